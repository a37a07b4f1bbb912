"""What is doubtful about a data set's files: each is told, counted, and not taken for known."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from absl import logging
import numpy as np

# By kind: what is wrong, and what to do.
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
}


class Doubt(NamedTuple):
    """What is doubtful about an image.

    Attributes:
      file: the image's path relative to the data set's root.
      kind: one of `REASONS`.
    """

    file: str
    kind: str

    @property
    def reason(self) -> str:
        """What is wrong, and what to do."""
        return REASONS[self.kind]


def of_mask(mask: np.ndarray) -> str | None:
    """The kind of doubt about a defective image's mask (H, W), at its own size; None if none."""
    covered = np.count_nonzero(mask)
    if not covered:
        return 'empty mask'
    return 'large mask' if 2 * covered > mask.size else None


def count(doubts: Iterable[Doubt]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(Counter(doubt.kind for doubt in doubts))


def log(doubts: Iterable[Doubt], split: str) -> None:
    """Warns once of each kind, with its number and its first files."""
    files = {}
    for doubt in doubts:
        files.setdefault(doubt.kind, []).append(doubt.file)
    for kind, named in files.items():
        first = ', '.join(named[:3]) + ', ...' * (len(named) > 3)
        logging.warning('%d of the %s images (%s): %s', len(named), split, first, REASONS[kind])
