"""What computes a folded network: OpenVINO on a CPU where it is installed, else XLA."""

import importlib.util
import logging as py_logging
import sys
import threading

from absl import logging
import jax
import numpy as np

from ssn_jax.errors import UserError

_PACKAGES = ('openvino', 'onnx')  # The second one to write the graph that the first one reads.


def choose(asked: str) -> str:
    """The engine's name, 'openvino' or 'xla', for what `config.engine` asks.

    Raises:
      UserError: OpenVINO is asked for, and it is not installed or this is no CPU.
    """
    if asked == 'xla':
        return 'xla'
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    on_cpu = jax.default_backend() == 'cpu'
    if asked == 'openvino' and not on_cpu:
        raise UserError(f'--engine=openvino is for CPUs: here JAX has a {jax.default_backend()}.')
    if asked == 'openvino' and missing:
        raise UserError(
            f"--engine=openvino needs {' and '.join(missing)}: pip install 'ssn_jax[cpu]'."
        )
    if on_cpu and missing:
        logging.info("XLA computes; pip install 'ssn_jax[cpu]' for OpenVINO, which is faster.")
    return 'openvino' if on_cpu and not missing else 'xla'


def import_openvino():
    """The package openvino, imported without what its import does besides.

    It reports to its makers, from a fork of this process, which has JAX's threads; and it takes
    absl's handler from the log.
    """
    handlers, telemetry = list(py_logging.root.handlers), 'openvino_telemetry'
    absent = telemetry not in sys.modules
    if absent:
        sys.modules[telemetry] = None  # As if it was not installed.
    import openvino

    if absent:
        del sys.modules[telemetry]
    py_logging.root.handlers[:] = handlers
    return openvino


class OpenVino:
    """An ONNX model compiled for this CPU; it takes images one by one, on all cores.

    Threads may share one: each has requests of its own.
    """

    def __init__(self, model: bytes, size: tuple[int, int], precision: str = 'float32'):
        """Compiles a model.

        Args:
          model: as `graph.py` writes it, with one input of images.
          size: their height and width.
          precision: float32, or bfloat16 where the processor has it.
        """
        openvino = import_openvino()
        core = openvino.Core()
        rounded = precision == 'bfloat16'
        if rounded and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            logging.warning('This processor has no bfloat16: float32 it is.')
            rounded = False
        self.name = f'OpenVINO {openvino.__version__.split("-")[0]}, '
        self.name += 'bfloat16' if rounded else 'float32'
        graph = core.read_model(model)
        graph.reshape([1, *size, 3])
        options = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': 'bf16' if rounded else 'f32',
        }
        self._compiled = core.compile_model(graph, 'CPU', options)
        self._requests = threading.local()

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs (N, ...) of images, uint8 RGB (N, H, W, 3)."""
        if not hasattr(self._requests, 'own'):
            self._requests.own = self._compiled.create_infer_request()
        request, found = self._requests.own, None
        for i in range(len(images)):
            request.infer([images[i : i + 1]])
            outputs = [tensor.data for tensor in request.output_tensors]
            if found is None:
                found = [np.empty((len(images), *x.shape[1:]), x.dtype) for x in outputs]
            for kept, x in zip(found, outputs, strict=True):
                kept[i] = x[0]
        return found
