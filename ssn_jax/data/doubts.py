"""What is doubtful about a data set's files: each is told, counted, and not taken for known."""

from collections import Counter
from collections.abc import Iterable, Mapping
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
    'shape': (
        'its sides are not in the ratio of image_size by a factor of 1.5 or more, and it is '
        'squashed: set --config.image_size to its shape, or --config.fit=pad'
    ),
    'unreadable': '',  # The error follows.
    'no image': (
        'not used, since its name is none of an image: if it is one, give it its ending, such as '
        '.png'
    ),
    'stray image': 'not used, since images lie in folders: move it to train/good or test/DEFECT',
    'other folder': 'not used, though it holds images: move them to train/good or test/DEFECT',
    'mask among images': (
        'not used, since it has the name, or lies in a folder, of a mask of another image: move '
        'masks to ground_truth/DEFECT'
    ),
    'mask of no image': (
        'not used, since no image has its name: the mask of NAME.png is NAME_mask.png or NAME.png'
    ),
    'known already': (
        'not added, since the run has the same file in its training or test split, such as '
    ),
    'in both splits': (
        'in training and in test, so its score says nothing: remove one of both files, such as '
    ),
}


class Doubt(NamedTuple):
    """What is doubtful about a file.

    Attributes:
      file: its path relative to the data set's root; of a mask mostly that of its image.
      kind: one of `REASONS`.
      more: what is added to the reason.
    """

    file: str
    kind: str
    more: str = ''

    @property
    def reason(self) -> str:
        """What is wrong, and what to do."""
        return REASONS[self.kind] + self.more


def of_mask(mask: np.ndarray, fitted: np.ndarray) -> str | None:
    """The kind of doubt about a defective image's mask; None if there is none.

    Args:
      mask: (H, W) at its own size.
      fitted: (h, w) as it is trained or measured with.
    """
    if not mask.any():
        return 'empty mask'
    if 2 * np.count_nonzero(mask) > mask.size:
        return 'large mask'
    return None if fitted.any() else 'lost mask'


def of_shape(size: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether an image of this (height, width) is squashed to image_size beyond all likeness."""
    (height, width), (high, wide) = size, image_size
    ratio = height * wide / (width * high)
    return max(ratio, 1 / ratio) > 1.5


def in_both(train: Mapping[str, bytes], test: Mapping[str, bytes]) -> list[Doubt]:
    """The test images that are training images too.

    Args:
      train: digests of what the training images' files hold, by file.
      test: likewise of the test images.
    """
    trained = {content: file for file, content in train.items()}
    found = [file for file, content in test.items() if content in trained]
    pair = f'{found[0]} and {trained[test[found[0]]]}' if found else ''
    return [Doubt(file, 'in both splits', pair) for file in found]


def count(doubts: Iterable[Doubt]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(Counter(doubt.kind for doubt in doubts))


def log(doubts: Iterable[Doubt], split: str = '') -> None:
    """Warns once of each reason, with the number of files and the first ones."""
    files = {}
    for doubt in doubts:
        files.setdefault(doubt.reason, []).append(doubt.file)
    of = f' of the {split} images' if split else ''
    for reason, named in files.items():
        first = ', '.join(named[:3]) + ', ...' * (len(named) > 3)
        logging.warning('%d%s (%s): %s', len(named), of, first, reason)
