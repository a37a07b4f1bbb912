"""Linear maps of the feature grid, computed at the backbone's own grids.

The feature grid F = [U_2 L_2, U_3 L_3] is linear in the layers L (upscaling and pooling U act on
positions, weights on channels, and the two commute). So F W = U_2 (L_2 W_2) + U_3 (L_3 W_3): the
weights meet 4 and 16 times fewer positions, exactly. A k x k convolution is k^2 such products,
upscaled with shifted matrices; rows and columns that the shift brings in from outside are zero.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax.models.features import feature_grid, grid_matrix


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
    size, features = kernel.shape[0], kernel.shape[-1]
    grid = feature_grid(layers, scale)
    n, start, rows, parts = len(layers[0]), 0, [], []
    for x in layers:
        h, w, channels = x.shape[1:]
        k = kernel[:, :, start : start + channels]
        start += channels
        # Per native position the products with all k^2 taps, ordered (row tap, column tap, D).
        y = x.reshape(n, h, w, channels) @ k.transpose(2, 0, 1, 3).reshape(channels, -1)
        y = y.reshape(n, h, w, size, size, features).transpose(0, 3, 1, 4, 2, 5)
        y = y.reshape(n, size * h, size * w, features)
        parts.append(jnp.matmul(shifted_matrix(w, grid[1], size), y))
        rows.append(shifted_matrix(h, grid[0], size))
    # All layers meet in one product over rows.
    y = jnp.concatenate(parts, 1).reshape(n, -1, grid[1] * features)
    return jnp.matmul(np.concatenate(rows, 1), y).reshape(n, *grid, features)


def shifted_matrix(size_in: int, size_out: int, taps: int) -> np.ndarray:
    """`grid_matrix` read at each tap's offset, side by side: (size_out, taps * size_in)."""
    matrix, half = grid_matrix(size_in, size_out), taps // 2
    padded = np.pad(matrix, ((half, half), (0, 0)))
    return np.concatenate([padded[i : i + size_out] for i in range(taps)], 1)


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
