"""A finished run is taught new images: what it learns, what stays as it is, what it refuses."""

import csv
import dataclasses
import json
import re
import shutil

import commands
import cv2
import numpy as np
import pytest
import runs_again
import tiny

from ssn_jax import cli, config as config_lib, data, extend, pipeline, run as run_lib
from ssn_jax.data import layouts
from ssn_jax.errors import UserError
from ssn_jax.training import parts

pytestmark = pytest.mark.usefixtures('small_programs')

RECIPE = {'image_score': 'map', 'map_loss': 'cross_entropy', 'positions': 16, 'drawn.count': 8}
RECIPE |= {'supervision.kind': 'auto', 'supervision.known': -1.0, 'supervision.distance_power': 0.0}
RECIPE |= {'optimizer.heads_learning_rate': 5e-3, 'optimizer.adaptor_learning_rate': 2e-3}
EPOCHS = 6


def add(folder, kind, count, seed, masks=None):
    """Images as of `tiny.write_data` of a class, with masks of the defects."""
    rng, (rows, columns) = np.random.default_rng(seed), np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < (64 / 3) ** 2
    for i in range(count):
        image = (60 + 60 * disc + rng.normal(0, 8, disc.shape)).clip(0, 255)
        if kind != 'good':
            mask, (x, y) = np.zeros(disc.shape, np.uint8), rng.integers(20, 34, 2)
            mask[y : y + 10, x : x + 10] = 255
            image[mask > 0] = 95 + 50 * ((rows + columns)[mask > 0] % 4 < 2)
            truth = (masks or folder / 'ground_truth') / kind / f'{i}_mask.png'
            truth.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(truth), mask)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / kind / f'{i}.png'), image.astype(np.uint8))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A finished run, and new images: defects of a kind that it has not seen, and normal ones."""
    folder = tmp_path_factory.mktemp('extend')
    workdir, nut = tiny.fake_run(folder, **RECIPE), folder / 'data/nut'
    add(nut / 'test', 'weave', 6, 3, nut / 'ground_truth')
    tiny.write_data(folder / 'other')
    shutil.copytree(folder / 'other/nut', nut, dirs_exist_ok=True)
    config = run_lib.read_config(workdir)
    pipeline.train_and_evaluate(config, workdir, quiet=True)
    add(folder / 'new', 'weave', 5, 1)
    add(folder / 'new', 'good', 2, 2)
    # The run knows one of them.
    shutil.copyfile(nut / 'test/weave/0.png', folder / 'new/weave/known.png')
    return folder


@pytest.fixture(scope='module')
def extended(folder):
    """A run extended by a command that was killed and given again.

    Its workdir, what the second command said, and the files of the extended run before.
    """
    before = {p: p.read_bytes() for p in (folder / 'run').rglob('*') if p.is_file()}
    named = f'--extend={folder}/run', f'--config.data.root={folder}/new'
    more = f'--config.epochs={EPOCHS}', '--config.checkpoint.every=1'
    workdir = folder / 'run-extended'
    command = commands.start('train', *named, *more, cwd=folder)
    runs_again.wait_for(lambda w: len(runs_again.rows(w)) >= 2, workdir, command)
    command.process.kill()
    command.process.join()
    assert f'Going on from epoch 1 of {folder}/run' in command.err
    command = commands.start('train', *named, *more, cwd=folder)
    assert command.end() == 0, command.err[-3000:]
    return workdir, command.out + command.err, before


def results(workdir):
    return json.loads((workdir / 'results.json').read_text())


@pytest.mark.slow
def test_a_new_kind_of_defect_is_found(extended, folder):
    workdir, said, before = extended
    after = {p: p.read_bytes() for p in (folder / 'run').rglob('*') if p.is_file()}
    assert after == before
    assert f'Resuming {workdir} after epoch' in said
    assert '1 (added:1/weave/known.png): not added, since the run has the same file' in said
    found, old = results(workdir), results(folder / 'run')
    assert found['train_defects'] == found['train_masks'] == 5 and found['train_images'] == 13
    # The run had no defects, and no output for known ones.
    assert 'supervision.known' not in (run_lib.read_found(folder / 'run') or {})
    assert run_lib.read_found(workdir)['supervision.known'] == 5 / 15
    compared = found['extended']
    assert compared['before']['I-AUROC'] == old['metrics']['I-AUROC']
    assert compared['before']['test FPR'] == old['decision']['test_fpr']
    assert compared['after']['AUPRO'] == found['metrics']['AUPRO'] > old['metrics']['AUPRO'] + 0.3
    assert found['recall']['weave']['found'] > old['recall']['weave']['found']
    assert compared['new']['weave']['after'] > compared['new']['weave']['before']
    assert {of['images'] for of in compared['new'].values()} == {5, 2}
    for words in (r'AUPRO .* % .* %', r'test FPR .* % .* %', r'weave +[0-4] of 5 +[45] of 5'):
        assert re.search(words, said)
    epoch, state = runs_again.last_state(workdir)
    per_epoch = int(re.search('([0-9]+) steps per epoch', said)[1])
    # The run itself was made up after 0 steps.
    assert epoch == 1 + EPOCHS and state.step == EPOCHS * per_epoch
    assert [row['epoch'] for row in runs_again.rows(workdir)] == list('234567')


@pytest.mark.slow
def test_it_is_a_run_as_any_other(extended, folder, tmp_path, capsys):
    workdir = shutil.copytree(extended[0], tmp_path / 'run')
    photos, measured = folder / 'data/nut/test/weave', results(workdir)
    cli.predict(f'--workdir {workdir} --input {photos} --output {tmp_path}/out --quiet'.split())
    with (tmp_path / 'out/predictions.csv').open(newline='') as file:
        called = [row['decision'] for row in csv.DictReader(file)]
    assert called.count('defective') == measured['recall']['weave']['found']
    cli.evaluate(['--workdir', str(workdir)])
    assert repr(measured['metrics']['AUPRO']) in capsys.readouterr().out
    cli.decide(['--workdir', str(workdir), '--images', str(folder / 'new/good')])
    assert results(workdir)['decision']['images'] == 2
    # Whatever it has learned, it is measured without.
    moved = shutil.copytree(folder / 'data', tmp_path / 'data')
    (workdir / 'config.json').write_text(
        (workdir / 'config.json').read_text().replace(f'{folder}/new', '/nowhere')
    )
    cli.evaluate(['--workdir', str(workdir), f'--config.data.root={moved}'])
    assert repr(measured['metrics']['AUPRO']) in capsys.readouterr().out


@pytest.mark.slow
def test_an_extended_run_is_extended_and_everything_has_moved(extended, folder, tmp_path):
    """With normal images alone."""
    for name in ('data', 'new'):
        shutil.copytree(folder / name, tmp_path / name)
    add(tmp_path / 'newer/train', 'OK', 3, 7, tmp_path / 'newer/ground_truth')
    given = {'data.root': str(tmp_path / 'newer'), 'data.added': f'{tmp_path}/new,', 'epochs': 1}
    config = extend.config_of(extended[0], given, str(tmp_path / 'data'))
    assert config.epochs == 2 + EPOCHS
    found = pipeline.train_and_evaluate(config, tmp_path / 'twice', quiet=True)
    assert found['train_images'] == 16 and found['train_defects'] == 5
    [(kind, new)] = found['extended']['new'].items()
    assert kind == 'good' and new['images'] == 3 and not new['unseen']
    scores = run_lib.read_scores(tmp_path / 'twice')
    assert sum(file.startswith('added:2/') for file in scores.of('train').file) == 3
    # Of heads that never saw them.
    split = data.load(config.data, config.image_size).train
    parted = dataclasses.replace(scores, part=[p.replace('train', '1') for p in scores.part])
    again = extend.compare(config, split, found, parted)
    assert again == found['extended'] | {'new': {'good': new | {'unseen': True}}}
    # Of other test images nothing was known before.
    other = found | {'data_sha256': {'test': 'other'}}
    assert extend.compare(config, split, other, scores)['before'] is None


# What it refuses


def several(run, new):
    shutil.copytree(run, run / 'seed-0')
    (run / 'config.json').unlink()


def edited(**fields):
    def change(run, new):
        config = run_lib.read_config(run)
        config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
        (run / 'config.json').write_text(config_lib.to_json(config))

    return change


def known(run, new):
    shutil.rmtree(new)
    shutil.copytree(f'{run_lib.read_config(run).data.root}/nut/test', new)


def emptied(run, new):
    shutil.rmtree(new)
    new.mkdir()


def flat(run, new):
    for path in list(new.rglob('*.png')):
        path.rename(new / path.name)


# How a run or the new images are changed, what is given besides, and what is said.
REFUSED = {
    'no run': (lambda run, new: shutil.rmtree(run), {}, 'run is no folder: --extend names'),
    'some folder': (several, {}, 'holds several runs: name one, such as .*seed-0'),
    'unfinished': (lambda run, new: (run / 'results.json').unlink(), {}, 'let the run finish'),
    'cut': (lambda run, new: (run / 'model.safetensors').write_bytes(b''), {}, 'is damaged'),
    'without a checkpoint': (
        lambda run, new: shutil.rmtree(run / 'checkpoints'),
        {},
        'run has no checkpoint to go on from: restore it',
    ),
    'imported': (lambda run, new: (run / 'imported.json').write_text('{}'), {}, 'was imported'),
    'no new images named': (None, {'data.root': ''}, 'name their folder with --config.data.root'),
    'no new folder': (lambda run, new: shutil.rmtree(new), {}, 'new: no such folder'),
    'a comma': (None, {'data.root': 'a,b'}, 'no such folder|a comma separates'),
    'empty': (emptied, {}, 'new: holds no images to learn from; put normal ones into .*new/good'),
    'flat': (flat, {}, 'new: holds no images to learn from'),
    'known': (known, {}, 'new: adds nothing, since the run has each of its files already'),
    'seeds': (None, {'seeds': 2}, '--config.seeds=2 cannot be used with --extend'),
    'no more epochs': (None, {'epochs': 0}, '--config.epochs=0 cannot be used: at least 1'),
    'embedded': (edited(data__root=''), {}, 'run learned from images that are drawn by the code'),
    'moved': (edited(data__root='/nowhere'), {}, 'in /nowhere, which .* now with --old_root'),
    'added before, and moved': (
        edited(data__added='/nowhere'),
        {},
        '/nowhere: no such folder; say with --config.data.added',
    ),
    'no real defects': (
        edited(supervision__kind='none'),
        {},
        'new holds defects, and .*run does not learn from .*: add --config.supervision.kind=auto',
    ),
    'no defects at all': (
        edited(supervision__kind='none', drawn__count=0),
        {},
        'add normal images alone, or train anew with --config edge',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', REFUSED)
def test_what_is_refused_is_one_line_and_leaves_nothing(name, folder, tmp_path):
    change, given, words = REFUSED[name]
    run, new = (shutil.copytree(folder / x, tmp_path / x) for x in ('run', 'new'))
    if change:
        change(run, new)
    given = {'data.root': str(new)} | given
    with pytest.raises(UserError, match=words) as raised:
        config = extend.config_of(run, given)
        pipeline.train_and_evaluate(config, tmp_path / 'more', quiet=True)
    assert '\n' not in str(raised.value)
    assert name == 'without a checkpoint' or not (tmp_path / 'more').exists()


@pytest.mark.slow
def test_a_folder_of_another_extension_is_refused(extended, folder, tmp_path):
    """Of other images, or of another run."""
    workdir = shutil.copytree(extended[0], tmp_path / 'more')
    given = {'data.root': str(folder / 'new'), 'epochs': EPOCHS, 'checkpoint.every': 1}
    origin = json.loads((workdir / 'origin.json').read_text())
    (workdir / 'origin.json').write_text(json.dumps(origin | {'extends': 'of another'}))
    with pytest.raises(UserError, match='more holds a run that went on from another one'):
        config = extend.config_of(folder / 'run', given)
        pipeline.train_and_evaluate(config, workdir, quiet=True)
    shutil.copytree(folder / 'new/weave', tmp_path / 'new/weave')
    with pytest.raises(UserError, match='more holds a run of other training images'):
        config = extend.config_of(folder / 'run', given | {'data.root': str(tmp_path / 'new')})
        pipeline.train_and_evaluate(config, workdir, quiet=True)


@pytest.mark.parametrize(
    ('program', 'flags', 'words'),
    [
        ('train', '--extend=run --config=edge', 'leave out --config.'),
        ('train', '--extend=', '--extend names no run'),
        ('train', '--extend=run --config.data.root=new', 'run is no folder: --extend'),
        ('train', '--config=edge --old_root=x', '--old_root is for --extend'),
        ('train', '--config=edge --config.extend=run', '--config.extend cannot be set'),
        ('sweep', '--extend=run --sweep=seed=0,1', '--extend is for ssn-jax train alone'),
    ],
)
def test_command_lines_that_are_refused(program, flags, words, tmp_path):
    command = commands.start(program, *flags.split(), cwd=tmp_path)
    assert command.end() == 1 and not command.out
    assert command.err.startswith('error: ') and words in command.err, command.err
    assert command.err.count('\n') == 1


# What is read


@pytest.mark.parametrize('base', ['.', 'train'])
def test_what_is_read_of_a_folder_of_new_images(base, tmp_path):
    add(tmp_path / base, 'OK', 2, 1, tmp_path / 'masks')
    add(tmp_path / base, 'weave', 2, 2, tmp_path / 'masks')
    shutil.rmtree(tmp_path / 'masks/OK')
    (tmp_path / 'masks/weave/1_mask.png').unlink()
    if base == 'train':
        shutil.copytree(tmp_path / 'train', tmp_path / 'test')
    below = '' if base == '.' else 'train/'
    found = layouts.added(tmp_path).records
    assert [(r.split, r.defect, r.file, r.mask and r.mask.name) for r in found] == [
        ('train', 'good', f'{below}OK/0.png', None),
        ('train', 'good', f'{below}OK/1.png', None),
        ('train', 'weave', f'{below}weave/0.png', '0_mask.png'),
        ('train', 'weave', f'{below}weave/1.png', None),
    ]
    shutil.rmtree(tmp_path / base / 'OK')
    shutil.rmtree(tmp_path / 'masks')
    assert [record.defect for record in layouts.added(tmp_path).records] == ['weave'] * 2


def test_added_images_follow_from_their_content_and_not_their_place(tmp_path):
    tiny.write_data(tmp_path / 'data')
    for i, kind in enumerate(('good', 'weave')):
        add(tmp_path / 'one' / kind, kind, 3, 4 + i)
    config = tiny.config(tmp_path)
    config.decision.group = 3
    config.data.added = f'{tmp_path}/one/good,{tmp_path}/one/weave,'
    dataset = data.load(config.data, config.image_size)
    assert len(dataset.train.files) == 12 and len(dataset.test.files) == 6
    groups = parts.groups(config, dataset.train)
    # Three files of one folder, as always.
    places = {'train/good': 6, 'added:1': 3, 'added:2': 3}
    for place, count in places.items():
        own = [i for i, file in enumerate(dataset.train.files) if place in file]
        assert len(own) == count and sorted(np.bincount(groups[own])[-1:]) == [3]
    shutil.move(tmp_path / 'one', tmp_path / 'two')
    config.data.added = f'{tmp_path}/two/good,{tmp_path}/two/weave'
    again = data.load(config.data, config.image_size)
    assert again.fingerprints == dataset.fingerprints
