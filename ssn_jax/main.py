"""Trains and evaluates a config: `python -m ssn_jax.main --config configs/mod2.py`.

Every config field is a flag: --config.noise.beta=0.05 --config.data.category=bottle.
"""

import difflib
import logging as py_logging
import os
import pathlib
import re
import sys

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from ssn_jax import config as config_lib
from ssn_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The config to train, configs/*.py.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; the same folder resumes it. Default: runs/NAME.'
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'One of several processes, as the scheduler of the cluster says.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'One of several processes: HOST:PORT of the one with --process_id=0.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0 on.')

_NO_CONFIG = 'no config: add --config configs/mod2.py (or another of configs/).'


def run(argv: list[str]) -> None:
    """Runs the main job for parsed flags."""
    del argv
    from ssn_jax import devices, train  # After the flags, so that a wrong one is told at once.

    devices.connect(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value or train.default_workdir(config))
    results = train.train_and_evaluate(config, workdir)
    if not devices.is_first():
        return
    print(train.format_table(results))
    if config.seeds > 1:
        print(f'Everything is in {workdir}: summary.json, and a run of each seed in seed-*/.')
        return
    print(f'Everything is in {workdir}: results.json, train.csv, figures/, checkpoints/.')


def cli(run_fn=run) -> None:
    """Parses flags, runs, and turns a user's mistake into one line and exit status 1."""
    set_up_log()
    try:
        app.run(run_fn, flags_parser=_parse)
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print('\ninterrupted: the same command goes on from the last checkpoint.', file=sys.stderr)
        sys.exit(130)


def set_up_log() -> None:
    """Logs this package's messages and its libraries' warnings to stderr (--verbosity=1: all)."""
    ours = str(pathlib.Path(__file__).parent) + os.sep

    def shown(record: py_logging.LogRecord) -> bool:
        return (
            record.levelno >= py_logging.WARNING
            or record.pathname.startswith(ours)
            or logging.get_verbosity() > logging.INFO
        )

    handler = logging.get_absl_handler().python_handler
    handler.addFilter(shown)
    handler.setFormatter(_LogFormatter())


class _LogFormatter(py_logging.Formatter):
    """The bare message, after its level where that matters."""

    def format(self, record: py_logging.LogRecord) -> str:
        message = super().format(record)
        notable = record.levelno >= py_logging.WARNING
        return f'{record.levelname.lower()}: {message}' if notable else message


def _parse(argv: list[str]) -> list[str]:
    """Parses the command line into absl's flags; UserError for whatever is wrong with it."""
    _check_fields(argv)
    path = _config_path(argv)
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # --help, which absl ends like a failure.
        sys.exit(0)
    except Exception as e:  # A config file is code: it can raise anything.
        raise UserError(_explain(e, path)) from None
    if len(rest) > 1:
        raise UserError(f'unexpected argument {rest[1]!r}: flags start with --.')
    if path is None:
        raise UserError(_NO_CONFIG)
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError(_unusable(path, 'its get_config() returns no ConfigDict'))
    return rest


def _config_path(argv: list[str]) -> str | None:
    """What --config is set to, or None; read by hand, for messages on what does not parse."""
    for arg, following in zip(argv, [*argv[1:], ''], strict=True):
        name, assigned, value = arg.partition('=')
        if name in ('-config', '--config'):
            return value if assigned else following
    return None


def _check_fields(argv: list[str]) -> None:
    """Raises UserError for a --config.FIELD that no config has."""
    known = list(_fields(config_lib.default_config()))
    for arg in argv:
        match = re.match(r'--?(?:no)?config\.([^=]*)', arg)
        if match and match[1] not in known:
            field = match[1]
            near = [name for name in known if name.startswith(f'{field}.')]
            near = near or difflib.get_close_matches(field, known, 3)
            hint = f'did you mean {", ".join(near)}?' if near else 'ssn_jax/config.py lists them.'
            raise UserError(f'no config field --config.{field}: {hint}')


def _fields(config: ml_collections.ConfigDict, prefix: str = ''):
    """Yields every field's name, group.field for those in groups."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _fields(value, f'{prefix}{name}.')
        else:
            yield prefix + name


def _explain(error: Exception, path: str | None) -> str:
    """One line for an error that parsing raised."""
    # What a config raises reaches us bare, or, if a ValueError or TypeError, as a flag's error
    # with the whole traceback in its text.
    text = str(error)
    in_config = 'parsing config file' in text
    if isinstance(error, flags.Error) and not in_config:
        if path is None and 'config.' in text:
            return _NO_CONFIG
        return f'{" ".join(text.split())} (flags take the form --config.FIELD=VALUE).'
    last = text.strip().splitlines()[-1].strip() if text.strip() else ''
    return _unusable(path, last if in_config else f'{type(error).__name__}: {last}')


def _unusable(path: str | None, reason: str) -> str:
    file = (path or '').split(':')[0]
    if not os.path.isfile(file):
        return f'no config file at {file!r}: configs/ holds them.'
    return f'{file} can not be used as a config ({reason}): configs/mod2.py shows how one looks.'


if __name__ == '__main__':
    cli()
