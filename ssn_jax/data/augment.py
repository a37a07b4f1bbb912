"""The images that the steps are shown: training images, flips, turned copies, drawn defects.

They are many times as many as the training images. So each is made when it is asked for, follows
from its index alone, and is not kept.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import functools

import cv2
import ml_collections
import numpy as np

from ssn_jax.data import Split, defects, images as images_lib

_FLIPS = (np.s_[:], np.s_[::-1], np.s_[:, ::-1], np.s_[::-1, ::-1])


class Shown:
    """All images that the steps are shown: normal ones, then defective ones.

    The normal images come first, then their turned copies (those of an image side by side), then
    the flips of all defective ones, at last normal and turned ones with a defect drawn into
    each. Of padded images the margin stays as it is.

    Attributes:
      labels: int32 (N,), 0 normal and 1 defective.
      has_mask: bool (N,); whether the place of its defect, or that it has none, is known.
      masked: whether any mask is more than empty.
      real: bool (N,); whether its defect is a real one.
      sources: int32 (N,), the training images that they were made from.
      donors: int32 (N,), the training images that a piece of was pasted into them, or -1.
    """

    def __init__(self, config: ml_collections.ConfigDict, split: Split):
        """Takes a config's `turned_copies`, `product` and `drawn`, and the training images."""
        self._split, self._product, self._drawn = split, config.product, config.drawn
        self._turned = config.turned_copies if config.product.angle == 'any' else 0
        self._normal, self._defective = (np.flatnonzero(split.labels == i) for i in (0, 1))
        self._plain = len(self._normal) * (1 + self._turned)
        # Beside drawn defects a flipped product would be one that lies as no other does.
        upright = config.drawn.count and config.product.angle == 'same'
        self._flips = 1 if upright and config.product.surface == 'object' else len(_FLIPS)
        flipped = self._flips * len(self._defective)
        self._first_drawn = self._plain + flipped
        drawn = self._drawn.count if self._plain else 0
        self.labels = np.repeat(np.int32([0, 1]), [self._plain, flipped + drawn])
        known = np.tile(split.has_mask[self._defective], self._flips)
        self.has_mask = np.concatenate([np.ones(self._plain, bool), known, np.ones(drawn, bool)])
        self._cut, self._real = real_defects(split)
        self.masked = bool(drawn or split.masks.any())
        self.real = np.repeat([False, True, False], [self._plain, flipped, drawn])
        plain = np.concatenate([self._normal, np.repeat(self._normal, self._turned)])
        below = plain[np.arange(drawn) % max(self._plain, 1)]
        self.sources = np.concatenate([plain, np.tile(self._defective, self._flips), below]).astype(
            np.int32
        )

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def donors(self) -> np.ndarray:
        found = np.full(len(self), -1, np.int32)
        seed, count = self._drawn.seed, len(self._real)
        for index in range(len(self) - self._first_drawn):
            _, kind, pasted, _ = defects.choose(self._plain, index, seed, self._product, count)
            if pasted >= 0:
                of = self._cut if kind == defects.REAL else self.sources
                found[self._first_drawn + index] = of[pasted]
        return found

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, 3)."""
        return len(self), *self._split.images.shape[1:]

    @property
    def padded(self) -> bool:
        """Whether some of the images have a margin."""
        return self._split.inside is not None

    def inside(self, index: int) -> tuple[slice, slice]:
        """The rows and columns that an image takes; all of them without a margin."""
        return self._split.inside[self.sources[index]] if self.padded else np.s_[:, :]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image, uint8 RGB (H, W, 3), and its mask, uint8 (H, W) of zeros and ones."""
        image, mask = self._made(index)
        if not self.padded:
            return image, mask
        part, size = self.inside(index), self.shape[1:3]
        padded = images_lib.pad(image, part, size, images_lib.GREY)
        return padded, images_lib.pad(mask, part, size)

    def _made(self, index):
        """An image and its mask, without the margin."""
        rest = index - self._plain
        if rest < 0:
            image = self._normal_or_turned(index)
            return image, np.zeros(image.shape[:2], np.uint8)
        if index < self._first_drawn:
            flip, member = divmod(rest, len(self._defective))
            part, source = self.inside(index), self._defective[member]
            pair = self._split.images[source][part], self._split.masks[source][part]
            return tuple(x[_FLIPS[flip]] for x in pair)
        rest, seed = index - self._first_drawn, self._drawn.seed
        below = self._normal_or_turned
        return defects.draw(below, self._plain, rest, seed, self._product, self._real)

    def _normal_or_turned(self, index):
        rest = index - len(self._normal)
        if rest < 0:
            return self._split.images[self._normal[index]][self.inside(index)]
        source, copy = divmod(rest, self._turned)
        rng = np.random.default_rng([self._drawn.seed, defects.TURN, source, copy])
        image = self._split.images[self._normal[source]][self.inside(index)]
        return turn(image, rng.uniform(0, 360))

    def parts(self, size: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """All images in order, `size` at a time, those that follow being made meanwhile.

        Yields:
          Which they are, the images (n, H, W, 3) and their masks (n, H, W).
        """

        def begin(start):
            members = range(len(self))[start : start + size]
            return [pool.submit(self.__getitem__, i) for i in members]

        with ThreadPoolExecutor() as pool:  # OpenCV releases the interpreter's lock.
            following = begin(0)
            for start in range(0, len(self), size):
                current, following = following, begin(start + size)
                images, masks = zip(*(made.result() for made in current), strict=True)
                yield slice(start, start + len(images)), np.stack(images), np.stack(masks)


def real_defects(split: Split) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Which images are defective with a known mask; of each (h, w, 3) and its mask, no margin."""
    known = np.flatnonzero((split.labels > 0) & split.masks.any((1, 2)))
    parts = [split.inside[i] if split.inside else np.s_[:, :] for i in known]
    pairs = zip(known, parts, strict=True)
    return known, [(split.images[i][part], split.masks[i][part]) for i, part in pairs]


def turn(image: np.ndarray, angle: float) -> np.ndarray:
    """An image, uint8 (H, W, 3), turned around its middle by an angle in degrees.

    What comes in from outside mirrors the inside.
    """
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
