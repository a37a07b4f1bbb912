"""The fused predictor against the direct form, as JAX and as a graph in other runtimes."""

import importlib.metadata
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import jax
import numpy as np
import onnxruntime
import pytest
import rule

from ssn_jax import config as config_lib
from ssn_jax.errors import UserError
from ssn_jax.fused import engine, fold, forward, graph
from ssn_jax.models import backbones
from ssn_jax.models.systems import GapCam, SimpleNet, SuperSimpleNet

SIMPLENET = SimpleNet(embedding=96, hidden=64)  # Of whole rows of patches.
ROWLESS = SimpleNet(embedding=100, hidden=64)
NETWORKS = [
    *(SuperSimpleNet(adaptor, adapted) for adaptor in ('linear', 'conv') for adapted in (0, 1)),
    SuperSimpleNet(classify=False),
    SuperSimpleNet(layers=(1, 2, 3)),
    SuperSimpleNet('conv', classify=False, layers=(1, 2)),
    GapCam(layers=(1, 2)),
    GapCam('linear'),
    GapCam('conv'),
    SIMPLENET,
    ROWLESS,
]


def shake(variables, rng):
    """Variables of the same shapes whose every value is another one, variances positive."""
    return jax.tree.map(
        lambda x: (x * rng.uniform(0.5, 1.5, x.shape)).astype(np.float32), variables
    )


def models(backbone, network, seed=0):
    """A backbone and a network with random weights."""
    rng = np.random.default_rng(seed)
    backbone_variables = shake(rule.backbone(backbone), rng)
    channels = backbones.feature_channels(backbone, getattr(network, 'layers', (2, 3)))
    channels = getattr(network, 'embedding', channels)
    return backbone_variables, network, shake(rule.network(network, channels), rng)


def random_images(seed, n, size):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def direct(backbone, backbone_variables, network, variables, images):
    """Score and map, straight through backbone, heads and blur."""
    model = backbones.BACKBONES[backbone]
    stages = jax.jit(model.apply)(backbone_variables, model.normalise(images))
    logits, scores = network.apply(variables, network.features(network.frozen(stages)))
    maps = network.full_size_map(logits, images.shape[1:3])[..., 0]
    return maps.max((1, 2)) if scores is None else scores, maps


def check_predictions(actual, expected, backbone='resnet18'):
    for a, b, spread in zip(actual, expected, (rule.SCORES, None), strict=True):
        rule.check_close(a, b, rule.TERMS[backbone], spread)


def check(backbone, network, n, size, seed, dtype=np.uint8):
    backbone_variables, network, variables = models(backbone, network, seed)
    images = random_images(seed, n, size).astype(dtype)
    expected = direct(backbone, backbone_variables, network, variables, images)
    fused = fold.fuse(backbone_variables, variables, network)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(fused))
    actual = jax.jit(forward.predict)(fused, images)
    assert [x.shape for x in actual] == [(n,), (n, *size)]
    check_predictions(actual, expected, backbone)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    network=st.sampled_from(NETWORKS),
    n=st.integers(1, 3),
    size=st.tuples(st.integers(17, 100), st.integers(17, 100)),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_fused_is_direct(network, n, size, seed, dtype):
    check('resnet18', network, n, size, seed, dtype)


@pytest.mark.parametrize('network', [GapCam('linear'), GapCam('conv'), SIMPLENET, ROWLESS])
def test_every_system_has_a_fused_form(network):
    check('resnet18', network, 2, (49, 33), 0)


def test_fused_is_direct_with_bottlenecks():
    check('wide_resnet50_2', SuperSimpleNet('linear', True), 1, (40, 65), 0)


@pytest.mark.parametrize(
    'network',
    [SuperSimpleNet(), SuperSimpleNet('conv', classify=False, layers=(1, 2, 3))],
)
def test_fused_is_direct_with_depthwise_convolutions(network):
    check('efficientnet_lite0', network, 2, (45, 70), 0)


@pytest.mark.parametrize(
    'backbone, network',
    [
        ('resnet18', SuperSimpleNet('linear', True)),
        ('resnet18', SuperSimpleNet('conv', True)),
        ('resnet18', SIMPLENET),
        ('efficientnet_lite0', SuperSimpleNet(classify=False)),
    ],
)
def test_the_form_for_accelerators_is_the_same(monkeypatch, backbone, network):
    """On a GPU no chunks, no loop over images, and XLA's own convolution."""
    backbone_variables, network, variables = models(backbone, network)
    images = random_images(0, 2, (48, 33))
    fused = fold.fuse(backbone_variables, variables, network)
    expected = forward.predict(fused, images, one_by_one=True)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    check_predictions(forward.predict(fused, images), expected, backbone)


def test_every_image_is_on_its_own():
    """Batch 1 gives what the same image gives in a batch."""
    backbone_variables, network, variables = models('resnet18', SuperSimpleNet())
    fused = fold.fuse(backbone_variables, variables, network)
    images = random_images(0, 3, (32, 48))
    together = forward.predict(fused, images)
    for i in range(3):
        check_predictions(
            forward.predict(fused, images[i : i + 1]), [x[i : i + 1] for x in together]
        )


@pytest.mark.parametrize(
    ('network', 'size'),
    # Odd sizes need all that even ones do, and more; the even one is that of most runs.
    [(network, (49, 33)) for network in NETWORKS]
    + [(network, (64, 96)) for network in (SuperSimpleNet(), GapCam('conv'), SIMPLENET)],
)
def test_the_graph_is_the_fused_form(network, size):
    """In OpenVINO and in onnxruntime; images of its own size, and of any other resized first."""
    backbone_variables, network, variables = models('resnet18', network)
    check_graph('resnet18', backbone_variables, network, variables, size)


@pytest.mark.parametrize(
    ('backbone', 'network'),
    [
        ('efficientnet_lite0', SuperSimpleNet(classify=False, layers=(1, 2, 3), waves=6)),
        ('wide_resnet50_2', GapCam()),
    ],
)
def test_the_graph_of_other_backbones(backbone, network):
    check_graph(backbone, *models(backbone, network), (45, 70))


def check_graph(backbone, backbone_variables, network, variables, size):
    fused = fold.fuse(backbone_variables, variables, network)
    config, images = config_lib.default_config(), random_images(0, 3, size)
    config.image_size = size
    expected = jax.jit(forward.predict)(fused, images)
    model = graph.predictor(fused, config)
    check_predictions(engine.OpenVino(model, size)(images), expected, backbone)
    session = onnxruntime.InferenceSession(model)
    check_predictions(session.run(None, {'images': images}), expected, backbone)
    if hasattr(network, 'adaptor'):
        layers = graph.features(fused.backbone, size, network.layers)
        stages = forward.backbone(fused.backbone, images)
        kept = zip(engine.OpenVino(layers, size)(images), network.frozen(stages), strict=True)
        for actual, layer in kept:
            rule.check_close(actual, layer, rule.TERMS[backbone])


def test_bfloat16_rounds_and_says_so():
    """Or, on a processor without it, float32 does."""
    fused = fold.fuse(*[models('resnet18', SuperSimpleNet())[i] for i in (0, 2, 1)])
    config, images = config_lib.default_config(), random_images(0, 2, (64, 64))
    config.image_size = (64, 64)
    model = graph.predictor(fused, config)
    exact, rounded = (engine.OpenVino(model, (64, 64), p) for p in ('float32', 'bfloat16'))
    off = np.abs(exact(images)[1] - rounded(images)[1]).max() / np.std(exact(images)[1])
    assert exact.name.endswith('float32')
    assert 1e-4 < off < 0.3 if rounded.name.endswith('bfloat16') else off == 0


def test_openvino_is_imported_without_its_reports():
    """In a process of its own: neither their package nor a fork; the log keeps its handlers."""
    code = """
import logging, sys
from absl import logging as absl_logging
from ssn_jax.fused import engine
absl_logging.use_absl_handler()
before = list(logging.root.handlers)
engine.import_quietly('openvino').Core()
assert logging.root.handlers == before and before
assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


def test_engines_that_are_not_there_are_told(monkeypatch):
    assert engine.choose('xla') == 'xla' and engine.choose('auto') == 'openvino'
    versions = {'openvino': '2024.6.0', 'onnx': '1.17.0'}
    monkeypatch.setattr(importlib.metadata, 'version', versions.__getitem__)
    assert engine.choose('auto') == 'xla'
    with pytest.raises(UserError, match=r'needs openvino:.*openvino 2025 or newer'):
        engine.choose('openvino')

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'version', absent)
    assert engine.choose('auto') == 'xla'
    with pytest.raises(UserError, match=r"--engine=openvino needs openvino.*'ssn_jax\[cpu\]'"):
        engine.choose('openvino')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert engine.choose('auto') == 'xla'
    with pytest.raises(UserError, match='is for CPUs'):
        engine.choose('openvino')


def test_a_network_that_openvino_cannot_compile_is_told():
    with pytest.raises(UserError, match=r'OpenVINO .* cannot compile.*engine=xla, in float32'):
        engine.OpenVino(b'no model', (64, 64))
