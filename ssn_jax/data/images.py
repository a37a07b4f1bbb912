"""Encoded images to arrays: reading, decoding, resizing."""

from pathlib import Path
import warnings

import cv2
import numpy as np
from PIL import Image

from ssn_jax.errors import UserError

SUFFIXES = frozenset({'.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp'})

# `size` only reads headers, and its caller judges the size.
Image.MAX_IMAGE_PIXELS = None
# What is wrong with an image is told by the caller, in one line.
warnings.filterwarnings('ignore', module='PIL')
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_JPEG_MAGIC = b'\xff\xd8\xff'
_PNG_MAGIC = b'\x89PNG\r\n\x1a\n'


def read(source: Path | bytes) -> bytes:
    """Returns the encoded bytes of an image given as a file or already as bytes.

    Raises:
      UserError: the file cannot be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise UserError(f'{source}: cannot be read ({error.strerror}); check the file') from error


def decode(encoded: bytes, file: Path | str) -> np.ndarray:
    """Decodes an image to 8-bit RGB.

    Grey is replicated to three channels, 16 bits become 8, alpha is dropped and the EXIF
    orientation is applied, all of it as `cv2.imread` does.

    Args:
      encoded: the contents of an image file.
      file: name for the error message.

    Returns:
      uint8 array of shape (H, W, 3).

    Raises:
      UserError: the bytes are no image that OpenCV reads, or one of more than 2^30 pixels.
    """
    return cv2.cvtColor(_decode(encoded, file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def decode_mask(encoded: bytes, file: Path | str) -> np.ndarray:
    """Decodes a mask: every pixel that is not black belongs to the defect.

    Masks of 0 and 1, of 0 and 255 and of 16 bits all mean the same.

    Args:
      encoded: the contents of an image file.
      file: name for the error message.

    Returns:
      uint8 array of shape (H, W) of zeros and ones.

    Raises:
      UserError: the bytes are no image that OpenCV reads.
    """
    mask = _decode(encoded, file, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    # JPEG rings around edges: its black is not exactly 0.
    floor = 127 if encoded.startswith(_JPEG_MAGIC) else 0
    return (mask > floor).astype(np.uint8)


def encode_mask(mask: np.ndarray) -> bytes:
    """Encodes a mask of zeros and ones, (H, W), as PNG bytes (black and white)."""
    return encode(mask * np.uint8(255))


def encode(image: np.ndarray) -> bytes:
    """Encodes a uint8 image, grey (H, W) or RGB (H, W, 3), as PNG bytes."""
    bgr = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode('.png', bgr)[1].tobytes()


def resize(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resizes an image (H, W, 3) bilinearly to `image_size`, (height, width)."""
    return cv2.resize(image, image_size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask (H, W) to `image_size`, (height, width), by the nearest pixel."""
    return cv2.resize(mask, image_size[::-1], interpolation=cv2.INTER_NEAREST)


def centre(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts `size`, (height, width), out of the middle of an image or mask (H, W, ...)."""
    top, left = ((n - m) // 2 for n, m in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def fit(
    image: np.ndarray, image_size: tuple[int, int], resize_to: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Resizes an image (H, W, 3) and cuts `image_size` out of its middle.

    Args:
      image: of any size.
      image_size: (height, width) of what is returned.
      resize_to: (height, width) before cutting; zeros: `image_size`, and nothing is cut.
    """
    whole = resize_to if any(resize_to) else image_size
    return centre(resize(image, whole), image_size)


def size(path: Path) -> tuple[int, int] | None:
    """An image file's (height, width) from its header; None where Pillow does not know it."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # Pillow raises many kinds, and OpenCV is asked next.
        return None


def _decode(encoded: bytes, file: Path | str, flags: int) -> np.ndarray:
    # Of a file without its end libpng complains to stderr itself.
    cut_off = encoded.startswith(_PNG_MAGIC) and b'IEND' not in encoded
    try:
        image = None if cut_off else cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # an empty buffer, or more pixels than OpenCV accepts
        image = None
    if image is None:
        raise UserError(f'{file}: does not decode as an image; repair or remove the file')
    return image


def turn(images: np.ndarray, copies: int, seed: int) -> np.ndarray:
    """Copies of images, each turned around its middle by a random angle.

    Args:
      images: uint8 (N, H, W, 3).
      copies: how many copies of each.
      seed: the angles follow from it, and from the image's index, alone.

    Returns:
      uint8 (N * copies, H, W, 3), the copies of an image side by side. What comes in from outside
      mirrors the inside.
    """
    height, width = images.shape[1:3]
    turned = np.empty((len(images) * copies, *images.shape[1:]), np.uint8)
    for index in range(len(turned)):
        image, copy = divmod(index, copies)
        angle = np.random.default_rng([seed, image, copy]).uniform(0, 360)
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
        turned[index] = cv2.warpAffine(
            images[image], matrix, (width, height), borderMode=cv2.BORDER_REFLECT
        )
    return turned
