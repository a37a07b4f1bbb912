"""What is added to the training images: flips, turned copies, drawn defects."""

import dataclasses

from absl import logging
import cv2
import ml_collections
import numpy as np

from ssn_jax.data import Split, defects, splits


def shown(config: ml_collections.ConfigDict, split: Split) -> Split:
    """All images that the steps are shown: with flips, turned copies and drawn defects."""
    return with_drawn(config, with_turned(config, with_flips(split)))


def shown_labels(config: ml_collections.ConfigDict, labels: np.ndarray) -> np.ndarray:
    """The labels of `shown` of a split with labels (N,), before any image of it is made."""
    defective = int(labels.sum())
    normal = (len(labels) - defective) * (1 + config.turned_copies)
    return np.repeat([0, 1], [normal, 4 * defective + normal * config.drawn.copies])


def with_flips(split: Split) -> Split:
    """The normal images, then the four `flips` of the defective ones, with their masks."""
    normal, defective = (np.flatnonzero(split.labels == label) for label in (0, 1))
    four = splits.take(split, np.concatenate([normal, np.tile(defective, 4)]))

    def flip(x):
        return np.concatenate([x[normal], flips(x[defective])])

    return dataclasses.replace(four, images=flip(split.images), masks=flip(split.masks))


def with_turned(config: ml_collections.ConfigDict, split: Split) -> Split:
    """The split with copies of its normal images, turned by any angle, right after them.

    Args:
      config: the run's; `turned_copies` says how many, and `drawn.seed` by which angles.
      split: the training images, normal ones first.
    """
    if not config.turned_copies:
        return split
    count = int((split.labels == 0).sum())
    normal = splits.part(split, 0, count)
    turned = turn(normal.images, config.turned_copies, config.drawn.seed)
    logging.info('%d copies of normal training images are turned', len(turned))
    return splits.join(normal, copies_of(normal, turned), splits.part(split, count))


def with_drawn(config: ml_collections.ConfigDict, split: Split) -> Split:
    """The split and, after it, copies of its normal images with defects drawn into them.

    Args:
      config: the run's; `drawn` says how many copies, and `seed` there which defects.
      split: the training images, normal ones first.
    """
    if not config.drawn.copies:
        return split
    normal = splits.part(split, 0, int((split.labels == 0).sum()))
    drawn, masks = defects.draw(normal.images, config.drawn.copies, config.drawn.seed)
    logging.info('%d copies of normal training images have a defect drawn into them', len(drawn))
    return splits.join(split, copies_of(normal, drawn, masks))


def copies_of(normal: Split, copied: np.ndarray, masks: np.ndarray | None = None) -> Split:
    """Changed copies (K * N, H, W, 3) of N normal images, those of an image side by side.

    With masks (K * N, H, W) they are defective images, and what was drawn into them is known.
    """
    sources = np.repeat(np.arange(len(normal.labels)), len(copied) // len(normal.labels))
    drawn = masks is not None
    return Split(
        images=copied,
        masks=masks if drawn else np.zeros(copied.shape[:3], np.uint8),
        has_mask=normal.has_mask[sources],
        labels=np.full(len(copied), drawn, normal.labels.dtype),
        defects=tuple('drawn' if drawn else normal.defects[i] for i in sources),
        files=tuple(normal.files[i] for i in sources),
    )


def flips(x: np.ndarray) -> np.ndarray:
    """Images (N, H, W, ...) as they are, upside down, mirrored, turned by 180°: (4N, H, W, ...)."""
    return np.concatenate([x, x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1]])


def turn(images: np.ndarray, copies: int, seed: int) -> np.ndarray:
    """Copies of images, each turned around its middle by a random angle.

    Args:
      images: uint8 (N, H, W, 3).
      copies: how many copies of each.
      seed: the angles follow from it, and from the image's index, alone.

    Returns:
      uint8 (N * copies, H, W, 3), the copies of an image side by side. What comes in from outside
      mirrors the inside.
    """
    height, width = images.shape[1:3]
    turned = np.empty((len(images) * copies, *images.shape[1:]), np.uint8)
    for index in range(len(turned)):
        image, copy = divmod(index, copies)
        angle = np.random.default_rng([seed, image, copy]).uniform(0, 360)
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
        turned[index] = cv2.warpAffine(
            images[image], matrix, (width, height), borderMode=cv2.BORDER_REFLECT
        )
    return turned
