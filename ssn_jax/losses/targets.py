"""What is known of defects, brought to the feature grid, where losses read it."""

from collections.abc import Sequence

import cv2
import ml_collections
import numpy as np

from ssn_jax.data import defects, images as images_lib

# Pixels that the smoothing of maps reaches (`grid.blur_matrix`).
_REACH = 12


def truth(
    settings: ml_collections.ConfigDict,
    masks: np.ndarray,
    grid: tuple[int, int],
    surroundings: tuple[int, int] = (0, 0),
) -> dict[str, np.ndarray]:
    """Masks and the weights of their places at the feature grid, as `synthesis.place` reads them.

    Args:
      settings: `config.supervision`.
      masks: uint8 (N, H, W) of zeros and ones; zeros where nothing is known.
      grid: height and width (h, w) of the feature grid.
      surroundings: of the config.

    Returns:
      mask and weight, float32 (N, h, w, 1); with surroundings also beside, 1 where they are.
    """
    kernel = np.ones((settings.dilation, settings.dilation), np.uint8)
    names = ['mask', 'weight'] + ['beside'] * any(surroundings)
    found = {name: np.zeros((len(masks), *grid, 1), np.float32) for name in names}
    found['weight'][:] = 1
    for i in np.flatnonzero(masks.any((1, 2))):
        dilated = cv2.dilate(masks[i], kernel)
        weights = distance_weights(dilated, settings.distance_weight, settings.distance_power)
        found['mask'][i, ..., 0] = images_lib.resize(dilated.astype(np.float32), grid) >= 0.5
        found['weight'][i, ..., 0] = images_lib.resize(weights, grid)
        if any(surroundings):
            inner, outer = (_grown(found['mask'][i, ..., 0], reach) for reach in surroundings)
            found['beside'][i, ..., 0] = outer - inner
    return found


def _grown(mask, reach):
    """A mask that reaches so many positions farther."""
    return cv2.dilate(mask, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))


def product(
    images: np.ndarray, grid: tuple[int, int], parts: Sequence[tuple[slice, slice]] | None = None
) -> np.ndarray:
    """Where the product is in images (N, H, W, 3), at the feature grid (h, w).

    Args:
      images: as said.
      grid: likewise.
      parts: the N rows and columns that padded images take; None: all.

    Returns:
      float32 (N, h, w, 1): 1 where it covers most of a position, else 0.
    """
    places = np.zeros((len(images), *grid, 1), np.float32)
    parts = parts or [np.s_[:, :]] * len(images)
    for place, image, part in zip(places, images, parts, strict=True):
        seen = np.zeros(image.shape[:2], np.uint8)
        seen[part] = defects.foreground(image[part])
        place[..., 0] = cv2.resize(seen, grid[::-1], interpolation=cv2.INTER_AREA)
    return places


def own(
    parts: Sequence[tuple[slice, slice]], size: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """The positions of a feature grid (h, w) that have a say in maps of padded images.

    Args:
      parts: the N rows and columns that these take.
      size: height and width with the margin.
      grid: as said.

    Returns:
      float32 (N, h, w, 1): 1 where images are, and as far into the margin as maps are smoothed.
    """
    places = np.zeros((len(parts), *grid, 1), np.float32)
    for place, part in zip(places, parts, strict=True):
        seen = np.zeros(size, np.float32)
        seen[tuple(slice(max(0, s.start - _REACH), s.stop + _REACH) for s in part)] = 1
        place[..., 0] = cv2.resize(seen, grid[::-1], interpolation=cv2.INTER_AREA) > 0
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
