"""Images in memory: the splits of a data set, and parts of them."""

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """The images of one split, sorted by defect and file name.

    Attributes:
      images: uint8 (N, H, W, 3), RGB.
      masks: uint8 (N, H, W) of zeros and ones; zeros where no mask is known.
      has_mask: bool (N,); True for normal images, whose mask is known to be empty.
      labels: int32 (N,), 0 normal and 1 defective.
      defects: N names, 'good' or the defect's.
      files: N paths relative to the data set's root.
    """

    images: np.ndarray
    masks: np.ndarray
    has_mask: np.ndarray
    labels: np.ndarray
    defects: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
      train: the images to learn from.
      test: the images to be measured on.
      name: the builder that made it: 'mvtec_ad', 'ksdd2', 'folder', or 'synthetic' for the
        embedded set, whatever name it was asked for under.
      category: the category's name.
      embedded: whether this is the embedded procedural set instead of real data.
      fingerprints: by split, 'train' and 'test', the SHA-256 of what it holds: of names, encoded
        images and masks, wherever they lie.
    """

    train: Split
    test: Split
    name: str
    category: str
    embedded: bool
    fingerprints: dict[str, str]


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
