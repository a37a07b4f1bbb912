"""What normal images tell of a product: its angle, its place, and whether it is a texture.

Whatever can be found so is a field of `config.product` that may be 'auto'. Features of a few
images are compared with those of others by their nearest neighbours.
"""

from collections.abc import Callable, Sequence

from absl import logging
import cv2
import numpy as np

from ssn_jax.data import defects
from ssn_jax.fused import fold
from ssn_jax.models import systems
from ssn_jax.training import features

# Images that are compared, and those that they are compared with.
_ASKED, _KNOWN = 32, 16
# With fewer nothing can be told.
_FEWEST = 8
# What the middle square of an image is resized to.
_SIDE = 256
# Normal images are told from their quarter turns by an AUROC above this: the angle is the same.
_TOLD_APART = 0.9
# A larger share of positions is most like a neighbour of the same place: the place is the same.
_AT_HOME = 0.75
# A larger share of the image's border is on the same side of Otsu's threshold as the product.
_ON_BORDER = 0.25
# Padded images whose sides differ by more than this share of the longest have no places in common.
_UNLIKE = 1 / 16


def find(config, images: Sequence[np.ndarray], backbone: dict) -> dict[str, str]:
    """Finds what a config's fields of the product are asked to be: those that are 'auto'.

    Args:
      config: the run's.
      images: the N normal training images, uint8 RGB (H, W, 3), without the margin of padded ones.
      backbone: its variables.

    Returns:
      The fields by their name in the config, and their values.
    """
    found = dict(config.product)
    asked = sorted(name for name, value in found.items() if value == 'auto')
    if not asked:
        return {}
    why, few = {}, len(images) < _FEWEST
    sides = np.array([image.shape[:2] for image in images])
    alike = (np.ptp(sides, 0) <= sides.max() * _UNLIKE).all()
    chosen = np.random.default_rng(0).permutation(len(images))[: _ASKED + _KNOWN]
    images = [images[i] for i in chosen]
    told, home = 1.0, 0.0
    if not few and asked != ['surface']:
        told, home = _compare(config, images, backbone)
    if 'angle' in asked:
        found['angle'] = 'same' if told > _TOLD_APART else 'any'
        why['angle'] = f'images are told from their quarter turns by an AUROC of {told:.2f}'
    if 'place' in asked:
        # What is turned is nowhere at home but in the middle.
        at_home = home > _AT_HOME and found['angle'] == 'same'
        found['place'] = 'same' if at_home and alike else 'any'
        why['place'] = f'{home:.0%} of the positions look most like those of their own place'
        if at_home and not alike:
            why['place'] += ', which padding moves, since images differ in shape'
    if few:
        why = dict.fromkeys(why, f'taken for granted: {len(images)} normal images are too few')
    share = np.median([defects.border(defects.foreground(image)).mean() for image in images])
    if 'surface' in asked:
        all_over = share > _ON_BORDER and found['place'] == 'any'
        found['surface'] = 'texture' if all_over else 'object'
        why['surface'] = f'{share:.0%} of the border look like the product'
    for name in asked:
        logging.info(
            'Found in the normal images: --config.product.%s=%s (%s)', name, found[name], why[name]
        )
    return {f'product.{name}': found[name] for name in asked}


def _compare(config, images, backbone) -> tuple[float, float]:
    """How well images are told from their quarter turns, and how many positions are at home."""
    squares = np.stack([_square(image) for image in images])
    extract = _extractor(config, backbone)
    known = min(_KNOWN, len(squares) // 2)
    normal = extract(squares)
    mean, deviation = normal.mean((0, 1, 2)), normal.std((0, 1, 2)) + 1e-6
    side = normal.shape[1]
    places = np.arange(side) - (side - 1) / 2
    inner = np.maximum(*np.abs(np.meshgrid(places, places))).ravel() < 0.35 * side
    disc = np.hypot(*np.meshgrid(places, places)).ravel() < 0.44 * side

    def standard(x):
        return ((x - mean) / deviation).reshape(len(x), side * side, -1)

    bank = standard(normal[:known])
    distances, nearest = nearest_of(bank, standard(normal[known:]))
    own = np.arange(side * side)
    away = [np.abs(f(nearest, side) - f(own, side)) for f in (np.floor_divide, np.mod)]
    home = (np.maximum(*away) <= 1)[:, inner].mean()
    straight = distances[:, disc].mean(1)
    told = []
    for turns in (1, 2, 3):
        turned = extract(np.ascontiguousarray(np.rot90(squares[known:], turns, (1, 2))))
        distance = nearest_of(bank, standard(turned))[0][:, disc].mean(1)
        told.append((distance[:, None] > straight).mean())
    return max(told), home


def _extractor(config, backbone) -> Callable:
    """From squares (n, 256, 256, 3) to features float32 (n, 16, 16, C), all on the last's grid."""
    network = systems.build_network(config)
    run = features.extractor(config, network, fold.fuse_backbone(backbone), (_SIDE, _SIDE))

    def extract(squares):
        layers = [np.asarray(features.restore(x), np.float32) for x in run(squares)]
        size = layers[-1].shape[1]
        blocks = (
            x.reshape(len(x), size, x.shape[1] // size, size, -1, x.shape[-1]) for x in layers
        )
        return np.concatenate([x.mean((2, 4)) for x in blocks], -1)

    return extract


def _square(image):
    """The middle square of an image, (256, 256, 3)."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def nearest_of(bank, asked):
    """The nearest neighbours of features.

    Args:
      bank: float32 (m, P, C), P places of m images.
      asked: (n, Q, C).

    Returns:
      Distances (n, Q) to the nearest of the bank, and of its P places that one's, int (n, Q).
    """
    rows, squares = bank.reshape(-1, bank.shape[-1]), (bank**2).sum(-1).ravel()
    distances, places = [], []
    for image in asked:
        squared = (image**2).sum(1)[:, None] + squares - 2 * image @ rows.T
        nearest = squared.argmin(1)
        distances.append(np.sqrt(np.maximum(squared.min(1), 0)))
        places.append(nearest % bank.shape[1])
    return np.array(distances), np.array(places)
