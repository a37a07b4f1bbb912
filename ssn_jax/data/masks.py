"""From the picture that a mask is saved as to the region that it marks, and to another size."""

import cv2
import numpy as np

_BLOCK = np.ones((3, 3), np.uint8)


def strength(layers: np.ndarray) -> np.ndarray:
    """How strongly each pixel of a mask is painted: 0 on its ground.

    What is opaque where something is transparent; else how far a colour is from the ground's: from
    black where the mask has any, and otherwise, in a coloured mask, from what is most common along
    its border; in a grey one how much brighter it is than its darkest.

    Args:
      layers: (H, W) or (H, W, C) of any type; grey, or three colours, with alpha last or without.

    Returns:
      (H, W) float32, not negative.
    """
    layers = layers.astype(np.float32)
    if layers.ndim == 2:
        layers = layers[..., None]
    if layers.shape[2] in (2, 4):
        alpha = layers[..., -1]
        if alpha.min() <= alpha.max() / 2 and alpha.min() < alpha.max():
            return alpha - alpha.min()
        layers = layers[..., :-1]
    bright = layers.max(2)
    dark, top = bright.min(), bright.max()
    if dark == top and (layers == layers[0, 0]).all():
        return np.maximum(bright, 0)  # One colour: all of it is painted, unless it is black.
    hue = (bright - layers.min(2)).max()
    if np.mean(bright < top / 5) < 0.01 and hue > top / 4:  # Lossy files hold some dark edges.
        border = np.concatenate([layers[0], layers[-1], layers[:, 0], layers[:, -1]])
        colours, counts = np.unique(border, axis=0, return_counts=True)
        return np.abs(layers - colours[counts.argmax()]).max(2)
    return bright - dark


def region(strength: np.ndarray, lossy: bool) -> np.ndarray:
    """The region that a mask marks, uint8 (H, W) of zeros and ones.

    Labels, areas of one value each, count whatever their value is. Where values run into each other
    (soft edges, and the noise of lossy files) a region ends half-way between ground and paint, and
    what is fainter than a quarter of the mask's highest value is noise.

    Args:
      strength: (H, W) float32, as of the function of this name.
      lossy: whether the file's format is a lossy one.
    """
    top = strength.max()
    if not top > 0:
        return np.zeros(strength.shape, np.uint8)
    if not lossy and _has_labels(strength):
        labels = np.isin(strength, np.unique(strength[_flat(strength)]))
        near = cv2.dilate(strength, _BLOCK)  # Soft edges of labels end at their half.
        return ((strength > 0) & (labels | (strength >= near / 2))).astype(np.uint8)
    floor = max(top / 4, min(top / 2, 1.5)) if lossy else top / 4
    count, parts = cv2.connectedComponents((strength >= floor).astype(np.uint8))
    highest = np.zeros(count, np.float32)
    np.maximum.at(highest, parts.ravel(), strength.ravel())
    upper = (parts > 0) & (strength >= highest[parts] / 2)
    # Lossy files overshoot: the upper quartile tells the paint better than the highest value.
    values, of = strength[upper], parts[upper]
    numbers = np.bincount(of, minlength=count)
    place = np.maximum(np.cumsum(numbers) - 1 - numbers // 4, 0)
    paint = np.append(values[np.lexsort((values, of))], 0)[place]
    level = np.where(parts > 0, paint[parts], np.inf).astype(np.float32)
    # A label that touches a brighter one ends at half of its own value.
    labels = _flat(strength, 5) & (strength >= floor)
    level[labels] = np.minimum(level, strength)[labels]
    return (strength >= cv2.erode(level, _BLOCK) / 2).astype(np.uint8)


def _has_labels(strength: np.ndarray) -> bool:
    """Whether what is faint in a mask are labels, and neither edges nor noise."""
    top = strength.max()
    faint = (strength > 0) & (strength < top / 2)
    if not faint.any():
        return False
    values, flat = np.unique(strength), _flat(strength)
    if ((values < top) & (values >= top / 16 * 15)).any():
        # Noise lies near the top as near the ground, and few of its many values lie flat.
        return 2 * len(np.unique(strength[flat])) > len(values)
    # A thin line is a label too.
    told = flat | (strength == cv2.dilate(strength, _BLOCK))
    return 2 * np.count_nonzero(told & faint) > np.count_nonzero(faint)


def _flat(strength: np.ndarray, side: int = 3) -> np.ndarray:
    """Where values lie in a square of so many equal ones a side, bool (H, W)."""
    square = np.ones((side, side), np.uint8)
    lowest, highest = cv2.erode(strength, square), cv2.dilate(strength, square)
    return cv2.dilate((lowest == highest).astype(np.uint8), square) > 0


def resize(mask: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask of zeros and ones (H, W) to `image_size`, so that none of its regions is lost.

    A pixel is marked where at least half of its area is; a region that would vanish keeps the pixel
    that holds the most of it.
    """
    height, width = image_size
    smaller = height * width < mask.size
    share = cv2.resize(
        mask.astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR,
    )
    resized = (share >= 0.5 - 1e-6).astype(np.uint8)
    _, parts = cv2.connectedComponents(mask)
    rows, columns = np.nonzero(mask)
    of = parts[rows, columns]
    rows, columns = rows * height // mask.shape[0], columns * width // mask.shape[1]
    kept = np.zeros(parts.max() + 1, bool)
    kept[of[resized[rows, columns] > 0]] = True
    lost = ~kept[of]
    places, counts = np.unique(
        np.stack([of[lost], rows[lost], columns[lost]]), axis=1, return_counts=True
    )
    order = np.lexsort((counts, places[0]))
    fullest = order[np.diff(places[0][order], append=0) != 0]  # The last one of each part.
    resized[places[1][fullest], places[2][fullest]] = 1
    return resized
