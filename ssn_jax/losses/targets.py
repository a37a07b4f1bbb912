"""What is known of defects, brought to the feature grid, where losses read it."""

from collections.abc import Iterable

import cv2
import ml_collections
import numpy as np

from ssn_jax.data import Split, defects, images


def truth(
    settings: ml_collections.ConfigDict, split: Split, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """What is known of the images, at the feature grid, as `synthesis.place` reads it.

    Args:
      settings: `config.supervision`.
      split: as `training_split` left it.
      grid: height and width (h, w) of the feature grid.

    Returns:
      label (N,), known (N,), and where any mask is known mask and weight (N, h, w, 1): float32.
    """
    arrays = {'label': split.labels, 'known': split.has_mask}
    if split.masks.any():
        kernel = np.ones((settings.dilation, settings.dilation), np.uint8)
        dilated = [cv2.dilate(mask, kernel) for mask in split.masks]
        weights = (
            distance_weights(mask, settings.distance_weight, settings.distance_power)
            for mask in dilated
        )
        arrays['mask'] = _resize(dilated, grid) >= 0.5
        arrays['weight'] = _resize(weights, grid)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def product(split: Split, grid: tuple[int, int]) -> np.ndarray:
    """Where the product is in normal images, at the feature grid (h, w): float32 (N, h, w, 1).

    1 where it covers most of a position; of defective images nothing is said, 0 everywhere.
    """
    places = np.zeros((len(split.labels), *grid, 1), np.float32)
    for i in np.flatnonzero(split.labels == 0):
        seen = defects.foreground(split.images[i]).astype(np.uint8)
        places[i, :, :, 0] = cv2.resize(seen, grid[::-1], interpolation=cv2.INTER_AREA)
    return places


def distance_weights(mask: np.ndarray, weight: float = 3.0, power: float = 2.0) -> np.ndarray:
    """Weights that grow from a defect's edge, where masks are least sure, to its middle.

    Božič et al., "Mixed supervision for surface-defect detection", Computers in Industry 2021.

    Args:
      mask: (H, W) of zeros and ones.
      weight: the weight in the middle.
      power: how steeply it falls to the edge.

    Returns:
      (H, W) float32: weight * (distance / largest distance)^power in each 8-connected region,
      1 outside.
    """
    weights = np.ones(mask.shape, np.float32)
    mask = mask.astype(np.uint8)
    count, regions = cv2.connectedComponents(mask, connectivity=8)
    if count == 1:  # The background alone.
        return weights
    distance = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Where a region fills the image there is no edge to measure from: OpenCV says infinity.
    distance = np.minimum(distance, sum(mask.shape))
    for region in range(1, count):
        inside = regions == region
        weights[inside] = weight * (distance[inside] / distance[inside].max()) ** power
    return weights


def _resize(x: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Resizes N arrays (H, W) bilinearly to (N, *size, 1)."""
    return np.stack([images.resize(y.astype(np.float32), size) for y in x])[..., None]
