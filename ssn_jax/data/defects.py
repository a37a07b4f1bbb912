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

from collections.abc import Callable
import functools
import itertools

import cv2
import numpy as np

# Areas in pixels of an image of 256x256; log-uniform between the two.
_AREAS = (20.0, 500.0)
_LARGE = (500.0, 25000.0)
# What differs by more than so many levels of 255 is part of the defect.
_VISIBLE = 10
# A defect has at least so many pixels, or is drawn again (at most _TRIES times).
_LEAST, _TRIES = 15, 20
# Pixels around what is drawn that a kind can see: a smear's half width, and the mask's closing.
_MARGIN = 8


def draw(
    image_of: Callable, count: int, index: int, copies: int, seed: int, large: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one defect into one of several copies of one of the normal images.

    Args:
      image_of: from an index to a normal image, uint8 RGB (H, W, 3).
      count: of these images.
      index: of the copy; those of an image are side by side. The kinds take turns, from one image
        to the next too.
      copies: how many copies of each image there are.
      seed: place and looks follow from it, and from the index, alone.
      large: share of the copies that get a large paste instead.

    Returns:
      The copy, and its mask, uint8 (H, W) of zeros and ones.
    """
    image, copy = divmod(index, copies)
    rng = np.random.default_rng([seed, image, copy])
    other, image = image_of(rng.integers(count)), image_of(image)
    if large and rng.random() < large:
        return draw_one(image, other, 'paste', rng, _LARGE)
    kinds = _kinds_of(image)
    return draw_one(image, other, kinds[index % len(kinds)], rng)


def _kinds_of(image):
    """The kinds that an image can have: nothing breaks off where no edge of a product is in view.

    A texture fills the image, and the half of it that `foreground` finds lies on its border too.
    """
    in_view = _border(foreground(image)).mean() < 0.25
    return [kind for kind in _KINDS if kind != 'break' or in_view]


def draw_one(
    image: np.ndarray,
    other: np.ndarray,
    kind: str,
    rng: np.random.Generator,
    areas: tuple[float, float] = _AREAS,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a defect of a kind (see above) into a copy of an image.

    Args:
      image: uint8 RGB (H, W, 3).
      other: where a paste comes from, of the same shape.
      kind: paste, tone, smear, warp, scratch or break.
      rng: source of every choice.
      areas: least and largest, in pixels of an image of 256x256.

    Returns:
      The image, and the mask of what has visibly changed, uint8 (H, W).
    """
    product = foreground(image)
    places = np.flatnonzero(product)
    scale = image.shape[0] * image.shape[1] / 256**2
    for _ in range(_TRIES):
        place = np.array(divmod(places[rng.integers(len(places))], image.shape[1]))
        area = scale * np.exp(rng.uniform(*np.log(areas)))
        window, drawn = _KINDS[kind](image, product, other, place, area, rng)
        drawn = drawn.clip(0, 255).astype(np.uint8)
        # OpenCV's maximum of the channels: NumPy is slow along an axis of three.
        difference = functools.reduce(cv2.max, cv2.split(cv2.absdiff(drawn, image[window])))
        mask = cv2.morphologyEx(
            (difference > _VISIBLE).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)
        )
        if mask.sum() >= _LEAST:
            break
    changed, whole = image.copy(), np.zeros(image.shape[:2], np.uint8)
    changed[window], whole[window] = drawn, mask
    return changed, whole


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


# A kind draws into a window of the image, given as two slices, and returns it with what it then
# shows, float32 (h, w, 3). Nothing changes at the window's edges.


def _window(shape, low, high):
    """The slices of an image's rows and columns from `low` to `high`, and a margin more."""
    low, high = np.floor(low).astype(int) - _MARGIN, np.ceil(high).astype(int) + _MARGIN + 1
    return tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(low, high, shape, strict=False))


def _around(place, window, angle):
    """Coordinates (h, w) of a window around a place, along and across a direction."""
    down, right = (
        np.arange(s.start, s.stop, dtype=np.float32) - np.float32(p)
        for s, p in zip(window, place, strict=True)
    )
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return (
        right * cosine + (down * sine)[:, None],
        (down * cosine)[:, None] - right * sine,
    )


def _blob(shape, place, area, rng):
    """A bent ellipse with a ragged, soft edge: its window, and opacities (h, w, 1) in 0..1."""
    aspect = np.exp(rng.uniform(0, np.log(8)))
    long = np.sqrt(area * aspect / np.pi)
    short, angle, bend = long / aspect, rng.uniform(0, np.pi), 0.3 * rng.normal() / max(long, 1)
    waves = [(n, rng.uniform(0, 2 * np.pi), 0.12 * rng.normal()) for n in (2, 3, 5)]
    edge = rng.uniform(0.7, 1.5)
    # No farther than so many radii from the middle is anything left of it.
    least = np.prod([1 - abs(height) for _, _, height in waves])
    reach = (1 + edge / (2 * short)) / max(least, 0.1)
    far = np.hypot(reach * long, reach * short + abs(bend) * (reach * long) ** 2)
    window = _window(shape, place - far, place + far)
    along, across = _around(place, window, angle)
    along, across = along / np.float32(long), (across + bend * along**2) / np.float32(short)
    radius, direction = np.hypot(along, across), np.arctan2(across, along)
    for n, phase, height in waves:
        radius *= 1 + height * np.cos(n * direction + phase)
    opacity = np.clip((1 - radius) * (short / edge) + 0.5, 0, 1)
    return window, opacity.astype(np.float32)[..., None]


def _mix(image, window, opacity, drawn):
    """A window of the image with something drawn over it."""
    below = image[window].astype(np.float32)
    return window, below + opacity * (drawn - below)


def _paste(image, product, other, place, area, rng):
    del product
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(0, 360), 1)
    other = cv2.warpAffine(other, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
    # Mostly from the product itself; what is missing shows what lies behind it.
    where = foreground(other) if rng.random() < 0.7 else np.ones((height, width), bool)
    origins = np.flatnonzero(where)
    shift = place - divmod(origins[rng.integers(len(origins))], width)
    window, opacity = _blob(image.shape, place, area, rng)
    rows, columns = (np.arange(s.start, s.stop) - d for s, d in zip(window, shift, strict=True))
    return _mix(image, window, opacity, other[np.ix_(rows % height, columns % width)])


def _tone(image, product, other, place, area, rng):
    del product, other
    window, opacity = _blob(image.shape, place, area, rng)
    below = image[window].astype(np.float32)
    mean = (opacity * below).sum((0, 1)) / max(opacity.sum(), 1e-6)
    level = rng.choice([-1, 1]) * rng.uniform(15, 70)
    return _mix(image, window, opacity, mean + rng.uniform(0.3, 1.3) * (below - mean) + level)


def _smear(image, product, other, place, area, rng):
    del product, other
    size = 2 * int(rng.integers(2, 7)) + 1
    half, angle = size // 2, rng.uniform(0, np.pi)
    along = np.linspace(-half, half, 4 * size)
    kernel = np.zeros((size, size), np.float32)
    rows, columns = half + along * np.sin(angle), half + along * np.cos(angle)
    kernel[rows.round().astype(int), columns.round().astype(int)] = 1
    window, opacity = _blob(image.shape, place, area, rng)
    below = image[window].astype(np.float32)
    blurred = cv2.filter2D(below, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    return _mix(image, window, opacity, blurred)


def _warp(image, product, other, place, area, rng):
    del product, other
    reach = np.clip(np.sqrt(area) * rng.uniform(0.8, 1.5), 6, 22)
    window = _window(image.shape, place - 2 * reach, place + 2 * reach)  # e^-16 is left there.
    right, down = _around(place, window, 0.0)
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
    moved = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return window, moved


def _scratch(image, product, other, place, area, rng):
    del other
    # A line that wanders, drawn four times as fine and averaged.
    step, bend, fine = rng.uniform(2, 5), rng.uniform(0.05, 0.5), 4
    angle = rng.uniform(0, 2 * np.pi)
    angles = angle + np.cumsum(bend * rng.normal(size=max(2, int(np.sqrt(area) * 4 / step))))
    points = np.cumsum(step * np.stack([np.sin(angles), np.cos(angles)], 1), 0) + place
    window = _window(image.shape, points.min(0), points.max(0))
    height, width = (max(s.stop - s.start, 1) for s in window)
    opacity = np.zeros((height * fine, width * fine), np.float32)
    corner = [s.start for s in window]
    for start, end in itertools.pairwise((fine * (points - corner)).astype(int)[:, ::-1].tolist()):
        thick = max(1, round(fine * rng.uniform(0.6, 2.5)))
        cv2.line(opacity, start, end, 1.0, thick)
    opacity = cv2.resize(opacity, (width, height), interpolation=cv2.INTER_AREA)
    opacity = cv2.GaussianBlur(opacity, (0, 0), rng.uniform(0.3, 0.8)).clip(0, 1)
    opacity = (opacity * product[window])[..., None]
    return window, image[window] + opacity * rng.choice([-1, 1]) * rng.uniform(20, 90)


def _break(image, product, other, place, area, rng):
    del other
    product = product.astype(np.uint8)
    outlines, _ = cv2.findContours(product, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if rng.random() < 0.5:
        outlines = [cv2.convexHull(outline) for outline in outlines]
    edge = np.concatenate(outlines)[:, 0, ::-1]  # Rows and columns.
    place = edge[np.argmin(((edge - place) ** 2).sum(1))]
    inside = cv2.erode(product, np.ones((3, 3), np.uint8))
    window, opacity = _blob(image.shape, place, area, rng)
    # What shows instead: what lies behind, as bright as beside the place, with the grain of where
    # it is widest.
    behind = cv2.erode(1 - product, np.ones((3, 3), np.uint8))
    overall = np.array(cv2.mean(image, behind)[:3])
    bright = _bright(image, behind, window, overall)
    room = cv2.distanceTransform(1 - product, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    wide = np.flatnonzero(room >= min(room.max(), 2 * np.sqrt(area)))
    shift = place - divmod(wide[rng.integers(len(wide))], image.shape[1])
    rows, columns = (
        (np.arange(s.start, s.stop) - d) % n
        for s, d, n in zip(window, shift, image.shape, strict=False)
    )
    from_there = np.ix_(rows, columns)
    grain = behind[from_there][..., None] * (image[from_there] - overall)
    return _mix(image, window, opacity * inside[window][..., None], bright + grain)


def _bright(image, behind, window, overall, width=8.0):
    """How bright what lies behind a product is near each pixel of a window, float32 (h, w, 3)."""
    wider = _window(image.shape, *np.add([[s.start, s.stop] for s in window], [-24, 24]).T)
    seen = behind[wider].astype(np.float32)[..., None]
    near = cv2.GaussianBlur(np.concatenate([image[wider] * seen, seen], -1), (0, 0), width)
    inner = tuple(
        slice(s.start - w.start, s.stop - w.start) for s, w in zip(window, wider, strict=True)
    )
    near = near[inner]
    return (near[..., :3] + 1e-3 * overall) / (near[..., 3:] + 1e-3)


_KINDS = {
    'paste': _paste,
    'tone': _tone,
    'smear': _smear,
    'warp': _warp,
    'scratch': _scratch,
    'break': _break,
}
