"""Predictions for a folder of images: a table, and pictures of each image's map.

Images stream through in chunks of bounded size, so memory does not grow with their number. While
one chunk is predicted, the next one is decoded, and the regions of the one before are found and
drawn. So a core is idle only when there is nothing left to do.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import csv
import errno
import functools
import io
import json
import os
import pathlib

from absl import logging
import cv2
import numpy as np

from ssn_jax import __version__, decision, drift, files, run as run_lib
from ssn_jax.data import doubts, images, layouts
from ssn_jax.errors import UserError
from ssn_jax.predictor import Predictor, find_regions
from ssn_jax.report import overlays as overlays_lib

COLUMNS = ('file', 'score', 'p_value', 'decision', 'x', 'y', 'width', 'height')
COLUMNS += ('threshold', 'run', 'version')

# Pixels of the images that are held at a time; a single image may have more.
_CHUNK_PIXELS = 2**25
_UNKNOWN_PIXELS = 2**24  # Of an image whose header does not tell.
_ABOUT = 'predictions.json'
# Why a picture cannot be written that no other one could be either.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}


def find(
    source: pathlib.Path, excluded: pathlib.Path | None = None, warn: bool = False
) -> Iterator[pathlib.Path]:
    """Yields the image files below a folder as training finds them (`layouts.walk`).

    Args:
      source: a folder, or a file, which may be called anything.
      excluded: a folder below it that is left out.
      warn: whether to say at the end what was found and is no image.
    """
    if not source.is_dir():
        yield source
        return
    others, found = [], False
    for path, is_image in layouts.walk(source, (excluded,)):
        found |= is_image
        if is_image:
            yield path
        elif warn:
            others.append(doubts.Doubt(path.relative_to(source).as_posix(), 'no image'))
    doubts.log(others if found else [])  # Else an error says more.


def check_output(output: pathlib.Path) -> None:
    """Raises UserError if predictions cannot go to this folder; writes nothing."""
    files.check_folder(output, '--output')
    if output.exists() and not (output / _ABOUT).exists():
        if not all(map(files.is_draft, output.iterdir())):
            raise UserError(f'{output} is not empty: choose another --output, or empty it.')


def predict(
    model: Predictor,
    source: pathlib.Path,
    output: pathlib.Path,
    max_pixels: int = images.MAX_PIXELS,
    overlays: bool = True,
    progress: Callable = lambda paths, total: paths,
    watch: drift.Watch | None = None,
    maps: str | None = None,
) -> tuple[int, int]:
    """Predicts an image or all images below a folder, but for those that `output` has already.

    Each row is written as soon as its image is done, so whatever ends the call loses none, and the
    same call goes on.

    Args:
      model: a trained network with its threshold.
      source: an image file, or a folder.
      output: receives predictions.csv (`COLUMNS`: path relative to `source`, score logit, p-value,
        decision, the box of the region with the highest peak in pixels of the image, and by what it
        was judged), predictions.json (what was asked for), overlays/, maps/ and masks/, and lists
        (file, reason) of images that cannot be read, unreadable.csv, or whose pictures cannot be
        written, unwritten.csv.
      max_pixels: an image of more is refused before it is decoded.
      overlays: whether to draw them.
      progress: wraps the iterator of paths; it is told their number.
      watch: sees the scores in the order of the images; the first at which it notices a change is
        told.
      maps: 'png' or 'npy', to write maps and masks; None: neither.

    Returns:
      The number of images that were predicted now, and of those that could not be read.

    Raises:
      UserError: there is no image, no threshold, or `output` cannot be written, is in use, or holds
        something else.
    """
    model.require_threshold()
    check_output(output)
    if not source.exists():
        raise UserError(f'{source} does not exist: --input names an image or a folder of images.')
    if not sum(1 for _ in find(source, output.resolve(), warn=True)):
        endings = ' '.join(sorted(images.SUFFIXES))
        raise UserError(f'{source} holds no images ({endings} and others): check --input.')
    try:
        output.mkdir(parents=True, exist_ok=True)
        with files.locked(output, '--output'):
            check_output(output)  # Another one may have begun there.
            return _predict(model, source, output, max_pixels, overlays, progress, watch, maps)
    except OSError as e:
        raise UserError(
            f'{output} cannot be written ({e.strerror}): make room, and the same command goes on, '
            'or choose another --output.'
        ) from None


def _predict(model, source, output, max_pixels, overlays, progress, watch, maps):
    """`predict` into a folder that is locked."""
    root = source if source.is_dir() else source.parent
    table = _Table(output / 'predictions.csv', COLUMNS)
    unreadable, unwritten = (
        _Table(output / name, ('file', 'reason')) for name in ('unreadable.csv', 'unwritten.csv')
    )
    written = _last_change(table.path)
    known = _continue(table.path, _about(model, source, overlays, maps))
    unreadable.path.unlink(missing_ok=True)  # They are tried again.

    def missing():
        for path in find(source, output.resolve()):
            if path.relative_to(root).as_posix() not in known:
                yield path
            elif _last_change(path) > written:
                raise UserError(
                    f'{path} has changed since {table.path} was written: choose another --output.'
                )

    total = sum(1 for _ in missing())
    if known:
        rest = f'{total} are left' if total else 'nothing is left to do'
        logging.info('Going on: %d images are in %s already, %s.', len(known), table.path, rest)
        with table.path.open(newline='', encoding='utf-8', errors='surrogateescape') as f:
            _watch(watch, [(row['file'], float(row['score'])) for row in csv.DictReader(f)])
    pictures = ([functools.partial(_overlay, model)] if overlays else []) + (
        [_MAPS[maps], _mask] if maps else []
    )
    load = functools.partial(_load, model=model, max_pixels=max_pixels, whole=overlays)
    paths, judged, done, failed = iter(progress(missing(), total=total)), [], 0, 0
    squashed = False

    def write():
        """Writes the rows of what is judged, and takes it away."""
        nonlocal done
        while judged:
            row, reason = judged[0].result()
            if reason:
                unwritten.append((row[0], reason))
                logging.warning('%s: %s', row[0], reason)
            table.append(row)
            judged.pop(0)
            done += 1

    with (
        table,
        unreadable,
        unwritten,
        ThreadPoolExecutor() as pool,
        # Its own, so that this thread is not in compiled code when a signal comes.
        ThreadPoolExecutor(1) as computing,
        _one_thread_of_opencv(),
    ):
        try:
            for loaded in _loaded(paths, pool, load, min(total, model.batch_size), max_pixels):
                named = []
                for path, image in loaded:
                    name = path.relative_to(root).as_posix()
                    if isinstance(image, UserError):
                        failed += 1
                        unreadable.append((name, str(image)))
                        logging.warning('%s', image)
                    else:
                        named.append((name, *image))
                squashed = squashed or _tell_squashed(model, named)
                if named:
                    found = computing.submit(model.logits, np.stack([x[-1] for x in named]))
                    write()
                    judged = _judge(model, named, *found.result(), output, pictures, pool)
                    scores = found.result()[0]
                    _watch(watch, zip((x[0] for x in named), scores, strict=True))
                named = path = image = None  # Not to be held while others are loaded.
            write()
            table.open()  # With its heading, if it has no row.
        except KeyboardInterrupt as e:
            # What is finished is not lost; the signal may have come just after a row was written.
            names = _read_names(table.path)
            judged = [one for one in judged if one.result()[0][0] not in names]
            write()
            raise type(e)(
                f'{len(_read_names(table.path))} predictions are in {table.path}, the same command '
                'goes on from there.'
            ) from None
        except OSError:  # Whose row is missing the others must not follow.
            raise
        except BaseException:
            write()
            raise
        finally:
            if os.listdir(output) == [_ABOUT]:
                (output / _ABOUT).unlink()
    return done, failed


class _Table:
    """A csv file that whole rows are appended to; it is made with the first one."""

    def __init__(self, path: pathlib.Path, columns: tuple[str, ...]):
        self.path, self._columns, self._file = path, columns, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            self._file.close()

    def open(self) -> None:
        """Opens the file, and gives it its heading if it has none."""
        if not self._file:
            self._file = self.path.open('ab', buffering=0)
            if not self._file.tell():
                self._write(self._columns)

    def append(self, row) -> None:
        """Adds a row; an OSError leaves what was there before."""
        self.open()
        self._write(row)

    def _write(self, row):
        text = io.StringIO()
        csv.writer(text).writerow(row)  # With its own end of lines it also quotes a \r in a name.
        line = (text.getvalue().removesuffix('\r\n') + '\n').encode(errors='surrogateescape')
        end = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise


def _name_of(model):
    """The name of a run's folder, also of '.'."""
    return os.path.basename(os.path.abspath(model.workdir))


def _about(model, source, overlays, maps):
    """What a folder's predictions share."""
    has_model = run_lib.has_model(model.workdir)
    return {
        'input': str(source.resolve()),
        'run': _name_of(model),
        'model': run_lib.model_digest(model.workdir) if has_model else None,
        'epoch': model.epoch,
        'precision': model.precision,
        'threshold': float(model.threshold),
        'overlays': overlays,
        'maps': maps,
        'version': __version__,
    }


def _continue(table: pathlib.Path, about: dict) -> set[str]:
    """The files that a table has rows of; what a kill has cut off is taken away from its end.

    Args:
      table: may be missing.
      about: what the rows must have been made with; is written beside a table without any.

    Raises:
      UserError: they were made with something else, or a file is damaged.
    """
    known, place = _read_names(table), table.with_name(_ABOUT)
    if not known:
        files.write(place, json.dumps(about, indent=2) + '\n')
        return known
    try:
        written = json.loads(place.read_text())
        different = [name for name in about if written.get(name) != about[name]]
    except (ValueError, AttributeError) as e:
        raise UserError(f'{place} is damaged ({e}): choose another --output.') from None
    if different:
        name = different[0]
        raise UserError(
            f'{table.parent} holds predictions of another kind (different: {", ".join(different)}; '
            f'{name} is {written.get(name)!r} there and {about[name]!r} here): choose another '
            '--output.'
        )
    return known


def _read_names(path):
    """The files that a table has rows of, after what is no whole row is cut off its end."""
    names, end, line = [], 0, ''

    def lines():
        nonlocal end, line
        for encoded in file:
            end, line = end + len(encoded), encoded.decode(errors='surrogateescape')
            yield line

    if not path.exists():
        return set()
    with path.open('r+b') as file:
        rows, whole = csv.reader(lines()), 0
        try:
            for row in rows:
                if len(row) != len(COLUMNS) or not line.endswith('\n'):
                    break
                names.append(row[0])
                whole = end
            damaged = next(rows, None) is not None or names[:1] not in ([], [COLUMNS[0]])
        except csv.Error:
            damaged = True
        if damaged:
            raise UserError(f'{path} is damaged: restore it, or choose another --output.')
        if whole < end:
            file.truncate(whole)
    return set(names[1:])


def _last_change(path):
    """When a file's content has last changed, in ns; 0 if it is gone.

    A camera's clock may be ahead, and a file that was moved is no other one.
    """
    try:
        state = path.stat()
    except OSError:
        return 0
    return min(state.st_mtime_ns, state.st_ctime_ns)


@contextlib.contextmanager
def _one_thread_of_opencv():
    """Within the block OpenCV computes in the thread that calls it: images are spread, not rows."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _judge(model, named, scores, maps, output, pictures, pool):
    """Futures of what `_row` makes of a chunk's (name, image, size, fitted image)."""
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise UserError(
            f'{model.workdir} gives scores that are no numbers: its training has diverged, see '
            'train.csv.'
        )
    return [
        pool.submit(_row, output, pictures, name, image, model, model.result(score, logits, size))
        for (name, image, size, _), score, logits in zip(named, scores, maps, strict=True)
    ]


def _tell_squashed(model, named):
    """Warns of the first image whose shape is far from the model's; whether there is one."""
    config = model.config
    if config.fit == 'pad' or any(config.resize):
        return False
    for name, _, size, _ in named:
        if doubts.of_shape(size, tuple(config.image_size)):
            logging.warning('%s, and maybe others: %s', name, doubts.REASONS['shape'])
            return True
    return False


def _watch(watch, scores):
    """Shows (name, score) to what watches them, if anything does, and tells what it notices."""
    for name, score in scores if watch else ():
        if watch.update(score):
            logging.warning(
                '%s: %s. If light, lens or product has changed, choose anew on good images of '
                'today: ssn-jax decide --images.',
                *(name, watch),
            )


def _row(output, pictures, name, image, model, result):
    """The table's row of an image, and why pictures of it could not be written, if so.

    Args:
      output: the folder.
      pictures: functions that give a picture's path and content, from the name, the image (uint8
        RGB (H, W, 3), or None if none draws on it), the result and the marked regions (h, w).
      name: the image's.
      image: as said.
      model: the predictor.
      result: what it says of the image.
    """
    regions, marked = find_regions(result.map, result.view)
    reasons = []
    for picture in pictures:
        path, content = picture(name, image, result, marked & result.defective)
        try:
            _store(output / path, content)
        except OSError as e:
            if e.errno in _REFUSALS:
                raise
            reasons.append(f'{path} cannot be written ({e.strerror})')
    called = decision.CLASSES[int(result.defective)]
    p_value = '' if result.p_value is None else f'{result.p_value:.6f}'
    by_what = f'{model.threshold:.6g}', _name_of(model), __version__
    return [name, f'{result.score:.6g}', p_value, called, *regions[0][:4], *by_what], '; '.join(
        reasons
    )


def _loaded(paths, pool, load, batch_size, max_pixels):
    """Yields chunks of (path, what `_load` returns of it), decoding one chunk ahead."""

    def start():
        """Begins to load the next chunk; the last path may be kept for the one after it."""
        chunk, held = [], 0
        while len(chunk) < batch_size:
            path = waiting.pop() if waiting else next(paths, None)
            if path is None:
                break
            size = images.size(path)
            pixels = size[0] * size[1] if size else _UNKNOWN_PIXELS
            if chunk and pixels <= max_pixels and held + pixels > _CHUNK_PIXELS:
                waiting.append(path)
                break
            held += min(pixels, max_pixels)
            chunk.append((path, pool.submit(load, path, size)))
        return chunk

    waiting = []
    chunk = start()
    while chunk:
        following = start()
        loaded = [(path, future.result()) for path, future in chunk]
        chunk = following
        yield loaded
        loaded.clear()


def _load(path, size, model, max_pixels, whole=True):
    """An image (None unless `whole`), its (height, width), and what the model sees, uint8 RGB.

    Or the UserError that it raised.
    """
    try:
        if path.is_dir():
            return UserError(f'{path}: cannot be listed; check the folder')
        images.check_size(size, path, max_pixels)
        image = images.decode(images.read(path), path, max_pixels, model.white)
        return image if whole else None, image.shape[:2], model.fit(image)
    except UserError as e:
        return e
    except OSError as e:  # Of a folder that may be listed and not entered.
        return UserError(f'{path}: cannot be read ({e.strerror}); check the file')


def _overlay(model, name, image, result, marked):
    """An overlay: the name with .jpg added, or .png where JPEG cannot hold it.

    Colours span 0..1 of the model's evidence in every image, so they compare; regions are outlined.
    """
    height, width = image.shape[:2]
    part = result.view.part
    drawn = overlays_lib.tint(image, model.evidence(result.map), part=part, bgr=True)
    overlays_lib.outline(drawn[part], marked, max(1, round(max(height, width) / 400)))
    suffix = '.jpg' if max(height, width) < 2**16 - 1 else '.png'
    return f'overlays/{name}{suffix}', _encode(suffix, drawn)


def _map_as_png(name, image, result, marked):
    """The map at the image's size: 16 bits, 65,535 times the probability; 0 where there is none."""
    levels = 65535 * decision.sigmoid(result.full_map())
    return f'maps/{name}.png', _encode('.png', np.uint16(np.round(np.nan_to_num(levels))))


def _map_as_npy(name, image, result, marked):
    """The map at the image's size: float32 logits; NaN where there is none."""
    content = io.BytesIO()
    np.save(content, result.full_map())
    return f'maps/{name}.npy', content.getbuffer()


def _mask(name, image, result, marked):
    """The regions at the image's size: 255, and 0 elsewhere."""
    return f'masks/{name}.png', _encode('.png', 255 * result.full_mask().astype(np.uint8))


_MAPS = {'png': _map_as_png, 'npy': _map_as_npy}


def _encode(suffix, image):
    done, encoded = cv2.imencode(suffix, image)
    if not done:
        raise UserError(f'an image of {image.shape} cannot be encoded as {suffix}.')
    return encoded


def _store(target, content):
    """Writes a file, under no other name before, which could be too long.

    What a kill leaves of it has no row, and is written again.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError:
        with contextlib.suppress(OSError):
            target.unlink()
        raise
