"""The TensorFlow Datasets builder of every layout.

Layouts differ in where their records come from alone; `records.py` writes them. Images are stored
as they were encoded: one prepared set serves every image size.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from ssn_jax.data import images
from ssn_jax.data.layouts import GOOD, Record
from ssn_jax.errors import UserError


class _Info(tfds.core.DatasetInfo):
    """What is known of a data set."""

    def initialize_from_bucket(self) -> None:
        """Asks nobody; TFDS would, and leave a temporary folder behind each time."""


class Inspection(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of images, their defects and, where known, their defects' masks."""

    VERSION = tfds.core.Version('1.0.0')

    # Nothing is ever downloaded. TFDS would search the package for checksums of downloads, with a
    # library that it does not declare.
    url_infos: ClassVar[dict] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            'image': tfds.features.Image(shape=(None, None, 3)),
            'mask': tfds.features.Image(shape=(None, None, 1)),
            'has_mask': np.bool_,
            'turned': np.bool_,
            'white': np.float64,
            'span': tfds.features.Tensor(shape=(2,), dtype=np.float64),
            'defect': tfds.features.Text(),
            'file': tfds.features.Text(),
        }
        return _Info(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        raise NotImplementedError('records.py writes the examples.')

    def _generate_examples(self) -> Iterator:
        raise NotImplementedError('records.py writes the examples.')


def example(record: Record) -> dict:
    """Reads and checks one record.

    Args:
      record: the image and its mask, as files or encoded bytes.

    Returns:
      The example to store: the image as it was encoded, the mask as PNG of the image's size
      (empty where no defect is known), and what is known of the defect; whether its mask was
      turned with the image though it fits unturned too; and of an image of more than 8 bits what
      white is as far as it tells, and its lowest and highest value (zeros of others).

    Raises:
      UserError: a file does not decode, or the mask's size is not the image's.
    """
    encoded = images.read(record.image)
    pixels = images.pixels(encoded, record.file)
    deep = pixels.dtype != np.uint8
    mask, turned = np.zeros(pixels.shape[:2], np.uint8), False
    if record.mask is not None:
        mask, turned = _mask(record, encoded, mask.shape)
    defect = record.defect or ('defect' if mask.any() else GOOD)
    return {
        'image': encoded,
        'mask': images.encode_mask(mask),
        'has_mask': defect == GOOD or record.mask is not None,
        'turned': turned,
        'white': images.white_of(pixels),
        'span': np.array([pixels.min(), pixels.max()] if deep else [0, 0], np.float64),
        'defect': defect,
        'file': record.file,
    }


def _mask(record: Record, image: bytes, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """A record's mask, turned with its image if it was not drawn on the turned one.

    Args:
      record: of a mask.
      image: its image as it was encoded.
      size: the image's (height, width), as it is shown.

    Returns:
      The mask, and whether it was turned and would fit without.

    Raises:
      UserError: it does not decode, or its size is not the image's.
    """
    file = record.file if isinstance(record.mask, bytes) else record.mask
    encoded = images.read(record.mask)
    mask = images.decode_mask(encoded, file)
    angle, own = images.orientation(image), images.orientation(encoded)
    fits, turned = mask.shape == size, images.turn(mask, angle)
    if angle not in (None, 1) and turned.shape == size and (own is None or not fits):
        return turned, fits
    if fits:
        return mask, False
    remedy = 'give them the same size'
    if mask.shape == size[::-1] and (angle or own):
        remedy = 'one of them is turned by its EXIF orientation: save both upright'
    raise UserError(
        f'{file}: the mask is {mask.shape[0]}x{mask.shape[1]} (height by width), its image '
        f'{size[0]}x{size[1]}; {remedy}'
    )
