"""The trained predictor as one portable file: from images of any size to scores and maps."""

import io
import json
import pathlib
import zipfile

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssn_jax import data, decision, files, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.fused import engine, forward
from ssn_jax.predictor import Predictor


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
        'input': 'images: uint8 RGB (N, H, W, 3), '
        + ('any size' if config.fit == 'squash' else 'padded to image_size with grey'),
        'outputs': 'scores: logits (N,); maps: logits (N, height, width) of image_size',
        'threshold': threshold,  # A logit: defective from this score on.
        'threshold_probability': None if threshold is None else float(decision.sigmoid(threshold)),
        # Ascending: of n the share (1 + how many are as high as a score) / (n + 1) is its p-value.
        'normal_scores': np.sort(model.normal).tolist(),
        'decision': model.decision,
        'classes': list(decision.CLASSES),
        'image_size': list(config.image_size),
        'resize': list(config.resize),
        'fit': config.fit,
        # Of images of more than 8 bits: 0 to it become 0 to 255.
        'white': model.white,
        'config': config.name,
        'category': data.category_of(config.data),
        'epoch': model.epoch,
        'precision': model.config.precision,
        'precisions': _tried(model),
        **run_lib.versions(),
    }


def _tried(model):
    """What other precisions change of a finished run, if they were tried."""
    if not model.workdir or model.epoch != model.config.epochs:
        return None
    return (run_lib.read_json(model.workdir / 'results.json') or {}).get('precisions')


def to_stablehlo(model: Predictor) -> bytes:
    """A zip archive of `predictor`, for `jax.export.deserialize`, and `metadata.json`.

    `predictor` holds StableHLO with symbolic N, H and W and all weights, for CPU, CUDA and TPU:
    uint8 RGB images (N, H, W, 3) -> score logits (N,) and anomaly logits (N, *image_size), float32.

    Raises:
      UserError: the model infers in int8.
    """
    if model.config.precision == 'int8':
        raise UserError('--format stablehlo has no int8: take openvino, or --precision float32.')
    padded = model.config.fit == 'pad'

    def predict(images):
        fitted = preprocess(model.config, images)
        return forward.predict(model.fused, fitted, False, model.precision, padded)

    sides = '{}, {}'.format(*model.config.image_size) if padded else 'h, w'
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f'n, {sides}, 3'), jnp.uint8)
    exported = jax.export.export(jax.jit(predict), platforms=('cpu', 'cuda', 'tpu'))(images)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as f:
        f.writestr('predictor', exported.serialize())
        f.writestr('metadata.json', json.dumps(metadata(model), indent=2) + '\n')
    return archive.getvalue()


def to_onnx(model: Predictor, opset: int | None = None) -> bytes:
    """An ONNX model of any number of images of any size; the metadata are its properties, as JSON.

    Args:
      model: of an opened run.
      opset: of the file; None: 17, which onnxruntime 1.20 and OpenVINO 2024.6 load.

    Raises:
      UserError: the package onnx is missing, or does not know the opset; or the model infers in
        int8.
    """
    try:
        from ssn_jax.fused import graph
    except ImportError:
        raise UserError("--format onnx needs onnx: pip install 'ssn_jax[cpu]'.") from None
    about = {key: json.dumps(value) for key, value in metadata(model).items()}
    if model.config.precision == 'int8':
        raise UserError('--format onnx has no int8: take openvino, or --precision float32.')
    if opset is not None and not graph.OPSET <= opset <= graph.latest_opset():
        raise UserError(
            f'--opset={opset} cannot be used: it is in {graph.OPSET}..{graph.latest_opset()}.'
        )
    # What pads images knows their size, and the graph does not.
    any_size = model.config.fit == 'squash'
    return graph.predictor(model.fused, model.config, any_size, opset or graph.OPSET, about)


def to_openvino(model: Predictor) -> tuple[bytes, bytes]:
    """OpenVINO's model of any number of images of any size, as .xml and .bin; of any precision.

    The metadata are its `rt_info` under 'ssn_jax', as JSON. What computes in bfloat16 is told when
    it is compiled (INFERENCE_PRECISION_HINT).

    Raises:
      UserError: the package openvino is missing.
    """
    try:
        openvino = engine.import_quietly('openvino')
    except ImportError:
        raise UserError("--format openvino needs openvino: pip install 'ssn_jax[cpu]'.") from None
    exact = model.config.precision != 'int8'
    network = openvino.Core().read_model(to_onnx(model)) if exact else model.int8()
    for key, value in metadata(model).items():
        network.set_rt_info(json.dumps(value), ['ssn_jax', key])
    return engine.serialise(network)


def write(model: Predictor, form: str, output: pathlib.Path, opset: int | None = None) -> None:
    """Writes a model to a file, whole or not at all.

    Args:
      model: of an opened run.
      form: 'onnx', 'stablehlo' or 'openvino'.
      output: the file; of openvino the .xml, with a .bin beside it.
      opset: as of `to_onnx`.

    Raises:
      UserError: the file cannot be written, or packages are missing.
    """
    files.check_output(output, '--output')
    doubts = []
    if model.epoch != model.config.epochs:
        doubts.append(f'this is epoch {model.epoch} of {model.config.epochs}')
    if model.threshold is None:
        doubts.append(f'there is no threshold ({model.why_none}), so the file holds none')
    if doubts:
        logging.warning('%s: %s.', model.workdir, ', and '.join(doubts))
    if form == 'openvino':
        files.check_output(output.with_suffix('.bin'), '--output')
        content, weights = to_openvino(model)
        output.unlink(missing_ok=True)  # Never beside another's weights.
        files.write_output(output.with_suffix('.bin'), weights, '--output')
    else:
        content = to_onnx(model, opset) if form == 'onnx' else to_stablehlo(model)
    files.write_output(output, content, '--output')
