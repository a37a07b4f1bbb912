"""The cheap form of the loss against the direct one, and what it is made of."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import losses as losses_lib, synthesis
from ssn_jax.config import default_config
from ssn_jax.losses import direct as direct_lib, sparse as sparse_lib
from ssn_jax.models import grid as grid_lib
from ssn_jax.models.grid import upscale_pool
from ssn_jax.models.layers import conv2d
from ssn_jax.synthesis import NoiseGenerator
from ssn_jax.training import steps

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
    monkeypatch.setattr(sparse_lib, '_SURPLUS', np.array([3.0, np.inf]))


shapes = st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 11))


@settings(max_examples=6, deadline=None)
@given(shape=shapes, size=st.sampled_from([1, 3, 5]), seed=st.integers(0, 2**31 - 1))
def test_native_convolution_equals_the_one_on_the_feature_grid(shape, size, seed):
    k_layers, k_kernel = jax.random.split(jax.random.key(seed))
    layers = make_layers(k_layers, *shape)
    kernel = jax.random.normal(k_kernel, (size, size, sum(CHANNELS), 4))
    expected = jax.jit(lambda x, k: conv2d(upscale_pool(x), k))(layers, kernel)
    rule.check_close(jax.jit(grid_lib.convolve)(layers, kernel), expected, kernel[..., 0].size + 40)


def test_convolution_of_a_constant_knows_the_border():
    value, kernel = jnp.arange(1.0, 4.0), jax.random.normal(jax.random.key(0), (5, 5, 3, 2))
    expected = conv2d(jnp.broadcast_to(value, (1, 6, 7, 3)), kernel)[0]
    actual = grid_lib.convolve_constant(value, kernel, (6, 7))
    rule.check_close(actual, expected, 25 * 3)


def make_losses(config, masks, truth):
    """The direct and the sparse loss with the same masks and the same draws of noise, in float64.

    In float32 rounding takes a value over the kink of a ReLU now and then.
    """
    keys = jax.random.split(jax.random.key(3), 3)
    layers = make_layers(keys[0], len(masks) // 2, masks.shape[1] // 2, masks.shape[2] // 2)
    state = steps.init_state(config, keys[1], sum(CHANNELS))
    state = jax.tree.map(lambda x: x.astype(jnp.result_type(x, 1.0)), state.replace(opt_state=()))
    random = jax.random.normal(keys[2], (*masks.shape[:3], config.noise.z_dim + sum(CHANNELS)))

    def both_players(make, masks, params, generator):
        """Terms, statistics, and both players' gradients."""

        def masks_fn(key, count, size):
            if count == len(masks) and tuple(size) == masks.shape[1:3]:
                return masks
            return synthesis.perlin_masks(key, count, size, 0.2)

        def noise_fn(generator, adapted, key):
            # The same draws for both forms: the sparse one asks for anomalous positions only.
            draws = random
            if adapted.ndim == 2:
                noisy = synthesis.place(masks, truth).noise
                (where,) = jnp.nonzero(noisy.reshape(-1) > 0, size=len(adapted), fill_value=0)
                draws = random.reshape(-1, random.shape[-1])[where]
            if config.noise.kind == 'static':
                return 0.3 * draws[..., : sum(CHANNELS)]
            z = draws[..., : config.noise.z_dim]
            raw = NoiseGenerator().apply({'params': generator}, jax.lax.stop_gradient(adapted), z)
            return synthesis.bounded_noise(raw, config.noise.beta)

        loss = functools.partial(
            make(config, masks_fn, noise_fn),
            batch_stats=state.batch_stats,
            batch={'layers': layers, **truth},
            key=keys[2],
        )
        gradients, result = jax.grad(lambda p: loss(p, generator), has_aux=True)(params)
        of_generator = {}
        if config.noise.kind == 'learned':
            of_generator = jax.grad(
                lambda g: loss(params, g, stop_map_gradient=False)[1][0]['generator_loss']
            )(generator)
        return *result, gradients, of_generator

    def compiled(make):
        run = jax.jit(functools.partial(both_players, make))
        return lambda masks: run(masks, state.params, state.generator)

    return compiled(direct_lib.make_loss), compiled(sparse_lib.make_sparse_loss)


@pytest.mark.parametrize(
    ('system', 'adaptor', 'adapt_cls_features', 'kind', 'unit', 'supervision'),
    [
        ('supersimplenet', 'linear', False, 'static', 'absolute', 'none'),
        ('supersimplenet', 'linear', True, 'learned', 'feature_std', 'none'),
        ('supersimplenet', 'linear', False, 'static', 'feature_std', 'masks'),
        ('supersimplenet', 'conv', True, 'learned', 'absolute', 'masks'),
        ('gap_cam', 'linear', True, 'static', 'absolute', 'labels'),
        ('gap_cam', 'conv', False, 'learned', 'absolute', 'labels'),
    ],
)
def test_sparse_equals_the_direct_one(system, adaptor, adapt_cls_features, kind, unit, supervision):
    """With some masks, with empty and with full ones: these take the second program.

    With supervision: a normal image, a defective one with its mask (or without), and one without.
    """
    config = default_config()
    config.system, config.supervision.kind = system, supervision
    config.adaptor, config.adapt_cls_features = adaptor, adapt_cls_features
    config.noise.update(kind=kind, unit=unit, std=0.3, beta=0.5)
    images = 2 if supervision == 'none' else 3
    with jax.enable_x64(True):
        masks = synthesis.perlin_masks(jax.random.key(7), 2 * images, (10, 14), 0.2, 0.1)
        masks, truth = masks.astype(float), {}
        if supervision != 'none':
            known = float(supervision == 'masks')
            truth = {'label': jnp.array([0.0, 1.0, 1.0]), 'known': jnp.array([1.0, known, 0.0])}
        if supervision == 'masks':
            truth['mask'] = jnp.zeros((3, 10, 14, 1)).at[1, 2:6, 3:9].set(1)
            truth['weight'] = jax.random.uniform(jax.random.key(8), (3, 10, 14, 1), maxval=3.0)
        placed = synthesis.place(masks, truth)
        assert 0 < placed.noise.mean() <= masks.mean() < 1
        assert (placed.noise != masks).any() == (supervision != 'none')
        direct, sparse = make_losses(config, masks, truth)
        for drawn in (masks, jnp.zeros_like(masks), jnp.ones_like(masks)):
            for expected, actual in zip(direct(drawn), sparse(drawn), strict=True):
                rule.check_gradients(actual, expected, 1e-9)
        if kind == 'learned' and unit != 'absolute':  # The unit counts.
            loss = direct(masks)[0]['loss']
            config.noise.unit = 'absolute'
            absolute, _ = make_losses(config, masks, truth)
            assert abs(absolute(masks)[0]['loss'] - loss) > 1e-3


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


@pytest.mark.parametrize('field, value', [('empty', 0.97), ('threshold', 0.99)])
def test_masks_that_hardly_cover_anything(field, value):
    """Of four images often none has an anomalous position; the loss is a number all the same."""
    config = default_config()
    config.batch_size, config.perlin[field] = 4, value
    layers = make_layers(jax.random.key(0), 4, 8, 8)
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    loss = jax.jit(losses_lib.config_loss(config))
    arguments = state.params, state.generator, state.batch_stats, {'layers': layers}
    assert np.isfinite(loss(*arguments, jax.random.key(2))[0])
