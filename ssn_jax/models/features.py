"""From images to the feature grid that the adaptor and the heads work on."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax import devices

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: jax.Array) -> jax.Array:
    """Scales RGB images (N, H, W, 3) in 0..255 to ImageNet's mean 0 and standard deviation 1."""
    mean, std = jnp.array(IMAGENET_MEAN), jnp.array(IMAGENET_STD)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def extract_layers(
    backbone: Callable,
    variables: dict,
    images: np.ndarray,
    batch_size: int = 16,
    frozen: Callable = lambda stages: stages[1:],
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    to_host: bool = False,
) -> tuple[jax.Array | np.ndarray, ...]:
    """Frozen features of a whole split, computed once and left on the devices.

    Args:
      backbone: `backbone(variables, images)` gives the stages' outputs, as `deploy.backbone` does.
      variables: its arrays.
      images: uint8 RGB (N, H, W, 3).
      batch_size: images at a time (and device).
      frozen: what to keep of the stages' outputs, as the network says.
      mesh: the devices that share the images; None is one.
      dtype: the precision they are kept in.
      to_host: keep them in the host's memory instead; the mesh is not used then.

    Returns:
      layer2 and layer3 (N, H_i, W_i, C_i) at their own grids, an eighth of the feature grid's
      memory; or what `frozen` makes of them. bfloat16 is kept as the bits that it is, uint16, for
      `restore`: to join or take from bfloat16 arrays, XLA on a CPU makes float32 copies of all.
      On a mesh they are spread as `devices.map_images` does it, and N may be larger.
    """

    def layers_of(v, x):
        return tuple(_store(y, dtype) for y in frozen(backbone(v, x)))

    if mesh is not None and not to_host:
        return devices.map_images(mesh, layers_of, variables, images, batch_size)

    # Into arrays of their final size: batches that are joined in the end take twice the memory.
    @functools.partial(jax.jit, donate_argnums=0)
    def write(kept, variables, batch, start):
        layers = layers_of(variables, batch)
        return [
            jax.lax.dynamic_update_slice_in_dim(all_of, new, start, 0)
            for all_of, new in zip(kept, layers, strict=True)
        ]

    run = jax.jit(layers_of)
    variables = jax.device_put(variables)
    batch_size = min(batch_size, len(images))
    shapes = jax.eval_shape(layers_of, variables, images[:1])
    new = np.empty if to_host else jnp.empty
    kept = [new((len(images), *x.shape[1:]), x.dtype) for x in shapes]
    for start in range(0, len(images), batch_size):
        # The last batch is whole too, and begins earlier.
        start = min(start, len(images) - batch_size)
        batch = images[start : start + batch_size]
        if not to_host:
            kept = write(kept, variables, batch, start)
            continue
        for all_of, layer in zip(kept, jax.device_get(run(variables, batch)), strict=True):
            all_of[start : start + batch_size] = layer
    return tuple(kept)


def _store(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array of any shape in the type that it is kept in; `restore` is the way back."""
    x = x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, np.uint16) if x.dtype == jnp.bfloat16 else x


def restore(x: jax.Array) -> jax.Array:
    """What was taken of the layers that `extract_layers` keeps, of any shape, to compute with.

    Of the bits of bfloat16 it makes float32; any other array stays as it is.
    """
    if x.dtype != np.uint16:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)


def layers_bytes(
    backbone: Callable,
    variables: dict,
    shape: tuple[int, ...],
    frozen: Callable = lambda stages: stages[1:],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> int:
    """How much memory `extract_layers` of images of `shape` (N, H, W, 3) takes."""
    image = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.uint8)
    layers = jax.eval_shape(lambda v, x: frozen(backbone(v, x)), variables, image)
    return shape[0] * sum(x.size for x in layers) * jnp.dtype(dtype).itemsize


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


def _halve(x, axis):
    """Averages of three neighbours around every other place of an axis, of two at its ends.

    By slices, since the ONNX exporter gets the shape of flax's pooling wrong.
    """
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
    layers: tuple[jax.Array, ...], places: jax.Array, images: jax.Array, scale: int = 2
) -> jax.Array:
    """`upscale_pool(layers)` at some places of some images, without building the feature grid.

    Args:
      layers: outputs of the backbone (N, H_i, W_i, C_i), finest first.
      places: (M, P) int, indices into the grid's H * W positions, row by row.
      images: (M,) int, which images they are of.
      scale: how many times finer than the first layer the grid is.

    Returns:
      (M, P, sum of C_i).
    """
    height, width = feature_grid(layers, scale)
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


def full_size_map(
    raw: jax.Array, size: tuple[int, int], taps: int = 25, repeat_edge: bool = False
) -> jax.Array:
    """The map for people: raw logits (N, h, w, 1) to logits (N, *size, 1).

    Bilinear (align_corners=False) to image size, then a Gaussian blur of sigma 4 pixels (see
    `blur_matrix`); a sigmoid makes a probability of it. Both steps are one matrix an axis.
    """
    rows, columns = (
        blur_matrix(m, taps=taps, repeat_edge=repeat_edge) @ resize_matrix(n, m, False)
        for n, m in zip(raw.shape[1:3], size, strict=True)
    )
    return apply_separable(rows, columns, raw)
