"""Pictures of maps: in colour over the grey image, with outlines around what is marked."""

import cv2
import numpy as np


def tint(
    image: np.ndarray,
    heat: np.ndarray,
    low: float = 0.0,
    high: float = 1.0,
    part: tuple[slice, slice] = np.s_[:, :],
    bgr: bool = False,
) -> np.ndarray:
    """Draws a map in colour, from dark blue at `low` to yellow at `high`, over the grey image.

    Args:
      image: uint8 RGB (H, W, 3).
      heat: the map (h, w); where it is not finite, the image stays bare.
      low: the lower end of the colour scale, in the map's unit.
      high: its upper end.
      part: rows and columns of the image that the map is stretched over.
      bgr: whether to return OpenCV's order of channels, which files are written from.

    Returns:
      uint8 RGB (H, W, 3).
    """
    # Little contrast is left to the image, lest its bright parts be taken for a high map.
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    cv2.convertScaleAbs(grey, grey, alpha=0.6, beta=51)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    below = picture[part]
    known = np.isfinite(heat)
    levels = np.where(known, (heat - low) / (high - low), 0).clip(0, 1)
    colours = cv2.applyColorMap(np.uint8(np.round(255 * levels)), cv2.COLORMAP_VIRIDIS)
    colours = colours if bgr else cv2.cvtColor(colours, cv2.COLOR_BGR2RGB)
    colours = cv2.resize(colours, below.shape[1::-1])
    if known.all():
        cv2.addWeighted(below, 0.3, colours, 0.7, 0, below)
        return picture
    cv2.addWeighted(below, 0.3, colours, 0.7, 0, colours)
    known = cv2.resize(np.uint8(known), below.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    cv2.copyTo(colours, known, below)
    return picture


def outline(picture: np.ndarray, regions: np.ndarray, width: int) -> None:
    """Draws a white line with black edges along the borders of regions.

    Args:
      picture: uint8 (H, W, 3), is drawn into.
      regions: (h, w), non-zero in the regions; stretched over the picture.
      width: of the white line, in pixels of the picture; the black one is three times as wide.
    """
    scale = np.divide(picture.shape[1::-1], regions.shape[::-1])
    lines, _ = cv2.findContours(np.uint8(regions > 0), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    lines = [np.round((line + 0.5) * scale - 0.5).astype(np.int32) for line in lines]
    for colour, thickness in (((0, 0, 0), 3 * width), ((255, 255, 255), width)):
        cv2.polylines(picture, lines, True, colour, thickness, cv2.LINE_AA)
