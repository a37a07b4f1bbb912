"""Files that appear whole or not at all, and folders that one process at a time writes."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import os
import pathlib
import re

from absl import logging

from ssn_jax.errors import UserError

_DRAFT = re.compile(r'\..*\.\d+\.tmp')


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a draft beside `path`, which becomes `path` when the block ends without an error.

    So no reader meets half a file, and a failure leaves what was there before. A missing folder
    is made. What a killed process leaves is told by `is_draft`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield draft
        os.replace(draft, path)
    finally:
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
def locked(folder: pathlib.Path) -> Iterator[None]:
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
            f'{folder} is in use by another run: wait for its end, or choose another --workdir.'
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


def write_output(path: pathlib.Path, content: str | bytes, flag: str) -> None:
    """`write` for a file that the user named with `flag`; UserError where it fails."""
    try:
        write(path, content)
    except OSError as e:
        raise UserError(
            f'{path} cannot be written ({e.strerror}): choose another {flag}.'
        ) from None
