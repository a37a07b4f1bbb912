"""What every command shares: one-line errors, the log, and the arguments that name a run."""

import argparse
from collections.abc import Callable
import contextlib
import errno
import inspect
import logging as py_logging
import os
import pathlib
import signal
import sys
import tempfile
import warnings

from absl import flags, logging

from ssn_jax import config as config_lib, signals
from ssn_jax.errors import UserError

if sys.platform == 'win32':  # Every command comes by here before it imports what Windows lacks.
    sys.exit(
        'error: ssn_jax does not run on Windows (array_record and fcntl are not made for it): use '
        'Linux, or WSL 2.'
    )

# What the machine can refuse at any time, whatever the code does.
_REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG),
)


def guard(command: Callable[[], object], interrupted: str = '') -> None:
    """Runs a command and says how it ended, if not well, in one line.

    A user's mistake, and what the machine refuses, is exit status 1; a signal's is 128 and its
    number: SIGHUP 129, Ctrl-C 130, SIGTERM 143, and 141 where nobody reads what is printed.

    Args:
      command: what to run.
      interrupted: what to say after a signal that does not say it itself.
    """
    try:
        with signals.raised():
            try:
                command()
            finally:
                sys.stdout.flush()
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # Whoever reads what is printed has enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except RuntimeError as e:
        if 'home directory' not in str(e):  # As pathlib's expanduser says it.
            raise
        print('error: no home folder is known for ~: write the path in full.', file=sys.stderr)
        sys.exit(1)
    except OSError as e:
        if e.errno not in _REFUSALS:
            raise
        where = f' ({e.filename})' if e.filename else ''
        print(f'error: {e.strerror}{where}: see to it and repeat the command.', file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as e:
        received = signals.number_of(e)
        rest = ': '.join(filter(None, [f'stopped by {received.name}', str(e) or interrupted]))
        with contextlib.suppress(OSError):  # The terminal may be gone.
            print(f'\n{rest}', file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(128 + received)  # Not to wait for a thread that compiles or computes.


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f'ssn-jax {command}',
            description=inspect.cleandoc(description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(f'{message} (--help lists what there is).')


def path(text: str) -> pathlib.Path:
    """What a flag names, a leading ~ read as the home folder."""
    return pathlib.Path(text).expanduser()


def add_run_arguments(parser: argparse.ArgumentParser, fields: tuple[str, ...]) -> None:
    """Adds --workdir, --checkpoint, --quiet and a --config.FIELD for every one of `fields`."""
    parser.add_argument(
        '--workdir', type=path, required=True, metavar='RUN', help="the run's folder"
    )
    parser.add_argument(
        '--checkpoint', type=int, metavar='EPOCH', help='a checkpoint; the newest if not given'
    )
    parser.add_argument('--quiet', action='store_true', help='warnings and errors only')
    for name in fields:
        kind, flag = type(config_lib.FIELDS[name].default), f'--config.{name}'
        names = [f'--{name}', flag] if name in ('engine', 'precision') else [flag]
        about = "instead of the run's own"
        parser.add_argument(*names, dest=f'config.{name}', type=kind, metavar='VALUE', help=about)


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, dict]:
    """Parses a command line with `add_run_arguments`.

    Returns:
      The arguments, and the config overrides among them, by 'group.field'.

    Raises:
      UserError: the command line is wrong.
    """
    arguments, rest = parser.parse_known_args(argv)
    known = config_lib.FIELDS
    values = {name: getattr(arguments, f'config.{name}', None) for name in known}
    allowed = [f'--config.{name}' for name in known if hasattr(arguments, f'config.{name}')]
    allowed = ', '.join(allowed) or 'no config field'
    for word in rest:
        name = word.removeprefix('--config.').partition('=')[0]
        if word.startswith('--config.'):
            wrong = 'belongs to training' if name in known else 'is no config field'
            raise UserError(f'--config.{name} {wrong}: this command takes {allowed}.')
    if rest:
        parser.error(f'unexpected argument {rest[0]!r}')
    return arguments, {name: value for name, value in values.items() if value is not None}


def set_up_log(quiet: bool = False) -> None:
    """Logs this package's messages and its libraries' warnings to stderr (--verbosity=1: all).

    Args:
      quiet: warnings only.
    """
    import cv2

    # What is wrong with an image is told in one line of our own.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    ours = str(pathlib.Path(__file__).parent) + os.sep

    def shown(record: py_logging.LogRecord) -> bool:
        # What orbax finds wrong with a checkpoint, `checkpoint.restore` tells.
        return (
            (record.levelno >= py_logging.WARNING and 'orbax' not in record.pathname)
            or (record.pathname.startswith(ours) and not quiet)
            or logging.get_verbosity() > logging.INFO
        )

    handler = logging.get_absl_handler().python_handler
    handler.filters.clear()  # Of an earlier call.
    handler.addFilter(shown)
    handler.setFormatter(_LogFormatter())


def compilation_cache() -> dict[str, str | float]:
    """JAX's settings, by name, that keep compiled programs below the user's cache folder.

    None, and a warning, where there is no such folder, or it cannot be written.
    """
    from ssn_jax.data import records

    folder = 'The cache folder'
    try:
        folder = records.cache_folder() / 'compiled'
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            os.posix_fallocate(f.fileno(), 0, 2**24)  # About what a command's programs take.
    except OSError as e:
        logging.warning('%s cannot be used (%s): no program is kept there.', folder, e.strerror)
        return {}
    return {
        'jax_compilation_cache_dir': str(folder),
        'jax_persistent_cache_min_compile_time_secs': 0.1,
    }


def use_compilation_cache() -> None:
    """Keeps compiled programs below the user's cache folder, so that a second start is quick."""
    import jax

    for name, value in compilation_cache().items():
        jax.config.update(name, value)
    # Where the disk gets full on the way: a page for every program.
    warnings.filterwarnings('ignore', 'Error writing persistent compilation cache')
    quieten_cache()


def quieten_cache() -> None:
    """Keeps jax up to 0.10.1 from printing pages of errors whenever a program comes from the cache.

    It takes two hints of LLVM's for the processor, +prefer-no-gather and +prefer-no-scatter, for
    instructions that the processor lacks.
    """
    import jax
    from jaxlib import utils

    if jax.__version_info__ < (0, 10, 2):
        utils.absl_set_min_log_level(3)  # Fatal ones only; errors are exceptions too.


def log_to_stderr(quiet: bool = False) -> None:
    """`set_up_log` for a command that is not started by absl."""
    flags.FLAGS.mark_as_parsed()  # There are none; absl would warn that they are still to come.
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    set_up_log(quiet)


class _LogFormatter(py_logging.Formatter):
    """The bare message, after its level where that matters."""

    def format(self, record: py_logging.LogRecord) -> str:
        message = super().format(record)
        notable = record.levelno >= py_logging.WARNING
        return f'{record.levelname.lower()}: {message}' if notable else message
