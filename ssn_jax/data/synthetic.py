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
VERSION = 2

# Images by split and defect.
_COUNTS = {
    'bearing': {
        'train': {GOOD: 150},
        'test': {
            GOOD: 60,
            'chip': 8,
            'fibre': 8,
            'missing_ball': 8,
            'scratch': 8,
            'stain': 8,
        },
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
      uint8 grey (H, W) or RGB (H, W, 3), twice, and uint8 (H, W) of zeros and ones.
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
        different = np.abs(damaged - normal).reshape(*normal.shape[:2], -1).max(-1)
        seen = (different >= _VISIBLE).astype(np.uint8)
        if defect == GOOD or seen.sum() >= 12:
            break
    # Where a defect happens to look like what it covers, its mask would have a pinhole: the pixels
    # that fill those are made to differ, too little for the eye.
    mask = cv2.morphologyEx(seen, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    image = normal.copy()
    image[mask == 1] += np.where(normal[mask == 1] < 128, _VISIBLE, -_VISIBLE)
    image[seen == 1] = damaged[seen == 1]
    return image.astype(np.uint8), normal.astype(np.uint8), mask


def _bearing(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A ball bearing seen from above on a dark mat, turned by any angle, (256, 256, 3), RGB.

    Returns the normal and the damaged picture, float in 0..255.
    """
    shape = (256, 256)
    middle = 128 + rng.uniform(-6, 6, 2)
    y, x = (axis - at for axis, at in zip(np.mgrid[:256, :256].astype(float), middle, strict=True))
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    turn, gleam = rng.uniform(0, _TAU, 2)

    mat = (
        np.array([58, 66, 74])
        * (1 + 0.04 * _noise(rng, shape, 3) + 0.05 * _noise(rng, shape, 60))[..., None]
    )
    shadow = np.clip(1.2 - (np.hypot(y - 5, x - 4) - 100) / 22, 0, 1) * (radius > 100)
    picture = mat * (1 - 0.6 * shadow[..., None])

    # Turned steel gleams in two opposite sectors, and its grooves run around.
    brushed = _noise(rng, (160, 1), (1.3, 1))[:, 0]
    grooves = np.interp(radius, np.arange(160), brushed) + 0.5 * _noise(rng, shape, 2)
    sheen = np.cos(angle - gleam) ** 2
    steel = 118 + 85 * sheen**3 + 26 * sheen + 7 * grooves
    steel = steel[..., None] * np.array([0.98, 1.0, 1.03])

    def ring(picture, inner, outer):
        """A flat ring with a bright and a dark chamfer at its edges."""
        here = _window(radius, inner, outer)[..., None]
        edge = np.minimum(radius - inner, outer - radius)
        shade = 1 + 0.35 * np.exp(-(((edge - 3) / 1.4) ** 2)) - 0.5 * np.exp(-((edge / 1.6) ** 2))
        return _blend(picture, steel * shade[..., None], here)

    def balls(picture, missing=()):
        """The raceway with its cage, and the balls in it."""
        depth = np.clip(np.minimum(radius - 52, 88 - radius) / 10, 0, 1)[..., None]
        picture = _blend(
            picture, np.array([46.0, 47, 50]) * (0.5 + depth), _window(radius, 52, 88)[..., None]
        )
        brass = np.array([186, 148, 84]) * (0.8 + 0.35 * sheen + 0.03 * grooves)[..., None]
        edge = np.clip(np.minimum(radius - 62, 78 - radius) / 3, 0, 1)[..., None]
        picture = _blend(picture, brass * (0.6 + 0.4 * edge), _window(radius, 62, 78)[..., None])
        for k in range(9):
            at = turn + _TAU * k / 9
            dy, dx = y - 70 * np.sin(at), x - 70 * np.cos(at)
            off = np.hypot(dy, dx)
            pocket = np.clip(17.5 - off, 0, 1)[..., None]
            hollow = np.array([30.0, 30, 32]) * (0.7 + 0.03 * np.clip(off + dy, 0, 30))[..., None]
            picture = _blend(picture, hollow, pocket)
            if k in missing:
                continue
            height = np.sqrt(np.clip(1 - (off / 15) ** 2, 0, 1))
            # The lamp, its reflection on the far side, and the dark band between them.
            light = np.exp(-(((dy + 5) ** 2 + (dx + 4) ** 2) / 14))
            rim = np.exp(-(((off - 11.5) / 2.2) ** 2)) * np.clip((dy + dx) / 15, 0, 1)
            grey = 52 + 98 * height + 150 * light + 60 * rim
            ball = grey[..., None] * np.array([0.97, 1.0, 1.04])
            picture = _blend(picture, ball, np.clip(15 - off + 0.5, 0, 1)[..., None])
        for k in range(9):  # Rivets of the cage.
            at = turn + _TAU * (k + 0.5) / 9
            off = np.hypot(y - 70 * np.sin(at), x - 70 * np.cos(at))
            rivet = np.array([206.0, 176, 118]) * (1.1 - 0.05 * off)[..., None]
            picture = _blend(picture, rivet, np.clip(3.5 - off, 0, 1)[..., None])
        return picture

    normal = balls(ring(ring(picture, 88, 110), 32, 52))
    if defect == GOOD:
        return normal, normal
    if defect == 'missing_ball':
        return normal, balls(ring(ring(picture, 88, 110), 32, 52), {int(rng.integers(9))})
    spot = rng.uniform(0, _TAU)
    direction = np.array([np.sin(spot), np.cos(spot)])
    metal = np.maximum(_window(radius, 90, 108), _window(radius, 34, 50))
    if defect == 'chip':  # Broken off an edge, where grainy steel shows.
        at = middle + rng.choice([109, 89, 51, 33]) * direction
        broken = _patch(rng, shape, at, rng.uniform(5, 11), corners=8, roughness=0.35)
        broken = broken * np.maximum(_window(radius, 88, 110), _window(radius, 32, 52))
        rough = (70 + 26 * _noise(rng, shape, 1.6))[..., None] * np.ones(3)
        return normal, _blend(normal, rough, broken[..., None])
    if defect == 'scratch':  # A dark groove with a burr that gleams beside it.
        damaged = normal
        for _ in range(rng.integers(1, 4)):
            at = middle + rng.choice([99, 42]) * direction + rng.normal(0, 4, 2)
            path, width = _path(rng, at, rng.uniform(16, 44), 0.08), rng.integers(1, 3)
            for colour, shift in ((250.0, 1.5), (36.0, 0)):
                line = _stroke(shape, path + shift, width) * metal
                damaged = _blend(damaged, colour, 0.9 * line[..., None])
        return normal, damaged
    if defect == 'stain':  # Rust or burnt oil.
        at = middle + rng.choice([99, 70, 42]) * direction
        blot = _patch(rng, shape, at, rng.uniform(7, 19), corners=11, roughness=0.3)
        blot = cv2.GaussianBlur(blot, (0, 0), 1.5) * _window(radius, 33, 109)
        tint = np.array(rng.choice([[0.86, 0.52, 0.28], [0.45, 0.38, 0.3]]))
        mottled = np.clip(0.85 + 0.2 * _noise(rng, shape, 4), 0.3, 1)
        return normal, _blend(normal, normal * tint, (blot * mottled)[..., None])
    # A fibre, lying anywhere on the bearing.
    at = middle + rng.uniform(38, 104) * direction
    line = _stroke(shape, _path(rng, at, rng.uniform(30, 80), 0.3), rng.integers(1, 3))
    line = line * _window(radius, 33, 109)
    colour = rng.choice([[150.0, 40, 46], [30, 60, 120], [28, 62, 40]])
    return normal, _blend(normal, colour, (0.9 * line)[..., None])


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


_PAINTERS = {'bearing': _bearing, 'screw': _screw, 'surface': _surface}


def _blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lays `above` over `below` with opacity `alpha`; (H, W), or with colours in front of axes."""
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
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = np.hypot(y - center[0], x - center[1])
    angle = np.arctan2(y - center[0], x - center[1])
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
