"""Files that appear whole or not at all, and folders that one process at a time writes."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import fcntl
import hashlib
import math
import mmap
import os
import pathlib
import re
import shutil
import sys
import tempfile

from absl import logging
import numpy as np

from ssn_jax.errors import UserError

_DRAFT = re.compile(r'\..*\.\d+\.tmp')


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a draft beside `path`, which becomes `path` when the block ends without an error.

    So no reader meets half a file, and a failure leaves what was there before. A missing folder
    is made. What a killed process leaves is told by `is_draft`. The draft may be made a folder.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield draft
        os.replace(draft, path)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def is_draft(path: pathlib.Path) -> bool:
    """Whether a path's name is that of a draft of `replacing`."""
    return bool(_DRAFT.fullmatch(path.name))


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file's content at once."""
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


@contextlib.contextmanager
def locked(folder: pathlib.Path, flag: str = '--workdir') -> Iterator[None]:
    """Within the block no other process can have this folder `locked`.

    The lock is the system's own (flock): it leaves no file, and ends with its process, however
    that ends.

    Raises:
      UserError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f'{folder} is in use by another run: wait for its end, or choose another {flag}.'
        ) from None
    except OSError as e:  # Some network file systems have no such locks.
        logging.warning('%s cannot be locked (%s): start no second run in it.', folder, e.strerror)
    try:
        yield
    finally:
        os.close(handle)


def check_folder(path: pathlib.Path, flag: str) -> None:
    """Raises UserError if a folder cannot be made or written to; writes nothing."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f'{existing} is a file, no folder: choose another {flag}.')
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f'{existing} is not writable: choose another {flag}.')


def check_output(path: pathlib.Path, flag: str) -> None:
    """Raises UserError if a file cannot be written for a reason that is known beforehand."""
    if path.is_dir():
        raise UserError(f'{path} is a folder: {flag} names a file.')
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f'{existing} cannot be written to: choose another {flag}.')


@contextlib.contextmanager
def writing(path: pathlib.Path, flag: str) -> Iterator[None]:
    """Within the block an OSError becomes a UserError: `path`, named by `flag`, is not written."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f'{path} cannot be written ({e.strerror}): choose another {flag}.'
        ) from None


def write_output(path: pathlib.Path, content: str | bytes, flag: str) -> None:
    """`write` for a file that the user named with `flag`; UserError where it fails."""
    with writing(path, flag):
        write(path, content)


def allocate(like: Mapping[str, tuple], folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays without values, which JAX on a CPU takes as they are, since they begin with a page.

    Together they lie in memory or, where they would take more than half of what is free there, in a
    file of `folder` that has no name and is gone with the process, however that ends.

    Args:
      like: their shapes and types, by name.
      folder: on the disk to use.

    Raises:
      UserError: there is no room for them on that disk either.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in like.values()]
    starts = np.cumsum([0, *(-(-n // mmap.PAGESIZE) * mmap.PAGESIZE for n in sizes)]).tolist()
    size, free = max(1, starts[-1]), free_memory()
    if size <= free / 2:
        buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        needed = f'{size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free'
        try:
            with tempfile.TemporaryFile(dir=folder) as f:
                # A disk that is full later would end the process without a word.
                os.posix_fallocate(f.fileno(), 0, size)
                buffer = mmap.mmap(f.fileno(), size)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f'{folder} cannot be written to ({e.strerror}), and there is too little memory '
                    f'({needed}): name another --workdir and --config.data.cache.'
                ) from None
            room = shutil.disk_usage(folder).free / 1e9
            raise UserError(
                f'no room ({needed}, and {room:.1f} GB of the disk of {folder}: {e.strerror}): '
                'choose a smaller --config.image_size, fewer --config.turned_copies or '
                '--config.drawn.count, or a --workdir or --config.data.cache on a larger disk.'
            ) from None
        logging.info('On the disk of %s: %s (%s)', folder, ', '.join(like), needed)
    return {
        name: np.frombuffer(buffer, dtype, math.prod(shape), start).reshape(shape)
        for (name, (shape, dtype)), start in zip(like.items(), starts, strict=False)
    }


def free_memory() -> int:
    """Bytes of memory that this process may still take without swapping, as far as Linux tells."""
    free = sys.maxsize
    with contextlib.suppress(OSError):  # Elsewhere nothing is told.
        free = 1024 * _number('/proc/meminfo', 'MemAvailable:')
    with contextlib.suppress(OSError, ValueError):  # No control group, or one without a limit.
        group = pathlib.Path('/sys/fs/cgroup')
        limit, used = (int((group / f'memory.{x}').read_text()) for x in ('max', 'current'))
        # Files that were read are held as long as nobody needs the room.
        free = min(free, limit - used + _number(group / 'memory.stat', 'inactive_file'))
    return max(free, 0)


def _number(path, name):
    """The number behind a name in a file of lines such as `MemAvailable: 16 kB`."""
    with open(path) as f:
        found = dict(line.split()[:2] for line in f)
    return int(found[name])
