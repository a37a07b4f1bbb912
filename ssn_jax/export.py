"""The trained predictor as one portable file: from images of any size to scores and maps."""

from collections.abc import Callable
import io
import json
import logging
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import ml_collections

from ssn_jax import data, decision, files, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.fused import forward
from ssn_jax.predictor import Predictor

_INPUT, _OUTPUTS = 'images', ('scores', 'maps')


def make_function(model: Predictor) -> Callable:
    """A model with its preprocessing, as a function of images of any size.

    Args:
      model: of an opened run.

    Returns:
      uint8 RGB images (N, H, W, 3) -> score logits (N,) and anomaly logits (N, *image_size), both
      float32. N, H and W may be symbolic.
    """
    config = model.config

    def predict(images):
        return forward.predict(model.fused, preprocess(config, images), False, config.precision)

    return predict


def preprocess(config: ml_collections.ConfigDict, images: jax.Array) -> jax.Array:
    """uint8 images (N, H, W, 3) of any size to whole levels, float32 (N, *image_size, 3).

    Resized to `config.resize` and cut if the run does so. As OpenCV's INTER_LINEAR, which computes
    with weights of 11 bits: levels differ from OpenCV's by one at most (by none when sizes are
    halved, in an eighth of the pixels otherwise).
    """
    size = tuple(config.image_size)
    whole = tuple(config.resize) if any(config.resize) else size
    top, left = ((n - m) // 2 for n, m in zip(whole, size, strict=True))
    x = _resize(images.astype(jnp.float32), 2, whole[1])
    x = jnp.floor(_resize(x, 1, whole[0]) + 0.5)
    return x[:, top : top + size[0], left : left + size[1]]


def _resize(x, axis, size):
    """Bilinear interpolation of one axis, whose length may be symbolic; edges are repeated.

    Places are computed in whole numbers, so that weights are as exact as `grid.resize`'s.
    """
    length = x.shape[axis]
    place = (2 * jnp.arange(size, dtype=jnp.int32) + 1) * length - size
    place = jnp.clip(place, 0, 2 * size * (length - 1))
    low, rest = place // (2 * size), place % (2 * size)
    high = jnp.minimum(low + 1, length - 1)
    weight = rest.astype(jnp.float32) / (2 * size)
    weight = weight.reshape([size if i == axis else 1 for i in range(4)])
    return jnp.take(x, low, axis=axis) * (1 - weight) + jnp.take(x, high, axis=axis) * weight


def metadata(model: Predictor) -> dict:
    """What a user of the file must know: the decision, the classes, sizes and origin."""
    config, threshold = model.config, model.threshold
    return {
        'format': 'ssn_jax predictor 1',
        'input': 'images: uint8 RGB (N, H, W, 3), any size',
        'outputs': 'scores: logits (N,); maps: logits (N, height, width) of image_size',
        'threshold': threshold,  # A logit: defective from this score on.
        'threshold_probability': None if threshold is None else float(decision.sigmoid(threshold)),
        'classes': list(decision.CLASSES),
        'image_size': list(config.image_size),
        'resize': list(config.resize),
        'config': config.name,
        'category': data.category_of(config.data),
        'epoch': model.epoch,
        **run_lib.versions(),
    }


def to_stablehlo(model: Predictor) -> bytes:
    """A zip archive of `predictor`, for `jax.export.deserialize`, and `metadata.json`.

    `predictor` holds StableHLO with symbolic N, H and W and all weights, for CPU, CUDA and TPU.
    """
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape('n, h, w, 3'), jnp.uint8)
    function = jax.jit(make_function(model))
    exported = jax.export.export(function, platforms=('cpu', 'cuda', 'tpu'))(images)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as f:
        f.writestr('predictor', exported.serialize())
        f.writestr('metadata.json', json.dumps(metadata(model), indent=2) + '\n')
    return archive.getvalue()


def to_onnx(model: Predictor) -> bytes:
    """An ONNX model with symbolic N, H and W; the metadata are its properties, as JSON.

    Raises:
      UserError: the packages of the export extra are missing.
    """
    try:
        import jax2onnx
    except ImportError:
        raise UserError("--format onnx needs jax2onnx: pip install -e '.[export]'.") from None
    logging.getLogger('onnx_ir').setLevel(logging.ERROR)  # It warns of shapes that stay symbolic.
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape('n, h, w, 3'), jnp.uint8)
    exported = jax2onnx.to_onnx(
        make_function(model),
        [images],
        model_name='ssn_jax',
        input_names=[_INPUT],
        output_names=list(_OUTPUTS),
    )
    _pool_images(exported.graph)
    for key, value in metadata(model).items():
        exported.metadata_props.add(key=key, value=json.dumps(value))
    return exported.SerializeToString()


def _pool_images(graph) -> None:
    """Rewrites max-pooling of (1, 1, N, H, W, C) to (N, C, H, W), which runtimes can do.

    jax2onnx 0.17 translates a reduce_window over four axes into a window over four axes, and no
    runtime pools more than three.
    """
    from onnx import helper

    made_by = {name: node for node in graph.node for name in node.output}
    for pool in [node for node in graph.node if node.op_type == 'MaxPool']:
        given = {a.name: list(a.ints) for a in pool.attribute if a.ints}
        if len(given['kernel_shape']) != 4:
            continue
        inner = made_by[pool.input[0]]
        source = made_by[inner.input[0]].input[0]
        [squeeze] = [node for node in graph.node if pool.output[0] in node.input]
        first, last = f'{pool.name}_nchw', f'{pool.name}_pooled'
        pads = given.get('pads', [0] * 8)
        new = [
            helper.make_node('Transpose', [source], [first], perm=[0, 3, 1, 2]),
            helper.make_node(
                'MaxPool',
                [first],
                [last],
                kernel_shape=given['kernel_shape'][1:3],
                strides=given['strides'][1:3],
                pads=pads[1:3] + pads[5:7],
            ),
            helper.make_node('Transpose', [last], list(squeeze.output), perm=[0, 2, 3, 1]),
        ]
        at = list(graph.node).index(squeeze)
        for old in (squeeze, pool, inner, made_by[inner.input[0]]):
            graph.node.remove(old)
        for node in reversed(new):
            graph.node.insert(at - 3, node)
        if any(given['kernel_shape'][i] != 1 for i in (0, 3)):
            raise ValueError('pooling over images or channels')


FORMATS = {'stablehlo': to_stablehlo, 'onnx': to_onnx}


def write(model: Predictor, form: str, output: pathlib.Path) -> None:
    """Writes a model to a file, whole or not at all.

    Args:
      model: of an opened run.
      form: a key of `FORMATS`.
      output: the file.

    Raises:
      UserError: the file cannot be written, or packages are missing.
    """
    files.check_output(output, '--output')
    files.write_output(output, FORMATS[form](model), '--output')
