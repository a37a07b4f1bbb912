"""Prediction of a split, and its metrics."""

import numpy as np

from ssn_jax import decision, devices, metrics
from ssn_jax.data import Split, splits
from ssn_jax.predictor import Predictor

NO_TEST_IMAGES = 'there are no test images'


def predict(model: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score logits (N,) and full-size anomaly logits (N, H, W) of images, float32.

    Args:
      model: a trained network.
      images: uint8 RGB (N, H, W, 3) of `config.image_size`. All local devices share them, and of
        several processes each predicts a share and gets all.
    """
    if not len(images):  # A split may be empty.
        return np.zeros(0, np.float32), np.zeros(images.shape[:3], np.float32)
    return devices.share_images(model.logits, images)


def scores_of(model: Predictor, split: Split, part: str) -> decision.Scores:
    """The scores of a split's images, without holding all their maps at once.

    Args:
      model: a trained network.
      split: the images.
      part: as of `decision.Scores`.
    """
    scores, maxima, valid = [], [], splits.valid(split)
    for start in range(0, len(split.labels), 256):
        some = slice(start, start + 256)
        found, maps = predict(model, split.images[some])
        scores.append(found)
        maxima.append(metrics.maximum(maps, None if valid is None else valid[some]))
    return as_scores(split, np.concatenate(scores), np.concatenate(maxima), part)


def as_scores(
    split: Split, scores: np.ndarray, map_maxima: np.ndarray, part: str
) -> decision.Scores:
    """Scores (N,) and the maxima of maps (N,) of a split's images with what these are."""
    named = [part] * len(scores), split.files, split.defects
    return decision.Scores(*named, split.labels, scores, map_maxima)


def evaluate(
    scores: np.ndarray, maps: np.ndarray, split: Split
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The seven metrics of predictions (N,) and (N, H, W) on a split.

    Both are logits: every metric depends on their order alone, and a sigmoid in float32 would
    tie what is confidently normal or anomalous. Of padded images the margin does not count.

    Returns:
      Values by metric name, None where undefined, and the reason for each None.
    """
    if not len(scores):
        return dict.fromkeys(metrics.METRICS), dict.fromkeys(metrics.METRICS, NO_TEST_IMAGES)
    known = split.labels, split.masks, split.has_mask, splits.valid(split)
    return metrics.evaluate(scores, maps, *known)
