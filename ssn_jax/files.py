"""Files that appear whole or not at all."""

from collections.abc import Iterator
import contextlib
import os
import pathlib

from ssn_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a draft beside `path`, which becomes `path` when the block ends without an error.

    So no reader meets half a file, and a failure leaves what was there before. A missing folder
    is made.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file's content at once."""
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def check_output(path: pathlib.Path, flag: str) -> None:
    """Raises UserError if a file can not be written for a reason that is known beforehand."""
    if path.is_dir():
        raise UserError(f'{path} is a folder: {flag} names a file.')
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f'{existing} can not be written to: choose another {flag}.')


def write_output(path: pathlib.Path, content: str | bytes, flag: str) -> None:
    """`write` for a file that the user named with `flag`; UserError where it fails."""
    try:
        write(path, content)
    except OSError as e:
        raise UserError(
            f'{path} can not be written ({e.strerror}): choose another {flag}.'
        ) from None
