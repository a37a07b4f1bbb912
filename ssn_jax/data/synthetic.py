"""The embedded data set: procedural images in MVTec AD's structure, drawn from a seed.

Every category has a painter that draws one scene twice, as it should be and as it is. The mask of
a defect is then no annotation but a fact: the pixels in which the two pictures differ. Position,
rotation, light, wear and grain vary from image to image, defective or not.
"""

from collections.abc import Iterator
import zlib

import cv2
import numpy as np

from ssn_jax.data import images
from ssn_jax.data.layouts import GOOD, Record

# Part of the prepared set's fingerprint: raise it with every change to what is drawn.
VERSION = 1

# Images by split and defect.
_COUNTS = {
    'bottle': {
        'train': {GOOD: 60},
        'test': {GOOD: 12, 'broken_large': 8, 'broken_small': 8, 'contamination': 8},
    },
    'carpet': {
        'train': {GOOD: 60},
        'test': {GOOD: 12, 'color': 8, 'cut': 8, 'hole': 8, 'thread': 8},
    },
    'screw': {
        'train': {GOOD: 60},
        'test': {
            GOOD: 12,
            'manipulated_front': 6,
            'scratch_head': 6,
            'scratch_neck': 6,
            'thread_side': 6,
            'thread_top': 6,
        },
    },
    'surface': {
        'train': {GOOD: 80, 'defect': 12},
        'test': {GOOD: 30, 'defect': 10},
    },
}
CATEGORIES = tuple(_COUNTS)

_VISIBLE = 6  # grey levels; a smaller difference is no defect that anybody could mark
_TAU = 2 * np.pi


def records(category: str, seed: int) -> Iterator[Record]:
    """Draws a category, image by image.

    Args:
      category: one of `CATEGORIES`.
      seed: not negative; every image depends on it, on its own name, and on nothing else.

    Yields:
      The records of the category, images and masks as PNG bytes.
    """
    for split, counts in _COUNTS[category].items():
        for defect, count in counts.items():
            for number in range(count):
                file = f'{category}/{split}/{defect}/{number:03d}.png'
                rng = np.random.default_rng([seed, zlib.crc32(file.encode())])
                image, _, mask = draw(category, defect, rng)
                encoded_mask = None if defect == GOOD else images.encode_mask(mask)
                yield Record(split, defect, file, images.encode(image), encoded_mask)


def draw(
    category: str, defect: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one image.

    Args:
      category: one of `CATEGORIES`.
      defect: 'good' or a defect of the category.
      rng: source of everything that varies.

    Returns:
      The image, the same image without its defect, and the mask of the pixels in which they differ:
      uint8 (H, W, 3) or (H, W) for a grey category, twice, and uint8 (H, W) of zeros and ones.
    """
    # Defects that come out too small to see (behind an edge, on a dark part) are drawn again.
    while True:
        normal, damaged = _PAINTERS[category](rng, defect)
        light = 1 + 0.03 * rng.standard_normal()
        grain = rng.normal(0, 2.0, normal.shape)
        normal, damaged = (
            np.clip(np.rint(light * cv2.GaussianBlur(picture, (0, 0), 0.6) + grain), 0, 255)
            for picture in (normal, damaged)
        )
        difference = np.abs(damaged - normal).reshape(*normal.shape[:2], -1).max(-1)
        seen = (difference >= _VISIBLE).astype(np.uint8)
        if defect == GOOD or seen.sum() >= 12:
            break
    # Where a defect happens to look like what it covers, its mask would have a pinhole: the pixels
    # that fill those are made to differ, too little for the eye.
    mask = cv2.morphologyEx(seen, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    image = normal.copy()
    image[mask == 1] += np.where(normal[mask == 1] < 128, _VISIBLE, -_VISIBLE)
    image[seen == 1] = damaged[seen == 1]
    return image.astype(np.uint8), normal.astype(np.uint8), mask


def _bottle(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A bottle's mouth from above, lit from behind: concentric rings of dark glass, (256, 256, 3).

    Returns the normal and the damaged picture, float in 0..255.
    """
    center = 128 + rng.uniform(-5, 5, 2)
    size = rng.uniform(110, 116)
    radius, angle = _polar((256, 256), center)
    radius = radius / size * (1 + 0.004 * np.cos(2 * angle + rng.uniform(0, _TAU)))

    # Radius (1: the outer edge) and colour there.
    rings = np.array(
        [
            [0.00, 15, 13, 19],
            [0.48, 17, 15, 21],
            [0.50, 62, 38, 34],
            [0.52, 34, 37, 43],
            [0.65, 42, 47, 54],
            [0.69, 76, 82, 92],
            [0.72, 36, 38, 46],
            [0.77, 62, 63, 72],
            [0.80, 36, 36, 44],
            [0.87, 34, 33, 42],
            [0.91, 27, 26, 35],
            [0.935, 66, 64, 80],
            [0.955, 30, 29, 40],
            [0.985, 52, 51, 64],
            [1.00, 110, 110, 120],
            [1.03, 285, 285, 286],  # the lamp behind saturates the sensor
        ]
    )
    rings[1:14, 0] += rng.normal(0, 0.003, 13)
    rings[:14, 1:] *= rng.uniform(0.9, 1.1, (14, 1))
    normal = np.stack([np.interp(radius, rings[:, 0], rings[:, c]) for c in (1, 2, 3)], -1)

    # The amber reflection runs round the shoulder and is interrupted where the light is.
    arc = np.exp(-(((radius - 0.82) / 0.012) ** 2))
    arc *= np.clip(
        0.55 + 0.6 * np.cos(angle - rng.uniform(0, _TAU)) + 0.3 * np.cos(3 * angle), 0, 1
    )
    normal += arc[..., None] * np.array([150, 75, 35])
    for _ in range(rng.integers(3, 7)):  # glints on the rim
        turn = np.angle(np.exp(1j * (angle - rng.uniform(0, _TAU))))
        along, across = turn / rng.uniform(0.03, 0.12), (radius - rng.uniform(0.72, 0.86)) / 0.008
        glint = np.exp(-(along**2) - across**2)
        normal += (rng.uniform(60, 150) * glint)[..., None]
    frosted = np.exp(-(((radius - 0.59) / 0.07) ** 4))
    normal += (9 * frosted * _noise(rng, (256, 256), 2))[..., None]

    direction = rng.uniform(0, _TAU)
    if defect in ('broken_large', 'broken_small'):
        large = defect == 'broken_large'
        reach = rng.uniform(0.34, 0.44) if large else rng.uniform(0.09, 0.14)
        away = rng.uniform(0.66, 0.74)
        spot = center + size * away * np.array([np.sin(direction), np.cos(direction)])
        chip = _patch(rng, (256, 256), spot, reach * size, corners=14, roughness=0.35)
        chip *= (radius > 0.46) * (radius < 0.93)
        shards = _shards(rng, (256, 256), spot, reach * size, 40 if large else 9)
        return normal, _blend(normal, shards, chip)
    if defect == 'contamination':
        reach = rng.uniform(0.10, 0.26)
        spot = center + size * rng.uniform(0, 0.45) * np.array(
            [np.sin(direction), np.cos(direction)]
        )
        blot = _patch(rng, (256, 256), spot, reach * size, corners=11, roughness=0.3)
        dust = rng.uniform(60, 120) * np.array([1.0, 0.96, 0.9]) + np.zeros_like(normal)
        dust += (14 * _noise(rng, (256, 256), 3) + 12 * _noise(rng, (256, 256), 14))[..., None]
        return normal, _blend(normal, dust, 0.9 * blot)
    return normal, normal


def _carpet(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """Woven threads, seen from above, (256, 256, 3).

    Returns the normal and the damaged picture, float in 0..255.
    """
    shape = (256, 256)
    y, x = np.mgrid[:256, :256].astype(float)
    turn = rng.normal(0, 0.03)
    pitch = rng.uniform(7.4, 8.0)
    across = (x * np.cos(turn) - y * np.sin(turn) + 1.2 * _noise(rng, shape, 40)) / pitch
    along = (x * np.sin(turn) + y * np.cos(turn) + 1.2 * _noise(rng, shape, 40)) / pitch
    across, along = across + rng.uniform(50, 51), along + rng.uniform(50, 51)

    column, row = np.floor(across).astype(int), np.floor(along).astype(int)
    bow_x = np.cos(np.pi * (across - column - 0.5))
    bow_y = np.cos(np.pi * (along - row - 0.5))
    warp_on_top = (column + row) % 2 == 0
    height = np.where(warp_on_top, bow_x * (0.6 + 0.4 * bow_y), bow_y * (0.6 + 0.4 * bow_x))
    dye = rng.normal(0, 0.07, (2, 128))
    tone = np.where(warp_on_top, 1.06 + dye[0][column], 0.9 + dye[1][row])
    fibres = 9 * np.where(warp_on_top, _noise(rng, shape, (5, 1)), _noise(rng, shape, (1, 5)))
    grey = (48 + 96 * height) * tone + fibres + 5 * _noise(rng, shape, 60)
    slope = rng.normal(0, 6, 2)
    grey += (slope[0] * (x - 128) + slope[1] * (y - 128)) / 128
    normal = grey[..., None] * np.array([1.0, 0.97, 0.93])

    spot = rng.uniform(50, 206, 2)
    if defect == 'cut':
        length = rng.uniform(45, 100)
        path = _path(rng, spot, length, wander=0.05)
        frayed = _blend(normal, 1.25 * normal + 22, 0.8 * _stroke(shape, path, 7))
        return normal, _blend(frayed, 26 + 0.1 * normal, _stroke(shape, path, rng.integers(2, 5)))
    if defect == 'hole':
        size = rng.uniform(8, 17)
        rim = _patch(rng, shape, spot, size + 4, corners=18, roughness=0.25)
        pit = _patch(rng, shape, spot, size, corners=18, roughness=0.25)
        frayed = _blend(normal, 1.2 * normal + 25, 0.8 * rim)
        return normal, _blend(frayed, 22 + 0.12 * normal, pit)
    if defect == 'thread':
        path = _path(rng, spot, rng.uniform(50, 120), wander=0.22)
        colour = np.array([[205, 198, 184], [30, 28, 36]][rng.integers(2)]) * rng.uniform(0.9, 1.1)
        return normal, _blend(normal, colour + 0.1 * normal, _stroke(shape, path, 2))
    if defect == 'color':
        stain = _patch(rng, shape, spot, rng.uniform(14, 34), corners=12, roughness=0.3)
        tints = [[1.3, 0.72, 0.68], [0.66, 0.8, 1.25], [0.7, 1.05, 0.72], [0.55, 0.5, 0.45]]
        return normal, _blend(normal, normal * np.array(tints[rng.integers(4)]), 0.85 * stain)
    return normal, normal


def _screw(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A countersunk screw lying at any angle on a light ground, (256, 256), grey.

    Returns the normal and the damaged picture, float in 0..255.
    """
    shape = (256, 256)
    y, x = np.mgrid[:256, :256].astype(float)
    middle = 128 + rng.uniform(-7, 7, 2)
    turn = rng.uniform(0, _TAU)
    x, y = x - middle[1], y - middle[0]
    # u runs along the screw from the head's face, v across it.
    u = x * np.cos(turn) + y * np.sin(turn) + 97
    v = -x * np.sin(turn) + y * np.cos(turn)

    ground = rng.uniform(192, 210) + 5 * _noise(rng, shape, 90) + 1.5 * _noise(rng, shape, 6)
    slope = rng.normal(0, 6, 2)
    ground += (slope[0] * x + slope[1] * y) / 128
    wear = 5 * _noise(rng, shape, 2) + 7 * _noise(rng, shape, 7)
    phase, gleam = rng.uniform(0, 1), rng.uniform(-0.4, 0.4)

    def lay(u, v, **damage):
        body, grey = _screw_body(u, v, phase, gleam, **damage)
        return _blend(shaded, grey + wear, body)

    outline, _ = _screw_body(u, v, phase, gleam)
    shadow = np.roll(cv2.GaussianBlur(outline, (0, 0), 7), (4, 3), (0, 1))
    shaded = ground * (1 - 0.22 * shadow)
    normal = lay(u, v)

    side = rng.choice([-1, 1])
    if defect in ('scratch_head', 'scratch_neck'):
        first, last, half_width = (8, 24, 10) if defect == 'scratch_head' else (40, 76, 5)
        metal = outline.copy()
        damaged = normal
        for _ in range(rng.integers(2, 5)):
            at = rng.uniform([first, -half_width], [last, half_width])
            lean = rng.uniform(0, np.pi)
            length = rng.uniform(8, 18)
            du, dv = u - at[0], v - at[1]
            beyond = np.maximum(np.abs(du * np.cos(lean) + dv * np.sin(lean)) - length / 2, 0)
            off = np.hypot(du * np.sin(lean) - dv * np.cos(lean), beyond)
            line = np.clip(rng.uniform(1.0, 1.8) - off + 0.5, 0, 1) * metal
            damaged = _blend(damaged, np.full(shape, rng.choice([30.0, 215.0])), 0.85 * line)
        return normal, damaged
    if defect == 'thread_side':
        start = rng.uniform(95, 140)
        return normal, lay(u, v, crushed=(start, start + rng.uniform(14, 28), side))
    if defect == 'thread_top':
        start = rng.uniform(95, 145)
        return normal, lay(u, v, worn=(start, start + rng.uniform(9, 20), 0.3 * side))
    if defect == 'manipulated_front':
        bend = side * rng.uniform(0.008, 0.022) * np.maximum(u - 160, 0) ** 2
        return normal, lay(u, v + bend, cut=rng.uniform(178, 190))
    return normal, normal


def _screw_body(
    u: np.ndarray,
    v: np.ndarray,
    phase: float,
    gleam: float,
    crushed: tuple[float, float, int] | None = None,
    worn: tuple[float, float, float] | None = None,
    cut: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Shape and shade of a screw in its own coordinates.

    Args:
      u: position along the screw in pixels from the head's face, (H, W).
      v: position across it, (H, W).
      phase: of the thread's helix.
      gleam: where across the body, in -1..1, the light is reflected.
      crushed: (from, to, side) where the thread's teeth are flattened.
      worn: (from, to, where across) in which the thread's top is ground off.
      cut: length that is left.

    Returns:
      Coverage in 0..1 and grey value, both (H, W).
    """
    stations = [0, 2, 6, 9, 26, 33, 80, 84, 168, 180, 196]
    core = np.interp(u, stations, [24, 28, 29, 27, 14, 11, 11, 9.5, 9, 6, 0.3])
    thread = np.interp(u, [78, 88, 170, 194], [0, 1, 1, 0.1])
    across = np.clip(v / np.maximum(core, 1), -1, 1)
    turns = u / 17.5 + phase

    def ridge(shift):
        return np.clip(np.cos(_TAU * (turns + shift)), 0, 1) ** 4

    tooth = 6 * thread * ridge(0.25 * np.sign(v))
    crest = thread * ridge(0.25 * across)
    trough = thread * ridge(0.25 * across + 0.17)
    if crushed is not None:
        start, end, side = crushed
        here = _window(u, start, end) * (np.sign(v) == side)
        tooth *= 1 - 0.9 * here
        crest *= 1 - 0.8 * here * (np.abs(across) > 0.3)
    half_width = core + tooth
    inside = np.clip(half_width - np.abs(v) + 0.5, 0, 1) * np.clip(u + 0.5, 0, 1)
    inside *= np.clip((196 if cut is None else cut) - u + 0.5, 0, 1)

    round_off = np.sqrt(np.clip(1 - (v / (half_width + 0.5)) ** 2, 0, 1))
    grey = 40 + 68 * round_off + 62 * np.exp(-(((across - gleam) / 0.17) ** 2))
    grey += 48 * crest - 46 * trough
    face = np.clip(1.5 - np.hypot((u - 3) / 6, v / 28), 0, 1) * (u < 10)
    grey += face * (26 - 70 * (np.abs(v) < 10) * (np.abs(u - 4) < 2.5))
    grey -= 22 * _window(u, 26, 34)
    if worn is not None:
        start, end, where = worn
        here = _window(u, start, end) * np.clip(1.6 - np.abs(across - where) / 0.35, 0, 1)
        grey += here * (150 - grey) * 0.9
    return inside, grey


def _surface(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A machined surface with cracks, scratches or pits as defects, (640, 232), grey.

    Returns the normal and the damaged picture, float in 0..255.
    """
    shape = (640, 232)
    x = np.linspace(-1, 1, shape[1])
    normal = rng.uniform(120, 150) - rng.uniform(8, 24) * (x - rng.uniform(-0.4, 0.4)) ** 2
    normal = normal + 5 * _noise(rng, shape, 110) + 4 * _noise(rng, shape, (60, 3))
    normal += 6 * _noise(rng, shape, 3) + 3 * _noise(rng, shape, (2, 14))
    for _ in range(rng.integers(0, 4)):  # smudges and handling marks that are no defects
        smudge = _patch(rng, shape, rng.uniform(0, shape), rng.uniform(8, 30), 12, 0.4)
        normal += rng.uniform(-9, 9) * cv2.GaussianBlur(smudge, (0, 0), 4)
        path = _path(rng, rng.uniform(0, shape), rng.uniform(20, 70), wander=0.03)
        normal += rng.uniform(2, 8) * _stroke(shape, path, 1)
    if defect == GOOD:
        return normal, normal

    spot = rng.uniform([70, 40], [570, 192])
    kind = rng.choice(['crack', 'scratch', 'pits'], p=[0.5, 0.25, 0.25])
    damaged = normal
    if kind == 'crack':
        path = _path(rng, spot, rng.uniform(60, 200), wander=0.35)
        depth = rng.uniform(0.3, 0.6)
        damaged = _blend(damaged, depth * normal, _stroke(shape, path, rng.integers(2, 4)))
        for _ in range(rng.integers(0, 3)):
            branch = _path(rng, path[rng.integers(len(path))], rng.uniform(20, 60), wander=0.4)
            damaged = np.minimum(damaged, _blend(normal, depth * normal, _stroke(shape, branch, 1)))
    elif kind == 'scratch':
        path = _path(rng, spot, rng.uniform(70, 180), wander=0.02)
        glare = normal + rng.choice([-55, 60])
        damaged = _blend(damaged, glare, 0.9 * _stroke(shape, path, rng.integers(1, 4)))
    else:
        for _ in range(rng.integers(2, 7)):
            near = spot + rng.normal(0, 16, 2)
            pit = _patch(rng, shape, near, rng.uniform(3, 8), corners=9, roughness=0.3)
            damaged = _blend(damaged, rng.uniform(0.35, 0.6) * normal, pit)
    return normal, damaged


_PAINTERS = {'bottle': _bottle, 'carpet': _carpet, 'screw': _screw, 'surface': _surface}


def _blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lays `above` over `below`, both (H, W) or (H, W, 3), with opacity `alpha`, (H, W)."""
    alpha = alpha.reshape(alpha.shape + (1,) * (below.ndim - 2))
    return below + alpha * (above - below)


def _noise(
    rng: np.random.Generator, shape: tuple[int, int], cell: float | tuple[float, float]
) -> np.ndarray:
    """Smooth noise of about unit deviation, (H, W); `cell` is the size of its grain in pixels."""
    cell = np.broadcast_to(cell, 2)
    # Four more than the cells it spans: cubic interpolation never reaches the border.
    coarse = rng.standard_normal(
        [int(np.ceil(n / c)) + 4 for n, c in zip(shape, cell, strict=True)]
    )
    shift = rng.uniform(1, 2, 2)
    at_y, at_x = np.mgrid[: shape[0], : shape[1]] / cell[:, None, None] + shift[:, None, None]
    return cv2.remap(coarse, np.float32(at_x), np.float32(at_y), interpolation=cv2.INTER_CUBIC)


def _polar(shape: tuple[int, int], center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance from `center`, (y, x), in pixels and angle of every pixel, both (H, W)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(y - center[0], x - center[1]), np.arctan2(y - center[0], x - center[1])


def _window(u: np.ndarray, start: float, end: float) -> np.ndarray:
    """1 between `start` and `end`, 0 elsewhere, with edges of one pixel."""
    return np.clip(u - start + 0.5, 0, 1) * np.clip(end - u + 0.5, 0, 1)


def _patch(
    rng: np.random.Generator,
    shape: tuple[int, int],
    center: np.ndarray,
    radius: float,
    corners: int,
    roughness: float,
) -> np.ndarray:
    """Opacity, (H, W), of an irregular patch about `center`, (y, x)."""
    distance, angle = _polar(shape, center)
    corner = np.sort(rng.uniform(-np.pi, np.pi, corners))
    reach = radius * np.clip(1 + roughness * rng.standard_normal(corners), 0.4, 1.6)
    return np.clip(np.interp(angle, corner, reach, period=_TAU) - distance + 0.5, 0, 1)


def _path(rng: np.random.Generator, middle: np.ndarray, length: float, wander: float) -> np.ndarray:
    """Points (n, 2), as (y, x), of a line through about `middle` that turns by `wander` a step."""
    steps = max(int(length / 4), 2)
    heading = rng.uniform(0, _TAU) + np.cumsum(wander * rng.standard_normal(steps))
    points = np.cumsum(4 * np.stack([np.sin(heading), np.cos(heading)], -1), 0)
    return points - points.mean(0) + middle


def _stroke(shape: tuple[int, int], path: np.ndarray, width: int) -> np.ndarray:
    """Opacity, (H, W), of a line of `width` pixels along `path`, (n, 2) as (y, x)."""
    canvas = np.zeros(shape, np.uint8)
    points = np.rint(path[:, ::-1] * 16).astype(np.int32)  # sixteenths of a pixel
    cv2.polylines(canvas, [points], False, 255, int(width), cv2.LINE_AA, shift=4)
    return canvas / 255


def _shards(
    rng: np.random.Generator, shape: tuple[int, int], center: np.ndarray, radius: float, count: int
) -> np.ndarray:
    """Broken glass: flat facets, most of them dark and some that glare, (H, W, 3)."""
    seeds = center + radius * rng.uniform(-1.2, 1.2, (count, 2))
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = np.stack([np.hypot(y - seed[0], x - seed[1]) for seed in seeds])
    nearest = np.partition(distance, 1, axis=0)[:2]
    tone = np.where(
        rng.random(count) < 0.2, rng.uniform(150, 250, count), rng.uniform(8, 95, count)
    )
    tilt = rng.normal(0, 2.5, (count, 2))
    facet = distance.argmin(0)
    grey = (
        tone[facet]
        + tilt[facet, 0] * (y - seeds[facet, 0])
        + tilt[facet, 1] * (x - seeds[facet, 1])
    )
    grey = np.clip(grey, 5, 255) + 70 * np.exp(-((nearest[1] - nearest[0]) ** 2) / 1.5)
    return grey[..., None] * np.array([0.97, 0.98, 1.02])
