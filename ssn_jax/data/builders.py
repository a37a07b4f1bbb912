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
      (empty where no defect is known), and what is known of the defect.

    Raises:
      UserError: a file does not decode, or the mask's size is not the image's.
    """
    encoded = images.read(record.image)
    size = images.decode(encoded, record.file).shape[:2]
    mask = np.zeros(size, np.uint8)
    if record.mask is not None:
        file = record.file if isinstance(record.mask, bytes) else record.mask
        mask = images.decode_mask(images.read(record.mask), file)
        if mask.shape != size:
            raise UserError(
                f'{file}: the mask is {mask.shape[0]}x{mask.shape[1]} (height by width), its image '
                f'{size[0]}x{size[1]}; give them the same size'
            )
    defect = record.defect or ('defect' if mask.any() else GOOD)
    return {
        'image': encoded,
        'mask': images.encode_mask(mask),
        'has_mask': defect == GOOD or record.mask is not None,
        'defect': defect,
        'file': record.file,
    }
