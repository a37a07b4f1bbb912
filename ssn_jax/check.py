"""What training would read of a folder, and what is doubtful about it: `ssn-jax check`."""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import pathlib
import shlex

import cv2
import ml_collections
import numpy as np

from ssn_jax import config as config_lib, files
from ssn_jax.data import builders, doubts as doubts_lib, images, layouts, records
from ssn_jax.data.layouts import GOOD, Record
from ssn_jax.errors import UserError
from ssn_jax.report import figures, overlays

CONFIG = 'auto'  # What the folder is read for.
_AT_ONCE = 64
_SHOWN, _SIDE = 48, 240  # Of the contact sheet: images, and pixels of each.


@dataclasses.dataclass(frozen=True)
class Image:
    """An image as training reads it.

    Attributes:
      file: path relative to the root.
      split: 'train' or 'test'.
      label: 0 normal, 1 defective; None if neither its folder nor its mask tells.
      defect: 'good' or the defect's name; None likewise.
      size: (height, width) in pixels; None if it cannot be read.
      bits: of a channel, in the file; None likewise.
      mask_pixels: of the image's own that are defective; None where that is not known.
    """

    file: str
    split: str
    label: int | None
    defect: str | None
    size: tuple[int, int] | None = None
    bits: int | None = None
    mask_pixels: int | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What `check` has found.

    Attributes:
      images: all of them.
      doubts: about them and other files, those that cannot be read among them.
      errors: by file what training would end with.
      image_size: what the images suggest; None if the config's serves as well.
    """

    images: list[Image]
    doubts: list[doubts_lib.Doubt]
    errors: dict[str, str]
    image_size: tuple[int, int] | None = None

    def to_dict(self) -> dict:
        """What `check --json` prints."""
        return {
            'images': [dataclasses.asdict(image) for image in self.images],
            'doubts': [{'file': doubt.file, 'reason': doubt.reason} for doubt in self.doubts],
        }


def choose_layout(config: ml_collections.ConfigDict) -> None:
    """Sets the name of `config.data` to the layout that its root looks like, if it has none.

    The category too, where there is but one.

    Raises:
      UserError: it names the embedded set.
    """
    root = pathlib.Path(config.root)
    config.name = config.name or layouts.guess(root)
    if config.name == 'synthetic':
        raise UserError('--config.data.name=synthetic has no folder to check: its code draws it')
    if config.name == 'mvtec_ad' and not config.category and root.is_dir():
        categories = [path.name for path in root.glob('[!.]*') if path.is_dir()]
        config.category = categories[0] if len(categories) == 1 else ''


def check(
    run: ml_collections.ConfigDict,
    masks: pathlib.Path | None = None,
    sheet: pathlib.Path | None = None,
) -> Found:
    """Reads a data set as training would.

    Args:
      run: the config of a run.
      masks: a folder that receives what is read as masks, 0 and 255, as FILE.png.
      sheet: a PNG to draw: images with their masks outlined, the doubtful ones first.

    Raises:
      UserError: the layout is wrong.
    """
    config, size = run.data, (tuple(run.image_size), tuple(run.resize))
    source = records.find(config)
    found, told, errors, contents = [], [], {}, {split: {} for split in layouts.SPLITS}
    for record, read in _read(source.records, records.mask_fitter(config, *size), masks):
        if isinstance(read, UserError):
            errors[record.file] = str(read)
            label = None if record.defect is None else int(record.defect != GOOD)
            found.append(Image(record.file, record.split, label, record.defect))
        else:
            image, content, *of_doubts = read
            found.append(image)
            contents[image.split][image.file] = content
            told.append((image, *of_doubts))
    trained = {image.file: example['white'] for image, example, _ in told if image.split == 'train'}
    white = records.white_of(config, trained)
    doubts = [*source.doubts, *doubts_lib.in_both(**contents)]
    for image, example, of_mask in told:
        doubts += records.doubts_about(image.file, example, of_mask, white)
    sizes = [(*image.size, image.mask_pixels or 0) for image, *_ in told]
    better = records.recommended_size(sizes, size[0])
    for image, *_ in told:
        if doubts_lib.of_shape(image.size, better or size[0]):
            doubts.append(doubts_lib.Doubt(image.file, 'shape'))
    doubts += [doubts_lib.Doubt(file, 'unreadable', error) for file, error in errors.items()]
    found.sort(key=lambda image: image.file)
    if sheet:
        _draw(sheet, {record.file: record for record in source.records}, found, doubts, white)
    return Found(found, doubts, errors, better)


def _read(
    found: Sequence[Record],
    fit_mask: Callable[[np.ndarray], np.ndarray],
    masks: pathlib.Path | None,
) -> Iterator[tuple]:
    """Yields each record with what is read of it, or with a UserError.

    That is its `Image`, the digest of its file, and what `records.doubts_about` takes.
    """

    def read(record):
        try:
            example = builders.example(record)
        except UserError as e:
            return record, e
        if masks and record.mask is not None:
            files.write(masks / f'{record.file}.png', example['mask'])
        encoded, defect = example.pop('image'), example['defect']
        mask = images.read_mask(example.pop('mask'))
        image = Image(
            *(record.file, record.split, int(defect != GOOD), defect, mask.shape),
            bits=8 * images.pixels(encoded, record.file).itemsize,
            mask_pixels=int(mask.sum()) if example['has_mask'] else None,
        )
        marked = example['has_mask'] and defect != GOOD
        of_mask = doubts_lib.of_mask(mask, fit_mask(mask)) if marked else None
        return record, (image, hashlib.sha256(encoded).digest(), example, of_mask)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(found), _AT_ONCE):  # Lest all images be held at once.
            yield from pool.map(read, found[start : start + _AT_ONCE])


def report(run: ml_collections.ConfigDict, found: Found) -> str:
    """What `check` prints of what it has found: table, doubts, and the command to train with."""
    lines = [table(found.images), '']
    lines += [
        f'{doubt.file}: {doubt.reason}' for doubt in found.doubts if doubt.kind != 'unreadable'
    ]
    if not found.doubts:
        lines.append('Nothing is doubtful.')
    if not any(image.split == 'test' for image in found.images):
        lines.append('There are no test images: a training chooses its threshold all the same.')
    first = 'Once the errors are mended, train' if found.errors else 'Train'
    return '\n'.join([*lines, '', f'{first} with', f'  {command(run, found.image_size)}'])


def table(found: Sequence[Image]) -> str:
    """Images by split and class: how many, how many masks, sizes and bit depths."""
    rows = [('split', 'class', 'images', 'masks', 'size (height x width)', 'bits')]
    kinds = {(image.split, image.defect or '(unknown)') for image in found}
    for split, defect in sorted(kinds, key=lambda x: (x[0] != 'train', x[1] != GOOD, x)):
        of = [x for x in found if (x.split, x.defect or '(unknown)') == (split, defect)]
        masks = '' if defect == GOOD else str(sum(x.mask_pixels is not None for x in of))
        sizes = [f'{x.size[0]}x{x.size[1]}' for x in of if x.size]
        bits = [str(x.bits) for x in of if x.bits]
        rows.append((split, defect, str(len(of)), masks, _counted(sizes), _counted(bits)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _counted(values: Sequence[str], shown: int = 3) -> str:
    """The most frequent values, with their numbers where there are several."""
    counts = collections.Counter(values).most_common()
    if len(counts) == 1:
        return counts[0][0]
    more = [f'{len(counts) - shown} others'] if len(counts) > shown else []
    return ', '.join([f'{value} ({n})' for value, n in counts[:shown]] + more)


def command(run: ml_collections.ConfigDict, image_size: tuple[int, int] | None = None) -> str:
    """The command that trains on a data set as it was read, at `image_size` if that is given."""
    config, usual = run.data, config_lib.load(CONFIG)
    name = records.layout_of(config)
    flags = [f'--config.data.name={name}', f'--config.data.root={config.root}']
    flags += [f'--config.data.category={config.category}'] * (name == 'mvtec_ad')
    # In the order of the fields; those above are of every command.
    more = [field.removeprefix('data.') for field in config_lib.FIELDS if field.startswith('data.')]
    for field in more[3:]:
        if config[field] != usual.data[field]:
            flags.append(f'--config.data.{field}={config[field]}')
    if image_size or run.image_size != usual.image_size:
        flags.append('--config.image_size=({},{})'.format(*(image_size or run.image_size)))
    workdir = f'runs/{records.category_of(config)}'
    return shlex.join(['ssn-jax', 'train', '--config', CONFIG, *flags, '--workdir', workdir])


def _draw(path, by_file, found, doubts, white):
    """Draws the contact sheet: the doubtful images, then defects, then normal ones, each spread."""
    doubtful = {doubt.file for doubt in doubts}
    chosen = [image for image in found if image.file in doubtful][:_SHOWN]
    for label in (1, 0):
        rest = [image for image in found if image.label == label and image.file not in doubtful]
        count = min(len(rest), (_SHOWN - len(chosen)) // (1 + label))
        chosen += [rest[i] for i in np.linspace(0, len(rest) - 1, count).round().astype(int)]
    cells = []
    for image in chosen:
        colour = figures.DEFECTIVE if image.file in doubtful else 'black'
        picture = _picture(by_file[image.file], white) if image.size else None
        text = image.file if image.size else f'{image.file}: unreadable'
        cells.append(
            (np.zeros((_SIDE, _SIDE, 3), np.uint8) if picture is None else picture, text, colour)
        )
    title = f'{len(chosen)} of {len(found)} images with their masks'
    title += ', the doubtful ones first' if doubtful else ''
    figures.contact_sheet(path, cells, title)


def _picture(record: Record, white: float) -> np.ndarray:
    """An image with its mask's outline on a grey square."""
    example = builders.example(record)
    image = images.decode(example['image'], record.file, white=white or images.WHITE, warn=False)
    height, width = (max(1, round(x * _SIDE / max(image.shape[:2]))) for x in image.shape[:2])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    overlays.outline(image, images.read_mask(example['mask']), 1)
    square = np.full((_SIDE, _SIDE, 3), 224, np.uint8)
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    square[top : top + height, left : left + width] = image
    return square
