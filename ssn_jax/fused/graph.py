"""The folded network as one plain ONNX graph: what is exported, and what a CPU's engine runs.

Channels come first inside, weights are constants, resizing and pooling are operations of their own,
and there are neither loops nor gathers. `forward.py` computes the same with JAX.
"""

from collections.abc import Sequence

import ml_collections
import numpy as np
from onnx import TensorProto, defs, helper, numpy_helper

from ssn_jax.data import images as images_lib
from ssn_jax.fused import fold
from ssn_jax.models import efficientnet, grid as grid_lib, resnet, systems
from ssn_jax.models.layers import SLOPE

OPSET = (
    17  # The least that has all that is used here; onnxruntime 1.20 and OpenVINO 2024.6 load it.
)
INPUT, OUTPUTS = 'images', ('scores', 'maps')


class _Builder:
    """Collects the nodes of a graph; tensors are known by their names, and their sizes by ours."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def constant(self, array: np.ndarray) -> str:
        """A weight."""
        name = f'w{len(self.constants)}'
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(
        self, operation: str, *inputs: str | np.ndarray | np.generic, name: str = '', **attributes
    ) -> str:
        """A node with one output; arrays among its inputs become constants."""
        self.count += 1
        output = name or f't{self.count}'
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(operation, names, [output], output, **attributes))
        return output

    def conv(
        self, x: str, kernel: np.ndarray, bias: np.ndarray | None = None, stride=1, pads=None
    ) -> str:
        """A convolution with a kernel (h, w, C, D), or (h, w, 1, C) of each channel by itself.

        `pads` are (top, left, bottom, right), and half of the kernel where they are not given.
        """
        size, depthwise = kernel.shape[:2], kernel.shape[2] == 1 and kernel.shape[3] > 1 and pads
        inputs = [kernel.transpose(3, 2, 0, 1)] + ([] if bias is None else [bias])
        return self.add(
            *('Conv', x, *inputs),
            kernel_shape=list(size),
            strides=[stride, stride],
            pads=list(pads or [n // 2 for n in size] * 2),
            group=kernel.shape[3] if depthwise else 1,
        )

    def reshape(self, x: str, *shape: int) -> str:
        """Reshapes; 0 keeps an axis, -1 is what remains."""
        return self.add('Reshape', x, np.array(shape, np.int64))

    def rows_and_columns(self, x: str, rows: np.ndarray, columns: np.ndarray) -> str:
        """Applies matrices (P, H) and (Q, W) to the last two axes of x (..., H, W)."""
        return self.add('MatMul', rows, self.add('MatMul', x, columns.T))


# --- Backbones ------------------------------------------------------------------------------------


def _backbone(b: _Builder, backbone, x: str, size: tuple[int, int]) -> list[tuple[str, tuple]]:
    """The backbone's outputs, each with its (height, width), of images (N, 3, H, W) in 0..255."""
    if isinstance(backbone, fold.EfficientNet):
        return _efficientnet(b, backbone, x, size)
    # The mean is subtracted before the zero padding; the standard deviation is in the kernel.
    x = b.add('Sub', x, 255 * np.float32(resnet.IMAGENET_MEAN)[:, None, None])
    x = b.add('Relu', b.conv(x, backbone.stem['kernel'], backbone.stem['bias'], 2))
    x = b.add('MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    size = _halved(_halved(size))
    outputs = []
    for blocks in backbone.stages:
        for i, block in enumerate(blocks):
            stride = 2 if outputs and i == 0 else 1
            strided = next(j for j, c in enumerate(block['convs']) if len(c['kernel']) > 1)
            y = x
            for j, conv in enumerate(block['convs']):
                y = b.add('Relu', y) if j else y
                y = b.conv(y, conv['kernel'], conv['bias'], stride if j == strided else 1)
            if 'downsample' in block:
                x = b.conv(x, block['downsample']['kernel'], block['downsample']['bias'], stride)
            x = b.add('Relu', b.add('Add', x, y))
            size = _halved(size) if stride == 2 else size
        outputs.append((x, size))
    return outputs


def _efficientnet(b, backbone, x, size):
    def relu6(x):
        return b.add('Clip', x, np.float32(0), np.float32(6))

    def same(kernel, stride):
        """TensorFlow's 'SAME' padding, more of it at the ends."""
        missing = [max((-(-n // stride) - 1) * stride + len(kernel) - n, 0) for n in size]
        return [m // 2 for m in missing] + [m - m // 2 for m in missing]

    x = b.add('Sub', x, np.float32(efficientnet.MEAN))
    stem, network = backbone.stem, efficientnet.BACKBONES['efficientnet_lite0']
    x = relu6(b.conv(x, stem['kernel'], stem['bias'], 2, same(stem['kernel'], 2)))
    size, channels, outputs = _halved(size), stem['bias'].size, []
    blocks = zip(backbone.blocks, network.blocks, strict=True)
    for i, (block, (features, _, stride)) in enumerate(blocks):
        y = x
        if 'expand' in block:
            y = relu6(b.conv(y, block['expand']['kernel'], block['expand']['bias']))
        kernel = block['depthwise']['kernel']
        y = relu6(b.conv(y, kernel, block['depthwise']['bias'], stride, same(kernel, stride)))
        y = b.conv(y, block['project']['kernel'], block['project']['bias'])
        x = b.add('Add', x, y) if stride == 1 and channels == features else y
        size, channels = (_halved(size) if stride == 2 else size), features
        if i in network.outputs:
            outputs.append((x, size))
    return outputs


def _halved(size):
    return tuple(-(-n // 2) for n in size)


def _select(b, outputs, layers):
    """`grid.select_layers`: tensors and their (height, width), finest first."""
    (first, size), last = outputs[-2], outputs[-1]
    if 1 in layers:
        # Averages of what is there: the padding is not counted.
        halved = b.add(
            *('AveragePool', outputs[-3][0]),
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
        )
        first = b.add('Concat', first, halved, axis=1)
    return [(first, size), last] if 3 in layers else [(first, size)]


# --- The feature grid -----------------------------------------------------------------------------


def _project(b, layers, kernel, bias, waves):
    """`grid.project` and a bias: each layer meets its part of the kernel (sum of C_i, D) first.

    What the position code of so many waves meets is a constant of the first layer's.
    """
    grid, parts, start = tuple(2 * n for n in layers[0][1]), [], 0
    for x, size, channels in layers:
        part = kernel[None, None, start : start + channels]
        start += channels
        y = b.conv(x, part)
        if waves and not parts:
            code = grid_lib.position_code(size, waves)
            met = (code @ kernel[start : start + 4 * waves]).transpose(2, 0, 1)
            y = b.add('Sub', y, -met)  # As in `_convolve`.
            start += 4 * waves
        # A little more than the factor: rounded down it gives the size, its only purpose.
        scales = [1.0, 1.0, *((m + 0.01) / n for n, m in zip(size, grid, strict=True))]
        parts.append(
            b.add(
                *('Resize', y, '', np.array(scales, np.float32)),
                mode='linear',
                coordinate_transformation_mode='align_corners',
            )
        )
    y = parts[0]
    for other in parts[1:]:
        y = b.add('Add', y, other)
    y = b.add('AveragePool', y, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    # Averages whose padding counts would shrink it at the edges.
    return b.add('Add', y, bias[:, None, None])


def _convolve(b, layers, kernel, bias):
    """`grid.convolve` and a bias (D,) or (H, W, D), by k x k projections at each layer's grid."""
    size, features = len(kernel), kernel.shape[-1]
    grid, columns_of, rows_of, start = tuple(2 * n for n in layers[0][1]), [], [], 0
    for x, (h, w), channels in layers:
        part = kernel[:, :, start : start + channels]
        start += channels
        # Output channels in the order row tap, feature, column tap.
        part = part.transpose(2, 0, 3, 1).reshape(1, 1, channels, -1)
        y = b.reshape(b.conv(x, part), 0, size * features, size, h, w)
        y = b.reshape(b.add('Transpose', y, perm=[0, 1, 3, 2, 4]), 0, size * features, h, size * w)
        columns = grid_lib.shifted_matrix(w, grid[1], size)
        y = b.add('MatMul', y, np.concatenate(columns, 1).T)
        y = b.reshape(y, 0, size, features, h, grid[1])
        y = b.reshape(b.add('Transpose', y, perm=[0, 2, 1, 3, 4]), 0, features, size * h, grid[1])
        columns_of.append(y)
        rows_of.append(np.concatenate(grid_lib.shifted_matrix(h, grid[0], size), 1))
    joined = b.add('Concat', *columns_of, axis=2) if len(columns_of) > 1 else columns_of[0]
    y = b.add('MatMul', np.concatenate(rows_of, 1), joined)
    bias = bias.transpose(2, 0, 1) if bias.ndim == 3 else bias[:, None, None]
    return b.add('Sub', y, -bias)  # NNCF 3.4 fails on what is added to a constant's product.


# --- Networks -------------------------------------------------------------------------------------


def _heads(b, fused, layers):
    """Score logits (N,) and raw anomaly logits (N, 1, h, w), as `forward.heads` computes them."""
    heads, network = fused.heads, fused.network
    if isinstance(network, systems.SimpleNet):
        return _simplenet(b, heads, layers)
    gap_cam, linear = isinstance(network, systems.GapCam), network.adaptor == 'linear'
    if not linear:
        adapted = b.add('Relu', _convolve(b, layers, **heads['adaptor']))
    if not gap_cam:
        hidden = heads['hidden']
        if linear:
            y = _project(b, layers, hidden['kernel'], hidden['bias'], network.waves)
        else:
            y = b.conv(adapted, hidden['kernel'][None, None], hidden['bias'])
        logits = b.conv(b.add('LeakyRelu', y, alpha=SLOPE), hidden['out'][None, None, :, None])
        if not network.classify:
            return None, logits
    cls = heads['cls']
    if 'adapted' in cls:
        x = b.conv(adapted, cls['adapted'], cls['bias'])
    else:
        x = _convolve(b, layers, cls['kernel'], cls['bias'] + _constant(cls, layers))
    score, bias = cls['score']['kernel'], cls['score']['bias']
    if gap_cam:
        logits = b.conv(b.add('Relu', x), score[None, None])
        scores = b.add('Add', _flat(b, b.add('GlobalAveragePool', logits)), bias)
        return scores, logits
    x = b.add('Relu', b.add('Add', x, b.conv(logits, cls['map'])))
    pooled = [b.add(f'Global{kind}Pool', y) for y in (x, logits) for kind in ('Max', 'Average')]
    pooled = b.conv(b.add('Concat', *pooled, axis=1), score[None, None], bias)
    return _flat(b, pooled), logits


def _constant(cls, layers):
    """What the adaptor's bias becomes in the convolution: (H, W, D), or nothing."""
    if 'constant' not in cls:
        return np.float32(0)
    grid = tuple(2 * n for n in layers[0][1])
    return np.asarray(grid_lib.convolve_constant(np.ones(1, np.float32), cls['constant'], grid))


def _simplenet(b, heads, layers):
    y, grid = None, layers[0][1]
    for (x, size, _), kernel in zip(layers, heads['patches'], strict=True):
        if kernel.shape[1] == 1:  # Padding counts in the averages, as zeros of the patches do.
            around = {'kernel_shape': [1, 3], 'pads': [0, 1, 0, 1], 'count_include_pad': 1}
            x = b.add('AveragePool', x, **around)
        part = b.conv(x, kernel)
        if size != grid:
            matrices = (
                grid_lib.resize_matrix(*pair, False) for pair in zip(size, grid, strict=True)
            )
            part = b.rows_and_columns(part, *matrices)
        y = b.add('Add', y, part) if y else part
    y = b.add('LeakyRelu', b.add('Add', y, heads['bias'][:, None, None]), alpha=SLOPE)
    logits = b.conv(y, heads['out'][None, None, :, None])
    return _flat(b, b.add('GlobalMaxPool', logits)), logits


def _flat(b, x):
    return b.reshape(x, -1)


# --- Models ---------------------------------------------------------------------------------------


def _model(b, outputs, size, opset, metadata=None):
    """The ONNX model of a graph, its input of any number of images of `size`."""
    given = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ['n', *size, 3])
    graph = helper.make_graph(b.nodes, 'ssn_jax', [given], outputs, b.constants)
    opsets = [helper.make_opsetid('', opset)]
    least = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=least)
    helper.set_model_props(model, metadata or {})
    return model.SerializeToString()


def predictor(
    fused: fold.Fused,
    config: ml_collections.ConfigDict,
    any_size: bool = False,
    opset: int = OPSET,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """An ONNX model from uint8 RGB images (N, H, W, 3) to score logits (N,) and anomaly logits.

    Args:
      fused: as `fold.fuse` returns it.
      config: the run's: its image size, and how images are brought to it.
      any_size: whether images may be of any size, resized as `Predictor.fit` does it but for
        rounding, by one level at most; else they are of the model's.
      opset: of the model.
      metadata: texts to store with it.

    Returns:
      The file; its maps are (N, *image_size), float32.
    """
    b, size = _Builder(), tuple(config.image_size)
    x = b.add('Transpose', b.add('Cast', INPUT, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    own = _own(b, x) if config.fit == 'pad' else None
    if any_size:
        x = _fitted(b, x, size, tuple(config.resize) if any(config.resize) else size)
    layers = _layers(b, fused.backbone, x, size, fused.network.layers)
    scores, logits = _heads(b, fused, layers)
    grid = tuple(
        n * (1 if isinstance(fused.network, systems.SimpleNet) else 2) for n in layers[0][1]
    )
    maps = b.rows_and_columns(logits, *fused.network.map_matrices(grid, size))
    if not scores:
        seen = maps
        if own:
            least = b.add('Neg', b.add('GlobalMaxPool', b.add('Neg', maps)))
            seen = b.add('Where', own, maps, least)
        scores = _flat(b, b.add('GlobalMaxPool', seen))
    b.add('Identity', scores, name=OUTPUTS[0])
    b.add('Squeeze', maps, np.int64([1]), name=OUTPUTS[1])
    float32 = TensorProto.FLOAT
    outputs = [
        helper.make_tensor_value_info(OUTPUTS[0], float32, ['n']),
        helper.make_tensor_value_info(OUTPUTS[1], float32, ['n', *size]),
    ]
    return _model(b, outputs, ('h', 'w') if any_size else size, opset, metadata)


def _layers(b, backbone, x, size, layers):
    """The selected layers: tensor, (height, width), channels."""
    selected = _select(b, _backbone(b, backbone, x, size), layers)
    channels = grid_lib.selected_channels(backbone.channels(), layers)
    return [(x, size, c) for (x, size), c in zip(selected, channels, strict=True)]


def _own(b, x):
    """`images.own` of images (N, 3, H, W): (N, 1, H, W)."""
    differs = b.add('Abs', b.add('Sub', x, np.float32(images_lib.GREY)[:, None, None]))
    sums = [b.add('ReduceSum', differs, np.int64([1, axis])) for axis in (3, 2)]
    return b.add('And', *(b.add('Greater', x, np.float32(0)) for x in sums))


def _fitted(b, x, size, whole):
    """Images (N, 3, H, W) of any size resized to `whole`, in whole levels, the middle cut out."""
    number = b.add('Slice', b.add('Shape', x), *(np.int64([n]) for n in (0, 1, 0)))
    sizes = b.add('Concat', number, np.int64([3, *whole]), axis=0)
    x = b.add(
        *('Resize', x, '', '', sizes), mode='linear', coordinate_transformation_mode='half_pixel'
    )
    x = b.add('Floor', b.add('Add', x, np.float32(0.5)))
    start = [(n - m) // 2 for n, m in zip(whole, size, strict=True)]
    end = [s + m for s, m in zip(start, size, strict=True)]
    return b.add('Slice', x, np.int64(start), np.int64(end), np.int64([2, 3]))


def latest_opset() -> int:
    """The latest opset that a model can be written in."""
    return min(defs.onnx_opset_version(), 22)


def features(
    backbone: fold.ResNet | fold.EfficientNet, size: Sequence[int], layers: tuple[int, ...]
) -> bytes:
    """An ONNX model from uint8 RGB images (N, *size, 3) to a backbone's layers (N, H_i, W_i, C_i).

    Args:
      backbone: as `fold.fuse_backbone` returns it.
      size: height and width.
      layers: which, as `grid.select_layers` takes them.
    """
    b = _Builder()
    x = b.add('Transpose', b.add('Cast', INPUT, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    outputs = []
    for i, (y, (h, w), c) in enumerate(_layers(b, backbone, x, tuple(size), layers)):
        name = b.add('Transpose', y, perm=[0, 2, 3, 1], name=f'layer{i}')
        shape = ['n', h, w, c]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return _model(b, outputs, tuple(size), OPSET)
