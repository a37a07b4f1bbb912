"""From scores to a decision: the threshold of a run, and on which images it was chosen."""

from collections.abc import Callable
import math

from absl import logging
import ml_collections
import numpy as np

from ssn_jax import metrics
from ssn_jax.data import Split

# What a decision calls an image, by index.
CLASSES = ('normal', 'defective')


def decide(
    config: ml_collections.ConfigDict,
    scores_of: Callable[[np.ndarray], np.ndarray],
    trained: Split,
    held_out: Split,
) -> dict:
    """Chooses the threshold from which on an image is called defective; never on the test split.

    A run that has seen defects takes the largest TPR - FPR (Youden). One that has not takes the
    smallest threshold that keeps false alarms to `config.decision.fpr`.

    Args:
      config: the run's.
      scores_of: score logits (N,) of images (N, H, W, 3).
      trained: the images that were trained on.
      held_out: the images that were kept aside for this; if there are none, the threshold is
        chosen on `trained`, which flatters it, and `split` says so.

    Returns:
      threshold (a logit, as the scores), probability (its sigmoid), tpr and fpr on these images
      (None where unknown), method, split and images (their number). Without finite scores
      threshold is None and `undefined` says why.
    """
    name, split = ('held out', held_out) if len(held_out.labels) else ('train', trained)
    images, labels = split.images, split.labels > 0
    youden = config.supervision.kind != 'none'
    if not youden:
        images, labels = images[~labels], labels[~labels]
        name += ' (normal)'
    where = {'split': name, 'images': len(images)}
    where['method'] = 'Youden' if youden else f'false-positive rate at most {config.decision.fpr}'
    if not youden and 0 < config.decision.fpr * len(images) < 1:
        logging.warning(
            'The threshold is chosen on %d normal images: too few for a false alarm rate of %g, '
            'which needs %d. Add normal images, or keep more aside (--config.decision.holdout).',
            len(images),
            config.decision.fpr,
            math.ceil(1 / config.decision.fpr - 1e-9),
        )
    scores = scores_of(images)
    try:
        if youden:
            found = metrics.youden(scores, labels)
        else:
            found = {'tpr': None} | metrics.threshold_at_fpr(scores, config.decision.fpr)
    except ValueError as e:
        return {'threshold': None, 'undefined': str(e)} | where
    return found | {'probability': float(sigmoid(found['threshold']))} | where


def rates(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float | None]:
    """True- and false-positive rate of scores (N,) and labels (N,); None where a class is empty."""
    called, defective = scores >= threshold, labels > 0
    return {
        name: float(called[members].mean()) if members.any() else None
        for name, members in (('tpr', defective), ('fpr', ~defective))
    }


def sigmoid(logits):
    """The probabilities of logits, a number or an array of any shape."""
    return 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
