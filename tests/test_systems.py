"""Every regime and system through the whole main job, on a tiny set with defects in training."""

import functools
import json
import shutil

import cv2
import jax
import numpy as np
import pytest
import tiny

from ssn_jax import config as config_lib, metrics, pipeline, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.models import backbones
from ssn_jax.report import compare, text
from ssn_jax.training import checkpoint, steps

pytestmark = pytest.mark.usefixtures('small_programs')

SIZE = (64, 48)


def write_ksdd2(root, masks_everywhere=False):
    """10 training and 6 test images; every third has a bright block, the rest is noise."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 10), ('test', 6)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(90, 110, (*SIZE, 3)).astype(np.uint8)
            mask = np.zeros(SIZE, np.uint8)
            if i % 3 == 0:
                mask[10 + i : 26 + i, 8:30] = 255
                image[mask > 0] += 100
                if masks_everywhere and split == 'train':
                    mask[:] = 255
            assert cv2.imwrite(str(root / split / f'{i}.png'), image)
            assert cv2.imwrite(str(root / split / f'{i}_GT.png'), mask)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('systems')
    tiny.write_weights(folder / 'w.safetensors')
    write_ksdd2(folder / 'data')
    write_ksdd2(folder / 'everywhere', masks_everywhere=True)
    return folder


def config_of(name, folder, data='data'):
    """A config of configs/, made tiny."""
    config = config_lib.load(name)
    config.epochs, config.batch_size, config.image_size = 1, 8, SIZE
    config.backbone.update(name='resnet18', weights=str(folder / 'w.safetensors'))
    config.data.update(name='ksdd2', root=str(folder / data), cache=str(folder / 'cache'))
    config.drawn.count = 24 if config.drawn.count else 0
    # What it is for the others, they share with these.
    config.decision.parts = 2 if name in ('mod3', 'simplenet') else 0
    config.resize = (72, 56)
    if config.system == 'simplenet':
        config.simplenet.update(embedding=96, hidden=32)
    return config


@pytest.fixture(scope='module')
def trained(folder):
    """The folder of a config's run, which is trained once."""

    @functools.cache
    def trained(name, data='data'):
        workdir = folder / 'runs' / f'{name}-{data}'
        pipeline.train_and_evaluate(config_of(name, folder, data), workdir)
        return workdir

    return trained


def check(results, workdir, config):
    """What every run leaves, and what belongs to its supervision."""
    assert results == json.loads((workdir / 'results.json').read_text())
    assert list(results['metrics']) == list(metrics.METRICS)
    assert all(0 <= value <= 1 for value in results['metrics'].values())
    assert results['decision'] == json.loads((workdir / 'decision.json').read_text())
    assert results['youden_on_test'].keys() == {'threshold', 'tpr', 'fpr'}
    supervised = config.supervision.kind != 'none'
    assert results['train_images'] == (10 if supervised else 6)
    assert results['train_defects'] == (4 if supervised else 0)
    chosen_on = 'out of part' if config.decision.parts else 'train'
    by_rate = not supervised or config.drawn.count > 0
    assert results['decision']['split'] == chosen_on + ' (normal)' * by_rate
    assert f'{results["decision"]["threshold"]:.4g}' in text.format_table(results)
    for figure in ('overlays', 'losses', 'roc', 'pixel_pr', 'scores'):
        assert (workdir / 'figures' / f'{figure}.png').stat().st_size > 1000


@pytest.mark.slow
def test_supersimplenet_with_masks(folder, tmp_path):
    for name, fraction in (('supervised', 1.0), ('mixed', 0.5)):  # One program for both.
        config, workdir = config_of(name, folder), tmp_path / name
        config.supervision.mask_fraction = fraction
        results = pipeline.train_and_evaluate(config, workdir)
        check(results, workdir, config)
        files = json.loads((workdir / 'masked_images.json').read_text())
        assert len(files) == results['train_masks'] == 4 * fraction
        assert set(files) <= {f'train/{i}.png' for i in (0, 3, 6, 9)}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['simplenet', 'mod2', 'auto'])
def test_unsupervised_systems_leave_out_defects_that_the_recipe_takes(name, folder, trained):
    results = results_of(trained(name))
    check(results, trained(name), config_of(name, folder))
    assert (trained(name) / 'masked_images.json').exists() == (results['train_masks'] > 0)


def results_of(workdir):
    return json.loads((workdir / 'results.json').read_text())


def state_of(workdir):
    """The last state of a run."""
    config = run_lib.read_config(workdir)
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)
    template = steps.init_state(config, jax.random.key(0), channels)
    return checkpoint.restore(checkpoint.open_manager(workdir, 1), template)[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mod3', 'mod3_sharp'])
def test_a_weak_run_does_not_know_where_its_defects_are(name, folder, trained):
    """Training masks that are positive everywhere: the same labels, and the same bits."""
    workdirs = [trained(name, data) for data in ('data', 'everywhere')]
    results, everywhere = map(results_of, workdirs)
    check(results, workdirs[0], config_of(name, folder))
    assert not (workdirs[0] / 'masked_images.json').exists()
    for name in ('metrics', 'decision', 'youden_on_test'):
        assert results[name] == everywhere[name]
    one, other = (jax.tree.leaves(state_of(workdir)) for workdir in workdirs)
    assert len(one) > 20
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    'name, kind', [('mod3', 'masks'), ('simplenet', 'labels'), ('simplenet', 'masks')]
)
def test_a_system_refuses_supervision_that_it_can_not_use(name, kind, folder, tmp_path):
    config = config_of(name, folder)
    config.supervision.kind = kind
    with pytest.raises(UserError, match=r'supervision\.kind'):
        pipeline.train_and_evaluate(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_without_masks_has_no_pixel_metrics(folder, tmp_path):
    root = tmp_path / 'photos'
    for split in ('train', 'test'):
        for file in sorted((folder / 'data' / split).glob('?.png')):
            kind = 'good' if int(file.stem) % 3 else 'broken'
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / split / kind)
    config = config_of('mixed', folder)
    config.sparse = False  # Compiles in half the time.
    config.data.update(name='folder', root=str(root))
    results = pipeline.train_and_evaluate(config, tmp_path / 'run')
    absent = {name for name, value in results['metrics'].items() if value is None}
    assert absent == {'P-AUROC', 'AP-loc', 'AUPRO'} == set(results['undefined'])
    assert (results['train_defects'], results['train_masks']) == (4, 0)
    assert 'no defective image has a mask' in text.format_table(results)


@pytest.mark.slow
def test_maps_of_two_runs_side_by_side(trained, tmp_path):
    workdirs, output = [trained('mod3'), trained('simplenet')], tmp_path / 'compare.png'
    for select in ('spread', 'failures'):
        compare.compare(workdirs, output, 2, select)
        assert cv2.imread(str(output)) is not None
        output.unlink()
    with pytest.raises(UserError, match='is no run'):
        compare.compare([tmp_path], output, 2)
