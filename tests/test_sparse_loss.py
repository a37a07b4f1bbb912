"""The cheap form of the loss against the direct one, and what it is made of."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssn_jax import sparse_loss, steps, synthesis
from ssn_jax.config import default_config
from ssn_jax.models import native
from ssn_jax.models.features import upscale_pool
from ssn_jax.models.heads import NoiseGenerator
from ssn_jax.models.layers import conv2d

CHANNELS = (5, 9)


def make_layers(key, n, height, width):
    """Two layers as a backbone returns them, the second half as fine, odd sizes rounded up."""
    k2, k3 = jax.random.split(key)
    half = (-(-height // 2), -(-width // 2))
    return (
        jax.random.normal(k2, (n, height, width, CHANNELS[0])),
        jax.random.normal(k3, (n, *half, CHANNELS[1])),
    )


@pytest.fixture(autouse=True)
def two_programs(monkeypatch):
    """One for what is usual and one for all positions: each more is another compilation."""
    monkeypatch.setattr(sparse_loss, '_SURPLUS', np.array([3.0, np.inf]))


shapes = st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 11))


@settings(max_examples=6, deadline=None)
@given(shape=shapes, size=st.sampled_from([1, 3, 5]), seed=st.integers(0, 2**31 - 1))
def test_native_convolution_equals_the_one_on_the_feature_grid(shape, size, seed):
    k_layers, k_kernel = jax.random.split(jax.random.key(seed))
    layers = make_layers(k_layers, *shape)
    kernel = jax.random.normal(k_kernel, (size, size, sum(CHANNELS), 4))
    expected = conv2d(upscale_pool(layers), kernel)
    np.testing.assert_allclose(native.convolve(layers, kernel), expected, atol=1e-5 * 30)


def test_convolution_of_a_constant_knows_the_border():
    value, kernel = jnp.arange(1.0, 4.0), jax.random.normal(jax.random.key(0), (5, 5, 3, 2))
    expected = conv2d(jnp.broadcast_to(value, (1, 6, 7, 3)), kernel)[0]
    actual = native.convolve_constant(value, kernel, (6, 7))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def both_losses(
    adaptor,
    adapt_cls_features,
    kind,
    masks,
    seed,
    shape,
    truth=None,
    system='supersimplenet',
    unit='absolute',
):
    """Values, terms, statistics and both players' gradients of the direct and the sparse form.

    Yields one after the other: each is a compilation.
    """
    n, height, width = shape
    config = default_config()
    config.system, config.supervision.kind = system, 'masks' if truth else 'none'
    config.adaptor, config.adapt_cls_features = adaptor, adapt_cls_features
    config.noise.kind, config.noise.std, config.noise.beta = kind, 0.3, 0.5
    config.noise.unit = unit
    keys = jax.random.split(jax.random.key(seed), 3)
    layers = make_layers(keys[0], n, height, width)
    state = steps.init_state(config, keys[1], sum(CHANNELS))
    random = jax.random.normal(keys[2], (*masks.shape[:3], config.noise.z_dim + sum(CHANNELS)))

    def masks_fn(key, count, size):
        if count == len(masks) and tuple(size) == masks.shape[1:3]:
            return masks
        return synthesis.perlin_masks(key, count, size, 0.2)

    def noise_fn(generator, adapted, key):
        # The same draws for both forms: the sparse one asks for anomalous positions only.
        draws = random
        if adapted.ndim == 2:
            noisy = synthesis.place(masks, truth or {}).noise
            (where,) = jnp.nonzero(noisy.reshape(-1) > 0, size=len(adapted), fill_value=0)
            draws = random.reshape(-1, random.shape[-1])[where]
        if kind == 'static':
            return 0.3 * draws[..., : sum(CHANNELS)]
        z = draws[..., : config.noise.z_dim]
        raw = NoiseGenerator().apply({'params': generator}, jax.lax.stop_gradient(adapted), z)
        return synthesis.bounded_noise(raw, config.noise.beta)

    def evaluate(loss_fn):
        def both(params, generator):
            known = {'layers': layers, **(truth or {})}
            loss = functools.partial(
                loss_fn, batch_stats=state.batch_stats, batch=known, key=keys[2]
            )
            (_, (terms, stats)), d_grads = jax.value_and_grad(
                lambda p: loss(p, generator), has_aux=True
            )(params)
            g_grads = {}
            if kind == 'learned':
                g_grads = jax.grad(
                    lambda g: loss(params, g, stop_map_gradient=False)[1][0]['generator_loss']
                )(generator)
            return terms, stats, d_grads, g_grads

        return jax.jit(both)(state.params, state.generator)

    yield evaluate(steps.make_loss(config, masks_fn, noise_fn))
    yield evaluate(sparse_loss.make_sparse_loss(config, masks_fn, noise_fn))


def assert_equal_trees(direct, sparse, tolerance=1e-4):
    """Each array within `tolerance`, relative to its norm or to the tree's, if that is larger.

    (A bias before a BatchNorm has gradient 0 up to rounding.)
    """
    paths = jax.tree_util.tree_leaves_with_path(direct)
    assert jax.tree.structure(direct) == jax.tree.structure(sparse)
    whole = max([float(jnp.linalg.norm(x)) for _, x in paths], default=0.0)
    for (path, expected), actual in zip(paths, jax.tree.leaves(sparse), strict=True):
        error = float(jnp.linalg.norm(jnp.asarray(expected) - actual))
        norm = max(float(jnp.linalg.norm(expected)), 1e-3 * whole)
        assert error <= tolerance * norm, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ('adaptor', 'adapt_cls_features', 'kind'),
    [
        ('linear', False, 'static'),
        ('linear', True, 'learned'),
        ('conv', False, 'learned'),
        ('conv', True, 'static'),
    ],
)
def test_sparse_loss_equals_the_direct_one(adaptor, adapt_cls_features, kind):
    shape = (2, 5, 7)
    masks = synthesis.perlin_masks(jax.random.key(7), 4, (10, 14), 0.2, 0.25)
    assert 0 < masks.mean() < 1
    direct, sparse = both_losses(adaptor, adapt_cls_features, kind, masks, 3, shape)
    for expected, actual in zip(direct, sparse, strict=True):
        assert_equal_trees(expected, actual)


@pytest.mark.parametrize(
    ('adaptor', 'adapt_cls_features', 'kind'),
    [('linear', False, 'static'), ('linear', True, 'static'), ('conv', False, 'learned')],
)
def test_sparse_loss_equals_the_direct_one_in_feature_units(adaptor, adapt_cls_features, kind):
    masks = synthesis.perlin_masks(jax.random.key(7), 4, (10, 14), 0.2, 0.25)
    arguments = adaptor, adapt_cls_features, kind, masks, 3, (2, 5, 7)
    direct, sparse = both_losses(*arguments, unit='feature_std')
    for expected, actual in zip(direct, sparse, strict=True):
        assert_equal_trees(expected, actual)
    absolute = next(both_losses(*arguments))
    assert abs(absolute[0]['loss'] - direct[0]['loss']) > 1e-3


@pytest.mark.parametrize(
    ('system', 'adaptor', 'adapt_cls_features', 'kind'),
    [
        ('supersimplenet', 'linear', False, 'static'),
        ('supersimplenet', 'conv', True, 'learned'),
        ('gap_cam', 'linear', True, 'static'),
        ('gap_cam', 'conv', False, 'learned'),
    ],
)
def test_sparse_loss_equals_the_direct_one_with_supervision(
    system, adaptor, adapt_cls_features, kind
):
    """A normal image, a defective one with its mask (GAP+CAM: without), and one without."""
    masks = system == 'supersimplenet'
    drawn = synthesis.perlin_masks(jax.random.key(7), 6, (10, 14), 0.2, 0.1)
    truth = {'label': jnp.array([0.0, 1.0, 1.0]), 'known': jnp.array([1.0, float(masks), 0.0])}
    if masks:
        truth['mask'] = jnp.zeros((3, 10, 14, 1)).at[1, 2:6, 3:9].set(1)
        truth['weight'] = jax.random.uniform(jax.random.key(8), (3, 10, 14, 1), maxval=3.0)
    placed = synthesis.place(drawn, truth)
    assert 0 < placed.noise.mean() < drawn.mean()
    direct, sparse = both_losses(
        adaptor, adapt_cls_features, kind, drawn, 3, (3, 5, 7), truth, system
    )
    for expected, actual in zip(direct, sparse, strict=True):
        assert_equal_trees(expected, actual)


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_sparse_loss_is_exact_for_empty_and_full_masks(share):
    """A full mask exceeds the usual capacity: the second program has to take it.

    In float64: where all positions are alike, their gradients cancel in the BatchNorm, and
    float32 shows the order of summation.
    """
    with jax.enable_x64(True):
        masks = jnp.full((4, 10, 14, 1), share)
        direct, sparse = both_losses('linear', False, 'learned', masks, 4, (2, 5, 7))
        for expected, actual in zip(direct, sparse, strict=True):
            assert_equal_trees(expected, actual)


def test_sparse_steps_learn():
    """Ten updates on one batch bring the loss down, in the compiled epoch that training uses."""
    config = default_config()
    config.batch_size, config.epochs, config.noise.std = 4, 10, 1.0
    layers = make_layers(jax.random.key(0), 4, 8, 8)
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    epoch = steps.make_epoch(config, 1)
    losses = []
    for i in range(10):
        state, metrics = epoch(state, {'layers': layers}, np.arange(4)[None], jax.random.key(i))
        losses.append(float(metrics['loss']))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
