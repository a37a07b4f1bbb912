"""The forward pass of folded weights (`fold.fuse`) in JAX, at the backbone's own grids.

Pure functions of arrays. `graph.py` writes the same network as an ONNX graph.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax.data import images as images_lib
from ssn_jax.fused import fold
from ssn_jax.models import efficientnet, grid as grid_lib, resnet, systems
from ssn_jax.models.layers import SLOPE, conv2d, depthwise

# Images that a CPU's cores may work on at the same time.
_IMAGES = 4

Backbone = fold.ResNet | fold.EfficientNet


def predict(
    fused: fold.Fused,
    images: jax.Array,
    one_by_one: bool | None = None,
    precision: str = 'float32',
    padded: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Score and map of images.

    Args:
      fused: as `fold.fuse` returns it.
      images: RGB (N, H, W, 3) in 0..255, uint8 or float.
      one_by_one: whether to go image by image, so that what is computed is still in the cache where
        it is used; by default on a CPU.
      precision: of products of float32 values, as `config.precision`.
      padded: whether images may have a margin of grey (`images.fit`), of which the map's maximum,
        where that is the score, is not.

    Returns:
      Score logits (N,) and full-size anomaly logits (N, H, W), both float32.
    """

    def run(images):
        stages = _backbone(fused.backbone, images)
        scores, logits = heads(fused, grid_lib.select_layers(stages, fused.network.layers))
        maps = fused.network.full_size_map(logits[..., None], images.shape[1:3])[..., 0]
        if scores is None:
            seen = maps
            if padded:  # The minimum, since it is finite even where all of an image is grey.
                least = maps.min((1, 2), keepdims=True)
                seen = jnp.where(images_lib.own(images), maps, least)
            scores = seen.max((1, 2))
        return scores, maps

    with jax.default_matmul_precision(precision):
        return grid_lib.by_image(run, images, _IMAGES, one_by_one)


def backbone(
    fused: Backbone, images: jax.Array, precision: str = 'float32'
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A folded backbone's three outputs on images (N, H, W, 3) in 0..255.

    Shapes as of the backbone itself; on a CPU image by image, as `predict` does it.
    """
    with jax.default_matmul_precision(precision):
        return grid_lib.by_image(functools.partial(_backbone, fused), images, _IMAGES)


def _backbone(fused, images):
    if isinstance(fused, fold.EfficientNet):
        return _efficientnet(fused, images)
    # The mean is subtracted before the zero padding; the standard deviation is in the kernel.
    x = jax.nn.relu(_conv(fused.stem, images - 255.0 * np.float32(resnet.IMAGENET_MEAN), 2))
    x = jax.lax.reduce_window(
        x, -np.array(np.inf, x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )  # fmt: skip
    outputs = []
    for blocks in fused.stages:
        for i, block in enumerate(blocks):
            x = _block(block, x, 2 if outputs and i == 0 else 1)
        outputs.append(x)
    return tuple(outputs)


def _efficientnet(fused, images):
    # The mean is subtracted before the zero padding; the standard deviation is in the kernel.
    x = jax.lax.conv_general_dilated(
        images - np.float32(efficientnet.MEAN), fused.stem['kernel'], (2, 2), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    x = jax.nn.relu6(x + fused.stem['bias'])
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
    """A residual block; the first of its convolutions that is not 1x1 carries the stride."""
    strided = next(i for i, conv in enumerate(block['convs']) if len(conv['kernel']) > 1)
    y = x
    for i, conv in enumerate(block['convs']):
        y = jax.nn.relu(y) if i else y
        y = _conv(conv, y, stride if i == strided else 1)
    if 'downsample' in block:
        x = _conv(block['downsample'], x, stride)
    return jax.nn.relu(x + y)


def _conv(conv, x, stride=1):
    """A convolution with 'kernel' (k, k, C, D) and 'bias' (D,), zero padding."""
    kernel = conv['kernel']
    if len(kernel) == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0] + conv['bias']
    pad = len(kernel) // 2, len(kernel) // 2
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return x + conv['bias']


def heads(fused: fold.Fused, layers: tuple[jax.Array, ...]) -> tuple[jax.Array | None, jax.Array]:
    """Scores (N,) and anomaly logits (N, h, w) at the network's own grid.

    Without a classification head scores are None: they are the maxima of the maps for people.

    Args:
      fused: as `fold.fuse` returns it.
      layers: the backbone's that the network reads (N, H_i, W_i, C_i), finest first.
    """
    of, network = fused.heads, fused.network
    if isinstance(network, systems.SimpleNet):
        return _simplenet(of, layers)
    gap_cam, linear = isinstance(network, systems.GapCam), network.adaptor == 'linear'
    if not linear:
        adapted = grid_lib.convolve(layers, of['adaptor']['kernel']) + of['adaptor']['bias']
        adapted = jax.nn.relu(adapted)
    if not gap_cam:
        layers = grid_lib.with_code(layers, network.waves)
        kernel, bias = of['hidden']['kernel'], of['hidden']['bias']
        hidden = grid_lib.project(layers, kernel) if linear else adapted @ kernel
        logits = jax.nn.leaky_relu(hidden + bias, SLOPE) @ of['hidden']['out']
        if not network.classify:
            return None, logits

    cls = of['cls']
    if 'adapted' in cls:
        x = conv2d(adapted, cls['adapted'])
    else:
        x = grid_lib.convolve(layers, cls['kernel'])
    x += cls['bias']
    if 'constant' in cls:
        x += grid_lib.convolve_constant(jnp.ones(1), cls['constant'], x.shape[1:3])
    score = cls['score']
    if gap_cam:  # The score is linear in the map's average.
        positions = jax.nn.relu(x) @ score['kernel']
        return positions.mean((1, 2))[:, 0] + score['bias'], positions[..., 0]

    of_map = logits[..., None]
    x = jax.nn.relu(x + conv2d(of_map, cls['map']))
    pooled = [x.max((1, 2)), x.mean((1, 2)), of_map.max((1, 2)), of_map.mean((1, 2))]
    scores = jnp.concatenate(pooled, -1) @ score['kernel'] + score['bias']
    return scores[:, 0], logits


def _simplenet(of, layers):
    grid, x = layers[0].shape[1:3], of['bias']
    for layer, kernel in zip(layers, of['patches'], strict=True):
        if kernel.shape[1] == 1:
            height, width = layer.shape[1:3]
            padded = jnp.pad(layer, ((0, 0), (1, 1), (1, 1), (0, 0)))
            averages = sum(padded[:, :, j : j + width] for j in range(3)) / 3
            part = sum(averages[:, i : i + height] @ kernel[i, 0] for i in range(3))
        else:
            part = conv2d(layer, kernel)
        x += grid_lib.resize(part, grid)
    logits = jax.nn.leaky_relu(x, SLOPE) @ of['out']
    return logits.max((1, 2)), logits
