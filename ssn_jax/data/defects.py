"""Defects drawn into normal images: anomalies that pass through the backbone like real ones.

Noise in feature space is told by what no image can cause, and a discriminator that has learnt to
tell it need not know a scratch. Drawn defects are crude, but their features are those of images.
Six kinds, each in a random place of the product:

- paste: a piece of another image, turned (Li et al., "CutPaste", CVPR 2021);
- tone: darker or brighter, with less or more contrast;
- smear: blurred along a line;
- warp: pushed, twisted, or drawn together;
- scratch: a thin line that wanders, darker or brighter;
- break: a piece of the edge is missing, half the time of what sticks out; not on textures.
"""

from concurrent.futures import ThreadPoolExecutor
import functools
import itertools

import cv2
import numpy as np

# Areas in pixels of an image of 256x256; log-uniform between the two.
_AREAS = (20.0, 500.0)
# What differs by more than so many levels of 255 is part of the defect.
_VISIBLE = 10
# A defect has at least so many pixels, or is drawn again (at most _TRIES times).
_LEAST, _TRIES = 15, 20


def draw(images: np.ndarray, copies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws one defect into each of several copies of every image.

    Args:
      images: normal images, uint8 RGB (N, H, W, 3).
      copies: how many copies of each; the kinds take turns, from one image to the next too.
      seed: places and looks follow from it, and from the image's index, alone.

    Returns:
      uint8 (N * copies, H, W, 3), the copies of an image side by side, and their masks, uint8
      (N * copies, H, W) of zeros and ones.
    """

    def one(index: int) -> None:
        image, copy = divmod(index, copies)
        rng = np.random.default_rng([seed, image, copy])
        other = images[rng.integers(len(images))]
        kinds = _kinds_of(images[image])
        kind = kinds[index % len(kinds)]
        drawn[index], masks[index] = draw_one(images[image], other, kind, rng)

    drawn = np.empty((len(images) * copies, *images.shape[1:]), np.uint8)
    masks = np.empty(drawn.shape[:3], np.uint8)
    with ThreadPoolExecutor() as pool:  # OpenCV releases the interpreter's lock.
        list(pool.map(one, range(len(drawn))))
    return drawn, masks


def _kinds_of(image):
    """The kinds that an image can have: nothing breaks off where no edge of a product is in view.

    A texture fills the image, and the half of it that `foreground` finds lies on its border too.
    """
    in_view = _border(foreground(image)).mean() < 0.25
    return [kind for kind in _KINDS if kind != 'break' or in_view]


def draw_one(
    image: np.ndarray, other: np.ndarray, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a defect of a kind (see above) into a copy of an image.

    Args:
      image: uint8 RGB (H, W, 3).
      other: where a paste comes from, of the same shape.
      kind: paste, tone, smear, warp, scratch or break.
      rng: source of every choice.

    Returns:
      The image, and the mask of what has visibly changed, uint8 (H, W).
    """
    places = np.argwhere(foreground(image))
    scale = image.shape[0] * image.shape[1] / 256**2
    for _ in range(_TRIES):
        row, column = places[rng.integers(len(places))]
        area = scale * np.exp(rng.uniform(*np.log(_AREAS)))
        changed = _KINDS[kind](image.astype(np.float32), other, (row, column), area, rng)
        changed = changed.clip(0, 255).astype(np.uint8)
        # OpenCV's maximum of the channels: NumPy is slow along an axis of three.
        difference = functools.reduce(cv2.max, cv2.split(cv2.absdiff(changed, image)))
        mask = (difference > _VISIBLE).astype(np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        if mask.sum() >= _LEAST:
            break
    return changed, mask


def foreground(image: np.ndarray) -> np.ndarray:
    """Where the product is (H, W), by Otsu's threshold: the side that is rarer on the border.

    On a texture that fills the image it is one of two halves of it, which does no harm.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    _, bright = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    product = 1 - bright if _border(bright).mean() > 0.5 else bright
    product = cv2.dilate(product, np.ones((5, 5), np.uint8)) > 0
    return product if product.any() else np.ones_like(product)


def _border(x):
    """The values (2H + 2W,) along the edges of an image (H, W)."""
    return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


def _blob(shape, place, area, rng):
    """A bent ellipse with a ragged, soft edge as opacities (H, W) in 0..1."""
    aspect = np.exp(rng.uniform(0, np.log(8)))
    long = np.sqrt(area * aspect / np.pi)
    short = long / aspect
    along, across = _turned(shape, place, rng.uniform(0, np.pi))
    across = across + 0.3 * rng.normal() * along**2 / max(long, 1)
    radius = np.hypot(along / long, across / short)
    angle = np.arctan2(across / short, along / long)
    for waves in (2, 3, 5):
        phase = rng.uniform(0, 2 * np.pi)
        radius *= 1 + 0.12 * rng.normal() * np.cos(waves * angle + phase)
    return np.clip((1 - radius) * short / rng.uniform(0.7, 1.5) + 0.5, 0, 1)[..., None]


def _turned(shape, place, angle):
    """Coordinates (H, W) around a place, along and across a direction."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    down, right = rows - place[0], columns - place[1]
    return (
        right * np.cos(angle) + down * np.sin(angle),
        down * np.cos(angle) - right * np.sin(angle),
    )


def _paste(image, other, place, area, rng):
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(0, 360), 1)
    other = cv2.warpAffine(other, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
    # Mostly from the product itself; what is missing shows what lies behind it.
    where = foreground(other) if rng.random() < 0.7 else np.ones((height, width), bool)
    origins = np.argwhere(where)
    shift = np.array(place) - origins[rng.integers(len(origins))]
    opacity = _blob(image.shape, place, area, rng)
    return image + opacity * (np.roll(other, shift, (0, 1)) - image)


def _tone(image, other, place, area, rng):
    del other
    opacity = _blob(image.shape, place, area, rng)
    mean = (opacity * image).sum((0, 1)) / max(opacity.sum(), 1e-6)
    level = rng.choice([-1, 1]) * rng.uniform(15, 70)
    changed = mean + rng.uniform(0.3, 1.3) * (image - mean) + level
    return image + opacity * (changed - image)


def _smear(image, other, place, area, rng):
    del other
    size = 2 * int(rng.integers(2, 7)) + 1
    half, angle = size // 2, rng.uniform(0, np.pi)
    along = np.linspace(-half, half, 4 * size)
    kernel = np.zeros((size, size), np.float32)
    rows, columns = half + along * np.sin(angle), half + along * np.cos(angle)
    kernel[rows.round().astype(int), columns.round().astype(int)] = 1
    blurred = cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    return image + _blob(image.shape, place, area, rng) * (blurred - image)


def _warp(image, other, place, area, rng):
    del other
    reach = np.clip(np.sqrt(area) * rng.uniform(0.8, 1.5), 6, 22)
    right, down = _turned(image.shape, place, 0.0)
    strength = np.exp(-(((right**2 + down**2) / reach**2) ** 2))
    kind = rng.random()
    if kind < 0.4:  # Pushed.
        angle, way = rng.uniform(0, 2 * np.pi), rng.uniform(2, 6)
        x, y = right + way * strength * np.cos(angle), down + way * strength * np.sin(angle)
    elif kind < 0.8:  # Twisted.
        angle = rng.choice([-1, 1]) * rng.uniform(0.3, 1) * strength
        x = right * np.cos(angle) - down * np.sin(angle)
        y = right * np.sin(angle) + down * np.cos(angle)
    else:  # Drawn together or apart.
        zoom = 1 + rng.choice([-0.4, 0.6]) * strength
        x, y = right * zoom, down * zoom
    x, y = (x + place[1]).astype(np.float32), (y + place[0]).astype(np.float32)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _scratch(image, other, place, area, rng):
    del other
    height, width = image.shape[:2]
    # A line that wanders, drawn four times as fine and averaged.
    step, bend, fine = rng.uniform(2, 5), rng.uniform(0.05, 0.5), 4
    angle = rng.uniform(0, 2 * np.pi)
    angles = angle + np.cumsum(bend * rng.normal(size=max(2, int(np.sqrt(area) * 4 / step))))
    points = np.cumsum(step * np.stack([np.cos(angles), np.sin(angles)], 1), 0) + place[::-1]
    opacity = np.zeros((height * fine, width * fine), np.float32)
    for start, end in itertools.pairwise(points):
        thick = max(1, round(fine * rng.uniform(0.6, 2.5)))
        cv2.line(opacity, *((fine * p).astype(int).tolist() for p in (start, end)), 1.0, thick)
    opacity = cv2.resize(opacity, (width, height), interpolation=cv2.INTER_AREA)
    opacity = cv2.GaussianBlur(opacity, (0, 0), rng.uniform(0.3, 0.8)).clip(0, 1)
    opacity = (opacity * foreground(image.astype(np.uint8)))[..., None]
    return image + opacity * rng.choice([-1, 1]) * rng.uniform(20, 90)


def _break(image, other, place, area, rng):
    del other
    product = foreground(image.astype(np.uint8)).astype(np.uint8)
    outlines, _ = cv2.findContours(product, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if rng.random() < 0.5:
        outlines = [cv2.convexHull(outline) for outline in outlines]
    edge = np.concatenate(outlines)[:, 0, ::-1]  # Rows and columns.
    place = edge[np.argmin(((edge - place) ** 2).sum(1))]
    inside = cv2.erode(product, np.ones((3, 3), np.uint8))[..., None]
    opacity = _blob(image.shape, place, area, rng) * inside
    # What shows instead: what lies behind, as bright as beside the place, with the grain of where
    # it is widest.
    behind = cv2.erode(1 - product, np.ones((3, 3), np.uint8)).astype(np.float32)[..., None]
    near = cv2.GaussianBlur(np.concatenate([image * behind, behind], -1), (0, 0), 8.0)
    overall = (behind * image).sum((0, 1)) / max(behind.sum(), 1)
    bright = (near[..., :3] + 1e-3 * overall) / (near[..., 3:] + 1e-3)
    room = cv2.distanceTransform(1 - product, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    wide = np.argwhere(room >= min(room.max(), 2 * np.sqrt(area)))
    shift = place - wide[rng.integers(len(wide))]
    grain = np.roll(behind * (image - bright), shift, (0, 1))
    return image + opacity * (bright + grain - image)


_KINDS = {
    'paste': _paste,
    'tone': _tone,
    'smear': _smear,
    'warp': _warp,
    'scratch': _scratch,
    'break': _break,
}
