"""Encoded images to arrays: reading, decoding, resizing."""

import contextlib
import io
from pathlib import Path
import re
import struct
import threading
import warnings

import cv2
import numpy as np
from PIL import Image

from ssn_jax.errors import UserError

# What is looked at in a folder; a file that is named itself may end in anything.
SUFFIXES = frozenset(
    {'.png', '.jpg', '.jpeg', '.jfif', '.jpe', '.bmp', '.dib', '.tif', '.tiff', '.webp', '.avif'}
    | {'.exr', '.gif', '.hdr', '.j2k', '.jp2', '.pam', '.pbm', '.pfm', '.pgm', '.pic', '.pnm'}
    | {'.ppm', '.pxm', '.ras', '.sr'}
)

_PILLOW = threading.Lock()
# ImageNet's mean, of which backbones see nothing.
_GREY = np.uint8([124, 116, 104])
MAX_PIXELS = 2**27  # Of an image that is decoded, unless more is asked for.
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


def decode(encoded: bytes, file: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image to 8-bit RGB.

    Grey is replicated to three channels, 16 bits become 8, alpha is dropped and the EXIF
    orientation is applied, all of it as `cv2.imread` does.

    Args:
      encoded: the contents of an image file.
      file: name for the error message.
      max_pixels: a larger image is refused before it is decoded.

    Returns:
      uint8 array of shape (H, W, 3).

    Raises:
      UserError: the bytes are no image that OpenCV reads, or one that is too large.
    """
    if encoded.startswith(_JPEG_MAGIC):  # A third faster; of .pam OpenCV leaves blue first.
        return _decode(encoded, file, cv2.IMREAD_COLOR_RGB, max_pixels)
    image = _decode(encoded, file, cv2.IMREAD_COLOR, max_pixels)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_mask(encoded: bytes, file: Path | str) -> np.ndarray:
    """Decodes a mask: every pixel that is not black belongs to the defect.

    Masks of 0 and 1, of 0 and 255 and of 16 bits all mean the same.

    Args:
      encoded: the contents of an image file.
      file: name for the error message.

    Returns:
      uint8 array of shape (H, W) of zeros and ones.

    Raises:
      UserError: the bytes are no image that OpenCV reads, or one of more than `MAX_PIXELS`.
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


def inside(size: tuple[int, int], image_size: tuple[int, int]) -> tuple[slice, slice]:
    """Where an image of `size` lies in one that it is padded to: rows and columns."""
    scale = min(n / m for n, m in zip(image_size, size, strict=True))
    shape = [max(1, round(scale * n)) for n in size]
    offsets = [(n - m) // 2 for n, m in zip(image_size, shape, strict=True)]
    return tuple(slice(low, low + n) for low, n in zip(offsets, shape, strict=True))


def pad(resized: np.ndarray, part: tuple[slice, slice], image_size: tuple[int, int], value=0):
    """An image or mask (h, w, ...) in its `part` of one of `image_size`, `value` around it."""
    padded = np.empty((*image_size, *resized.shape[2:]), resized.dtype)
    padded[:] = value
    padded[part] = resized
    return padded


def fit(
    image: np.ndarray,
    image_size: tuple[int, int],
    resize_to: tuple[int, int] = (0, 0),
    how: str = 'squash',
) -> np.ndarray:
    """Resizes an image (H, W, 3) and cuts `image_size` out of its middle, or pads it to that.

    Args:
      image: of any size.
      image_size: (height, width) of what is returned.
      resize_to: (height, width) before cutting; zeros: `image_size`, and nothing is cut.
      how: 'pad' keeps the aspect ratio, with grey around; 'squash' does not.
    """
    if how == 'pad':
        part = inside(image.shape[:2], image_size)
        return pad(resize(image, _shape(part)), part, image_size, _GREY)
    whole = resize_to if any(resize_to) else image_size
    return centre(resize(image, whole), image_size)


def fit_mask(
    mask: np.ndarray,
    image_size: tuple[int, int],
    resize_to: tuple[int, int] = (0, 0),
    how: str = 'squash',
) -> np.ndarray:
    """A mask (H, W) as `fit` makes its image."""
    if how == 'pad':
        part = inside(mask.shape, image_size)
        return pad(resize_mask(mask, _shape(part)), part, image_size)
    whole = resize_to if any(resize_to) else image_size
    return centre(resize_mask(mask, whole), image_size)


def _shape(part):
    return tuple(s.stop - s.start for s in part)


def size(source: Path | bytes) -> tuple[int, int] | None:
    """The (height, width) of an image, a file or its bytes, from its header; None if unknown."""
    try:
        with _pillow_unbounded():
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return image.height, image.width
    except Exception:  # Pillow raises many kinds, and does not know all that OpenCV reads.
        pass
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open('rb') as file:
            head = file.read(2**14)
    except OSError:
        return None
    if found := re.search(rb'\n[-+]Y (\d{1,9}) [-+]X (\d{1,9})\n', head):  # Radiance, .hdr.
        return int(found[1]), int(found[2])
    if found := re.search(rb'\0dataWindow\0box2i\0\x10\0\0\0(.{16})', head, re.DOTALL):  # OpenEXR.
        left, top, right, bottom = struct.unpack('<4i', found[1])
        return bottom - top + 1, right - left + 1
    if head.startswith(b'P7'):  # .pam
        sides = [re.search(rb'\n%s (\d{1,9})\n' % side, head) for side in (b'HEIGHT', b'WIDTH')]
        return (int(sides[0][1]), int(sides[1][1])) if all(sides) else None
    return None


@contextlib.contextmanager
def _pillow_unbounded():
    """Within the block Pillow opens images of any size and warns of nothing.

    Only headers are read there, and the caller judges the size; both settings are of the whole
    process, so one thread at a time changes them, and sets them back.
    """
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_size(found: tuple[int, int] | None, file: Path | str, max_pixels: int) -> None:
    """Raises UserError if an image of this (height, width) has too many pixels."""
    if found and found[0] * found[1] > max_pixels:
        raise UserError(
            f'{file}: {found[0]}x{found[1]} (height by width) is more than {max_pixels} pixels; '
            'reduce it (predicting takes --max_pixels)'
        )


def _decode(
    encoded: bytes, file: Path | str, flags: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    check_size(size(encoded), file, max_pixels)
    # Of a file without its end libpng complains to stderr itself.
    cut_off = encoded.startswith(_PNG_MAGIC) and b'IEND' not in encoded
    try:
        image = None if cut_off else cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # an empty buffer, or more pixels than OpenCV accepts
        image = None
    if image is None:
        raise UserError(f'{file}: does not decode as an image; repair or remove the file')
    return image
