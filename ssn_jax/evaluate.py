"""Prediction of a split, and its metrics."""

import numpy as np

from ssn_jax import devices, metrics
from ssn_jax.data import Split
from ssn_jax.predictor import Predictor


def predict(model: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score logits (N,) and full-size anomaly logits (N, H, W) of images, float32.

    Args:
      model: a trained network.
      images: uint8 RGB (N, H, W, 3) of `config.image_size`. All local devices share them, and of
        several processes each predicts a share and gets all.
    """
    return devices.share_images(model.logits)(images)


def predict_scores(model: Predictor, images: np.ndarray) -> np.ndarray:
    """Score logits (N,) of images (N, H, W, 3), without holding all their maps at once."""
    parts = [images[i : i + 256] for i in range(0, len(images), 256)]
    return np.concatenate([predict(model, part)[0] for part in parts])


def evaluate(
    scores: np.ndarray, maps: np.ndarray, split: Split
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The seven metrics of predictions (N,) and (N, H, W) on a split.

    Both are logits: every metric depends on their order alone, and a sigmoid in float32 would
    tie what is confidently normal or anomalous.

    Returns:
      Values by metric name, None where undefined, and the reason for each None.
    """
    return metrics.evaluate(scores, maps, split.labels, split.masks, split.has_mask)
