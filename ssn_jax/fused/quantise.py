"""The graph in int8: quantised after training, by NNCF."""

import contextlib
import io
import logging as py_logging

import numpy as np
import onnx

from ssn_jax.fused import engine

IMAGES = 150
# So many of the first convolutions stay as they are: what they find, the head reads best.
_EXACT = 10


def quantise(model: bytes, images: np.ndarray):
    """An OpenVINO model that weighs and reads in 8 bits what its later convolutions do.

    The first ones, how images are brought to the model's size, and the interpolation of maps stay
    as they are (docs/inference.md has what each costs).

    Args:
      model: as `graph.predictor` writes it, in ONNX.
      images: normal ones, uint8 (N, H, W, 3), from which the ranges of values are taken.
    """
    nncf = engine.import_quietly('nncf')
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    py_logging.getLogger('nncf').setLevel(py_logging.ERROR)
    nodes = onnx.load_from_string(model).graph.node
    convolutions = [node.name for node in nodes if node.op_type == 'Conv'][:_EXACT]
    first = next(i for i, node in enumerate(nodes) if node.op_type == 'Conv')
    left = {*convolutions, *(node.name for node in nodes[:first])}
    given = engine.import_quietly('openvino').Core().read_model(model)
    # A convolution with a bias is two operations there.
    names = [x.get_friendly_name() for x in given.get_ordered_ops()]
    shown = nncf.Dataset([image[None] for image in images[:IMAGES]])
    scope = nncf.IgnoredScope(
        names=[name for name in names if name.split('/')[0] in left],
        types=['MatMul', 'Select'],
        validate=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # A bar.
        return nncf.quantize(
            given,
            shown,
            subset_size=min(len(images), IMAGES),
            target_device=nncf.TargetDevice.CPU,
            # Weights of 7 bits are for processors without VNNI, of before about 2020.
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
            ignored_scope=scope,
        )
