"""What a run may know of its training images' defects, brought to what its steps read.

`training_split` is the gate: it takes away what `config.supervision` does not allow, and nothing
after it has seen more.
"""

from collections.abc import Iterable
import dataclasses
import math

from absl import logging
import cv2
import ml_collections
import numpy as np

from ssn_jax import sampling
from ssn_jax.data import Split, defects, images
from ssn_jax.errors import UserError


def take(split: Split, indices: np.ndarray) -> Split:
    """The images of a split at the given places."""
    return Split(
        images=split.images[indices],
        masks=split.masks[indices],
        has_mask=split.has_mask[indices],
        labels=split.labels[indices],
        defects=tuple(split.defects[i] for i in indices),
        files=tuple(split.files[i] for i in indices),
    )


def join(*splits: Split) -> Split:
    """The images of several splits, one after the other."""

    def joined(*parts):
        return sum(parts, ()) if isinstance(parts[0], tuple) else np.concatenate(parts)

    names = [field.name for field in dataclasses.fields(Split)]
    return Split(*(joined(*(getattr(split, name) for split in splits)) for name in names))


def part(split: Split, start: int, stop: int | None = None) -> Split:
    """The images from one place to another, not copied."""
    names = [field.name for field in dataclasses.fields(Split)]
    return Split(*(getattr(split, name)[start:stop] for name in names))


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


def hold_out(config: ml_collections.ConfigDict, split: Split) -> tuple[Split, Split]:
    """Keeps a share of the training images aside, to choose a threshold on.

    Args:
      config: the run's; `decision.holdout` is the share of each class that the run learns from,
        rounded up, and the seed says which.
      split: the training images.

    Returns:
      The images to train on, and those kept aside.

    Raises:
      UserError: none of a class would be left.
    """
    aside = []
    for label in (0, 1) if config.supervision.kind != 'none' else (0,):
        members = np.flatnonzero(split.labels == label)
        count = math.ceil(config.decision.holdout * len(members))
        if count and count == len(members):
            raise UserError(
                f'--config.decision.holdout={config.decision.holdout} leaves no '
                f'{("normal", "defective")[label]} training image of {count}: make it smaller.'
            )
        aside.append(sampling.choose(config.seed, members, count))
    aside = np.sort(np.concatenate(aside))
    rest = np.setdiff1d(np.arange(len(split.labels)), aside)
    return take(split, rest), take(split, aside)


def training_split(config: ml_collections.ConfigDict, split: Split) -> Split:
    """The training images with what the run may know of them.

    Args:
      config: the run's; `supervision.kind` none: the normal images alone; labels: all images and
        no defect's mask; masks: all images, and the masks of as many defective ones as
        `mask_count` or `mask_fraction` says, chosen by seed.
      split: the training images.

    Returns:
      Such a split: `has_mask` is False and `masks` 0 where a defect's place is not to be known.

    Raises:
      UserError: there is no normal, or with supervision no defective, image; or fewer masks than
        `mask_count`.
    """
    settings = config.supervision
    defective = split.labels > 0
    if defective.all():
        raise UserError('the training split holds no normal image: training needs them.')
    if settings.kind == 'none':
        return take(split, np.flatnonzero(~defective))
    if not defective.any():
        raise UserError(
            f'the training split holds no defective image, and --config.supervision.kind='
            f'{settings.kind} learns from them: add some (train/DEFECT), or set it to none.'
        )
    chosen = np.zeros(0, int)
    if settings.kind == 'masks':
        # A mask that vanished in resizing says nothing about the place.
        masked = np.flatnonzero(defective & split.has_mask & split.masks.any((1, 2)))
        count = settings.mask_count
        if count > len(masked):
            raise UserError(
                f'--config.supervision.mask_count={count}: only {len(masked)} defective training '
                'images have a mask.'
            )
        if count < 0:
            wanted = math.floor(settings.mask_fraction * defective.sum() + 0.5)
            count = min(wanted, len(masked))
            if count < wanted:
                logging.warning('%d masks are asked for, %d are there.', wanted, count)
        chosen = sampling.choose(config.seed, masked, count)
    known = ~defective
    known[chosen] = True
    masks = np.where((known & defective)[:, None, None], split.masks, 0).astype(np.uint8)
    return dataclasses.replace(split, masks=masks, has_mask=known)


def masked_files(split: Split) -> list[str]:
    """The defective images of a training split whose mask is used."""
    places = np.flatnonzero((split.labels > 0) & split.has_mask)
    return [split.files[i] for i in places]


def flips(x: np.ndarray) -> np.ndarray:
    """Images (N, H, W, ...) as they are, upside down, mirrored, turned by 180°: (4N, H, W, ...)."""
    return np.concatenate([x, x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1]])


def with_flips(split: Split) -> Split:
    """The normal images, then the four `flips` of the defective ones, with their masks."""
    normal, defective = (np.flatnonzero(split.labels == label) for label in (0, 1))
    four = take(split, np.concatenate([normal, np.tile(defective, 4)]))

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
    normal = part(split, 0, count)
    turned = images.turn(normal.images, config.turned_copies, config.drawn.seed)
    logging.info('%d copies of normal training images are turned', len(turned))
    return join(normal, copies_of(normal, turned), part(split, count))


def with_drawn(config: ml_collections.ConfigDict, split: Split) -> Split:
    """The split and, after it, copies of its normal images with defects drawn into them.

    Args:
      config: the run's; `drawn` says how many copies, and `seed` there which defects.
      split: the training images, normal ones first.
    """
    if not config.drawn.copies:
        return split
    normal = part(split, 0, int((split.labels == 0).sum()))
    drawn, masks = defects.draw(normal.images, config.drawn.copies, config.drawn.seed)
    logging.info('%d copies of normal training images have a defect drawn into them', len(drawn))
    return join(split, copies_of(normal, drawn, masks))


def shown(config: ml_collections.ConfigDict, split: Split) -> Split:
    """All images that the steps are shown: with flips, turned copies and drawn defects."""
    return with_drawn(config, with_turned(config, with_flips(split)))


def shown_labels(config: ml_collections.ConfigDict, labels: np.ndarray) -> np.ndarray:
    """The labels of `shown` of a split with labels (N,), before any image of it is made."""
    defective = int(labels.sum())
    normal = (len(labels) - defective) * (1 + config.turned_copies)
    return np.repeat([0, 1], [normal, 4 * defective + normal * config.drawn.copies])


def truth(
    settings: ml_collections.ConfigDict, split: Split, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """What is known of the images, at the feature grid, as `synthesis.place` reads it.

    Args:
      settings: `config.supervision`.
      split: as `training_split` left it.
      grid: height and width (h, w) of the feature grid.

    Returns:
      label (N,), known (N,), and where any mask is known mask and weight (N, h, w, 1): float32.
    """
    arrays = {'label': split.labels, 'known': split.has_mask}
    if split.masks.any():
        kernel = np.ones((settings.dilation, settings.dilation), np.uint8)
        dilated = [cv2.dilate(mask, kernel) for mask in split.masks]
        weights = (
            distance_weights(mask, settings.distance_weight, settings.distance_power)
            for mask in dilated
        )
        arrays['mask'] = _resize(dilated, grid) >= 0.5
        arrays['weight'] = _resize(weights, grid)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def product(split: Split, grid: tuple[int, int]) -> np.ndarray:
    """Where the product is in normal images, at the feature grid (h, w): float32 (N, h, w, 1).

    1 where it covers most of a position; of defective images nothing is said, 0 everywhere.
    """
    places = np.zeros((len(split.labels), *grid, 1), np.float32)
    for i in np.flatnonzero(split.labels == 0):
        seen = defects.foreground(split.images[i]).astype(np.uint8)
        places[i, :, :, 0] = cv2.resize(seen, grid[::-1], interpolation=cv2.INTER_AREA)
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


def _resize(x: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Resizes N arrays (H, W) bilinearly to (N, *size, 1)."""
    return np.stack([images.resize(y.astype(np.float32), size) for y in x])[..., None]
