"""What is doubtful about a data set's files, though they can be read: told, and counted."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from absl import logging
import numpy as np

# Of an image or its mask, by kind: what is wrong, how it is read, and what to do.
REASONS = {
    'empty mask': (
        'its mask is empty, and counts as unknown: mark the defect in it, or remove the mask'
    ),
    'large mask': (
        'its mask covers more than half of the image, and counts as unknown: invert it if it marks '
        'what is normal, or remove it'
    ),
    'lost mask': (
        'nothing of its mask is left at image_size, and it counts as unknown: raise '
        '--config.image_size, cut less, or set --config.data.masks=region'
    ),
    'values': (
        'its values do not fit those of the training images: save it with their range, or set '
        'white by --config.data.range'
    ),
    'turned mask': (
        'its mask was turned as the EXIF orientation of the image says: if they do not meet now, '
        'save both upright'
    ),
    'shape': (
        'its sides are not in the ratio of image_size by a factor of 1.5 or more, and it is '
        'squashed: set --config.image_size to its shape, or --config.fit=pad'
    ),
}
_KINDS = {reason: kind for kind, reason in REASONS.items()}


@dataclass(frozen=True)
class Doubt:
    """Something about a file that its owner should know.

    Attributes:
      file: path relative to the data set's root.
      reason: what is wrong with it, how it is read, and what to do.
    """

    file: str
    reason: str


def of_mask(mask: np.ndarray) -> str | None:
    """The kind of doubt about a defective image's mask (H, W), at its own size; None if none."""
    covered = np.count_nonzero(mask)
    if not covered:
        return 'empty mask'
    return 'large mask' if 2 * covered > mask.size else None


def of_shape(size: tuple[int, int], image_size: tuple[int, int]) -> str | None:
    """The kind of doubt about an image's (height, width) that is squashed; None if none."""
    (height, width), (high, wide) = size, image_size
    ratio = height * wide / (width * high)
    return 'shape' if max(ratio, 1 / ratio) > 1.5 else None


def in_both(train: Mapping[str, bytes], test: Mapping[str, bytes]) -> list[Doubt]:
    """The test images that are training images too.

    Args:
      train: digests of what the training images' files hold, by file.
      test: likewise of the test images.
    """
    trained = {content: file for file, content in train.items()}
    found = [file for file, content in test.items() if content in trained]
    if not found:
        return []
    reason = (
        f'is in training and in test ({len(found)} test images are; {found[0]} is the file '
        f'{trained[test[found[0]]]}): its score says nothing, remove one of both'
    )
    return [Doubt(file, reason) for file in found]


def count(doubts: Iterable[Doubt]) -> dict[str, int]:
    """How many there are of each kind, those of names and places together as 'files'."""
    return dict(Counter(_KINDS.get(doubt.reason, 'files') for doubt in doubts))


def log(doubts: Iterable[Doubt]) -> None:
    """Logs what is doubtful, a line for each reason with the files that it holds for."""
    by_reason = {}
    for doubt in doubts:
        by_reason.setdefault(doubt.reason, []).append(doubt.file)
    for reason, files in by_reason.items():
        more = f' and {len(files) - 1} more' if len(files) > 1 else ''
        logging.warning('%s%s: %s', files[0], more, reason)
