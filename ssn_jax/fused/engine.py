"""What computes a folded network: OpenVINO on a CPU where it is installed, else XLA."""

import importlib
import importlib.metadata
import logging as py_logging
import pathlib
import sys
import tempfile
import threading

from absl import logging
import jax
import numpy as np

from ssn_jax.errors import UserError

# By package, the first version that will do: onnx writes the graph that OpenVINO reads.
_PACKAGES = {'openvino': 2025, 'onnx': 1}


def choose(asked: str) -> str:
    """The engine's name, 'openvino' or 'xla', for what `config.engine` asks.

    Raises:
      UserError: OpenVINO is asked for, and it is not installed or this is no CPU.
    """
    if asked == 'xla':
        return 'xla'
    missing = [name for name, least in _PACKAGES.items() if _version(name) < least]
    on_cpu = jax.default_backend() == 'cpu'
    if asked == 'openvino' and not on_cpu:
        raise UserError(f'--engine=openvino is for CPUs: here JAX has a {jax.default_backend()}.')
    if asked == 'openvino' and missing:
        raise UserError(
            f"--engine=openvino needs {' and '.join(missing)}: pip install 'ssn_jax[cpu]' "
            f'(openvino {_PACKAGES["openvino"]} or newer).'
        )
    if on_cpu and missing:
        logging.info(
            "XLA computes; pip install 'ssn_jax[cpu]' for OpenVINO, which is faster (%s: absent, "
            'or too old).',
            ', '.join(missing),
        )
    return 'openvino' if on_cpu and not missing else 'xla'


def _version(package):
    """The first number of an installed package's version; -1 without the package."""
    try:
        return int(importlib.metadata.version(package).split('.')[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return -1


def import_quietly(package: str):
    """OpenVINO or NNCF, imported without what their import does besides.

    They report to their makers, from a fork of this process, which has JAX's threads; and OpenVINO
    takes absl's handler from the log.
    """
    handlers, telemetry = list(py_logging.root.handlers), 'openvino_telemetry'
    absent = telemetry not in sys.modules
    if absent:
        sys.modules[telemetry] = None  # As if it was not installed.
    try:
        return importlib.import_module(package)
    finally:
        if absent:
            del sys.modules[telemetry]
        py_logging.root.handlers[:] = handlers


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16."""
    core = import_quietly('openvino').Core()
    return 'BF16' in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES')


def read(path: pathlib.Path):
    """An OpenVINO model from its .xml and .bin.

    Raises:
      UserError: one of them is missing or damaged.
    """
    try:
        return import_quietly('openvino').Core().read_model(path)
    except RuntimeError as e:
        raise UserError(
            f'{path} or {path.with_suffix(".bin").name} beside it cannot be read '
            f'({_last_line(e)}): the command that made them makes them anew.'
        ) from None


def _last_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def serialise(model) -> tuple[bytes, bytes]:
    """An OpenVINO model as the contents of its .xml and .bin."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'model.xml'
        import_quietly('openvino').save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix('.bin').read_bytes()


class OpenVino:
    """A model compiled for this CPU; it takes images one by one, on all cores.

    Threads may share one: each has requests of its own.
    """

    def __init__(self, model, size: tuple[int, int], precision: str = 'float32'):
        """Compiles a model.

        Args:
          model: ONNX as `graph.py` writes it, with one input of images; or OpenVINO's.
          size: their height and width.
          precision: float32, bfloat16 where the processor has it, or int8, of a model that
            `quantise` made.

        Raises:
          UserError: it cannot be compiled.
        """
        openvino = import_quietly('openvino')
        core = openvino.Core()
        precision = precision if precision != 'bfloat16' or has_bfloat16() else 'float32'
        version = openvino.__version__.split('-')[0]
        known = precision if precision in ('bfloat16', 'int8') else 'float32'
        self.name = f'OpenVINO {version}, {known}'
        options = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': 'bf16' if precision == 'bfloat16' else 'f32',
        }
        try:
            graph = core.read_model(model) if isinstance(model, bytes) else model
            graph.reshape([1, *size, 3])
            self._compiled = core.compile_model(graph, 'CPU', options)
        except RuntimeError as e:
            raise UserError(
                f'OpenVINO {version} cannot compile this network ({_last_line(e)}): engine=xla, in '
                'float32, computes without it.'
            ) from None
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
