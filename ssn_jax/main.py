"""Trains and evaluates a config: `python -m ssn_jax.main --config configs/mod2.py`.

Every config field is a flag: --config.noise.beta=0.05 --config.data.category=bottle.
"""

import difflib
import os
import pathlib
import re
import sys

from absl import app, flags
import ml_collections
from ml_collections import config_flags

from ssn_jax import config as config_lib, terminal
from ssn_jax.errors import UserError

try:
    _CONFIG = config_flags.DEFINE_config_file('config', None, 'The config to train, configs/*.py.')
except flags.Error as e:  # It reads the files of --flagfile at once.
    sys.exit(f'error: {" ".join(str(e).split()).removeprefix("ERROR:: ")}')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; the same folder resumes it. Default: runs/NAME.'
)
_QUIET = flags.DEFINE_bool('quiet', False, 'Show warnings, errors and one line at the end only.')
_TENSORBOARD = flags.DEFINE_bool('tensorboard', False, 'Write TensorBoard event files too.')
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
    # After the flags, so that a wrong one is told at once.
    from ssn_jax import devices, pipeline, run as run_lib
    from ssn_jax.report import text as text_lib

    devices.connect(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value or run_lib.default_workdir(config))
    terminal.set_up_log(_QUIET.value)
    results = pipeline.train_and_evaluate(config, workdir, _TENSORBOARD.value, _QUIET.value)
    if not devices.is_first():
        return
    if not _QUIET.value:
        print(text_lib.format_table(results))
    print(text_lib.summary(workdir))


_INTERRUPTED = 'the same command goes on from the last checkpoint, if there is one.'


def cli(run_fn=run, interrupted: str = _INTERRUPTED) -> None:
    """Parses flags, runs, and turns a user's mistake into one line and exit status 1."""
    terminal.set_up_log()
    terminal.guard(lambda: app.run(run_fn, flags_parser=_parse), interrupted)


def _parse(argv: list[str]) -> list[str]:
    """Parses the command line into absl's flags; UserError for whatever is wrong with it."""
    check_fields(argv)
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
    path = None
    for arg, following in zip(argv, [*argv[1:], ''], strict=True):
        name, assigned, value = arg.partition('=')
        if name in ('-config', '--config'):
            path = value if assigned else following
    return path


def check_fields(argv: list[str]) -> None:
    """Raises UserError for a --config.FIELD that no config has."""
    known = [name for name, _ in config_lib.fields(config_lib.default_config())]
    for arg in argv:
        match = re.match(r'--?(?:no)?config\.([^=]*)', arg)
        if match and match[1] not in known:
            field = match[1]
            near = [name for name in known if name.startswith(f'{field}.')]
            near = near or difflib.get_close_matches(field, known, 3)
            hint = f'did you mean {", ".join(near)}?' if near else 'ssn_jax/config.py lists them.'
            raise UserError(f'no config field --config.{field}: {hint}')


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
    return f'{file} cannot be used as a config ({reason}): configs/mod2.py shows how one looks.'


if __name__ == '__main__':
    cli()
