"""Encoded images to arrays: reading, decoding, resizing."""

from collections.abc import Callable
import contextlib
import io
from pathlib import Path
import re
import struct
import threading
import warnings

from absl import logging
import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from ssn_jax.data import masks
from ssn_jax.errors import UserError

# What is looked at in a folder; a file that is named itself may end in anything.
SUFFIXES = frozenset(
    {'.png', '.jpg', '.jpeg', '.jfif', '.jpe', '.bmp', '.dib', '.tif', '.tiff', '.webp', '.avif'}
    | {'.exr', '.gif', '.hdr', '.j2k', '.jp2', '.pam', '.pbm', '.pfm', '.pgm', '.pic', '.pnm'}
    | {'.ppm', '.pxm', '.ras', '.sr'}
)

_PILLOW = threading.Lock()
# ImageNet's mean, of which backbones see nothing.
GREY = np.uint8([124, 116, 104])
MAX_PIXELS = 2**27  # Of an image that is decoded, unless more is asked for.
WHITE = 2.0**16 - 1  # Of files of more than 8 bits, unless more is known.
_JPEG_MAGIC = b'\xff\xd8\xff'
_PNG_MAGIC = b'\x89PNG\r\n\x1a\n'
_TIFF_MAGICS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
# Of other files than TIFF, those that hold more than 8 bits and do not say white: PNG, Netpbm's
# (floats among them), JPEG 2000 and Radiance.
_DEEP_MAGICS = (
    *(_PNG_MAGIC, b'P2', b'P3', b'P5', b'P6', b'P7', b'Pf', b'PF'),
    *(b'\0\0\0\x0cjP  ', b'\xff\x4f\xff\x51', b'#?'),
)
# Tags of TIFF.
_BITS, _PHOTOMETRIC, _ORIENTATION, _KIND, _OLD_KIND = _TAGS = 258, 262, 274, 254, 255
_DEPTH = 32997  # Of volumes: how many pictures a page holds.


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


def decode(
    encoded: bytes,
    file: Path | str,
    max_pixels: int = MAX_PIXELS,
    white: float = WHITE,
    warn: bool = True,
) -> np.ndarray:
    """Decodes an image to 8-bit RGB.

    Grey is replicated to three channels, alpha is dropped and the EXIF orientation is applied, all
    of it as `cv2.imread` does. Files of 8 bits are read as they are; of deeper ones 0 to `white`
    become 0 to 255.

    Args:
      encoded: the contents of an image file.
      file: name for messages.
      max_pixels: a larger image is refused before it is decoded.
      white: the value of white in files of more than 8 bits.
      warn: whether to log that a file's values and `white` do not fit.

    Returns:
      uint8 array of shape (H, W, 3).

    Raises:
      UserError: the bytes are no image that OpenCV reads, one that is too large or of several
        pages, or its values are no numbers or far below `white`.
    """
    values = pixels(encoded, file, max_pixels)
    if values.dtype == np.uint8:
        return values
    misfit = unfitting(values, white)
    if is_foreign(values, white):
        raise UserError(
            f'{file}: is of {values.dtype} to {values.max():g}, and not what white is told for '
            f'({white:g}): save it as the training images are'
        )
    if misfit and warn:
        logging.warning('%s: %s', file, misfit)
    tags = _tiff_tags(encoded)
    inverted = bool(tags) and tags.get(_PHOTOMETRIC) == 0
    if values.dtype == np.uint16 and white == WHITE and tags and not inverted:
        # OpenCV rounds colours of TIFF otherwise than those of PNG; packed ones of 10 to 14 bits it
        # reads as of 16 alone.
        bgr = _imdecode(encoded, cv2.IMREAD_COLOR)
        if bgr is not None:
            return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    grey = to_8_bit(values, white)
    # OpenCV turns white-is-zero round in files of 8 bits alone.
    grey = 255 - grey if inverted else grey
    return grey if grey.ndim == 3 else cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def pixels(encoded: bytes, file: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image to values as they are stored; arguments and errors as of `decode`.

    Returns:
      (H, W, 3) RGB, uint8 of files of 8 bits and less; of deeper ones the file's own type, where
      grey is (H, W).
    """
    _check(encoded, file, max_pixels)
    if encoded.startswith(_JPEG_MAGIC):  # A third faster; of .pam OpenCV leaves blue first.
        return _decode(encoded, file, cv2.IMREAD_COLOR_RGB)
    flags = cv2.IMREAD_COLOR
    tags = _tiff_tags(encoded)
    if tags and tags.get(_BITS, 1) > 16:
        flags = cv2.IMREAD_UNCHANGED  # With others OpenCV reads no grey of 32 bits.
    elif tags or encoded.startswith(_DEEP_MAGICS):
        flags |= cv2.IMREAD_ANYDEPTH
    image = _decode(encoded, file, flags)
    if image.ndim == 3 and image.shape[2] not in (3, 4):
        raise UserError(f'{file}: has {image.shape[2]} channels: save it as grey or RGB')
    if image.dtype.kind == 'f' and not np.isfinite(image).all():
        raise UserError(f'{file}: holds values that are no numbers (NaN or infinite); repair it')
    if image.dtype == np.uint8 and image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.ndim == 2:
        return image
    return np.ascontiguousarray(image[..., 2::-1])


def white_of(values: np.ndarray) -> float:
    """What white is, as far as one image of `pixels` tells; 0 of 8 bits, where it is 255.

    That is the highest value of 8, 10, 12, 14, 16, ... bits, whichever holds the image's own; of
    floats 1, or a power of two beyond it (less one from 8 bits on).
    """
    if values.dtype == np.uint8:
        return 0.0
    highest = float(values.max())
    if values.dtype.kind == 'f' and highest < 2**7:
        return 2.0 ** max(0, int(np.ceil(np.log2(max(highest, 1)))))
    bits = int(np.ceil(highest)).bit_length()
    return 2.0 ** max(8, bits + bits % 2) - 1


def is_foreign(values: np.ndarray, white: float) -> bool:
    """Whether `white` is of another kind of values: of 16 bits, of floats, of 0 to 1."""
    if values.dtype.kind != 'f':
        return (
            values.dtype.kind not in 'iu'
            or white <= 2
            or (white == WHITE and values.dtype.itemsize > 2)
        )
    return white == WHITE or (white > 2 and values.max() <= 1)


def unfitting(values: np.ndarray, white: float) -> str | None:
    """Why the values of an image of `pixels` do not fit `white`, and what to do; None if they do.

    Args:
      values: of more than 8 bits; or their lowest and highest.
      white: the value of white.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > white:
        return (
            f'its values go from {low:g} to {high:g}, and what is outside of 0..{white:g} is cut: '
            'save it with the range of the training images, or train with white as '
            '--config.data.range'
        )
    if 0 < high * 16 < white:
        return (
            f'its highest value is {high:g} where white is {white:g}, so it is nearly black: save '
            'it with the range of the training images, or train with white as --config.data.range'
        )
    return None


def to_8_bit(values: np.ndarray, white: float) -> np.ndarray:
    """Maps 0 to `white` to 0 to 255, uint8; what is outside is cut."""
    if values.dtype != np.uint16:
        return np.round(np.clip(values, 0, white) * (255.0 / white)).astype(np.uint8)
    table = np.arange(2**16)
    if white == WHITE:  # As OpenCV does.
        return (table >> 8).astype(np.uint8)[values]
    return np.round(np.minimum(table, white) * (255.0 / white)).astype(np.uint8)[values]


def decode_mask(encoded: bytes, file: Path | str) -> np.ndarray:
    """Decodes a mask of any kind to the region that it marks.

    Marked is what is opaque where something is transparent, what differs from the ground of a
    coloured mask, and what is brighter than the darkest of a grey one. Each label counts, however
    faint; soft edges and those of lossy files end at half of their region's highest value.

    Args:
      encoded: the contents of an image file.
      file: name for the error message.

    Returns:
      uint8 array of shape (H, W) of zeros and ones.

    Raises:
      UserError: the bytes are no image that OpenCV reads, or one of more than `MAX_PIXELS`, of
        several pages, or of values that are no numbers.
    """
    _check(encoded, file, MAX_PIXELS)
    layers = _by_pillow(encoded)
    if layers is None:
        layers = _decode(encoded, file, cv2.IMREAD_UNCHANGED)
    strength = masks.strength(layers)
    if not np.isfinite(strength).all():
        raise UserError(f'{file}: holds values that are no numbers (NaN or infinite); repair it')
    # VP8 is WebP's lossy form, VP8L the other.
    lossy = encoded.startswith(_JPEG_MAGIC) or (encoded[:4] == b'RIFF' and b'VP8 ' in encoded)
    region = masks.region(strength, lossy)
    # As it is, OpenCV turns TIFF alone.
    return region if _tiff_tags(encoded) else turn(region, orientation(encoded))


def orientation(encoded: bytes) -> int | None:
    """The EXIF orientation, 1 to 8, that an image file names; None if it names none."""
    if tags := _tiff_tags(encoded):
        found = tags.get(_ORIENTATION, 1)
        return found if found != 1 else None  # Libraries write 1 without being asked.
    if not any(mark in encoded for mark in (b'Exif', b'eXIf', b'EXIF')):
        return None
    try:
        with _pillow_unbounded(), Image.open(io.BytesIO(encoded)) as image:
            exif = Image.Exif()  # `getexif` would look into XMP too, as OpenCV does not.
            exif.load(image.info.get('exif', b''))
            return exif.get(_ORIENTATION)
    except Exception:  # Pillow raises many kinds.
        return None


def turn(image: np.ndarray, orientation: int | None) -> np.ndarray:
    """Turns an image (H, W, ...) as stored to how its EXIF orientation says that it is shown."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def read_mask(encoded: bytes) -> np.ndarray:
    """Reads what `encode_mask` has written."""
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE) // 255


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


def own(images) -> np.ndarray:
    """Which pixels of images (N, H, W, 3) lie in no margin that `fit` padded them with: (N, H, W).

    Those whose row and column hold more than grey. NumPy's arrays or JAX's.
    """
    differs = (images != GREY).any(-1)
    return differs.any(2)[:, :, None] & differs.any(1)[:, None, :]


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
    resize: Callable = resize,
    ground=GREY,
) -> np.ndarray:
    """Resizes an image (H, W, 3) and cuts `image_size` out of its middle, or pads it to that.

    Args:
      image: of any size; or a mask (H, W).
      image_size: (height, width) of what is returned.
      resize_to: (height, width) before cutting; zeros: `image_size`, and nothing is cut.
      how: 'pad' keeps the aspect ratio, with `ground` around; 'squash' does not.
      resize: from an image and a (height, width) to that of this size.
      ground: the values of a pixel.
    """
    if how == 'pad':
        part = inside(image.shape[:2], image_size)
        return pad(resize(image, _shape(part)), part, image_size, ground)
    whole = resize_to if any(resize_to) else image_size
    return centre(resize(image, whole), image_size)


def fit_mask(
    mask: np.ndarray,
    image_size: tuple[int, int],
    resize_to: tuple[int, int] = (0, 0),
    how: str = 'squash',
    resize: Callable = resize_mask,
) -> np.ndarray:
    """A mask (H, W) as `fit` makes its image, resized by `resize`."""
    return fit(mask, image_size, resize_to, how, resize, 0)


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


def _check(encoded: bytes, file: Path | str, max_pixels: int) -> None:
    """Raises UserError, before anything is decoded, of an image too large or of several pages."""
    check_size(size(encoded), file, max_pixels)
    count = _pages(encoded)
    if count > 1:
        raise UserError(f'{file}: holds {count} pages: split it into one file a page')


def _pages(encoded: bytes) -> int:
    """How many pictures a file holds, without its previews; 1 if that cannot be told."""
    if encoded.startswith(_TIFF_MAGICS):
        pages = _tiff_pages(encoded)
        pages = [t for t in pages if not (t.get(_KIND, 0) & 5 or t.get(_OLD_KIND) == 2)]
        return max(1, sum(t.get(_DEPTH, 1) for t in pages))
    animated = encoded.startswith(b'GIF8') or b'ANMF' in encoded[: 2**16] or b'avis' in encoded[:64]
    if not animated and b'acTL' not in encoded[: 2**16]:
        return 1
    try:
        with _pillow_unbounded(), Image.open(io.BytesIO(encoded)) as image:
            return getattr(image, 'n_frames', 1)
    except Exception:  # Pillow raises many kinds.
        return 1


def _tiff_pages(encoded: bytes, most: int | None = None) -> list[dict[int, int]]:
    """The tags of `_TAGS` that each page of a TIFF file has, by number, of several values the most.

    Args:
      encoded: the file; of a damaged one what is found.
      most: how many pages are looked at; None: all.
    """
    pages, seen, file = [], {0}, io.BytesIO(encoded)
    try:
        with _pillow_unbounded():
            head = encoded[:16] if b'+' in encoded[2:4] else encoded[:8]
            place = TiffImagePlugin.ImageFileDirectory_v2(head).next
            while place not in seen and len(pages) != most:
                seen.add(place)
                file.seek(place)
                tags, numbers = TiffImagePlugin.ImageFileDirectory_v2(head), {}
                tags.load(file)
                for tag in (*_TAGS, _DEPTH):
                    values = tags.get(tag)
                    values = values if isinstance(values, tuple) else (values,)
                    if values and all(isinstance(value, int) for value in values):
                        numbers[tag] = max(values)
                pages.append(numbers)
                place = tags.next
    except Exception:  # Pillow raises many kinds.
        pass
    return pages


def _tiff_tags(encoded: bytes) -> dict[int, int] | None:
    """The tags of a TIFF file's first page; None of another file."""
    if not encoded.startswith(_TIFF_MAGICS):
        return None
    return next(iter(_tiff_pages(encoded, 1)), None)


def _by_pillow(encoded: bytes) -> np.ndarray | None:
    """The pixels of a mask that OpenCV reads wrong, uint8; None of another file.

    Of grey with alpha, or with one transparent value, (H, W, 2); of a palette the colours
    (H, W, 4), or where all are the same colour, their numbers (H, W).
    """
    try:
        with _pillow_unbounded(), Image.open(io.BytesIO(encoded)) as image:
            if image.mode == 'LA' or (image.mode in ('1', 'L') and 'transparency' in image.info):
                return np.asarray(image.convert('LA'))
            if image.mode != 'P':
                return None
            numbers = np.asarray(image)
            colours = np.asarray(image.convert('RGBA'))
    except Exception:  # Pillow raises many kinds, and OpenCV tells what is wrong.
        return None
    return numbers if (colours == colours[0, 0]).all() else colours


def _decode(encoded: bytes, file: Path | str, flags: int) -> np.ndarray:
    # Of a file without its end libpng complains to stderr itself.
    cut_off = encoded.startswith(_PNG_MAGIC) and b'IEND' not in encoded
    image = None if cut_off else _imdecode(encoded, flags)
    if image is None:
        raise UserError(f'{file}: does not decode as an image; repair or remove the file')
    return image


def _imdecode(encoded: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # an empty buffer, or more pixels than OpenCV accepts
        return None
