"""The forward pass of folded weights (`fold.fuse`), at the backbone's own grids.

Pure functions of arrays.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax.fused import fold
from ssn_jax.models import efficientnet, grid as grid_lib, resnet, systems
from ssn_jax.models.layers import SLOPE, conv2d, depthwise

# Images that a CPU's cores may work on at the same time.
_IMAGES = 4
# Those of the classification head's convolution, which are upscaled from 25 projections each.
_CLS_CHUNK = 32

Backbone = fold.ResNet | fold.EfficientNet


def _merge(x):
    """The chunks of `_split` as one."""
    return jnp.moveaxis(x, 0, -2).reshape(1, *x.shape[1:-1], -1)


def predict(
    fused: fold.Fused,
    images: jax.Array,
    for_cache: bool | None = None,
    precision: str = 'float32',
) -> tuple[jax.Array, jax.Array]:
    """Score and map of images, computed in the type of `fused`.

    Args:
      fused: as `fold.fuse` returns it.
      images: RGB (N, H, W, 3) in 0..255, uint8 or float.
      for_cache: whether to go image by image and in chunks of hidden channels, so that what is
        computed is still in the cache where it is used; by default on a CPU.
      precision: of products of float32 values, as `config.precision`.

    Returns:
      Score logits (N,) and full-size anomaly logits (N, H, W), both float32.
    """
    for_cache = jax.default_backend() == 'cpu' if for_cache is None else for_cache

    def run(images):
        stages = _backbone(fused.backbone, images)
        layers = grid_lib.select_layers(stages, fused.network.layers)
        scores, logits = heads(fused, layers, for_cache)
        return scores, fused.network.full_size_map(logits[..., None], images.shape[1:3])[..., 0]

    with jax.default_matmul_precision(precision):
        return grid_lib.by_image(run, images, _IMAGES, for_cache)


def make_predictor(
    fused: fold.Fused, batch_size: int, image_size: tuple[int, int], precision: str = 'float32'
) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """Compiles `predict` for one batch shape; the arrays of `fused` go to the device once.

    Args:
      fused: as `fold.fuse` returns it, or `cast` to another type.
      batch_size: images per call.
      image_size: their (height, width).
      precision: as of `predict`.

    Returns:
      uint8 images (batch_size, *image_size, 3) -> scores (batch_size,), maps (batch_size,
      *image_size).
    """
    fused = jax.device_put(prepare(fused))
    images = jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.uint8)
    run = jax.jit(functools.partial(predict, precision=precision))
    compiled = run.lower(fused, images).compile()
    return lambda images: compiled(fused, images)


def cast(fused: fold.Fused, dtype: jax.typing.DTypeLike) -> fold.Fused:
    """The arrays of `fused` in another type; `predict` then computes in it."""
    return jax.tree.map(lambda x: x.astype(dtype), fused)


def deviation(
    fused: dict, images: np.ndarray, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> dict[str, float]:
    """What another type than float32 changes, on images (N, H, W, 3).

    Returns:
      'score' and 'map': the largest difference of logits, divided by the standard deviation of
      the float32 logits (of a score over images, of the map over all pixels).
    """
    run = jax.jit(predict)
    exact, rounded = (jax.device_get(run(f, images)) for f in (fused, cast(fused, dtype)))
    return {
        name: float(np.abs(a - b).max() / a.std())
        for name, a, b in zip(('score', 'map'), exact, rounded, strict=True)
    }


def backbone(
    fused: Backbone, images: jax.Array, precision: str = 'float32'
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A backbone's three outputs on images (N, H, W, 3) in 0..255, by `fuse_backbone`'s arrays.

    Shapes as of the backbone itself; on a CPU image by image, as `predict` does it.
    """
    with jax.default_matmul_precision(precision):
        return grid_lib.by_image(functools.partial(_backbone, fused), images, _IMAGES)


def _backbone(fused, images):
    if isinstance(fused, fold.EfficientNet):
        return _efficientnet(fused, images)
    # The mean is subtracted before the zero padding; the standard deviation is in the kernel.
    x = images - 255.0 * np.array(resnet.IMAGENET_MEAN, np.float32)
    x = jax.nn.relu(_conv(fused.stem, x.astype(fused.stem['kernel'].dtype), 2))
    x = jax.lax.reduce_window(
        x, -np.array(np.inf, x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )  # fmt: skip
    outputs = []
    for blocks in fused.stages:
        for i, block in enumerate(blocks):
            stride = 2 if outputs and i == 0 else 1
            x = _block(block, x, stride)
        outputs.append(x)
    return tuple(outputs)


def _efficientnet(fused, images):
    # The mean is subtracted before the zero padding; the standard deviation is in the kernel.
    stem = fused.stem
    x = (images - np.float32(efficientnet.MEAN)).astype(stem['kernel'].dtype)
    x = jax.lax.conv_general_dilated(
        x, stem['kernel'], (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    x = jax.nn.relu6(x + stem['bias'])
    network = efficientnet.BACKBONES['efficientnet_lite0']
    outputs = []
    for i, (block, (*_, stride)) in enumerate(zip(fused.blocks, network.blocks, strict=True)):
        y = jax.nn.relu6(_conv(block['expand'], x)) if 'expand' in block else x
        y = depthwise(y, block['depthwise']['kernel'], stride) + block['depthwise']['bias']
        y = _conv(block['project'], jax.nn.relu6(y))
        x = x + y if x.shape == y.shape else y
        if i in network.outputs:
            outputs.append(x)
    return tuple(outputs)


def _block(block, x, stride):
    """A residual block; its first 3x3 convolution carries the stride."""
    y = x
    for i, conv in enumerate(block['convs']):
        if i:
            y = jax.nn.relu(y)
        y = _conv(conv, y, stride if i == _strided(block) else 1)
    if 'downsample' in block:
        x = _conv(block['downsample'], x, stride)
    return jax.nn.relu(x + y)


def _strided(block):
    """Which of a block's convolutions carries its stride: the first that is not 1x1."""
    return next(i for i, conv in enumerate(block['convs']) if len(conv['kernel']) > 1)


def _conv(conv, x, stride=1):
    """A convolution with 'kernel' (k, k, C, D), or Winograd's, and 'bias' (D,), zero padding."""
    kernel = conv['kernel']
    if isinstance(kernel, tuple):
        y = _winograd(x, kernel)
    elif len(kernel) == 1:
        y = x[:, ::stride, ::stride] @ kernel[0, 0]
    else:
        pad = len(kernel) // 2, len(kernel) // 2
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
    return y + conv['bias']


def prepare(fused: fold.Fused) -> fold.Fused:
    """Brings `fuse`'s arrays into the form that is fastest where they will be used.

    Matrices that are used one by one become arrays of their own: XLA copies a slice before it
    multiplies with it, which takes a fifth of the time of one image with WideResNet50-2. On a CPU
    convolutions of the layers go in chunks, which stay in the cache, one on each core.
    """
    on_cpu, ready = jax.default_backend() == 'cpu', dict(fused.heads)
    if 'cls' in ready:
        ready['cls'] = grid_lib.in_chunks(ready['cls'], _CLS_CHUNK if on_cpu else None)
    if 'adaptor' in ready:
        kernel = grid_lib.in_chunks(ready['adaptor']['kernel'], fold.CHUNK if on_cpu else None)
        ready['adaptor'] = ready['adaptor'] | {'kernel': kernel}
    return fused.replace(backbone=prepare_backbone(fused.backbone), heads=ready)


def prepare_backbone(fused: Backbone) -> Backbone:
    """Brings `fuse_backbone`'s arrays into the form that is fastest where they will be used.

    On a CPU, in float32, 3x3 convolutions of stride 1 become Winograd's: 16 products for 4 outputs
    instead of 36 (Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016,
    F(2x2, 3x3)). Other devices choose such algorithms by themselves.
    """
    is_float32 = fused.stem['bias'].dtype == np.float32
    if jax.default_backend() != 'cpu' or not is_float32 or isinstance(fused, fold.EfficientNet):
        return fused

    def transform(stage, block):
        kernels = [conv['kernel'] for conv in block['convs']]
        strided = _strided(block) if stage and 'downsample' in block else None
        convs = [
            conv | {'kernel': _winograd_kernel(k)} if len(k) == 3 and i != strided else conv
            for i, (conv, k) in enumerate(zip(block['convs'], kernels, strict=True))
        ]
        return block | {'convs': convs}

    stages = [[transform(s, b) for b in stage] for s, stage in enumerate(fused.stages)]
    return fused.replace(stages=stages)


def _winograd_kernel(kernel):
    """A kernel (3, 3, C, D) for `_winograd`: 16 of (C, D)."""
    g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    # As one matrix product, which NumPy does far faster than an einsum.
    transformed = np.kron(g, g) @ np.asarray(kernel, np.float64).reshape(9, -1)
    return tuple(transformed.reshape(16, *kernel.shape[2:]).astype(np.float32))


def _winograd(x, kernel):
    """The 3x3 convolution of x (N, H, W, C), zero padding, by products of 2x2 output tiles."""
    n, h, w, channels = x.shape
    rows, columns = (h + 1) // 2, (w + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))

    def inputs(d):
        return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]

    def outputs(m):
        return m[0] + m[1] + m[2], m[1] - m[2] - m[3]

    tiles = [
        column
        for row in inputs([x[:, i : i + 2 * rows - 1 : 2] for i in range(4)])
        for column in inputs([row[:, :, j : j + 2 * columns - 1 : 2] for j in range(4)])
    ]
    # XLA's batched product is slower on a CPU than 16 single ones.
    m = [t.reshape(-1, channels) @ k for t, k in zip(tiles, kernel, strict=True)]
    m = [outputs(y) for y in zip(*(outputs(m[j::4]) for j in range(4)), strict=True)]
    y = jnp.stack([jnp.stack(row, 1) for row in m], 0)
    y = y.reshape(2, n, rows, columns, 2, -1).transpose(1, 2, 0, 3, 4, 5)
    return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :h, :w]


def heads(
    fused: fold.Fused, layers: tuple[jax.Array, ...], in_chunks: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Scores (N,) and anomaly logits (N, H, W) on the feature grid, float32.

    Args:
      fused: as `fold.fuse` returns it.
      layers: the backbone's that the network reads (N, H_i, W_i, C_i), finest first.
      in_chunks: whether the segmentation head goes in chunks of hidden channels.
    """
    if isinstance(fused.network, systems.SimpleNet):
        return _simplenet(fused.heads, layers)
    of = fused.heads
    if not in_chunks and 'hidden' in of:  # All hidden channels are one chunk.
        of = of | {'hidden': jax.tree.map(_merge, of['hidden'])}
    return _heads(fused.network, of, layers)


def _heads(network, fused, layers):
    """`heads` of a SuperSimpleNet or of GAP+CAM."""
    gap_cam, linear = isinstance(network, systems.GapCam), network.adaptor == 'linear'
    grid, layers = grid_lib.feature_grid(layers), grid_lib.columns_first(layers)
    if not linear:
        adapted = grid_lib.convolve_arranged(layers, fused['adaptor']['kernel'])
        adapted = jax.nn.relu(adapted + fused['adaptor']['bias'])

    # The segmentation head in chunks of hidden channels, added up.
    def add(logits, chunk):
        kernel = chunk['kernel']
        y = grid_lib.convolve_arranged(layers, [kernel]) if linear else adapted @ kernel
        y = jax.nn.leaky_relu(y + chunk['bias'], SLOPE)
        return logits + jnp.matmul(y, chunk['out'], preferred_element_type=jnp.float32), None

    if not gap_cam:
        logits = jnp.zeros((layers[0].shape[1], *grid))
        # Two chunks at a time keep two cores busy: the products of one are too small for that.
        logits, _ = jax.lax.scan(add, logits, fused['hidden'], unroll=2)
        if not network.classify:
            return logits.max((1, 2)), logits

    if 'cls_adapted' in fused:
        x = conv2d(adapted, fused['cls_adapted'])
    else:
        x = grid_lib.convolve_arranged(layers, fused['cls'])
    x += fused['cls_bias']
    if 'cls_constant' in fused:
        x += grid_lib.convolve_constant(jnp.ones(1, x.dtype), fused['cls_constant'], grid)
    if gap_cam:  # The score is linear in the map's average.
        positions = jax.nn.relu(x).astype(jnp.float32) @ fused['score']['kernel']
        return positions.mean((1, 2))[:, 0] + fused['score']['bias'], positions[..., 0]

    of_map = logits[..., None]
    x += conv2d(of_map.astype(x.dtype), fused['map'])
    x = jax.nn.relu(x).astype(jnp.float32)
    pooled = [x.max((1, 2)), x.mean((1, 2)), of_map.max((1, 2)), of_map.mean((1, 2))]
    scores = jnp.concatenate(pooled, -1) @ fused['score']['kernel'] + fused['score']['bias']
    return scores[:, 0], logits


def _simplenet(fused, layers):
    grid = layers[0].shape[1:3]
    x = fused['bias']
    for layer, kernel in zip(layers, fused['patches'], strict=True):
        patches = systems.average_patches(layer, len(kernel))
        x += grid_lib.resize(patches @ kernel, grid).astype(kernel.dtype)
    x = jax.nn.leaky_relu(x, SLOPE)
    logits = jnp.matmul(x, fused['out'], preferred_element_type=jnp.float32)
    return logits.max((1, 2)), logits
