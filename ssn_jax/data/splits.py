"""Images in memory: the splits of a data set, and parts of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssn_jax.data.doubts import Doubt


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
      inside: the rows and columns that each image takes, where images are padded; None: all.
    """

    images: np.ndarray
    masks: np.ndarray
    has_mask: np.ndarray
    labels: np.ndarray
    defects: tuple[str, ...]
    files: tuple[str, ...]
    inside: tuple[tuple[slice, slice], ...] | None = None


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
      white: what white is in images of more than 8 bits; 0 if no training image tells.
      doubts: about its files.
    """

    train: Split
    test: Split
    name: str
    category: str
    embedded: bool
    fingerprints: dict[str, str]
    white: float = 0.0
    doubts: tuple[Doubt, ...] = ()


def take(split: Split, indices: np.ndarray) -> Split:
    """The images of a split at the given places; the split itself if these are all."""
    if np.array_equal(indices, np.arange(len(split.labels))):
        return split
    return Split(
        images=split.images[indices],
        masks=split.masks[indices],
        has_mask=split.has_mask[indices],
        labels=split.labels[indices],
        defects=tuple(split.defects[i] for i in indices),
        files=tuple(split.files[i] for i in indices),
        inside=split.inside and tuple(split.inside[i] for i in indices),
    )


def own_images(split: Split, places: np.ndarray) -> Sequence[np.ndarray]:
    """The images (h, w, 3) at some places, without the margin of those that are padded."""
    if not split.inside:
        return split.images[places]
    return [split.images[i][split.inside[i]] for i in places]


def valid(split: Split) -> np.ndarray | None:
    """Which pixels are of images, bool (N, H, W), and not of the margin; None: all."""
    if not split.inside:
        return None
    found = np.zeros(split.masks.shape, bool)
    for one, part in zip(found, split.inside, strict=True):
        one[part] = True
    return found
