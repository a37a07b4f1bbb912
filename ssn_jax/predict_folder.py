"""Predictions for a folder of images: a table, and a picture of each image with its map.

Images stream through in chunks of bounded size, so memory does not grow with their number. While
one chunk is predicted, the next one is decoded, and the regions of the one before are found and
drawn. So a core is idle only when there is nothing left to do.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import csv
import functools
import pathlib

from absl import logging
import cv2
import numpy as np

from ssn_jax import __version__, decision, files
from ssn_jax.data import doubts, images, layouts
from ssn_jax.errors import UserError
from ssn_jax.predictor import Predictor, find_regions
from ssn_jax.report import overlays as overlays_lib

COLUMNS = ('file', 'score', 'p_value', 'decision', 'x', 'y', 'width', 'height')
COLUMNS += ('threshold', 'run', 'version')

# Pixels of the images that are held at a time; a single image may have more.
_CHUNK_PIXELS = 2**25
_UNKNOWN_PIXELS = 2**24  # Of an image whose header does not tell.


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
    others = []
    for path, is_image in layouts.walk(source, (excluded,)):
        if is_image:
            yield path
        elif warn:
            others.append(doubts.Doubt(path.relative_to(source).as_posix(), 'no image'))
    doubts.log(others)


def check_output(output: pathlib.Path) -> None:
    """Raises UserError if predictions cannot go to this folder; writes nothing."""
    files.check_folder(output, '--output')
    if output.exists() and any(output.iterdir()):
        raise UserError(f'{output} is not empty: choose another --output, or empty it.')


def predict(
    model: Predictor,
    source: pathlib.Path,
    output: pathlib.Path,
    max_pixels: int = images.MAX_PIXELS,
    overlays: bool = True,
    progress: Callable = lambda paths, total: paths,
) -> tuple[int, int]:
    """Predicts an image or all images below a folder.

    Args:
      model: a trained network with its threshold.
      source: an image file, or a folder.
      output: receives predictions.csv (`COLUMNS`: path relative to `source`, score logit, p-value,
        decision, the box of the region with the highest peak in pixels of the image, and by what it
        was judged), overlays/, and unreadable.csv if there is one (file, reason). An interrupted
        call leaves predictions.partial.csv instead.
      max_pixels: an image of more is refused before it is decoded.
      overlays: whether to draw them.
      progress: wraps the iterator of paths; it is told their number.

    Returns:
      The number of images that were predicted, and of those that could not be.

    Raises:
      UserError: there is no image, no threshold, or `output` cannot be written.
    """
    model.require_threshold()
    check_output(output)
    if not source.exists():
        raise UserError(f'{source} does not exist: --input names an image or a folder of images.')
    total = sum(1 for _ in find(source, output.resolve(), warn=True))
    if not total:
        endings = ' '.join(sorted(images.SUFFIXES))
        raise UserError(f'{source} holds no images ({endings} and others): check --input.')
    root = source if source.is_dir() else source.parent
    batch_size = min(total, model.batch_size)
    done, failures = 0, []
    paths = iter(progress(find(source, output.resolve()), total))
    try:
        with (
            files.replacing(output / 'predictions.csv') as draft,
            draft.open('w', newline='', errors='surrogateescape') as table,
            _kept(draft, output / 'predictions.partial.csv'),
            ThreadPoolExecutor() as pool,
            # Its own, so that this thread is not in compiled code when a signal comes.
            ThreadPoolExecutor(1) as computing,
            _one_thread_of_opencv(),
        ):
            rows, judged = csv.writer(table, lineterminator='\n'), []
            rows.writerow(COLUMNS)
            folder = output / 'overlays' if overlays else None
            load = functools.partial(_load, model=model, max_pixels=max_pixels, whole=overlays)
            try:
                for loaded in _loaded(paths, pool, load, batch_size, max_pixels):
                    named = []
                    for path, image in loaded:
                        name = path.relative_to(root).as_posix()
                        if isinstance(image, UserError):
                            failures.append((name, str(image)))
                            logging.warning('%s', image)
                        else:
                            named.append((name, *image))
                    if named:
                        found = computing.submit(model.logits, np.stack([x[-1] for x in named]))
                        _write(rows, judged)
                        judged = _judge(model, named, *found.result(), folder, pool)
                    done += len(named)
                    named = path = image = None  # Not to be held while others are loaded.
            finally:  # What is finished is not lost, whatever has ended the rest.
                _write(rows, judged)
        if failures:
            with (
                files.replacing(output / 'unreadable.csv') as draft,
                draft.open('w', newline='', errors='surrogateescape') as table,
            ):
                csv.writer(table, lineterminator='\n').writerows([('file', 'reason'), *failures])
    except OSError as e:
        raise UserError(
            f'{output} cannot be written ({e.strerror}): make room, or choose another --output.'
        ) from None
    return done, len(failures)


def _write(rows, judged):
    """Writes the rows of futures, which it takes away."""
    while judged:
        rows.writerow(judged.pop(0).result())


@contextlib.contextmanager
def _kept(draft, partial):
    """Gives a draft that is interrupted the name `partial`."""
    try:
        yield
    except KeyboardInterrupt:
        draft.replace(partial)
        logging.warning('The images that were predicted until now are in %s.', partial)
        raise


@contextlib.contextmanager
def _one_thread_of_opencv():
    """Within the block OpenCV computes in the thread that calls it: images are spread, not rows."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _judge(model, named, scores, maps, folder, pool):
    """Futures of the rows of a chunk's (name, image, size, fitted image), drawn into `folder`."""
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise UserError(
            f'{model.workdir} gives scores that are no numbers: its training has diverged, see '
            'train.csv.'
        )
    return [
        pool.submit(_row, folder, name, image, model, model.result(score, logits, size))
        for (name, image, size, _), score, logits in zip(named, scores, maps, strict=True)
    ]


def _row(folder, name, image, model, result):
    """The table's row of an image; draws its overlay into `folder`, if there is one."""
    regions, marked = find_regions(result.map, result.view)
    if folder:
        _draw(folder / name, result, image, marked if result.defective else None)
    called = decision.CLASSES[int(result.defective)]
    p_value = '' if result.p_value is None else f'{result.p_value:.6f}'
    by_what = f'{model.threshold:.6g}', model.workdir.name, __version__
    return [name, f'{result.score:.6g}', p_value, called, *regions[0][:4], *by_what]


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


def _draw(target, result, image, regions):
    """Writes the overlay of an image: `target` with .jpg added, or .png where JPEG cannot hold it.

    Colours span probabilities 0..1 in every image, so they compare; `regions` are outlined.
    """
    height, width = image.shape[:2]
    part = result.view.part
    drawn = overlays_lib.tint(image, decision.sigmoid(result.map), part=part, bgr=True)
    if regions is not None:
        overlays_lib.outline(drawn[part], regions, max(1, round(max(height, width) / 400)))
    suffix = '.jpg' if max(height, width) < 2**16 - 1 else '.png'
    ok, encoded = cv2.imencode(suffix, drawn)
    if not ok:
        raise UserError(f'{target}{suffix} cannot be encoded: try --no_overlays.')
    files.write(target.with_name(target.name + suffix), encoded.tobytes())
