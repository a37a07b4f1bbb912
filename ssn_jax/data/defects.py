"""Defects drawn into normal images: anomalies that pass through the backbone like real ones.

Noise in feature space is told by what no image can cause, and a discriminator that has learnt to
tell it need not know a scratch. Drawn defects are crude, but their features are those of images.
`KINDS` lists them. Every length and area is relative to the image.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import NamedTuple

import cv2
import numpy as np

# Independent streams of random numbers from `config.drawn.seed`.
DRAW, TURN, PICTURE = range(3)
# What differs by more than so many levels of 255 is part of the defect.
_VISIBLE = 10
# A defect has at least this area (see `unit`), or is drawn again (at most _TRIES times).
_LEAST, _TRIES = 15.0, 20
# What is around a defect that it can change: a smear's half width, and the mask's closing.
_MARGIN = 8.0
# Of so many drawn defects one is a real one, if there are any with a mask; its kind is REAL.
_TRANSPLANTED, REAL = 4, 'real'


class Kind(NamedTuple):
    """A kind of drawn defects.

    Attributes:
      draw: `(image, product, other, place, area, rng) -> window, drawn`: the image uint8 RGB
        (H, W, 3); where the product is, bool (H, W); another image of its shape, if it `pastes`;
        row and column; pixels; the source of every choice. It draws into a window of the image,
        given as two slices, and returns it with what it then shows, float32 (h, w, 3). Nothing
        changes at the window's edges.
      share: how often it is drawn, beside the others' shares.
      areas: least and largest; log-uniform between the two. In `unit`s squared: of 65,536.
      only: what it is for, if not for all: an 'object', a 'texture', products of the same 'place'
        or 'angle'. What is but moved or turned is no defect of others, nor is what looks as if the
        product lay elsewhere; and of an object at any place large ones raise false alarms.
    """

    draw: Callable
    share: int
    areas: tuple[float, float]
    only: tuple[str, ...] = ()
    pastes: bool = False


def choose(
    count: int, index: int, seed: int, product: Mapping[str, str], real: int = 0
) -> tuple[int, str, int, np.random.Generator]:
    """What a drawn image is made of: the normal images take turns.

    Args:
      count: of the normal images.
      index: of the drawn one.
      seed: everything follows from it, and from the index, alone.
      product: `config.product`.
      real: number of real defects; one in `_TRANSPLANTED` drawn ones is one of theirs.

    Returns:
      The normal image that it is drawn into; the kind, a name in `KINDS`, or REAL; the normal
      image, or of REAL the real defect, that a piece is pasted of, or -1; the source of all that
      is still to be chosen.
    """
    copy, image = divmod(index, count)
    rng = np.random.default_rng([seed, DRAW, image, copy])
    if real and rng.random() < 1 / _TRANSPLANTED:
        return image, REAL, int(rng.integers(real)), rng
    shares = kinds_of(product)
    kind = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    other = int(rng.integers(count))
    return image, kind, other if KINDS[kind].pastes else -1, rng


def draw(
    image_of: Callable,
    count: int,
    index: int,
    seed: int,
    product: Mapping[str, str],
    real: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a defect into a normal image.

    Args:
      image_of: from an index to a normal image, uint8 RGB (H, W, 3), which may differ in size.
      count: as of `choose`, as are the three that follow.
      index: likewise.
      seed: likewise.
      product: likewise.
      real: defective images, and their masks, uint8 of zeros and ones, not all zeros.

    Returns:
      The image, and the defect's mask, uint8 (H, W) of zeros and ones.
    """
    image, kind, pasted, rng = choose(count, index, seed, product, len(real))
    if kind == REAL:
        return transplant(image_of(image), *real[pasted], product, rng)
    return draw_one(image_of(image), image_of(pasted) if pasted >= 0 else None, kind, rng)


def kinds_of(product: Mapping[str, str]) -> dict[str, int]:
    """The kinds of defects that products have that are as `config.product` says: their shares."""
    fit = {product['surface']} | {x for x in ('place', 'angle') if product[x] == 'same'}
    return {k: kind.share for k, kind in KINDS.items() if not kind.only or fit & {*kind.only}}


def draw_one(
    image: np.ndarray, other: np.ndarray | None, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a defect into a copy of an image.

    Args:
      image: uint8 RGB (H, W, 3).
      other: of a kind that pastes, another image; one of another shape is resized to this one's.
      kind: a name in `KINDS`.
      rng: source of every choice.

    Returns:
      The image, and the mask of what has visibly changed, uint8 (H, W).
    """
    draw_kind, areas = KINDS[kind].draw, KINDS[kind].areas
    product, square = foreground(image), unit(image) ** 2
    if other is not None and other.shape != image.shape:
        other = cv2.resize(other, image.shape[1::-1])
    places = np.flatnonzero(product)
    close = _square(2 * unit(image))
    for _ in range(_TRIES):
        place = np.array(divmod(places[rng.integers(len(places))], image.shape[1]))
        area = square * np.exp(rng.uniform(*np.log(areas)))
        window, drawn = draw_kind(image, product, other, place, area, rng)
        drawn = drawn.clip(0, 255).astype(np.uint8)
        # OpenCV's maximum of the channels: NumPy is slow along an axis of three.
        difference = functools.reduce(cv2.max, cv2.split(cv2.absdiff(drawn, image[window])))
        mask = cv2.morphologyEx((difference > _VISIBLE).astype(np.uint8), cv2.MORPH_CLOSE, close)
        if mask.sum() >= _LEAST * square:
            break
    changed, whole = image.copy(), np.zeros(image.shape[:2], np.uint8)
    changed[window], whole[window] = drawn, mask
    return changed, whole


def transplant(
    image: np.ndarray,
    source: np.ndarray,
    mask: np.ndarray,
    product: Mapping[str, str],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a real defect out of its image, and pastes it into a copy of a normal one.

    It is scaled and turned a little, by any angle where the product is; and it lies anywhere on the
    product, perhaps flipped, or near where it was if products lie at the same place. It is as much
    darker or brighter than what is around it as it was.

    Args:
      image: uint8 RGB (H, W, 3).
      source: the defective image; one of another shape is resized to this one's.
      mask: of its defects, uint8 of zeros and ones, not all zeros; one region is pasted.
      product: `config.product`.
      rng: source of every choice.

    Returns:
      As of `draw_one`.
    """
    if source.shape != image.shape:
        source = cv2.resize(source, image.shape[1::-1])
        shrunk = cv2.resize(mask.astype(np.float32), image.shape[1::-1])
        mask = (shrunk >= min(0.5, shrunk.max())).astype(np.uint8)  # A line stays one.
    near, far = _square(2 * unit(image)), _square(8 * unit(image))
    count, regions, _, centres = cv2.connectedComponentsWithStats(cv2.dilate(mask, near))
    region = rng.integers(1, count)
    cut = ((regions == region) & (mask > 0)).astype(np.uint8)
    places, enough = (
        np.flatnonzero(foreground(image)),
        min(cut.sum() / 4, _LEAST * unit(image) ** 2),
    )
    for _ in range(_TRIES):
        place, angle, flips = centres[region][::-1], rng.normal(scale=5), (1, 1)
        if product['angle'] == 'any':
            angle = rng.uniform(0, 360)
        if product['place'] == 'same':
            place = place + rng.normal(scale=4 * unit(image), size=2)
        else:
            place = np.array(divmod(places[rng.integers(len(places))], image.shape[1]))
            flips = rng.choice([-1, 1], 2)
        matrix = cv2.getRotationMatrix2D((0, 0), angle, np.exp(rng.uniform(-0.35, 0.35)))
        matrix[:, :2] *= flips
        matrix[:, 2] = place[::-1] - matrix[:, :2] @ centres[region]
        pasted = cv2.warpAffine(cut, matrix, image.shape[1::-1], flags=cv2.INTER_NEAREST)
        if pasted.sum() >= enough:
            break
    mode = {'flags': cv2.INTER_LINEAR, 'borderMode': cv2.BORDER_REFLECT}
    moved = cv2.warpAffine(source, matrix, image.shape[1::-1], **mode).astype(np.float32)
    around = (cv2.dilate(cut, far) > 0) & (cv2.dilate(mask, near) == 0)
    beside = cv2.dilate(pasted, far) > pasted
    if around.any() and beside.any():
        moved += image[beside].mean(0, np.float32) - source[around].mean(0, np.float32)
    opacity = cv2.dilate(pasted, _square(1.5 * unit(image))).astype(np.float32)
    opacity = cv2.GaussianBlur(opacity, (0, 0), unit(image))[..., None]
    changed = image + opacity * (moved - image)
    return changed.round().clip(0, 255).astype(np.uint8), pasted


def unit(image: np.ndarray) -> float:
    """The length in pixels of an image (H, W, 3) that all lengths are in: 1 at 256x256."""
    return np.sqrt(image.shape[0] * image.shape[1]) / 256


def foreground(image: np.ndarray) -> np.ndarray:
    """Where the product is (H, W), by Otsu's threshold: the side that is rarer on the border.

    On a texture that fills the image it is one of two halves of it, which does no harm.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    _, bright = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    product = 1 - bright if border(bright).mean() > 0.5 else bright
    product = cv2.dilate(product, _square(2 * unit(image))) > 0
    return product if product.any() else np.ones_like(product)


def _square(reach):
    """The square kernel that reaches so many pixels to each side."""
    side = 2 * round(reach) + 1
    return np.ones((side, side), np.uint8)


def border(x: np.ndarray) -> np.ndarray:
    """The values (2H + 2W,) along the edges of an image (H, W)."""
    return np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])


# --- Windows, shapes, and what shows below --------------------------------------------------------


def _window(image, low, high):
    """The slices of an image's rows and columns from `low` to `high`, and a margin more."""
    margin = int(np.ceil(_MARGIN * unit(image)))
    low, high = np.floor(low).astype(int) - margin, np.ceil(high).astype(int) + margin + 1
    ends = zip(low, high, image.shape, strict=False)
    # Some of the image at least, whatever lies outside.
    return tuple(slice(min(max(a, 0), n - 1), max(min(b, n), 1)) for a, b, n in ends)


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


def _blob(image, place, area, rng, soft=1.0, aspects=8.0):
    """A bent ellipse with a ragged edge: its window, and opacities (h, w, 1) in 0..1.

    `soft` times wider than usual is its edge, and up to `aspects` times as long as wide it is.
    """
    aspect = np.exp(rng.uniform(0, np.log(aspects)))
    long = np.sqrt(area * aspect / np.pi)
    short, angle, bend = long / aspect, rng.uniform(0, np.pi), 0.3 * rng.normal() / max(long, 1)
    waves = [(n, rng.uniform(0, 2 * np.pi), 0.12 * rng.normal()) for n in (2, 3, 5)]
    edge = min(rng.uniform(0.7, 1.5) * soft * unit(image), 2 * short)
    # No farther than so many radii from the middle is anything left of it.
    least = np.prod([1 - abs(height) for _, _, height in waves])
    reach = (1 + edge / (2 * short)) / max(least, 0.1)
    far = np.hypot(reach * long, reach * short + abs(bend) * (reach * long) ** 2)
    window = _window(image, place - far, place + far)
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


def _shifted(image, window, shift):
    """What of an image lies `shift` (rows, columns) before a window, float32; its ends meet."""
    rows, columns = (
        (np.arange(s.start, s.stop) - round(d)) % n
        for s, d, n in zip(window, shift, image.shape, strict=False)
    )
    return image[np.ix_(rows, columns)].astype(np.float32)


def _step(area, rng):
    """A shift (rows, columns) in any direction, of half to twice the size of an area."""
    angle, length = rng.uniform(0, 2 * np.pi), np.sqrt(area) * rng.uniform(0.5, 2)
    return length * np.array([np.sin(angle), np.cos(angle)])


def _filled(image, window, hidden, rng):
    """A window of the image, float32, where what is hidden (h, w, 1) continues what is around it.

    Averages of what can be seen, from one scale to the next, and noise as there is beside them.
    """
    reach = 12 * unit(image)
    corners = np.array([[s.start, s.stop] for s in window], np.float32).T
    wider = _window(image, corners[0] - reach, corners[1] + reach)
    inner = tuple(
        slice(s.start - w.start, s.stop - w.start) for s, w in zip(window, wider, strict=True)
    )
    seen = np.ones((*image[wider].shape[:2], 1), np.float32)
    seen[inner] = hidden < 0.02
    levels = [(image[wider] * seen, seen)]
    while min(seen.shape[:2]) > 1 and (seen == 0).any():
        value, seen = (
            cv2.resize(x, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for x in levels[-1]
        )
        seen = seen[..., None]
        levels.append((value, seen))
    filled = None
    for value, seen in reversed(levels):
        known = value / np.maximum(seen, 1e-6)
        if filled is not None:
            filled = cv2.resize(filled, value.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            known = np.where(seen > 0, known, filled)
        filled = known
    below = image[wider].astype(np.float32)
    grain = np.abs(below - cv2.blur(below, (3, 3)))[levels[0][1][..., 0] > 0]
    usual = np.median(grain) if grain.size else 0.0
    return filled[inner] + 1.5 * usual * rng.standard_normal((*hidden.shape[:2], 1), np.float32)


# --- The kinds ------------------------------------------------------------------------------------


def _paste(image, product, other, place, area, rng):
    """A piece of another image, turned (Li et al., "CutPaste", CVPR 2021)."""
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(0, 360), 1)
    other = cv2.warpAffine(other, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
    # Mostly from the product itself; what is missing shows what lies behind it.
    where = foreground(other) if rng.random() < 0.7 else np.ones((height, width), bool)
    origins = np.flatnonzero(where)
    shift = place - divmod(origins[rng.integers(len(origins))], width)
    window, opacity = _blob(image, place, area, rng)
    return _mix(image, window, opacity, _shifted(other, window, shift))


def _double(image, product, other, place, area, rng):
    """What the image shows not far from there, once more."""
    window, opacity = _blob(image, place, area, rng)
    return _mix(image, window, opacity, _shifted(image, window, _step(area, rng)))


def _remove(image, product, other, place, area, rng):
    """A part is missing: what is around goes on."""
    window, opacity = _blob(image, place, area, rng)
    return _mix(image, window, opacity, _filled(image, window, opacity, rng))


def _move(image, product, other, place, area, rng):
    """A part is missing, and lies beside its place."""
    window, opacity = _blob(image, place, area, rng)
    _, drawn = _mix(image, window, opacity, _filled(image, window, opacity, rng))
    shift = _step(area, rng).round().astype(int)
    low, high = np.array([[s.start, s.stop] for s in window]).T
    both = _window(image, np.minimum(low, low + shift), np.maximum(high, high + shift))
    whole, over = image.astype(np.float32), np.zeros((*image.shape[:2], 1), np.float32)
    whole[window], over[window] = drawn, opacity
    return both, whole[both] + _shifted(over, both, shift) * (
        _shifted(image, both, shift) - whole[both]
    )


def _turn(image, product, other, place, area, rng):
    """A part is turned."""
    window, opacity = _blob(image, place, area, rng, aspects=1.5)
    along, across = _around(place, window, rng.uniform(0.3, 2 * np.pi - 0.3))
    x, y = along + np.float32(place[1]), across + np.float32(place[0])
    turned = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return _mix(image, window, opacity, turned.astype(np.float32))


def _tone(image, product, other, place, area, rng):
    """Darker or brighter, with less or more contrast."""
    window, opacity = _blob(image, place, area, rng)
    below = image[window].astype(np.float32)
    mean = (opacity * below).sum((0, 1)) / max(opacity.sum(), 1e-6)
    level = rng.choice([-1, 1]) * rng.uniform(15, 70)
    return _mix(image, window, opacity, mean + rng.uniform(0.3, 1.3) * (below - mean) + level)


def _stain(image, product, other, place, area, rng):
    """A stain with a soft edge, coloured where the image is."""
    window, opacity = _blob(image, place, area, rng, soft=rng.uniform(1, 12))
    below = image[window].astype(np.float32)
    tint = rng.uniform(0.2, 0.9, 3)
    if (image[..., 0] == image[..., 2]).all():
        tint[:] = tint[0]
    bright = 255 * (rng.random() < 0.3)
    return _mix(image, window, opacity, bright + tint.astype(np.float32) * (below - bright))


def _smear(image, product, other, place, area, rng):
    """Blurred along a line."""
    size = 2 * max(1, round(rng.uniform(2, 6.5) * unit(image))) + 1
    half, angle = size // 2, rng.uniform(0, np.pi)
    along = np.linspace(-half, half, 4 * size)
    kernel = np.zeros((size, size), np.float32)
    rows, columns = half + along * np.sin(angle), half + along * np.cos(angle)
    kernel[rows.round().astype(int), columns.round().astype(int)] = 1
    window, opacity = _blob(image, place, area, rng)
    below = image[window].astype(np.float32)
    blurred = cv2.filter2D(below, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    return _mix(image, window, opacity, blurred)


def _blur(image, product, other, place, area, rng):
    """Blurred on all sides."""
    window, opacity = _blob(image, place, area, rng, soft=3)
    below = image[window].astype(np.float32)
    blurred = cv2.GaussianBlur(below, (0, 0), rng.uniform(1, 4) * unit(image))
    return _mix(image, window, opacity, blurred)


def _warp(image, product, other, place, area, rng):
    """Pushed, twisted, or drawn together."""
    reach = max(np.sqrt(area) * rng.uniform(0.8, 1.5), 6 * unit(image))
    window = _window(image, place - 2 * reach, place + 2 * reach)  # e^-16 is left there.
    right, down = _around(place, window, 0.0)
    strength = np.exp(-(((right**2 + down**2) / reach**2) ** 2))
    kind = rng.random()
    if kind < 0.4:  # Pushed.
        angle, way = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.3) * reach + unit(image)
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


def _line(image, points, widths, rng):
    """A line through points (n, 2), of widths (n - 1,): window, opacities (h, w, 1) in 0..1."""
    fine = 4  # Times as fine it is drawn, and averaged.
    window = _window(image, points.min(0), points.max(0))
    height, width = (max(s.stop - s.start, 1) for s in window)
    opacity = np.zeros((height * fine, width * fine), np.float32)
    corner = [s.start for s in window]
    ends = (fine * (points - corner)).astype(int)[:, ::-1].tolist()
    for (start, end), thick in zip(itertools.pairwise(ends), widths, strict=True):
        cv2.line(opacity, start, end, 1.0, max(1, round(fine * thick)))
    opacity = cv2.resize(opacity, (width, height), interpolation=cv2.INTER_AREA)
    opacity = cv2.GaussianBlur(opacity, (0, 0), rng.uniform(0.3, 0.8) * unit(image)).clip(0, 1)
    return window, opacity[..., None]


def _scratch(image, product, other, place, area, rng):
    """A thin line that wanders, darker or brighter."""
    step, bend = rng.uniform(2, 5) * unit(image), rng.uniform(0.05, 0.5)
    angle = rng.uniform(0, 2 * np.pi)
    angles = angle + np.cumsum(bend * rng.normal(size=max(2, int(np.sqrt(area) * 4 / step))))
    points = np.cumsum(step * np.stack([np.sin(angles), np.cos(angles)], 1), 0) + place
    widths = rng.uniform(0.6, 2.5, len(points) - 1) * unit(image)
    window, opacity = _line(image, points, widths, rng)
    opacity = opacity * product[window][..., None]
    return window, image[window] + opacity * rng.choice([-1, 1]) * rng.uniform(20, 90)


def _thread(image, product, other, place, area, rng):
    """A line along or across the texture's own direction: added, or hidden by what lies beside."""
    width = rng.uniform(1, 4) * unit(image)
    angle = _direction(image) + rng.choice([0, np.pi / 2]) + 0.02 * rng.normal()
    way = np.array([np.sin(angle), np.cos(angle)])
    half = min(area / width, 2 * max(image.shape)) / 2
    points = place + half * np.linspace(-1, 1, 9)[:, None] * way
    points = points + np.cumsum(0.1 * unit(image) * rng.normal(size=(9, 2)), 0)
    window, opacity = _line(image, points, np.full(8, width), rng)
    below = image[window].astype(np.float32)
    if rng.random() < 0.5:
        return _mix(image, window, opacity, below + rng.choice([-1, 1]) * rng.uniform(20, 70))
    beside = rng.choice([-1, 1]) * width * rng.uniform(1, 2.5) * np.array([way[1], -way[0]])
    return _mix(image, window, opacity, _shifted(image, window, beside))


def _direction(image):
    """The direction of an image's lines in radians, but for quarter turns: threads cross."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    across = cv2.Sobel(grey, -1, 1, 0) + 1j * cv2.Sobel(grey, -1, 0, 1)
    return np.angle((across**4 / (np.abs(across) ** 2 + 1)).sum()) / 4


def _break(image, product, other, place, area, rng):
    """A piece of the edge is missing, half the time of what sticks out."""
    product = product.astype(np.uint8)
    outlines, _ = cv2.findContours(product, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if rng.random() < 0.5:
        outlines = [cv2.convexHull(outline) for outline in outlines]
    edge = np.concatenate(outlines)[:, 0, ::-1]  # Rows and columns.
    place = edge[np.argmin(((edge - place) ** 2).sum(1))]
    inside = cv2.erode(product, np.ones((3, 3), np.uint8))
    window, opacity = _blob(image, place, area, rng)
    # What shows instead: what lies behind, as bright as beside the place, with the grain of where
    # it is widest.
    behind = cv2.erode(1 - product, np.ones((3, 3), np.uint8))
    overall = np.array(cv2.mean(image, behind)[:3])
    bright = _bright(image, behind, window, overall)
    room = cv2.distanceTransform(1 - product, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    wide = np.flatnonzero(room >= min(room.max(), 2 * np.sqrt(area)))
    shift = place - divmod(wide[rng.integers(len(wide))], image.shape[1])
    grain = _shifted(behind[..., None], window, shift) * (_shifted(image, window, shift) - overall)
    return _mix(image, window, opacity * inside[window][..., None], bright + grain)


def _bright(image, behind, window, overall):
    """How bright what lies behind a product is near each pixel of a window, float32 (h, w, 3)."""
    reach = 24 * unit(image)
    corners = np.array([[s.start, s.stop] for s in window]).T
    wider = _window(image, corners[0] - reach, corners[1] + reach)
    seen = behind[wider].astype(np.float32)[..., None]
    near = np.concatenate([image[wider] * seen, seen], -1)
    near = cv2.GaussianBlur(near, (0, 0), reach / 3)
    near = near[
        tuple(
            slice(s.start - w.start, s.stop - w.start) for s, w in zip(window, wider, strict=True)
        )
    ]
    return (near[..., :3] + 1e-3 * overall) / (near[..., 3:] + 1e-3)


KINDS = {
    'paste': Kind(_paste, 4, (20.0, 500.0), pastes=True),
    'swap': Kind(_paste, 4, (500.0, 26000.0), ('place',), pastes=True),
    'double': Kind(_double, 2, (50.0, 5000.0), ('place',)),
    'move': Kind(_move, 2, (50.0, 5000.0), ('place',)),
    'turn': Kind(_turn, 3, (100.0, 26000.0), ('angle',)),
    'remove': Kind(_remove, 3, (20.0, 26000.0), ('place', 'texture')),
    'break': Kind(_break, 3, (20.0, 500.0), ('object',)),
    'warp': Kind(_warp, 4, (20.0, 500.0)),
    'scratch': Kind(_scratch, 3, (20.0, 500.0)),
    'thread': Kind(_thread, 2, (20.0, 2000.0), ('texture',)),
    'tone': Kind(_tone, 3, (20.0, 500.0)),
    'stain': Kind(_stain, 2, (20.0, 26000.0), ('place', 'texture')),
    'smear': Kind(_smear, 3, (20.0, 500.0)),
    'blur': Kind(_blur, 2, (20.0, 26000.0), ('place', 'texture')),
}
