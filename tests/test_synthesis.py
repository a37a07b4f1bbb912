"""Perlin noise against the published numbers; masks and noise by their properties."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import synthesis
from ssn_jax.config import default_config

N = 1000


@functools.partial(jax.jit, static_argnames='size')
def jitted_masks(key, size, threshold, empty):
    return synthesis.perlin_masks(key, N, size, threshold, empty)


def masks(seed, size, threshold, empty=0.5):
    """N masks as a train step makes them, everything inside one jit: (N, H, W)."""
    return np.asarray(jitted_masks(jax.random.key(seed), size, threshold, empty))[..., 0]


@functools.partial(jax.jit, static_argnames='size')
def jitted_noise(angles, scale, size):
    return synthesis.perlin_noise(angles, scale, size)


@pytest.mark.parametrize('scale', [(1, 1), (2, 8), (4, 4), (32, 16), (32, 32)])
def test_perlin_noise_matches_published_noise(scale):
    expected = rule.reference(f'perlin_{scale[0]}x{scale[1]}')
    angles, noise = expected['angles'], expected['noise']
    ours = synthesis.perlin_noise(angles, scale, noise.shape)
    # The published fading, 6t^5 - 15t^4 + 10t^3, loses what values 15 times as large round by.
    terms = 3 * 15**2
    rule.check_close(ours, noise, terms)
    # The same with traced scales on a lattice that is larger than needed.
    padded = np.pad(angles, ((0, 32 - scale[0]), (0, 32 - scale[1])), constant_values=1.0)
    rule.check_close(jitted_noise(padded, scale, noise.shape), noise, terms)


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([(64, 64), (32, 8), (1, 16)]),
    scale=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_perlin_noise_is_zero_at_the_lattice_and_bounded(size, scale, seed):
    scale = tuple(min(2**k, s) for k, s in zip(scale, size, strict=True))
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, (33, 33)).astype(np.float32)
    noise = np.asarray(jitted_noise(angles, scale, size))
    assert noise.shape == size
    lattice = noise[:: size[0] // scale[0], :: size[1] // scale[1]]
    rule.check_close(lattice, np.zeros(lattice.shape), 20, spread=1)
    assert np.abs(noise).max() <= 1 + rule.tolerance(20)


@pytest.mark.parametrize('size', [(16, 16), (16, 24), (80, 29), (1, 5)])
def test_masks_are_zero_or_one(size):
    drawn = masks(0, size, 0.1)
    assert drawn.shape == (N, *size)
    assert drawn.dtype == np.float32
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert 0.02 < drawn.mean() < 0.4


@pytest.mark.parametrize('empty', [0.0, 0.3, 0.5])
@pytest.mark.parametrize('size', [(16, 16), (16, 24), (80, 29)])
def test_share_of_empty_masks(size, empty):
    """A threshold below the noise's minimum fills every mask that is kept."""
    drawn = masks(1, size, -2.0, empty)
    filled = drawn.min((1, 2))
    np.testing.assert_array_equal(filled, drawn.max((1, 2)))
    # Four and a half standard deviations of a binomial share: one false alarm in 100,000.
    assert abs((1 - filled).mean() - empty) <= 4.5 * np.sqrt(empty * (1 - empty) / N)


def test_a_higher_threshold_leaves_less_of_the_same_masks():
    low, high = (masks(2, (16, 24), t) for t in (0.2, 0.6))
    assert (high <= low).all()
    assert 0 < high.mean() < 0.6 * low.mean()


@pytest.mark.parametrize('size, axis', [((64, 64), 1), ((16, 64), 0), ((80, 12), 0), ((80, 12), 1)])
def test_scales_are_uniform(monkeypatch, size, axis):
    """Each axis' scale is 2^k with k uniform in 0..5, but never finer than the grid."""
    monkeypatch.setattr(
        synthesis,
        'perlin_noise',
        lambda angles, scale, size: jnp.full(size, jnp.log2(scale[axis].astype(jnp.float32))),
    )
    finest = min(5, int(np.ceil(np.log2(size[axis]))))
    for k in range(1, finest + 2):
        drawn = synthesis.perlin_masks(jax.random.key(3), N, size, k - 0.5, 0.0)
        share = (finest + 1 - k) / (finest + 1)
        assert abs(drawn.mean() - share) <= 4.5 * np.sqrt(share * (1 - share) / N)


def test_images_of_a_batch_are_independent():
    """Hardly two masks are alike, areas are uncorrelated, and so is which of them are empty."""
    drawn = masks(4, (16, 16), 0.0, 0.0).reshape(N, -1)
    assert len(np.unique(drawn, axis=0)) > 0.9 * N  # Coarse scales leave few patterns.
    kept = masks(4, (16, 16), 0.0).max((1, 2))
    area = drawn.mean(1)
    for a, b in [
        (area[::2], area[1::2]),  # neighbours
        (area[: N // 2], area[N // 2 :]),  # the two copies of a doubled batch
        (kept[::2], kept[1::2]),
        (area, kept),
        (area[1:], kept[:-1]),
    ]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(a))


def test_masks_follow_from_the_key_alone():
    first, again, other = (masks(seed, (16, 24), 0.2) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_other_grids_are_resized_before_the_threshold(monkeypatch):
    """A (3, 4) grid is drawn at (4, 4) and brought to 3 rows as areas, without align_corners."""
    rows = jnp.array([1.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(
        synthesis,
        'perlin_noise',
        lambda angles, scale, size: jnp.broadcast_to(rows[:, None], size),
    )
    # Row centres 1/6, 3/2, 17/6 of the drawn grid: 5/6, 0, 5/6.
    for threshold, expected in ((0.83, [1, 0, 1]), (0.84, [0, 0, 0])):
        drawn = synthesis.perlin_masks(jax.random.key(0), 2, (3, 4), threshold, 0.0)
        np.testing.assert_array_equal(drawn[..., 0], np.tile(np.c_[expected], (2, 1, 4)))


def test_static_noise_is_gaussian_with_the_given_deviation():
    noise_fn, features = synthesis.make_noise(default_config()), jnp.zeros((4, 32, 32, 32))
    scaled = np.asarray(noise_fn({}, features, jax.random.key(7))) / 0.015
    assert abs(scaled.mean()) < 4.5 / np.sqrt(scaled.size)
    assert scaled.std() == pytest.approx(1, abs=0.01)
    assert (scaled**4).mean() == pytest.approx(3, abs=0.1)
    copies = scaled.reshape(2, -1)
    assert abs(np.corrcoef(copies)[0, 1]) < 4.5 / np.sqrt(copies.shape[1])


@settings(max_examples=25, deadline=None)
@given(
    raw=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20),
    beta=st.sampled_from([0.0, 0.0015, 0.05, 0.1, 0.5]),
)
def test_learned_noise_keeps_its_bound(raw, beta):
    raw = jnp.array(raw, jnp.float32)
    noise = np.asarray(synthesis.bounded_noise(raw, beta))
    assert (np.abs(noise) <= np.float32(beta)).all()
    rule.check_close(noise, beta * np.tanh(np.float64(raw)), 8, spread=beta)
    np.testing.assert_array_equal(synthesis.bounded_noise(raw, None), raw)


def test_double_puts_the_copy_behind():
    x = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(synthesis.double(x), np.r_[x, x])


def test_noise_scales_are_the_channels_standard_deviations():
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3)) * jnp.array([0.1, 1.0, 20.0]) + 5
    assert synthesis.noise_scales('absolute', x, x) == [1.0, 1.0]
    exact, thinned = synthesis.noise_scales('feature_std', x, synthesis.thin(x))
    rule.check_close(exact, np.asarray(x, np.float64).std((0, 1, 2)), 4096, spread=0)
    np.testing.assert_allclose(thinned, exact, rtol=0.15)
    gradient = jax.grad(lambda x: synthesis.noise_scales('feature_std', x)[0].sum())(x)
    assert (gradient == 0).all()
