"""Anomalies in feature space: where they are (Perlin masks) and what they are (noise).

Everything is a pure function of a key and runs inside jit, random scales included.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssn_jax.models.grid import resize
from ssn_jax.models.layers import Dense

MAX_LOG2_SCALE = 5


def perlin_noise(
    angles: jax.Array, scale: tuple[jax.Array, jax.Array], size: tuple[int, int]
) -> jax.Array:
    """Gradient noise on a grid (Perlin, "An image synthesizer", SIGGRAPH 1985).

    Args:
      angles: directions of the lattice's unit gradients in radians, at least
        (scale[0] + 1, scale[1] + 1); what lies beyond is not read.
      scale: lattice cells per axis, integers that may be traced; they divide `size`.
      size: height and width of the grid.

    Returns:
      (H, W), about in [-1, 1]; 0 at every lattice point.
    """

    def axis(n: int, cells: jax.Array):
        position = jnp.arange(n) * cells / n
        cell = jnp.floor(position).astype(jnp.int32)
        t = position - cell
        return cell, t, t**3 * (t * (t * 6 - 15) + 10)

    (i, y, fade_y), (j, x, fade_x) = axis(size[0], scale[0]), axis(size[1], scale[1])
    gradients = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)

    def corner(di: int, dj: int) -> jax.Array:
        g = gradients[(i + di)[:, None], (j + dj)[None, :]]
        return g[..., 0] * (y - di)[:, None] + g[..., 1] * (x - dj)[None, :]

    def lerp(a, b, t):
        return a + t * (b - a)

    left = lerp(corner(0, 0), corner(1, 0), fade_y[:, None])
    right = lerp(corner(0, 1), corner(1, 1), fade_y[:, None])
    return np.sqrt(2.0) * lerp(left, right, fade_x[None, :])


def perlin_masks(
    key: jax.Array, n: int, size: tuple[int, int], threshold: float, empty: float = 0.5
) -> jax.Array:
    """Random anomaly masks at feature resolution (Rolih et al., ICPR 2024, section III-B).

    Each image draws a lattice scale 2^k per axis, k uniform in 0..5 (never finer than the grid).
    Grids that are no power of two are drawn at the next power of two per axis and resized
    bilinearly before thresholding.

    Args:
      key: PRNG key.
      n: number of masks.
      size: height and width of the grid.
      threshold: noise above it is anomalous.
      empty: probability of an empty mask.

    Returns:
      (n, H, W, 1) float32, 0 or 1.
    """
    drawn = tuple(1 << (s - 1).bit_length() for s in size)
    finest = [min(MAX_LOG2_SCALE, d.bit_length() - 1) for d in drawn]
    k_rows, k_columns, k_angles, k_empty = jax.random.split(key, 4)
    rows = 2 ** jax.random.randint(k_rows, (n,), 0, finest[0] + 1)
    columns = 2 ** jax.random.randint(k_columns, (n,), 0, finest[1] + 1)
    shape = (n, 2 ** finest[0] + 1, 2 ** finest[1] + 1)
    angles = jax.random.uniform(k_angles, shape, maxval=2 * np.pi)
    noise = jax.vmap(lambda a, r, c: perlin_noise(a, (r, c), drawn))(angles, rows, columns)
    noise = noise[..., None]
    if drawn != tuple(size):
        noise = resize(noise, size)
    kept = jax.random.bernoulli(k_empty, 1.0 - empty, (n, 1, 1, 1))
    return ((noise > threshold) & kept).astype(jnp.float32)


def bounded_noise(raw: jax.Array, beta: float | None) -> jax.Array:
    """A generator's raw output (N, H, W, C) as noise: beta * tanh(raw), or raw without a bound."""
    return raw if beta is None else beta * jnp.tanh(raw)


def noise_scales(unit: str, *grids: jax.Array) -> list[jax.Array | float]:
    """What noise is multiplied with before it is added to each of several feature grids.

    Args:
      unit: 'absolute', or 'feature_std' for each channel's own standard deviation.
      *grids: clean features (..., C).

    Returns:
      (C,) for each grid, without a gradient; 1 for absolute noise.
    """
    if unit == 'absolute':
        return [1.0] * len(grids)
    return [jax.lax.stop_gradient(x.reshape(-1, x.shape[-1]).std(0)) for x in grids]


def thin(grid: jax.Array) -> jax.Array:
    """Every fourth row and column of a grid (N, H, W, C): enough to know its channels' spread."""
    return grid[:, ::4, ::4]


class Placement(NamedTuple):
    """Where a doubled batch gets noise, and what it teaches.

    Attributes:
      noise: (2N, H, W, 1), 1 where noise is added.
      target: (2N, H, W, 1), 1 where the map is to be anomalous.
      weight: (2N, H, W, 1), how much a position's loss on the map counts.
      taught: (2N, 1, 1, 1), 0 for an image whose map has no known target.
      labels: (2N,), 1 for an image with a defect, true or synthetic.
    """

    noise: jax.Array
    target: jax.Array
    weight: jax.Array
    taught: jax.Array
    labels: jax.Array


def place(drawn: jax.Array, batch: dict[str, jax.Array]) -> Placement:
    """Brings random masks and what is known of the images together (Rolih et al., 2024, III-B).

    Noise never falls on a true defect. Of a defective image without a mask any position may be
    the defect: it gets no noise at all, and its map is not taught.

    Args:
      drawn: random masks for the doubled batch, (2N, H, W, 1).
      batch: `label` (N,), `known` (N,) whether the mask is known, `mask` and `weight`
        (N, H, W, 1). What is absent is that of normal images: label 0, known, empty, weight 1.
    """
    n = len(drawn) // 2
    one = jnp.ones((n, *drawn.shape[1:]))
    mask = double(batch.get('mask', 0 * one))
    label = double(batch.get('label', jnp.zeros(n)))
    known = double(batch.get('known', jnp.ones(n)))[:, None, None, None]
    noise = drawn * known * (1 - mask)
    return Placement(
        noise=noise,
        target=jnp.maximum(mask, noise),
        weight=jnp.where(noise > 0, 1.0, double(batch.get('weight', one))),
        taught=known,
        labels=jnp.maximum(label, noise.max((1, 2, 3))),
    )


def double(x: jax.Array) -> jax.Array:
    """Two copies of a batch along the first axis: (N, ...) -> (2N, ...)."""
    return jnp.concatenate([x, x])


def make_noise(config: ml_collections.ConfigDict) -> Callable:
    """`noise(generator, adapted, key)`: noise for adapted features, both (..., C).

    It is in units of `config.noise.unit`: what calls it knows the features' own spread.
    """
    settings = config.noise

    def static(generator, adapted, key):
        return settings.std * jax.random.normal(key, adapted.shape)

    def learned(generator, adapted, key):
        z = jax.random.normal(key, (*adapted.shape[:-1], settings.z_dim))
        raw = NoiseGenerator().apply({'params': generator}, jax.lax.stop_gradient(adapted), z)
        return bounded_noise(raw, settings.beta if settings.bounded else None)

    return learned if settings.kind == 'learned' else static


def make_masks(config: ml_collections.ConfigDict) -> Callable:
    """`masks(key, n, size)`: where anomalies are put, (n, *size, 1)."""
    perlin = config.perlin
    return lambda key, n, size: perlin_masks(key, n, size, perlin.threshold, perlin.empty)


class NoiseGenerator(nn.Module):
    """Three 1x1 convolutions C + Z -> C/2 -> C/2 -> C: (N, H, W, C), (N, H, W, Z) -> raw noise.

    Z may be 0 (learned noise v1 takes no random input).
    """

    @nn.compact
    def __call__(self, adapted: jax.Array, z: jax.Array) -> jax.Array:
        channels = adapted.shape[-1]
        x = jnp.concatenate([adapted, z], -1)
        x = nn.relu(Dense(channels // 2, name='layer0')(x))
        x = nn.relu(Dense(channels // 2, name='layer1')(x))
        return Dense(channels, name='layer2')(x)
