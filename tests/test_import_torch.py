"""Imported checkpoints: the published numbers through the run, and every wrong file in one line."""

import json
import sys
import types

import jax
import numpy as np
import pytest
import rule
import safetensors.numpy
from test_torch_archives import in_zip, state_dict
import tiny

from ssn_jax import config as config_lib, import_torch, predictor, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.fused import forward
from ssn_jax.import_torch import import_checkpoint
from ssn_jax.models import resnet, weights
from ssn_jax.models.systems import GapCam, SuperSimpleNet
from ssn_jax.synthesis import NoiseGenerator
from ssn_jax.training import checkpoint, steps

pytestmark = pytest.mark.usefixtures('small_programs')

WRAPPER = 'feature_extractor.feature_extractor.'


def head_tensors(model, channels):
    """The rule's state_dict of a trained network, as the publication saves it."""
    features = jax.ShapeDtypeStruct((1, 8, 8, channels), np.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), features)
    tracked = {'discriminator.dec_head.1.num_batches_tracked': np.array(9)}
    return rule.tensors(template, weights.head_name) | tracked


def wrapped(name):
    """The rule's state_dict of a backbone under the publication's names."""
    return {WRAPPER + key: value for key, value in rule.backbone_tensors(name).items()}


@pytest.fixture
def write(tmp_path):
    """Writes tensors to a checkpoint and returns its path."""

    def write(tensors):
        safetensors.numpy.save_file(tensors, tmp_path / 'c.safetensors')
        return tmp_path / 'c.safetensors'

    return write


@pytest.fixture
def config(tmp_path):
    """The default config with the rule's ResNet18 as its backbone."""
    config = config_lib.default_config()
    config.image_size = (64, 96)
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    config.backbone.weights = str(tmp_path / 'resnet18.safetensors')
    return config


def message(*arguments):
    """The one line that an import ends with."""
    with pytest.raises(UserError) as caught:
        import_checkpoint(*arguments)
    text = str(caught.value)
    assert '\n' not in text and 0 < len(text) < 1000
    return text


def restore(workdir):
    """Config, epoch and state, from the workdir alone."""
    config = config_lib.from_json(workdir / 'config.json')
    channels = sum(resnet.CHANNELS[config.backbone.name][1:])
    template = steps.init_state(config, jax.random.key(1), channels)
    return config, *checkpoint.restore(checkpoint.open_manager(workdir, 2), template)


def predict(workdir, image):
    """Score and full-size logits of a normalised image, as evaluation computes them."""
    model = predictor.open_run(workdir)
    mean, std = np.float32(resnet.IMAGENET_MEAN), np.float32(resnet.IMAGENET_STD)
    return jax.jit(forward.predict)(model.fused, (image * std + mean) * 255)


@pytest.mark.parametrize(
    'file, backbone, model, own_backbone',
    [
        ('scenario_a', 'resnet18', SuperSimpleNet('linear', False), False),
        pytest.param(
            *('baseline_wrn50', 'wide_resnet50_2', SuperSimpleNet('linear', False), True),
            marks=pytest.mark.slow,
        ),
        ('gap_cam', 'resnet18', GapCam('linear'), True),
    ],
)
def test_imported_run_gives_the_published_numbers(
    file, backbone, model, own_backbone, config, write, tmp_path
):
    expected = rule.reference(f'model_{file}')
    tensors = head_tensors(model, sum(resnet.CHANNELS[backbone][1:]))
    if own_backbone:  # A whole classifier's tensors above the features are let pass.
        tensors |= wrapped(backbone) | {f'{WRAPPER}fc.weight': np.zeros((2, 2), np.float32)}
        config.backbone.weights = ''
    workdir = tmp_path / 'runs' / 'imported'
    written = import_checkpoint(config, write(tensors), workdir, 7)

    restored, epoch, state = restore(workdir)
    assert restored == written
    assert (restored.backbone.name, restored.adaptor) == (backbone, model.adaptor)
    assert restored.system == ('gap_cam' if file == 'gap_cam' else 'supersimplenet')
    assert (epoch, int(state.step)) == (config.epochs, 7)
    scores, maps = predict(workdir, expected['image'])
    terms = rule.TERMS[backbone]
    rule.check_close(maps, expected['anomaly_map'][..., 0], terms)
    rule.check_close(scores, expected['score'], terms, rule.SCORES)


def test_scenario_b_and_its_generator_are_imported(config, write, tmp_path):
    shapes = [jax.ShapeDtypeStruct((1, 8, 8, c), np.float32) for c in (384, 32)]
    template = jax.eval_shape(NoiseGenerator().init, jax.random.key(0), *shapes)
    tensors = head_tensors(SuperSimpleNet('conv'), 384) | rule.tensors(template, weights.head_name)
    # What a config may ask for and no checkpoint of theirs has.
    config.optimizer.average, config.features.layers = 0.9, (1, 2, 3)
    import_checkpoint(config, write(tensors), tmp_path / 'run')
    restored, _, state = restore(tmp_path / 'run')
    noise = restored.noise
    assert (noise.kind, noise.z_dim, noise.bounded) == ('learned', 32, True)
    assert restored.adaptor == 'conv'
    expected = rule.network(SuperSimpleNet('conv'), 384)
    evaluated = state.variables()['params']
    assert jax.tree.all(jax.tree.map(np.array_equal, evaluated, expected['params']))
    ours = jax.tree.leaves(state.generator)
    expected = jax.tree.leaves(rule.generator(384, 32)['params'])
    assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.slow
def test_imported_run_is_measured_as_any_other(config, write, tmp_path, capsys):
    """--evaluate leaves what a run leaves: the main job takes the import for complete."""
    tiny.write_data(tmp_path / 'data')
    config.image_size = (64, 64)
    config.data.update(root=str(tmp_path / 'data'), category='nut', cache=str(tmp_path / 'cache'))
    workdir = tmp_path / 'run'
    path = write(head_tensors(SuperSimpleNet(), 384))
    values = types.SimpleNamespace(
        config=config,
        workdir=str(workdir),
        weights=str(path),
        step=0,
        evaluate=True,
        quiet=True,
        tensorboard=False,
    )
    import_torch.main(values)
    results = json.loads((workdir / 'results.json').read_text())
    assert f'{100 * results["metrics"]["I-AUROC"]:6.2f} %' in capsys.readouterr().out
    assert results['train_seconds'] is None and results['decision']['threshold'] is not None
    assert (workdir / 'figures' / 'overlays.png').exists()
    with pytest.raises(UserError, match='holds a run already'):
        import_torch.main(values)


# --- Files and folders that are of no use ---------------------------------------------------------


@pytest.mark.parametrize(
    'change, words',
    [
        ({'discriminator.seg.1.running_var': None}, 'missing: discriminator.seg.1.running_var'),
        ({'discriminator.seg.9.weight': (3,)}, 'not expected: discriminator.seg.9.weight'),
        ({'discriminator.fc_score.weight': (1, 200)}, 'discriminator.fc_score.weight has shape'),
        ({'feature_adaptor.projection.weight': (100, 100, 1, 1)}, 'shape (100, 100, 1, 1)'),
        ({'feature_adaptor.projection.weight': None}, 'no feature_adaptor.projection.weight'),
        ({f'{WRAPPER}conv1.weight': None}, 'missing: conv1.weight'),
        ({f'{WRAPPER}layer1.7.conv1.weight': (3,)}, 'not expected: layer1.7.conv1.weight'),
        ({f'{WRAPPER}bn1.bias': (3,)}, 'bn1.bias has shape (3,)'),
    ],
)
def test_wrong_tensors_are_named(change, words, config, write, tmp_path):
    config.backbone.weights = ''
    tensors = head_tensors(SuperSimpleNet(), 384) | wrapped('resnet18')
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
    path = write(tensors)
    before = set(tmp_path.iterdir())
    text = message(config, path, tmp_path / 'run')
    assert words in text and str(path) in text
    assert set(tmp_path.iterdir()) == before


def test_two_backbones_are_one_too_many(config, write, tmp_path):
    path = write(head_tensors(SuperSimpleNet(), 384) | wrapped('resnet18'))
    assert '--config.backbone.weights' in message(config, path, tmp_path / 'run')


@pytest.mark.parametrize('suffix', ['.pt', '.pth'])
def test_files_of_torch_are_imported_without_torch(suffix, config, write, tmp_path, monkeypatch):
    """As the same tensors in a safetensors file; torch is not even sought."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    tensors = head_tensors(SuperSimpleNet(), 384)
    (tmp_path / f'w{suffix}').write_bytes(in_zip(state_dict(tensors), arrays=tensors))
    import_checkpoint(config, tmp_path / f'w{suffix}', tmp_path / 'run')
    import_checkpoint(config, write(tensors), tmp_path / 'other')
    ours, theirs = (run_lib.read_model(tmp_path / name) for name in ('run', 'other'))
    ours, theirs = ((model.backbone, model.network) for model in (ours, theirs))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
