"""Trains and evaluates a config: `python -m ssn_jax.main --config configs/mod2.py`.

Every config field is a flag: --config.noise.beta=0.05 --config.data.category=bottle.
"""

from collections.abc import Callable, Sequence
import inspect
import os
import re
import sys

from absl import app, flags
import ml_collections
from ml_collections import config_flags

from ssn_jax import config as config_lib, terminal
from ssn_jax.errors import UserError

try:
    _CONFIG = config_flags.DEFINE_config_file('config', None, 'The config: its path, or its name.')
except flags.Error as e:  # It reads the files of --flagfile at once.
    sys.exit(f'error: {" ".join(str(e).split()).removeprefix("ERROR:: ")}')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; the same folder resumes it. Default: runs/NAME.'
)
_EXTEND = flags.DEFINE_string(
    'extend',
    None,
    'Go on with this finished run, instead of --config, with more images: --config.data.root names '
    "their folder, --config.epochs says how many epochs (a quarter of the run's). The new run goes "
    'to RUN-extended, unless --workdir says otherwise.',
)
_OLD_ROOT = flags.DEFINE_string(
    'old_root', None, 'With --extend: where the images are now that the run learned from.'
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

_NO_CONFIG = 'no config: add --config configs/mod2.py, or --config mod2 (--help lists them all).'
_OWN = ('config', 'workdir', 'quiet', 'tensorboard')
_OF_TRAINING = ('extend', 'old_root', 'distributed', 'coordinator', 'num_processes', 'process_id')


def run() -> None:
    """Runs the main job for parsed flags."""
    # After the flags, so that a wrong one is told at once.
    from ssn_jax import devices, extend, pipeline, run as run_lib
    from ssn_jax.report import text

    devices.connect(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config, workdir = _CONFIG.value, _WORKDIR.value and terminal.path(_WORKDIR.value)
    if _EXTEND.value:
        extended = terminal.path(_EXTEND.value)
        given = config_flags.get_override_values(flags.FLAGS['config'])
        config = extend.config_of(extended, given, _OLD_ROOT.value)
        beside = extended.resolve()  # It may be '.'.
        workdir = workdir or beside.with_name(f'{beside.name}-extended')
    elif config.extend:
        raise UserError('--config.extend cannot be set: --extend RUN goes on with a finished run.')
    config_lib.validate(config)
    workdir = workdir or run_lib.default_workdir(config)
    terminal.set_up_log(_QUIET.value)
    results = pipeline.train_and_evaluate(config, workdir, _TENSORBOARD.value, _QUIET.value)
    if not devices.is_first():
        return
    if not _QUIET.value:
        print(text.format_table(results))
    print(text.summary(workdir))


_INTERRUPTED = 'the same command goes on from the last checkpoint, if there is one.'


def cli(
    argv: list[str] | None = None,
    about: str = __doc__,
    run_fn: Callable = run,
    interrupted: str = _INTERRUPTED,
    flags_of: Sequence[str] = (),
) -> None:
    """Parses flags, runs, and turns a user's mistake into one line and exit status 1.

    Args:
      argv: what follows the command; None: the process's.
      about: what --help begins with.
      run_fn: what runs.
      interrupted: what is said after a signal.
      flags_of: the names of flags that are the command's own.
    """
    argv = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    if {'-h', '--help', '-help', '--helpfull', '--helpshort'} & set(argv[1:]):
        terminal.guard(lambda: print(help_text(about, flags_of)))
        return
    terminal.set_up_log()

    def run_checked(_):
        if flags_of and _EXTEND.value is not None:
            raise UserError('--extend is for ssn-jax train alone.')
        return run_fn()

    terminal.guard(lambda: app.run(run_checked, argv=argv, flags_parser=_parse), interrupted)


def help_text(about: str, flags_of: Sequence[str] = ()) -> str:
    """What --help shows: what the command does, its flags, and the config's fields."""
    names = (*flags_of, *_OWN, *(() if flags_of else _OF_TRAINING))
    width = max(map(len, config_lib.FIELDS)) + 11
    lines = [inspect.cleandoc(about), '', 'Flags:']
    lines += [f'  {"--" + name:{width}s}{flags.FLAGS[name].help}' for name in names]
    lines += ['', f'Configs of the package: {", ".join(config_lib.built_in())}.', '']
    lines.append('Fields of a config, with what they are where it does not set them:')
    for name, field in config_lib.FIELDS.items():
        if name != 'version':
            lines.append(f'  {"--config." + name:{width}s}{field.about} ({field.default!r})')
    return '\n'.join(lines)


def _parse(argv: list[str]) -> list[str]:
    """Parses the command line into absl's flags; UserError for whatever is wrong with it."""
    check_fields(argv)
    argv = _with_path(_with_config(argv))
    path = _value_of('config', argv)
    try:
        rest = flags.FLAGS(argv)
    except Exception as e:  # A config file is code: it can raise anything.
        raise UserError(_explain(e, path)) from None
    if flags.FLAGS['log_dir'].present:
        raise UserError('--log_dir is not used: a run has its log in log.txt of its --workdir.')
    if len(rest) > 1:
        raise UserError(f'unexpected argument {rest[1]!r}: flags start with --.')
    if path is None:
        raise UserError(_NO_CONFIG)
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        raise UserError(_unusable(path, 'its get_config() returns no ConfigDict'))
    return rest


def _with_path(argv: list[str]) -> list[str]:
    """The command line with --config's path, where it names a config of the package."""
    argv = list(argv)
    for i, arg in enumerate(argv):
        name, assigned, value = arg.partition('=')
        if name not in ('-config', '--config'):
            continue
        if assigned:
            argv[i] = f'{name}={config_lib.find(value)}'
        elif i + 1 < len(argv):
            argv[i + 1] = config_lib.find(argv[i + 1])
    return argv


def _with_config(argv: list[str]) -> list[str]:
    """The command line with some --config, where --extend stands for it: its fields are flags."""
    extended = _value_of('extend', argv)
    if extended is None:
        if _value_of('old_root', argv) is not None:
            raise UserError('--old_root is for --extend: name the images with --config.data.root.')
        return argv
    if _value_of('config', argv) is not None:
        raise UserError('--extend takes the config of the run that it names: leave out --config.')
    if not extended:
        raise UserError('--extend names no run: add the folder of a finished one.')
    return [argv[0], '--config=mod1_a', *argv[1:]]


def _value_of(flag: str, argv: list[str]) -> str | None:
    """What a flag is set to, or None; read by hand, for messages on what does not parse."""
    found = None
    for arg, following in zip(argv, [*argv[1:], ''], strict=True):
        name, assigned, value = arg.partition('=')
        if name in (f'-{flag}', f'--{flag}'):
            found = value if assigned else following
    return found


def check_fields(argv: list[str]) -> None:
    """Raises UserError for a --config.FIELD that no config has."""
    for arg in argv:
        if match := re.match(r'--?(?:no)?config\.([^=]*)', arg):
            config_lib.check_name(match[1])


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
        known = ', '.join(config_lib.built_in())
        return f'no config file at {file!r}: name one of your own, or one of the package: {known}.'
    return f'{file} cannot be used as a config ({reason}): configs/mod2.py shows how one looks.'


if __name__ == '__main__':
    cli()
