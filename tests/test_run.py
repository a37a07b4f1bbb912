"""A run is its folder alone: it can be moved, and says what it is, or one line why not."""

import json
import os
import shutil

import commands
import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from ssn_jax import cli, config as config_lib, pipeline, predictor, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.models import weights
from ssn_jax.training import checkpoint, steps

pytestmark = pytest.mark.usefixtures('small_programs')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return tiny.fake_run(tmp_path_factory.mktemp('runs'), epochs=4, epoch=3)


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / 'run')


def same(ours, theirs):
    return jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_everything_a_run_holds(workdir):
    run = predictor.open_run(workdir)
    assert run.config == config_lib.from_json(workdir / 'config.json')
    assert run.epoch == 3 and run.threshold is None  # The decision is of epoch 4.
    stored = run_lib.read_model(workdir)
    state = steps.init_state(run.config, jax.random.key(1), 384)
    backbone, _ = weights.load_backbone('resnet18', run.config.backbone.weights, False)
    assert same((stored.network, stored.backbone), (state.variables(), backbone))


def test_a_folder_of_several_runs_names_one(tmp_path):
    (tmp_path / 'seed-1').mkdir()
    with pytest.raises(UserError, match=f'{tmp_path} holds several runs.*{tmp_path}/seed-1'):
        predictor.open_run(tmp_path)


def test_a_checkpoint_can_be_chosen(copy):
    config = config_lib.from_json(copy / 'config.json')
    states = [steps.init_state(config, jax.random.key(n), 384) for n in (1, 2)]
    checkpoint.save(checkpoint.open_manager(copy, 2), 4, states[1])
    for epoch, state in zip((3, 4), states, strict=True):
        assert same(checkpoint.read_variables(copy, config, epoch), state.variables())
    with pytest.raises(UserError, match=r'no checkpoint of epoch 7: it has 3, 4\.'):
        checkpoint.read_variables(copy, config, 7)


def test_overrides_take_the_place_of_the_runs_own(workdir):
    run = predictor.open_run(workdir, overrides={'data.category': 'bolt', 'eval_batch_size': 2})
    assert (run.config.data.category, run.config.eval_batch_size) == ('bolt', 2)
    with pytest.raises(UserError, match='eval_batch_size=0'):
        predictor.open_run(workdir, overrides={'eval_batch_size': 0})


def test_what_a_run_found_is_read_and_not_compared(copy):
    """Identity is what was asked for."""
    asked = config_lib.from_json(copy / 'config.json')
    (copy / 'found.json').write_text('{"eval_batch_size": 3}')
    assert run_lib.read_config(copy).eval_batch_size == 3
    run_lib.check_workdir(asked, copy)


def without_network(run):
    run_lib.write_model(run, run_lib.Model(run_lib.read_model(run).backbone))


def cut_model(run):
    content = (run / 'model.safetensors').read_bytes()
    (run / 'model.safetensors').write_bytes(content[:-40])


def older(run, **fields):
    """The config that a run of version 1 has."""
    values = json.loads((run / 'config.json').read_text())
    values |= {'version': 1, 'image_score': 'map'} | fields
    values['noise']['shell'], values['drawn']['copies'] = [0.0, 0.0], 4
    (run / 'config.json').write_text(json.dumps(values))


BAD = {
    'nowhere': shutil.rmtree,
    'no run': lambda run: (run / 'config.json').unlink(),
    'no checkpoint': without_network,
    'newer ssn_jax': lambda run: (run / 'config.json').write_text('{"version": 1000}'),
    'before it is smoothed': older,
    'no config': lambda run: (run / 'config.json').write_text('{'),
    'model.safetensors does not exist': lambda run: (run / 'model.safetensors').unlink(),
    'model.safetensors is damaged': cut_model,
    'not that of results.json': lambda run: (run / 'results.json').write_text(
        '{"model_sha256": "0"}'
    ),
    'found.json cannot be read': lambda run: (run / 'found.json').write_text('{'),
}
WORDS = {'nowhere': 'no folder'}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_run_is_one_line(name, copy):
    BAD[name](copy)
    with pytest.raises(UserError, match=WORDS.get(name, name)) as raised:
        predictor.open_run(copy)
    assert str(copy) in str(raised.value) and '\n' not in str(raised.value)


def test_an_older_run_with_a_head_is_understood(copy):
    config = config_lib.from_json(copy / 'config.json')
    older(copy, image_score='head')
    assert config_lib.from_json(copy / 'config.json').to_dict() == config.to_dict()


# --- Runs that are moved --------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of two epochs: the folder of it and its data, its config and its results."""
    folder = tmp_path_factory.mktemp('trained')
    tiny.write_data(folder / 'data')
    tiny.write_weights(folder / 'resnet18.safetensors')
    config = tiny.config(folder, epochs=2, sparse=False, **{'checkpoint.every': 1})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in commands.SMALL.items():
            patch.setattr(*name, value)
        results = pipeline.train_and_evaluate(config, folder / 'run', quiet=True)
    return folder, config, results


@pytest.fixture
def moved(trained, tmp_path):
    """The run and its data in another folder, without its weights, and a config that says so."""
    folder, config, _ = trained
    for name in ('run', 'data'):
        shutil.copytree(folder / name, tmp_path / name)
    config = config.copy_and_resolve_references()
    config.data.update(root=str(tmp_path / 'data'), cache=str(tmp_path / 'cache'))
    config.backbone.weights = ''
    return tmp_path, config


@pytest.mark.slow
def test_what_a_run_says_of_itself(trained):
    folder, _, results = trained
    origin = json.loads((folder / 'run/origin.json').read_text())
    assert origin['data'] == results['data_sha256']
    assert origin['commit'] == results['versions']['commit'] == run_lib.commit()
    assert origin['jax'] == results['versions']['jax'] == jax.__version__
    assert results['model_sha256'] == run_lib.model_digest(folder / 'run')
    said = (folder / 'run/log.txt').read_text()
    assert 'warning' in said.lower() and '6 normal images can promise none below 0.14' in said


@pytest.mark.slow
def test_a_moved_run_goes_on_without_its_weights(moved, trained):
    """Its data are elsewhere, and its weights are nowhere but in it: the same bits."""
    folder, config = moved
    shutil.rmtree(folder / 'run/checkpoints/2')
    (folder / 'run/results.json').unlink()
    without_network(folder / 'run')
    results = pipeline.train_and_evaluate(config, folder / 'run', quiet=True)
    for name in ('model_sha256', 'metrics', 'weights', 'data_sha256'):
        assert results[name] == trained[2][name]
    config.backbone.weights = str(folder / 'gone.safetensors')
    again = pipeline.train_and_evaluate(config, folder / 'run', quiet=True)
    assert again['metrics'] == results['metrics']


@pytest.mark.slow
def test_other_images_or_weights_are_told(moved, caplog):
    """Other test images change what is measured, all else what was learned."""
    folder, config = moved
    tiny.write_weights(folder / 'other.safetensors')
    arrays = weights.read(folder / 'other.safetensors')
    arrays['conv1.weight'] = arrays['conv1.weight'] * np.float32(1.01)
    safetensors.numpy.save_file(arrays, folder / 'other.safetensors')
    config.backbone.weights = str(folder / 'other.safetensors')
    with pytest.raises(UserError, match='other backbone weights'):
        pipeline.train_and_evaluate(config, folder / 'run', quiet=True)
    config.backbone.weights, black = '', np.zeros((64, 64, 3), np.uint8)
    assert cv2.imwrite(str(folder / 'data/nut/test/good/000.png'), black)
    pipeline.train_and_evaluate(config, folder / 'run', quiet=True)
    assert 'begun with other test images' in caplog.text
    assert cv2.imwrite(str(folder / 'data/nut/train/good/000.png'), black)
    with pytest.raises(UserError, match='other training images'):
        pipeline.train_and_evaluate(config, folder / 'run', quiet=True)


@pytest.mark.slow
def test_a_moved_run_predicts_measures_and_exports(moved, trained, capsys):
    """Where neither its data nor its weights nor a network are."""
    folder, config = moved
    done = commands.start(
        *('predict', '--workdir', 'run', '--input', 'data/nut/test', '--output', 'out'),
        cwd=folder,
        HF_HUB_OFFLINE='1',
        HOME=str(folder / 'home'),
    )
    assert done.end() == 0, done.err
    run = ['--workdir', str(folder / 'run')]
    cli.export([*run, '--format', 'stablehlo', '--output', str(folder / 'a.zip')])
    where = [f'--config.data.{name}={config.data[name]}' for name in ('root', 'cache')]
    capsys.readouterr()
    cli.evaluate([*run, *where])
    said = capsys.readouterr().out
    assert f'{trained[2]["metrics"]["AUPRO"]!r}' in said and 'other images' not in said
    os.rename(folder / 'data/nut/test/good/000.png', folder / 'data/nut/test/good/900.png')
    cli.evaluate([*run, *where, '--checkpoint', '1'])
    said = capsys.readouterr().out
    assert 'epoch 1,' in said and "other images or masks than those of the run's own" in said


@pytest.mark.slow
def test_a_run_that_lost_its_last_checkpoint_is_none_that_is_finished(moved, monkeypatch):
    """It trains on: its results and its decision go before another model takes their place."""
    folder, config = moved
    shutil.rmtree(folder / 'run/checkpoints/2')
    (folder / 'run/model.safetensors').write_bytes(b'cut off')
    with pytest.raises(UserError, match='is damaged'):
        predictor.open_run(folder / 'run')
    (folder / 'run/model.safetensors').unlink()
    config.backbone.weights = str(folder / 'resnet18.safetensors')
    tiny.write_weights(folder / 'resnet18.safetensors')
    monkeypatch.setattr(pipeline, 'measure', lambda *_: {})  # As if it was killed there.
    pipeline.train_and_evaluate(config, folder / 'run', quiet=True)
    assert not (folder / 'run/results.json').exists()
    assert predictor.open_run(folder / 'run').threshold is None


def test_two_configs_that_begin_in_one_new_folder(tmp_path):
    """The second one is told when it has the lock, whatever it was told before."""
    config, origin = (
        config_lib.default_config(),
        run_lib.Origin({'train': 'a', 'test': 'b'}, 'c', 'd'),
    )
    with run_lib.begin(config, {}, tmp_path / 'run', origin, {'params': {'a': np.zeros(1)}}):
        pass
    with pytest.raises(UserError, match='other backbone weights'):
        other = run_lib.Origin(origin.data, 'e', 'f')
        run_lib.begin(config, {}, tmp_path / 'run', other, {})
    config.epochs = 3
    with pytest.raises(UserError, match='a run of another config'):
        run_lib.begin(config, {}, tmp_path / 'run', origin, {})


def test_an_imported_run_keeps_its_backbone(tmp_path):
    (tmp_path / 'imported.json').write_text('{"backbone": "c", "weights": "c.pt"}')
    with pytest.raises(UserError, match=r'other backbone weights \(c\.pt\)'):
        run_lib.check_origin(tmp_path, run_lib.Origin({'train': 'a', 'test': 'b'}, 'x', 'y'))
    run_lib.check_origin(tmp_path, run_lib.Origin({'train': 'a', 'test': 'b'}, 'c', 'y'))
