"""From a data set's name and root to arrays in memory.

A data set is first prepared: every file is read and checked once and stored, still encoded, in
array_record files below the cache folder. The prepared set's name holds a fingerprint of its
source, so a file that changes is never read from an old copy; digests of its own files tell when
one of them is damaged.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
from dataclasses import dataclass
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
from ssn_jax.data import images, layouts, splits, synthetic
from ssn_jax.data.layouts import GOOD, Record
from ssn_jax.errors import UserError

# Of a prepared set's files, by their path in it. Sets of a version without are prepared anew.
_DIGESTS = 'sha256.json'
# Of how a prepared set is stored: raise it, and older ones are prepared anew.
_FORMAT = 2


@dataclass(frozen=True)
class _Source:
    """Where a data set comes from, and what tells it from every other one."""

    name: str
    category: str
    records: Iterable[Record]
    identity: list


def load(
    data_config: ConfigDict, image_size: tuple[int, int], resize: tuple[int, int] = (0, 0)
) -> splits.Dataset:
    """Loads a data set, preparing it first if this source was not prepared before.

    Args:
      data_config: fields `name` ('mvtec_ad', 'synthetic', 'ksdd2' or 'folder'), `root` (folder of
        the real data; empty: the embedded set), `category`, `cache` (folder of the prepared sets;
        empty: ssn_jax in the user's cache folder) and `seed` (of the embedded set).
      image_size: (height, width) of images and masks.
      resize: (height, width) they are resized to before `image_size` is cut out of their middle;
        zeros: they are resized to `image_size`.

    Returns:
      The data set.

    Raises:
      UserError: the source is incomplete or broken, or the folder that `cache` names cannot be
        written.
    """
    source = _source(data_config)
    with _prepared(source, data_config.cache) as prepared:
        train, of_train = _read(prepared, 'train', image_size, resize)
        test, of_test = _read(prepared, 'test', image_size, resize)
    return splits.Dataset(
        train=train,
        test=test,
        name=source.name,
        category=source.category,
        embedded=source.name == 'synthetic',
        fingerprints={'train': of_train, 'test': of_test},
    )


def is_embedded(config: ConfigDict) -> bool:
    """Whether a config's data are the embedded set: procedural images instead of real ones."""
    return config.name == 'synthetic' or not config.root


def category_of(config: ConfigDict) -> str:
    """The category that a config's data have: only two of the sets are told it."""
    match config.name:
        case 'folder':
            return Path(config.root).expanduser().resolve().name
        case 'ksdd2':
            return config.name if config.root else 'surface'
    return config.category


def _source(config: ConfigDict) -> _Source:
    """Finds the data set that a config asks for."""
    root = Path(config.root).expanduser()
    match config.name:
        case 'synthetic':
            return _embedded(config.category, config.seed)
        case 'mvtec_ad':
            if not config.root:
                return _embedded(config.category, config.seed)
            return _real(
                config.name, config.category, root, layouts.mvtec_ad(root, config.category)
            )
        case 'ksdd2':
            if not config.root:
                return _embedded(category_of(config), config.seed)
            return _real(config.name, category_of(config), root, layouts.ksdd2(root))
        case 'folder':
            if not config.root:
                raise UserError(
                    '--config.data.name=folder needs your images: name their folder with '
                    '--config.data.root'
                )
            return _real(config.name, category_of(config), root, layouts.folder(root))
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


def _real(name: str, category: str, root: Path, records: list[Record]) -> _Source:
    identity = [os.fspath(root.resolve()), category]
    for record in records:
        for file in filter(None, (record.image, record.mask)):
            try:
                state = file.stat()
            except OSError as error:
                raise UserError(f'{file}: cannot be read ({error.strerror})') from error
            identity += [os.fspath(file.relative_to(root)), state.st_size, state.st_mtime_ns]
    return _Source(name, category, records, identity)


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


def _read(
    prepared: Path, split: str, image_size: tuple[int, int], resize: tuple[int, int]
) -> tuple[splits.Split, str]:
    """Decodes and resizes one split of a prepared set; returns it and its fingerprint."""
    from tensorflow_datasets import decode

    skip = {'image': decode.SkipDecoding(), 'mask': decode.SkipDecoding()}
    source = _builder(prepared).as_data_source(split, decoders=skip)
    # Encoded images are read twice, lest all of them be held at once.
    named = [(e['defect'].decode(), e['file'].decode(), bool(e['has_mask'])) for e in source]
    order = sorted(range(len(named)), key=named.__getitem__)
    named = [named[i] for i in order]
    defects, names, has_mask = (tuple(x) for x in zip(*named, strict=True)) if named else ((),) * 3
    shape, pixels = (len(named), *image_size), np.uint8
    wanted = {'images': ((*shape, 3), pixels), 'masks': (shape, pixels)}
    kept = files.allocate(wanted, prepared.parent)
    size = resize if any(resize) else image_size

    def fill(place: int, example: dict) -> bytes:
        """Decodes an image to its place; what it is told by."""
        file = example['file'].decode()
        kept['images'][place] = images.fit(
            images.decode(example['image'], file), image_size, resize
        )
        mask = images.decode_mask(example['mask'], file)
        kept['masks'][place] = images.centre(images.resize_mask(mask, size), image_size)
        # The mask as pixels, since it was encoded here, by whatever version of OpenCV.
        parts = example['image'], np.packbits(mask).tobytes(), bytes([example['has_mask']])
        heading = f'{file}\0{example["defect"].decode()}\0'.encode()
        return b''.join(hashlib.sha256(part).digest() for part in (heading, *parts))

    content, at_once = hashlib.sha256(), 64
    with ThreadPoolExecutor() as pool:  # OpenCV and hashlib release the interpreter's lock.
        for start in range(0, len(order), at_once):
            examples = [source[i] for i in order[start : start + at_once]]
            for told in pool.map(fill, range(start, start + len(examples)), examples):
                content.update(told)
    split = splits.Split(
        **kept,
        has_mask=np.array(has_mask, bool),
        labels=np.array([defect != GOOD for defect in defects], np.int32),
        defects=defects,
        files=names,
    )
    return split, content.hexdigest()
