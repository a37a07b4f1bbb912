"""Linear maps of the feature grid, computed at the backbone's own grids.

The feature grid F = [U_2 L_2, U_3 L_3] is linear in the layers L (upscaling and pooling U act on
positions, weights on channels, and the two commute). So F W = U_2 (L_2 W_2) + U_3 (L_3 W_3): the
weights meet 4 and 16 times fewer positions, exactly. A k x k convolution is k^2 such products,
upscaled with shifted matrices; rows and columns that the shift brings in from outside are zero.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax.models.features import grid_matrix


def project(layers: tuple[jax.Array, ...], kernel: jax.Array, scale: int = 2) -> jax.Array:
    """`upscale_pool(layers) @ kernel` without building the feature grid.

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      kernel: (sum of C_i, D).
      scale: how many times finer than the first layer the grid is.

    Returns:
      (N, H, W, D).
    """
    return convolve(layers, kernel[None, None], scale)


def convolve(layers: tuple[jax.Array, ...], kernel: jax.Array, scale: int = 2) -> jax.Array:
    """The k x k convolution of `upscale_pool(layers)`, zero padding, stride 1.

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      kernel: (k, k, sum of C_i, D), odd k.
      scale: how many times finer than the first layer the grid is.

    Returns:
      (N, H, W, D).
    """
    kernels = arrange(kernel, [x.shape[-1] for x in layers])

    def run(layers):
        return convolve_arranged(columns_first(layers), kernels, scale)

    return by_image(run, layers)


def by_image(
    run: Callable,
    inputs: jax.Array | tuple[jax.Array, ...],
    together: int = 1,
    for_cache: bool | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """`run(inputs)`, image by image, so that what it computes is in the cache where it is used.

    Args:
      run: a function of inputs of any number of images to arrays, images apart.
      inputs: arrays with the images on the first axis.
      together: images that several cores may work on at the same time.
      for_cache: whether to do so, by default on a CPU, or all images at once.
    """
    for_cache = jax.default_backend() == 'cpu' if for_cache is None else for_cache
    if not for_cache or len(jax.tree.leaves(inputs)[0]) == 1:
        return run(inputs)

    def one(carry, image):
        result = run(jax.tree.map(lambda x: x[None], image))
        return carry, jax.tree.map(lambda x: x[0], result)

    return jax.lax.scan(one, None, inputs, unroll=together)[1]


def split(x: jax.Array, chunk: int = 128) -> jax.Array:
    """(..., D) in chunks of its last axis, on a CPU: (D / chunk, ..., chunk), else (1, ..., D)."""
    chunk = chunk if jax.default_backend() == 'cpu' else x.shape[-1]
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, chunk), -2, 0)


def columns_first(layers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Outputs of the backbone (N, H_i, W_i, C_i) as (W_i, N, H_i, C_i)."""
    return tuple(x.transpose(2, 0, 1, 3) for x in layers)


def arrange(kernel: jax.Array, channels: Sequence[int]) -> tuple[tuple[jax.Array, ...]]:
    """A kernel (k, k, sum of C_i, D) as `convolve_arranged` takes it, in one chunk.

    Returns:
      Per chunk and layer (k, C_i, k * D): column tap, channel, row tap and output channel.
    """
    parts, start = [], 0
    for n in channels:
        part = kernel[:, :, start : start + n].transpose(1, 2, 0, 3)
        parts.append(part.reshape(len(kernel), n, -1))
        start += n
    return (tuple(parts),)


def in_chunks(kernels: tuple[tuple[jax.Array, ...]], chunk: int | None = None) -> tuple:
    """What `arrange` returns in chunks of output channels, and tap by tap in a tuple.

    XLA would copy a tap's slice before it multiplies with it.

    Args:
      kernels: as of `arrange`.
      chunk: output channels at a time; None: all of them.

    Returns:
      Per chunk and layer k arrays (C_i, k * chunk), one of each column tap.
    """
    [of_layers] = kernels
    size = len(of_layers[0])
    features = of_layers[0].shape[-1] // size
    chunk = chunk or features

    def taps(kernel, start):
        by_tap = kernel.reshape(*kernel.shape[:2], size, features)
        return tuple(by_tap[..., start : start + chunk].reshape(*kernel.shape[:2], -1))

    starts = range(0, features, chunk)
    return tuple(tuple(taps(kernel, start) for kernel in of_layers) for start in starts)


def convolve_arranged(
    layers: tuple[jax.Array, ...], kernels: tuple[tuple[jax.Array, ...], ...], scale: int = 2
) -> jax.Array:
    """`convolve` with layers and kernel brought into the order of the products before.

    With columns in front of rows, every intermediate result lies in memory as the next product
    reads it: (column tap and column, image, row and row tap, D).

    Args:
      layers: as of `columns_first`, finest first.
      kernels: as of `arrange` or `in_chunks`.
      scale: how many times finer than the first layer the grid is.

    Returns:
      (N, H, W, D).
    """
    parts = [_convolve_chunk(layers, kernel, scale) for kernel in kernels]
    return jnp.concatenate(parts, -1).transpose(1, 2, 0, 3)


def _convolve_chunk(layers, kernels, scale):
    """`convolve_arranged` by one chunk of kernels: (W, N, H, chunk)."""
    width, n, height = scale * layers[0].shape[0], layers[0].shape[1], scale * layers[0].shape[2]
    rows, parts = [], []
    for x, kernel in zip(layers, kernels, strict=True):
        w, _, h, channels = x.shape
        size = len(kernel)
        x = x.reshape(-1, channels)
        # One product per column tap: XLA's batched product is slower on a CPU.
        y = jnp.stack([x @ k for k in kernel]).reshape(size * w, -1)
        columns = shifted_matrix(w, width, size).transpose(1, 0, 2).reshape(width, -1)
        parts.append((columns.astype(y.dtype) @ y).reshape(width, n, h * size, -1))
        rows.append(shifted_matrix(h, height, size).transpose(1, 2, 0).reshape(height, -1))
    # All layers meet in one product over rows.
    return jnp.matmul(np.concatenate(rows, 1).astype(x.dtype), jnp.concatenate(parts, 2))


def shifted_matrix(size_in: int, size_out: int, taps: int) -> np.ndarray:
    """`grid_matrix` read at each tap's offset: (taps, size_out, size_in)."""
    matrix, half = grid_matrix(size_in, size_out), taps // 2
    padded = np.pad(matrix, ((half, half), (0, 0)))
    return np.stack([padded[i : i + size_out] for i in range(taps)])


def convolve_constant(value: jax.Array, kernel: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The k x k convolution of a grid that holds `value` (C,) everywhere: (H, W, D).

    It is no constant: near the border some taps meet the zero padding.
    """
    size = kernel.shape[0]
    rows, columns = (_inside(n, size) for n in grid)
    return jnp.einsum('yd,xe,deo->yxo', rows, columns, jnp.einsum('c,deco->deo', value, kernel))


def _inside(n: int, taps: int) -> np.ndarray:
    position = np.arange(n)[:, None] + np.arange(taps) - taps // 2
    return ((position >= 0) & (position < n)).astype(np.float32)
