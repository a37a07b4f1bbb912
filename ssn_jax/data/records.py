"""From a data set's name and root to arrays in memory.

A data set is first prepared: every file is read and checked once and stored, still encoded, in
array_record files below the cache folder. The prepared set's name holds a fingerprint of its
source, so a file that changes is never read from an old copy; digests of its own files tell when
one of them is damaged.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
from dataclasses import dataclass, field, replace
import errno
import hashlib
import itertools
import json
import os
from pathlib import Path
import shutil
import tempfile
import uuid

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from ssn_jax import files
from ssn_jax.data import doubts as doubts_lib, images, layouts, masks, splits, synthetic
from ssn_jax.data.doubts import Doubt
from ssn_jax.data.layouts import GOOD, Record
from ssn_jax.errors import UserError

# Of a prepared set's files, by their path in it. Sets of a version without are prepared anew.
_DIGESTS = 'sha256.json'
# Of how a prepared set is stored: raise it, and older ones are prepared anew.
_FORMAT = 3
# What names of added files begin with, wherever they are, after which comes which folder it is.
_ADDED = 'added'
# Pixels of a side that a defect should have where the network sees it, whose grid has steps of 4.
_LEAST = 12


@dataclass(frozen=True)
class _Source:
    """Where a data set comes from, and what tells it from every other one."""

    name: str
    category: str
    records: Iterable[Record]
    identity: list
    doubts: list[Doubt] = field(default_factory=list)


def load(
    data_config: ConfigDict,
    image_size: tuple[int, int],
    resize: tuple[int, int] = (0, 0),
    fit: str = 'squash',
    need: str = 'train',
) -> splits.Dataset:
    """Loads a data set, preparing it first if this source was not prepared before.

    Args:
      data_config: fields `name` ('mvtec_ad', 'synthetic', 'ksdd2' or 'folder'), `root` (folder of
        the real data; empty: the embedded set), `category`, `cache` (folder of the prepared sets;
        empty: ssn_jax in the user's cache folder) and `seed` (of the embedded set); and, if it has
        them, `range` (what white is in files of more than 8 bits; 0: found from the training
        images) and `masks` (how they are resized: 'nearest', 'region', which loses none, or
        'auto': 'region' of a 'folder').
      image_size: (height, width) of images and masks.
      resize: (height, width) they are resized to before `image_size` is cut out of their middle;
        zeros: they are resized to `image_size`.
      fit: 'pad' keeps their aspect ratio.
      need: the split that must hold images, 'train' or 'test'; the other one may be empty.

    Returns:
      The data set. What is doubtful about its files is logged.

    Raises:
      UserError: the source is incomplete or broken, or the folder that `cache` names cannot be
        written.
    """
    source = find(data_config, need)
    with _prepared(source, data_config.cache) as prepared:
        listed = {split: _list(prepared, split) for split in layouts.SPLITS}
        fitting = {
            'white': white_of(
                data_config, {file: white for _, file, _, white, _ in listed['train'][1]}
            ),
            'image_size': image_size,
            'resize': resize,
            'fit': fit,
            'fit_mask': mask_fitter(data_config, image_size, resize, fit),
        }
        train, of_train, trained, in_train, seen = _read(
            *listed['train'], prepared.parent, **fitting
        )
        test, of_test, tested, in_test, more = _read(*listed['test'], prepared.parent, **fitting)
    of_both = doubts_lib.in_both(trained, tested)
    doubts_lib.log([*source.doubts, *of_both])
    doubts_lib.log(in_train, 'training')
    doubts_lib.log(in_test, 'test')
    better = recommended_size([*seen, *more], image_size, fit)
    if better and not any(resize):
        logging.info('Images and their defects suggest --config.image_size=(%d,%d)', *better)
    return splits.Dataset(
        train=train,
        test=test,
        name=source.name,
        category=source.category,
        embedded=source.name == 'synthetic',
        fingerprints={'train': of_train, 'test': of_test},
        white=fitting['white'],
        doubts=(*source.doubts, *of_both, *in_train, *in_test),
    )


def recommended_size(
    seen: Sequence[tuple[int, int, int]], image_size: tuple[int, int], fit: str = 'squash'
) -> tuple[int, int] | None:
    """The image_size that images suggest by their shape and by how small their defects are.

    Args:
      seen: of images height, width, and how many of their pixels are defective; 0 if unknown.
      image_size: (height, width) that they would be resized to.
      fit: 'pad' if they keep their aspect ratio.

    Returns:
      (height, width), rounded to 8, no larger than the images and of at most 2^20 pixels, in
      which half of the defects are as large as a square of `_LEAST` pixels a side; in the ratio of
      the images where image_size is far from it, and padded ones would have defects that are too
      small or, if nothing is known of these, less than half of the pixels. None if image_size
      serves as well.
    """
    if not seen:
        return None
    found = np.array(seen, float)
    own, wanted = np.median(found[:, :2], 0), np.array(image_size, float)
    shares = (found[:, 2] / found[:, :2].prod(1))[found[:, 2] > 0]
    shape = doubts_lib.of_shape(tuple(own), image_size)
    if shape and fit == 'pad':
        taken = (own * (wanted / own).min()).prod()
        small = len(shares) and np.median(shares) * taken < _LEAST**2
        shape = small or (not len(shares) and 2 * taken < wanted.prod())
        wanted = wanted if shape else own * (wanted / own).min()
    if shape:  # As many pixels.
        wanted = own * np.sqrt(wanted.prod() / own.prod())
    side = np.sqrt(np.median(shares) * wanted.prod()) if len(shares) else _LEAST
    wanted *= max(1, _LEAST / side)
    wanted *= min(1, (own / wanted).min(), np.sqrt(2**20 / wanted.prod()))
    better = tuple(int(max(32, 8 * round(x / 8))) for x in wanted)
    larger = np.prod(better) > 1.2 * np.prod(image_size)
    return better if shape or larger else None


def is_embedded(config: ConfigDict) -> bool:
    """Whether a config's data are the embedded set: procedural images instead of real ones."""
    return config.name == 'synthetic' or not (config.root or _places(config))


def layout_of(config: ConfigDict) -> str:
    """The name of a config's layout; where folders are named one by one it is a folder."""
    return 'folder' if _places(config) else config.name


def _places(config: ConfigDict) -> dict[str, Path]:
    """The folders of images that a config names one by one."""
    names = ('normal_dir', 'normal_test_dir', 'defect_dir')
    return {name: _below_root(config, name) for name in names if config.get(name)}


def _below_root(config: ConfigDict, name: str) -> Path:
    """A folder that a config names, from its root."""
    return Path(config.root).expanduser() / Path(config[name]).expanduser()


def category_of(config: ConfigDict) -> str:
    """The category that a config's data have: only two of the sets are told it."""
    match layout_of(config):
        case 'folder':
            return Path(config.root).expanduser().resolve().name
        case 'ksdd2':
            return config.name if config.root else 'surface'
    return config.category


def find(config: ConfigDict, need: str = 'train') -> _Source:
    """Finds the data set that a config asks for.

    Args:
      config: as of `load`; `added`, if it has that, names folders of more training images,
        separated by commas.
      need: the split that must hold images; for 'test' nothing is added.

    Raises:
      UserError: as of `load`; or a folder adds nothing.
    """
    found = _find(config, need)
    if not config.get('added') or need == 'test':
        return found
    if found.name == 'synthetic':
        raise UserError(
            'images can be added to real ones alone, and these are drawn by the code: train on a '
            'folder of images'
        )
    listing = layouts.Listing(list(found.records), list(found.doubts))
    normal = config.get('normal', layouts.NORMAL).split(',')
    for number, name in enumerate(filter(None, config.added.split(',')), 1):
        _add(listing, layouts.added(Path(name).expanduser(), normal), name, number)
    return _real(found.name, found.category, Path(config.root).expanduser(), listing)


def added_by(file: str) -> int:
    """The number, from 1 on, of the added folder that a file of a split comes from; 0: of none."""
    folder, _, number = file.partition('/')[0].partition(':')
    return int(number) if folder == _ADDED and number.isdecimal() else 0


def _add(listing: layouts.Listing, new: layouts.Listing, name: str, number: int) -> None:
    """Adds to a listing what it does not hold yet; UserError if there is nothing."""
    by_size = {}
    for record in listing.records:
        by_size.setdefault(record.image.stat().st_size, []).append(record)
    known, start, prefix = [], len(listing.records), f'{_ADDED}:{number}/'
    for record in new.records:
        content, file = images.read(record.image), prefix + record.file
        alike = by_size.get(len(content), ())
        same = next((other for other in alike if images.read(other.image) == content), None)
        if same:
            known.append((file, f'{file} and {same.file}'))
        else:
            listing.records.append(replace(record, file=file))
    if len(listing.records) == start:
        raise UserError(f'{name}: adds nothing, since the run has each of its files already')
    listing.doubts.extend(Doubt(file, 'known already', known[0][1]) for file, _ in known)
    listing.doubts.extend(doubt._replace(file=prefix + doubt.file) for doubt in new.doubts)


def _find(config: ConfigDict, need: str) -> _Source:
    """The data set without what is added to it."""
    root, places = Path(config.root).expanduser(), _places(config)
    if need == 'test':
        places.pop('normal_dir', None)
    normal = config.get('normal', layouts.NORMAL).split(',')
    masks_in = _below_root(config, 'mask_dir') if config.get('mask_dir') else None
    if masks_in and layout_of(config) != 'folder':
        raise UserError('--config.data.mask_dir is for --config.data.name=folder: say that too')
    match layout_of(config):
        case 'synthetic':
            return _embedded(config.category, config.seed)
        case 'mvtec_ad':
            if not config.root:
                return _embedded(config.category, config.seed)
            found = layouts.mvtec_ad(root, config.category, normal, need)
            return _real('mvtec_ad', config.category, root, found)
        case 'ksdd2':
            if not config.root:
                return _embedded(category_of(config), config.seed)
            return _real(config.name, category_of(config), root, layouts.ksdd2(root, need))
        case 'folder':
            if places:
                places |= {'mask_dir': masks_in} if masks_in else {}
                found = layouts.from_folders(root, places, normal, need)
                return _real('folder', category_of(config), root, found)
            if not config.root:
                raise UserError(
                    '--config.data.name=folder needs your images: name their folder with '
                    '--config.data.root, or those of test images with --config.data.defect_dir'
                )
            found = layouts.folder(root, normal, need, masks_in)
            return _real(config.name, category_of(config), root, found)
    raise UserError(
        f'--config.data.name={config.name}: no such data set; choose from mvtec_ad, synthetic, '
        'ksdd2, folder'
    )


def _embedded(category: str, seed: int) -> _Source:
    if category not in synthetic.CATEGORIES:
        raise UserError(
            f'--config.data.category={category}: not in the embedded set, which has '
            f'{", ".join(synthetic.CATEGORIES)}; for real images name their folder with '
            '--config.data.root'
        )
    if seed < 0:
        raise UserError(f'--config.data.seed={seed}: must not be negative')
    identity = [synthetic.VERSION, category, seed]
    return _Source('synthetic', category, synthetic.records(category, seed), identity)


def _real(name: str, category: str, root: Path, found: layouts.Listing) -> _Source:
    identity = [os.fspath(root.resolve()), category]
    for record in found.records:
        identity += [record.split, record.defect]
        for file in filter(None, (record.image, record.mask)):
            try:
                state = file.stat()
            except OSError as error:
                raise UserError(f'{file}: cannot be read ({error.strerror})') from error
            identity += [os.fspath(file), state.st_size, state.st_mtime_ns]
    return _Source(name, category, found.records, identity, found.doubts)


def cache_folder(configured: str = '') -> Path:
    """The folder for what can be made again: as configured, or ssn_jax in the user's cache.

    Raises:
      OSError: none is configured, and the user has no home, as in a container with any user's id.
    """
    if configured:
        return Path(configured).expanduser()
    try:
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'ssn_jax'
    except RuntimeError:
        raise OSError(errno.ENOENT, 'the user has no home folder') from None


@contextlib.contextmanager
def _prepared(source: _Source, configured: str) -> Iterator[Path]:
    """Yields the folder of the prepared set: a temporary one where the cache cannot be written."""
    with contextlib.ExitStack() as stack:
        try:
            prepared = _prepare(source, cache_folder(configured))
        except OSError as error:
            reason = f'cannot be written ({error.strerror or error})'
            if configured:
                raise UserError(
                    f'{configured}: {reason}; name another folder with --config.data.cache'
                ) from error
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='ssn_jax-'))
            logging.warning('The cache %s: the data are prepared in %s, for now.', reason, folder)
            prepared = _prepare(source, Path(folder))
        yield prepared


def _prepare(source: _Source, cache: Path) -> Path:
    """Returns the folder of the prepared set; makes it if it is not there.

    The set is built under a name of its own and renamed when complete: a failure leaves nothing
    behind, and of two processes that build the same set the slower one takes the faster one's.

    Raises:
      OSError: it cannot be written.
    """
    identity = json.dumps([_FORMAT, *source.identity])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:24]
    prepared = cache / f'{source.name}-{source.category}-{fingerprint}'
    if prepared.is_dir():
        problem = _problem(prepared)
        if not problem:
            return prepared
        logging.warning('%s is prepared anew: %s', prepared, problem)
    logging.info('Preparing %s %s in %s', source.name, source.category, prepared)
    building = prepared.with_name(f'{prepared.name}.incomplete-{uuid.uuid4().hex}')
    try:
        building.mkdir(parents=True)
        _build(source, building)
        (building / _DIGESTS).write_text(json.dumps(_digests(building), indent=2) + '\n')
        if prepared.is_dir() and _problem(prepared):
            old = building.with_name(f'{building.name}-old')
            prepared.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        try:
            building.rename(prepared)
        except OSError:
            if not prepared.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return prepared


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a prepared set."""
    found = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != _DIGESTS)
    return {path.relative_to(folder).as_posix(): files.digest(path) for path in found}


def _problem(prepared: Path) -> str | None:
    """Why a prepared set cannot be used; None if its files are what was written."""
    try:
        expected = json.loads((prepared / _DIGESTS).read_text())
        found = _digests(prepared)
    except (OSError, ValueError) as error:
        return f'its files cannot be verified ({error})'
    if not isinstance(expected, dict):
        return f'{_DIGESTS} is damaged'
    names = expected.keys() | found.keys()
    different = sorted(name for name in names if found.get(name) != expected.get(name))
    return f'{different[0]} is damaged' if different else None


def _build(source: _Source, folder: Path) -> None:
    from tensorflow_datasets.core import sequential_writer

    from ssn_jax.data import builders

    # Not by download_and_prepare: what is more than 1 GB it shuffles with TensorFlow, which is not
    # there.
    info = _builder(folder).info
    Path(info.data_dir).mkdir(parents=True)
    writer = sequential_writer.SequentialWriter(
        info, max_examples_per_shard=2**31, file_format='array_record'
    )
    writer.initialize_splits(list(layouts.SPLITS))
    records = iter(source.records)
    while some := list(itertools.islice(records, 64)):
        of = {split: [] for split in layouts.SPLITS}
        for record in some:
            of[record.split].append(builders.example(record))
        writer.add_examples(of)
    writer.close_all()


def _builder(folder: Path):
    # Imported where needed: TFDS takes longer to import than everything else here together.
    from ssn_jax.data import builders

    return builders.Inspection(data_dir=folder, file_format='array_record')


def _list(prepared: Path, split: str) -> tuple[Sequence[dict], list[tuple]]:
    """A split of a prepared set.

    Returns:
      Its examples, images and masks as they were encoded; and, in the order of defects and files,
      of each its defect, file, whether it has a mask, what white is, and its place in the former.
    """
    from tensorflow_datasets import decode

    skip = {'image': decode.SkipDecoding(), 'mask': decode.SkipDecoding()}
    builder, source = _builder(prepared), []
    if builder.info.splits[split].num_examples:  # array_record opens no split without a file.
        source = builder.as_data_source(split, decoders=skip)
    # Encoded images are read again later, lest all of them be held at once.
    return source, sorted(
        (e['defect'].decode(), e['file'].decode(), bool(e['has_mask']), float(e['white']), i)
        for i, e in enumerate(source)
    )


def white_of(config: ConfigDict, trained: Mapping[str, float]) -> float:
    """What white is in images of more than 8 bits; 0 if no training image tells.

    One rule for all of them: what the config says, or that of the training image whose white is the
    highest.

    Args:
      config: as of `load`.
      trained: by training image what white is in it; 0 in one of 8 bits.

    Raises:
      UserError: some are of 0 to 1, and others are not.
    """
    if white := float(config.get('range', 0)):
        return white
    found = sorted((white, file) for file, white in trained.items() if white)
    if not found:
        return 0.0
    (least, one), (white, other) = found[0], found[-1]
    if least <= 1 and white > 2:
        raise UserError(
            f'{one} holds values of 0 to 1, and {other} of 0 to {white:g}: save all images with '
            'one range'
        )
    logging.info('White is %g in images of more than 8 bits, as training images tell.', white)
    return white


def mask_fitter(
    config: ConfigDict,
    image_size: tuple[int, int],
    resize: tuple[int, int] = (0, 0),
    fit: str = 'squash',
) -> Callable[[np.ndarray], np.ndarray]:
    """What fits masks (H, W) to `image_size`; arguments as of `load`."""
    how = config.get('masks', 'auto')
    if how == 'auto':
        how = 'region' if layout_of(config) == 'folder' else 'nearest'
    to_size = masks.resize if how == 'region' else images.resize_mask
    return lambda mask: images.fit_mask(mask, image_size, resize, fit, to_size)


def doubts_about(file: str, example: Mapping, of_mask: str | None, white: float) -> list[Doubt]:
    """What is doubtful about an image.

    Args:
      file: its name.
      example: `turned`, `white` and `span` of `builders.example`.
      of_mask: as `doubts.of_mask` found it.
      white: of all images, as `white_of` found it.
    """
    kinds = [of_mask] if of_mask else []
    if example['white'] and images.unfitting(example['span'], white or images.WHITE):
        kinds.append('values')
    if example['turned']:
        kinds.append('turned mask')
    return [Doubt(file, kind) for kind in kinds]


def _read(
    source: Sequence[dict],
    examples: list[tuple],
    folder: Path,
    white: float,
    image_size: tuple[int, int],
    resize: tuple[int, int],
    fit: str,
    fit_mask: Callable,
) -> tuple[splits.Split, str, dict[str, bytes], list[Doubt], list[tuple[int, int, int]]]:
    """Decodes and resizes a split.

    Returns:
      It, its fingerprint, by file the digests of its images as they are encoded, what is doubtful
      about it, and of each image height, width and how many pixels its mask marks.
    """
    defects, names, has_mask, _, order = (
        (tuple(x) for x in zip(*examples, strict=True)) if examples else ((),) * 5
    )
    has_mask = np.array(has_mask, bool)
    shape, pixels = (len(order), *image_size), np.uint8
    wanted = {'images': ((*shape, 3), pixels), 'masks': (shape, pixels)}
    kept = files.allocate(wanted, folder)

    squashed = fit == 'squash' and not any(resize)

    def fill(place: int, example: dict) -> tuple[bytes, list[Doubt], tuple[int, int, int]]:
        """Decodes an image to its place; what it is told by, what is doubtful, and its sizes."""
        file, of_mask = example['file'].decode(), None
        image = images.decode(example['image'], file, white=white or images.WHITE, warn=False)
        kept['images'][place] = images.fit(image, image_size, resize, fit)
        # The mask as pixels, since it was encoded here, by whatever version of OpenCV.
        mask = images.read_mask(example['mask'])
        parts = example['image'], np.packbits(mask).tobytes(), bytes([example['has_mask']])
        heading = f'{file}\0{example["defect"].decode()}\0'.encode()
        told = b''.join(hashlib.sha256(part).digest() for part in (heading, *parts))
        kept['masks'][place] = 0
        if has_mask[place] and defects[place] != GOOD:
            fitted = fit_mask(mask)
            of_mask = doubts_lib.of_mask(mask, fitted)
            has_mask[place] = not of_mask
            if not of_mask:
                kept['masks'][place] = fitted
        found = doubts_about(file, example, of_mask, white)
        if squashed and doubts_lib.of_shape(mask.shape, image_size):
            found.append(Doubt(file, 'shape'))
        return told, found, (*mask.shape, int(np.count_nonzero(mask)))

    content, encoded, at_once, doubtful, seen = hashlib.sha256(), [], 64, [], []
    with ThreadPoolExecutor() as pool:  # OpenCV and hashlib release the interpreter's lock.
        for start in range(0, len(order), at_once):
            some = [source[i] for i in order[start : start + at_once]]
            places = range(start, start + len(some))
            for told, found, sizes in pool.map(fill, places, some):
                seen.append(sizes)
                content.update(told)
                encoded.append(told[32:64])
                doubtful += found
    inside = None
    if fit == 'pad':
        inside = tuple(images.inside(sizes[:2], image_size) for sizes in seen)
        full = tuple(slice(0, n) for n in image_size)
        inside = inside if any(part != full for part in inside) else None
    split = splits.Split(
        **kept,
        has_mask=has_mask,
        labels=np.array([defect != GOOD for defect in defects], np.int32),
        defects=defects,
        files=names,
        inside=inside,
    )
    return split, content.hexdigest(), dict(zip(names, encoded, strict=True)), doubtful, seen
