"""The feature grid: resizing, pooling and convolving layers, all of it as small matrices.

The feature grid F = [U_2 L_2, U_3 L_3] is linear in the layers L (upscaling and pooling U act on
positions, weights on channels, and the two commute). So F W = U_2 (L_2 W_2) + U_3 (L_3 W_3): the
weights meet 4 and 16 times fewer positions, exactly. A k x k convolution is k^2 such products,
upscaled with shifted matrices; rows and columns that the shift brings in from outside are zero.
"""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np


def select_layers(
    stages: tuple[jax.Array, ...], layers: tuple[int, ...] = (2, 3)
) -> tuple[jax.Array, ...]:
    """What of a backbone's outputs features are made of.

    Layer1 is brought to layer2's grid, by averages around the places that layer2's own stride
    keeps, and joins its channels: the grid, and the cost at it, do not grow.

    Args:
      stages: outputs of layer1 (if it is chosen), layer2 and layer3 (N, H_i, W_i, C_i).
      layers: (2, 3), (1, 2, 3) or (1, 2).

    Returns:
      At layer2's grid (N, H_2, W_2, C_2), or with layer1 (N, H_2, W_2, C_2 + C_1); and layer3.
    """
    first = stages[-2]
    if 1 in layers:
        halved = _halve(_halve(stages[-3], 1), 2)
        first = jnp.concatenate([first, halved], -1)
    return (first, stages[-1]) if 3 in layers else (first,)


def selected_channels(channels: Sequence[int], layers: tuple[int, ...]) -> list[int]:
    """The channels of each of `select_layers`' arrays, by those of layer1, layer2 and layer3."""
    first = channels[1] + (channels[0] if 1 in layers else 0)
    return [first, channels[2]] if 3 in layers else [first]


def position_code(size: tuple[int, int], waves: int) -> np.ndarray:
    """A Fourier code of where positions lie: sin and cos of k * pi / 2 times y and x in -1..1.

    Args:
      size: of a layer (h, w).
      waves: k = 1..waves.

    Returns:
      float32 (h, w, 4 * waves): neighbours have like codes, at every size of images.
    """
    k = np.arange(1, waves + 1) * np.pi / 2
    parts = []
    for axis, n in enumerate(size):
        place = np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
        angles = np.expand_dims(place[:, None] * k, 1 - axis)
        parts += [np.sin(angles), np.cos(angles)]
    shape = (*size, waves)
    return np.concatenate([np.broadcast_to(x, shape) for x in parts], -1).astype(np.float32)


def with_code(layers: tuple[jax.Array, ...], waves: int) -> tuple[jax.Array, ...]:
    """Layers (N, H_i, W_i, C_i) whose first has a position code behind its channels."""
    if not waves:
        return layers
    first, *rest = layers
    code = jnp.broadcast_to(position_code(first.shape[1:3], waves), (*first.shape[:3], 4 * waves))
    return (jnp.concatenate([first, code.astype(first.dtype)], -1), *rest)


def _halve(x, axis):
    """Averages of three neighbours around every other place of an axis, of two at its ends."""
    size = x.shape[axis]
    padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)])
    count = np.convolve(np.ones(size), np.ones(3))[1:-1:2]
    total = sum(jax.lax.slice_in_dim(padded, i, size + i, 2, axis) for i in range(3))
    return total / np.expand_dims(count, [i for i in range(x.ndim) if i != axis]).astype(x.dtype)


@functools.cache
def resize_matrix(size_in: int, size_out: int, align_corners: bool) -> np.ndarray:
    """Bilinear interpolation along one axis as a matrix (size_out, size_in).

    With `align_corners` the first and last samples of input and output coincide; without, pixels
    are areas and samples beyond the border repeat it (PyTorch's and OpenCV's conventions).
    """
    i = np.arange(size_out)
    if align_corners:
        x = i * ((size_in - 1) / (size_out - 1)) if size_out > 1 else np.zeros(1)
    else:
        x = np.maximum((i + 0.5) * (size_in / size_out) - 0.5, 0.0)
    low = np.minimum(np.floor(x).astype(int), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (i, low), 1.0 - (x - low))
    np.add.at(matrix, (i, high), x - low)
    return matrix.astype(np.float32)


@functools.cache
def pool_matrix(size: int) -> np.ndarray:
    """Averages three neighbours along one axis, zero padding counted, as a matrix (size, size)."""
    offset = np.abs(np.arange(size)[:, None] - np.arange(size))
    return ((offset <= 1) / 3.0).astype(np.float32)


def apply_separable(rows: np.ndarray, columns: np.ndarray, x: jax.Array) -> jax.Array:
    """Applies `rows` (P, H) and `columns` (Q, W) to the two grid axes of x (N, H, W, C)."""
    x = jnp.einsum('qw,nhwc->nhqc', columns, x)
    return jnp.einsum('ph,nhqc->npqc', rows, x)


def resize(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
    """Resizes x (N, H, W, C) bilinearly to (N, *size, C)."""
    rows = resize_matrix(x.shape[1], size[0], align_corners)
    columns = resize_matrix(x.shape[2], size[1], align_corners)
    return apply_separable(rows, columns, x)


def grid_matrix(size_in: int, size_out: int) -> np.ndarray:
    """The matrix (size_out, size_in) that brings one axis of a layer to the feature grid.

    Bilinear resizing with align_corners, then the 3-wide average: both are linear and separable,
    so one matrix does both.
    """
    return pool_matrix(size_out) @ resize_matrix(size_in, size_out, True)


def feature_grid(layers: tuple[jax.Array, ...], scale: int = 2) -> tuple[int, int]:
    """Height and width of the feature grid: `scale` times the first layer's."""
    return layers[0].shape[1] * scale, layers[0].shape[2] * scale


def upscale_pool(layers: tuple[jax.Array, ...], scale: int = 2) -> jax.Array:
    """Brings backbone layers to one grid (Rolih et al., ICPR 2024, section III-A).

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      scale: how many times finer than the first layer the grid is.

    Returns:
      (N, scale * H_0, scale * W_0, sum of C_i): every layer resized bilinearly
      (align_corners=True), concatenated, averaged over 3x3 with the zero padding counted.
    """
    height, width = feature_grid(layers, scale)
    return jnp.concatenate(
        [
            apply_separable(grid_matrix(x.shape[1], height), grid_matrix(x.shape[2], width), x)
            for x in layers
        ],
        axis=-1,
    )


def sample_features(
    layers: tuple[jax.Array, ...], places: jax.Array, images: jax.Array
) -> jax.Array:
    """`upscale_pool(layers)` at some places of some images, without building the feature grid.

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      places: (M, P) int, indices into the grid's H * W positions, row by row.
      images: (M,) int, which images they are of.

    Returns:
      (M, P, sum of C_i).
    """
    height, width = feature_grid(layers)
    image = images[:, None, None, None]
    parts = []
    for x in layers:
        rows, of_rows = (t[places // width] for t in _taps(x.shape[1], height))
        columns, of_columns = (t[places % width] for t in _taps(x.shape[2], width))
        near = x[image, rows[..., :, None], columns[..., None, :]]
        parts.append(jnp.einsum('npyxc,npy,npx->npc', near, of_rows, of_columns))
    return jnp.concatenate(parts, -1)


def _taps(size_in: int, size_out: int) -> tuple[jax.Array, jax.Array]:
    """What each row of `grid_matrix` reads: (size_out, taps) indices, and their weights."""
    matrix = grid_matrix(size_in, size_out)
    taps = (matrix != 0).sum(1).max()
    # The largest weights first; what is beyond a row's own taps has weight 0.
    order = np.argsort(-matrix, axis=1, kind='stable')[:, :taps]
    return jnp.asarray(order), jnp.asarray(np.take_along_axis(matrix, order, 1))


@functools.cache
def blur_matrix(
    size: int, sigma: float = 4.0, taps: int = 25, repeat_edge: bool = False
) -> np.ndarray:
    """A Gaussian blur along one axis with reflected edges, as a matrix (size, size).

    With `repeat_edge` the mirror lies beyond the last sample (SciPy's reflect) and not on it.
    """
    offset = np.arange(taps) - taps // 2
    weights = np.exp(-0.5 * (offset / sigma) ** 2)
    weights /= weights.sum()
    matrix = np.zeros((size, size))
    period = 2 * size if repeat_edge else max(2 * (size - 1), 1)
    for d, w in zip(offset, weights, strict=True):
        reflected = (np.arange(size) + d) % period
        reflected = np.minimum(reflected, period - repeat_edge - reflected)
        np.add.at(matrix, (np.arange(size), reflected), w)
    return matrix.astype(np.float32)


def map_matrices(
    grid: tuple[int, int], size: tuple[int, int], taps: int = 25, repeat_edge: bool = False
) -> list[np.ndarray]:
    """What brings the rows and the columns of a raw map to the map for people.

    Bilinear (align_corners=False) to image size, then a Gaussian blur of sigma 4 pixels (see
    `blur_matrix`). Both steps are one matrix an axis, (H, h) and (W, w).
    """
    return [
        blur_matrix(m, taps=taps, repeat_edge=repeat_edge) @ resize_matrix(n, m, False)
        for n, m in zip(grid, size, strict=True)
    ]


def full_size_map(raw: jax.Array, size: tuple[int, int], **blur) -> jax.Array:
    """The map for people: raw logits (N, h, w, 1) to logits (N, *size, 1) by `map_matrices`.

    A sigmoid makes a probability of it.
    """
    return apply_separable(*map_matrices(raw.shape[1:3], size, **blur), raw)


def project(layers: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
    """`upscale_pool(layers) @ kernel` without building the feature grid.

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      kernel: (sum of C_i, D).

    Returns:
      (N, H, W, D).
    """
    return convolve(layers, kernel[None, None])


def convolve(layers: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
    """The k x k convolution of `upscale_pool(layers)`, zero padding, stride 1.

    With columns in front of rows, every intermediate result lies in memory as the next product
    reads it: (column tap and column, image, row and row tap, D).

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      kernel: (k, k, sum of C_i, D), odd k.

    Returns:
      (N, H, W, D).
    """
    n, size = layers[0].shape[0], len(kernel)  # The former may be symbolic.
    height, width = feature_grid(layers)
    rows, parts, start = [], [], 0
    for x in layers:
        _, h, w, channels = x.shape
        taps = kernel[:, :, start : start + channels].transpose(1, 2, 0, 3)
        start += channels
        x = x.transpose(2, 0, 1, 3).reshape(-1, channels)
        # One product per column tap: XLA's batched product is slower on a CPU.
        y = jnp.stack([x @ tap.reshape(channels, -1) for tap in taps]).reshape(size * w, -1)
        columns = shifted_matrix(w, width, size).transpose(1, 0, 2).reshape(width, -1)
        parts.append((columns @ y).reshape(width, n, h * size, -1))
        rows.append(shifted_matrix(h, height, size).transpose(1, 2, 0).reshape(height, -1))
    # All layers meet in one product over rows.
    joined = jnp.matmul(np.concatenate(rows, 1), jnp.concatenate(parts, 2))
    return joined.transpose(1, 2, 0, 3)


def by_image(
    run: Callable,
    inputs: jax.Array | tuple[jax.Array, ...],
    together: int = 1,
    one_by_one: bool | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """`run(inputs)`, image by image, so that what it computes is in the cache where it is used.

    Args:
      run: a function of inputs of any number of images to arrays, images apart.
      inputs: arrays with the images on the first axis.
      together: images that several cores may work on at the same time.
      one_by_one: whether to do so, by default on a CPU, or all images at once.
    """
    one_by_one = jax.default_backend() == 'cpu' if one_by_one is None else one_by_one
    if not one_by_one or len(jax.tree.leaves(inputs)[0]) == 1:
        return run(inputs)

    def one(carry, image):
        result = run(jax.tree.map(lambda x: x[None], image))
        return carry, jax.tree.map(lambda x: x[0], result)

    return jax.lax.scan(one, None, inputs, unroll=together)[1]


def split(x: jax.Array, chunk: int = 128) -> jax.Array:
    """(..., D) in chunks of its last axis, on a CPU: (D / chunk, ..., chunk), else (1, ..., D)."""
    chunk = chunk if jax.default_backend() == 'cpu' else x.shape[-1]
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, chunk), -2, 0)


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
