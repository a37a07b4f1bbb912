"""In which precision a finished run infers: what each changes of scores, and how long it takes."""

import importlib.util
import time

from absl import logging
import jax
import ml_collections
import numpy as np

from ssn_jax import devices, files
from ssn_jax.errors import UserError
from ssn_jax.fused import engine
from ssn_jax.predictor import INT8, Predictor

# No score may change by more than this share of the standard deviation of normal scores.
_TOLERATED = 0.1
_TURNS = 15
IMAGES = 200  # So many normal images are enough.


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the precision that a config asks for can not be had here."""
    if config.precision not in ('auto', 'int8'):
        return
    if not devices.is_alone():
        raise UserError(
            f'--config.precision={config.precision} is for one process: each would decide for '
            'itself.'
        )
    if config.precision == 'auto':
        return
    if engine.choose(config.engine) != 'openvino':
        raise UserError("--config.precision=int8 needs OpenVINO: pip install 'ssn_jax[cpu]'.")
    if importlib.util.find_spec('nncf') is None:
        raise UserError("--config.precision=int8 needs nncf: pip install 'ssn_jax[int8]'.")


def settle(model: Predictor, normal: np.ndarray) -> tuple[Predictor, dict[str, dict]]:
    """A trained network in the precision that its config asks for, int8 or auto.

    'auto' is the fastest that changes no score by more than a tenth of the normal scores' standard
    deviation.

    Args:
      model: of a run's folder, which receives int8.xml where int8 is asked for or tried.
      normal: normal images, uint8 (N, *image_size, 3), of which `IMAGES` are enough: int8's ranges
        are those of their features, and their scores are compared.

    Returns:
      The predictor, and by precision that was tried, ms: the median time of an image; change: the
      largest of a score, in standard deviations of the normal ones, None where these are alike.
    """
    asked = model.config.precision
    names = _candidates(model) if asked == 'auto' else ['float32', 'int8']
    models = {name: model.at(name) for name in names}
    if 'int8' in names:
        try:
            _quantise(model, normal)
        except Exception as e:  # Whatever NNCF makes of a network that it does not know.
            if asked == 'int8':
                raise
            logging.warning('This network is not tried in int8: %s', ' '.join(str(e).split()))
            del models['int8']
    scores = {name: each.logits(normal)[0] for name, each in models.items()}
    seconds = _take_turns(models, normal)
    spread, tried = float(scores['float32'].std()), {}
    for name in models:
        change = float(np.abs(scores[name] - scores['float32']).max())
        tried[name] = {'ms': round(1e3 * float(np.median(seconds[name])), 2)}
        # Of one image, or of images that are alike, there is no spread to compare with.
        tried[name]['change'] = 0.0 if not change else change / spread if spread else None
    chosen = asked
    if asked == 'auto':
        changes = {name: values['change'] for name, values in tried.items()}
        alike = [name for name, x in changes.items() if x is not None and x <= _TOLERATED]
        chosen = min(alike or ['float32'], key=lambda name: tried[name]['ms'])
    for name, values in tried.items():
        change = 'unknown' if values['change'] is None else f'{values["change"]:.2f}'
        logging.info(
            '%s: %.1f ms an image, largest change of a score in standard deviations: %s%s',
            *(name, values['ms'], change, ' (chosen)' if name == chosen else ''),
        )
    return models[chosen], tried


def _quantise(model, images):
    """Writes a run's int8.xml and int8.bin, never one beside another's."""
    from ssn_jax.fused import graph, quantise

    logging.info('Quantising on %d normal images', min(len(images), quantise.IMAGES))
    exact = graph.predictor(model.fused, model.config, any_size=model.config.fit == 'squash')
    text, weights = engine.serialise(quantise.quantise(exact, images))
    path = model.workdir / INT8
    path.unlink(missing_ok=True)
    files.write(path.with_suffix('.bin'), weights)
    files.write(path, text)


def _candidates(model):
    """The precisions that this machine can infer in, float32 first."""
    if model.engine == 'openvino':
        names = ['float32', 'bfloat16'] if engine.has_bfloat16() else ['float32']
        return names + ['int8'] * (importlib.util.find_spec('nncf') is not None)
    return ['float32'] if jax.default_backend() == 'cpu' else ['float32', 'bfloat16']


def _take_turns(models, images):
    """Seconds (_TURNS,) that each model takes for an image."""
    seconds = {name: [] for name in models}
    for turn in range(_TURNS):
        image = images[turn % len(images)][None]
        for name, model in models.items():
            began = time.perf_counter()
            model.logits(image)
            seconds[name].append(time.perf_counter() - began)
    return seconds
