"""The gate: what a run may know of its training images.

`training_split` takes away what `config.supervision` does not allow, and nothing after it has seen
more.
"""

import dataclasses
import math

from absl import logging
import ml_collections
import numpy as np

from ssn_jax.data import Split, sampling, splits
from ssn_jax.errors import UserError


def training_split(config: ml_collections.ConfigDict, split: Split) -> Split:
    """The training images with what the run may know of them.

    Args:
      config: the run's; `supervision.kind` none: the normal images alone; labels: all images and
        no defect's mask; masks: all images, and the masks of as many defective ones as `mask_count`
        or `mask_fraction` says, chosen by seed; auto: the same with what there is, if anything.
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
    if settings.kind == 'none' or (settings.kind == 'auto' and not defective.any()):
        return splits.take(split, np.flatnonzero(~defective))
    if not defective.any():
        raise UserError(
            f'the training split holds no defective image, and --config.supervision.kind='
            f'{settings.kind} learns from them: add some (train/DEFECT), or set it to none.'
        )
    chosen = np.zeros(0, int)
    if settings.kind in ('masks', 'auto'):
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
            if count < wanted and settings.kind == 'masks':
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
