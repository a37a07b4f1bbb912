"""The fused predictor against the direct form, and in other precisions."""

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax.fused import fold, forward
from ssn_jax.models import backbones, grid as grid_lib
from ssn_jax.models.systems import GapCam, SimpleNet, SuperSimpleNet

SIMPLENET = SimpleNet(embedding=96, hidden=64)
NETWORKS = [
    *(SuperSimpleNet(adaptor, adapted) for adaptor in ('linear', 'conv') for adapted in (0, 1)),
    SuperSimpleNet(classify=False),
    SuperSimpleNet(layers=(1, 2, 3)),
    SuperSimpleNet('conv', classify=False, layers=(1, 2)),
    GapCam(layers=(1, 2)),
    GapCam('linear'),
    GapCam('conv'),
    SIMPLENET,
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
    return scores, network.full_size_map(logits, images.shape[1:3])[..., 0]


def check_predictions(actual, expected, backbone='resnet18'):
    for a, b, spread in zip(actual, expected, (rule.SCORES, None), strict=True):
        rule.check_close(a, b, rule.TERMS[backbone], spread)


def check(backbone, network, n, size, seed, dtype=np.uint8):
    backbone_variables, network, variables = models(backbone, network, seed)
    images = random_images(seed, n, size).astype(dtype)
    expected = direct(backbone, backbone_variables, network, variables, images)
    fused = fold.fuse(backbone_variables, variables, network)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(fused))
    actual = jax.jit(forward.predict)(forward.prepare(fused), images)
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


@pytest.mark.parametrize('network', [GapCam('linear'), GapCam('conv'), SIMPLENET])
def test_every_system_has_a_fused_form(network):
    check('resnet18', network, 2, (49, 33), 0)


@pytest.mark.parametrize('adapted', [False, True])
def test_fused_is_direct_with_bottlenecks(adapted):
    check('wide_resnet50_2', SuperSimpleNet('linear', adapted), 1, (40, 65), 0)


@pytest.mark.parametrize(
    'network',
    [SuperSimpleNet(), SuperSimpleNet('conv', classify=False, layers=(1, 2, 3)), GapCam()],
)
def test_fused_is_direct_with_depthwise_convolutions(network):
    check('efficientnet_lite0', network, 2, (45, 70), 0)


@pytest.mark.parametrize(
    'backbone, network',
    [
        ('resnet18', SuperSimpleNet('linear', True)),
        ('resnet18', SuperSimpleNet('conv', True)),
        ('resnet18', GapCam()),
        ('resnet18', SIMPLENET),
        ('efficientnet_lite0', SuperSimpleNet(classify=False)),
    ],
)
def test_the_form_for_accelerators_is_the_same(monkeypatch, backbone, network):
    """On a GPU no chunks, no loop over images, and XLA's own convolution."""
    backbone_variables, network, variables = models(backbone, network)
    images = random_images(0, 2, (48, 33))
    fused = fold.fuse(backbone_variables, variables, network)
    expected = forward.predict(fused, images, for_cache=True)
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


def test_bfloat16_computes_in_it_and_its_deviation_is_reported():
    backbone_variables, network, variables = models('resnet18', SuperSimpleNet())
    fused = fold.fuse(backbone_variables, variables, network)
    images = random_images(0, 3, (48, 40))
    layers = forward.backbone(forward.cast(fused, jnp.bfloat16).backbone, images)
    assert {x.dtype for x in layers} == {jnp.dtype(jnp.bfloat16)}
    # Compiled, as `deviation` does it: how bfloat16 rounds depends on the program.
    predict = jax.jit(forward.predict)
    exact, rounded = (predict(x, images) for x in (fused, forward.cast(fused, jnp.bfloat16)))
    assert {x.dtype for x in rounded} == {jnp.dtype(jnp.float32)}
    reported = forward.deviation(fused, images)
    for name, a, b in zip(('score', 'map'), exact, rounded, strict=True):
        expected = np.abs(np.asarray(a) - np.asarray(b)).max() / np.asarray(a).std()
        assert reported[name] == pytest.approx(expected)
        assert 1e-4 < reported[name]
    assert forward.deviation(fused, images, dtype=jnp.float32) == {'score': 0, 'map': 0}


def test_convolve_arranged_is_convolve():
    layers = (rule.draw_input('l2', (2, 4, 5, 3)), rule.draw_input('l3', (2, 2, 3, 4)))
    kernel = rule.draw_input('kernel', (5, 5, 7, 6))
    expected = grid_lib.upscale_pool(layers)
    expected = jax.lax.conv_general_dilated(
        expected, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    arranged = grid_lib.arrange(kernel, (3, 4))
    for kernels in (arranged, grid_lib.in_chunks(arranged), grid_lib.in_chunks(arranged, 4)):
        actual = grid_lib.convolve_arranged(grid_lib.columns_first(layers), kernels)
        rule.check_close(actual, expected, 25 * 7 * 40)
