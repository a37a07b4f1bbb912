"""The cross product of config values: one run for each, and one table of all of them.

Every run is that of a command, `python -m ssn_jax.main`, in a process of its own, so that one which
dies takes nothing with it. Runs that differ in their seed alone are a row of the table and share a
folder; they train in one process where they can.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import dataclasses
import io
import itertools
import math
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import urllib.parse

from absl import flags, logging
import ml_collections
from ml_collections import config_flags

from ssn_jax import config as config_lib, files, metrics, run as run_lib, terminal
from ssn_jax.errors import UserError
from ssn_jax.report import markup, page, published

# --- What is to be run ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
      setting: the text of each axis's value by field, without the seed.
      configs: of each run, by seed.
      workdir: receives a folder seed-N for each run.
    """

    setting: Mapping[str, str]
    configs: Mapping[int, ml_collections.ConfigDict]
    workdir: pathlib.Path

    @property
    def label(self) -> str:
        """The setting in words; the config's name if only seeds are swept."""
        name = next(iter(self.configs.values())).name
        return ', '.join(f'{f}={text}' for f, text in self.setting.items()) or name

    def run_of(self, seed: int) -> pathlib.Path:
        """A run's workdir."""
        return self.workdir / f'seed-{seed}'

    def finished(self) -> dict[int, run_lib.Run]:
        """The runs that have their results, by seed."""
        found = {}
        for seed in self.configs:
            try:
                run = run_lib.read_run(self.run_of(seed))
            except UserError:  # None yet, or not whole: the run's command writes them anew.
                continue
            if run.config.precision == self.configs[seed].precision:
                found[seed] = run
        return found


def parse_axes(
    base: ml_collections.ConfigDict, axes: Iterable[str], given: Iterable[str] = ()
) -> dict[str, dict[str, object]]:
    """Reads FIELD=VALUE,VALUE,... with values of each field's own type.

    Args:
      base: the config that the values take their place in.
      axes: one text for each field; commas inside brackets belong to a value.
      given: fields that are set otherwise.

    Returns:
      By field, the values by their texts.

    Raises:
      UserError: a text is none of these, or a field is set twice.
    """
    parsed: dict[str, dict[str, object]] = {}
    for axis in axes:
        field, assigned, text = axis.partition('=')
        if not assigned:
            raise UserError(f'--sweep {axis} has no values: it takes FIELD=VALUE,VALUE,....')
        config_lib.check_name(field)
        if field == 'seeds':
            raise UserError('--sweep seeds says how many run at once: --sweep seed=0,1,2 does too.')
        if field in parsed:
            raise UserError(f'--sweep {field} is given twice: join its values with commas.')
        if field in given:
            raise UserError(f'--sweep {field} and --config.{field} are given: leave one out.')
        values = parsed[field] = {}
        for one in re.split(r',(?![^(\[]*[)\]])', text):
            value = _parse(base, field, one)
            if value in values.values():
                raise UserError(f'--sweep {axis} holds {one!r} twice: leave one out.')
            values[one] = value
    if not parsed:
        raise UserError('nothing to sweep: add --sweep FIELD=VALUE,VALUE,....')
    if 'seed' in parsed and 'seeds' in given:
        raise UserError('--sweep seed and --config.seeds are given: leave one out.')
    return parsed


def _parse(base, field, text):
    """A field's value as --config.FIELD=TEXT sets it."""
    values, argv = flags.FlagValues(), ['', f'--config.{field}={text}']
    config = base.copy_and_resolve_references()
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, ValueError, TypeError, SyntaxError):
        kind = type(dict(config_lib.fields(base))[field]).__name__
        raise UserError(f'--sweep {field}: {text!r} is no value of this field ({kind}).') from None
    return dict(config_lib.fields(config))[field]


def plan(
    base: ml_collections.ConfigDict, axes: Mapping[str, Mapping[str, object]], workdir: pathlib.Path
) -> list[Setting]:
    """The rows of a sweep, the last axis varying first.

    Args:
      base: what is not swept; without an axis `seed` its seeds are.
      axes: as `parse_axes` returns them.
      workdir: receives a folder for each row.

    Raises:
      UserError: a combination is no config, or the folder holds something else.
    """
    others = {field: values for field, values in axes.items() if field != 'seed'}
    numbers = axes['seed'].values() if 'seed' in axes else range(base.seed, base.seed + base.seeds)
    rows = []
    for texts in itertools.product(*others.values()):
        setting = dict(zip(others, texts, strict=True))
        configs = {}
        for seed in sorted(numbers):
            config = configs[seed] = base.copy_and_resolve_references()
            values = {field: others[field][text] for field, text in setting.items()}
            config.update_from_flattened_dict(values | {'seed': seed, 'seeds': 1})
            config_lib.validate(config)
        row = Setting(setting, configs, workdir)
        label = ','.join(f'{field}={text}' for field, text in setting.items()) or row.label
        name = urllib.parse.quote(label, safe='=,()')
        if len(name) > 255:
            raise UserError(f'{row.label} is too long for the name of a folder: shorten its paths.')
        rows.append(dataclasses.replace(row, workdir=workdir / name))
    _check_folder(rows, workdir)
    return rows


def _check_folder(rows, workdir):
    try:
        for row in rows:
            for seed, config in row.configs.items():
                run_lib.check_workdir(config, row.run_of(seed))
        known = {workdir / name for name in ('results.csv', 'results.md')}
        known |= {row.workdir for row in rows} | {row.workdir / 'summary.json' for row in rows}
        known |= {row.run_of(seed) for row in rows for seed in row.configs}
        found = [*workdir.glob('*'), *(path for row in rows for path in row.workdir.glob('*'))]
    except OSError as e:
        raise UserError(
            f'{workdir} cannot be used ({e.strerror}): choose another --workdir.'
        ) from e
    other = sorted(p for p in found if p not in known and not p.name.startswith('.'))
    if other:
        raise UserError(
            f'{workdir} holds something else than this sweep ({other[0].relative_to(workdir)}): '
            'add it to the sweep, or choose another --workdir.'
        )


# --- Running it -----------------------------------------------------------------------------------


def run(
    settings: Sequence[Setting], arguments: Sequence[str], finish_row: Callable[[dict], None]
) -> dict:
    """Runs what is not finished.

    Args:
      settings: of the sweep.
      arguments: of every run's command line.
      finish_row: is called with what has failed so far, after each row.

    Returns:
      Why runs failed, in a line each, by label and seed.
    """
    failed: dict[tuple[str, int], str] = {}
    for i, row in enumerate(settings, 1):
        missing = sorted(row.configs.keys() - row.finished())
        logging.info(
            'Setting %d of %d: %s, %d runs missing', i, len(settings), row.label, len(missing)
        )
        for group in groups(row.configs, missing):
            reason = _run_process(row, group, arguments)
            # Several may lack memory, or one of them end all: then each gets its own turn, from the
            # last checkpoint on. A mistake in config or data is that of each.
            # NaN ends all of them too, and is told of a seed.
            of_all = reason and reason.startswith('error: ') and '(seed ' not in reason
            retry = reason and len(group) > 1 and not of_all
            for seed in sorted(set(group) - row.finished().keys()):
                if retry:
                    reason = _run_process(row, [seed], arguments)
                if seed not in row.finished():
                    failed[row.label, seed] = reason or 'it left no results.json'
        for seed, done in row.finished().items():
            loss = [0, *done.history.get('loss', [])][-1]  # An imported checkpoint has none.
            if not math.isfinite(loss):
                failed[row.label, seed] = f'diverged: its loss is {loss} in the end'
        for (label, seed), reason in failed.items():
            if label == row.label:
                logging.error('%s, seed %d: %s', label, seed, reason)
        finish_row(failed)
    return failed


def groups(
    configs: Mapping[int, ml_collections.ConfigDict], seeds: Sequence[int]
) -> list[list[int]]:
    """Rising seeds in groups that `config.seeds` can train at once."""
    found: list[list[int]] = []
    for seed in seeds:
        if found and seed == found[-1][-1] + 1 and _trains_several(configs[seed]):
            found[-1].append(seed)
        else:
            found.append([seed])
    return found


def _trains_several(config):
    several = config.copy_and_resolve_references()
    several.seed, several.seeds = 0, 2
    try:
        config_lib.validate(several)
    except UserError:
        return False
    return True


def _run_process(row, seeds, arguments):
    """Runs the main job on seeds that follow each other; why it failed, or None."""
    workdir = row.workdir if len(seeds) > 1 else row.run_of(seeds[0])
    process = subprocess.Popen(
        [
            *(sys.executable, '-m', 'ssn_jax.main', *arguments),
            *(f'--config.{field}={text}' for field, text in row.setting.items()),
            *(f'--config.seed={seeds[0]}', f'--config.seeds={len(seeds)}', f'--workdir={workdir}'),
        ],
        env={k.upper(): str(v) for k, v in terminal.compilation_cache().items()} | os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    told = b''
    with process:
        try:
            while part := os.read(process.stderr.fileno(), 1 << 16):
                sys.stderr.buffer.write(part)
                sys.stderr.buffer.flush()
                told = (told + part)[-(1 << 16) :]
        except BaseException:
            process.terminate()
            raise
    return explain(process.returncode, told.decode(errors='replace'))


def explain(status: int, told: str) -> str | None:
    """Why a process failed, in a line, by its exit status and what it wrote last; None if not."""
    if status == 0:
        return None
    if status < 0:
        return f'killed by {signal.Signals(-status).name}'
    lines = [line.strip() for line in re.split(r'[\r\n]+', told) if line.strip()]
    # The line of the exception, which notes may follow.
    errors = [line for line in lines if re.match(r'error: |[\w.]*(Error|Exception)\b', line)]
    last = (errors or lines or [f'exit status {status}'])[-1]
    return last[:300]


# --- The table ------------------------------------------------------------------------------------


def write_tables(workdir: pathlib.Path, rows: Sequence[Setting], failed: Mapping) -> str:
    """Writes results.csv (metrics in 0..1) and results.md (in percent); returns the latter."""
    finished = [(row, list(row.finished().values())) for row in rows]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    spread = [name + suffix for name in metrics.METRICS for suffix in ('', ' std')]
    writer.writerow([*rows[0].setting, 'seeds', 'failed', 'epochs', *spread, 'seconds'])
    shown = []
    for row, runs in finished:
        # A finished run's has what it found.
        config = runs[0].config if runs else next(iter(row.configs.values()))
        lost = [seed for label, seed in failed if label == row.label]
        values = [_mean_and_std(run.results['metrics'][n] for run in runs) for n in metrics.METRICS]
        seconds, _ = _mean_and_std(run.results.get('train_seconds') for run in runs)
        writer.writerow(
            [
                *(*row.setting.values(), len(runs), ' '.join(map(str, lost)), config.epochs),
                *(*itertools.chain(*values), seconds),
            ]
        )
        if runs:
            beside = published.find(config, runs[0].results)
            shown.append(page.Row(row.label, runs, beside))
    files.write_output(workdir / 'results.csv', table.getvalue(), '--workdir')

    first = next(iter(rows[0].configs.values()))
    cells, done = sum(len(row.configs) for row in rows), sum(len(runs) for _, runs in finished)
    blocks = [
        ('heading', 1, f'Sweep of {first.name}'),
        ('text', f'{done} of {cells} runs are finished, {len(failed)} failed. {page.EXPLANATION}'),
    ]
    if shown:
        blocks += [*(('text', note) for note in page.notes(shown))]
        blocks.append(('table', page.metrics_table(shown)))
    blocks += [('text', f'{label}, seed {seed}: {why}') for (label, seed), why in failed.items()]
    text = markup.markdown(blocks, '.')
    files.write_output(workdir / 'results.md', text, '--workdir')
    return text


def _mean_and_std(values):
    """Mean and sample standard deviation of what is defined; '' where there is none."""
    known = [v for v in values if v is not None]
    std = statistics.stdev(known) if len(known) > 1 else ''
    return statistics.fmean(known) if known else '', std


# --- The command ----------------------------------------------------------------------------------


def main(values: flags.FlagValues) -> int:
    """Runs the sweep of the parsed flags; the exit status."""
    for name in ('distributed', 'coordinator', 'num_processes', 'process_id'):
        if values[name].present:
            raise UserError(f'--{name} is for a single run: a sweep has one process at a time.')
    if not values.workdir:
        raise UserError('no folder for the results: add --workdir sweeps/NAME.')
    terminal.set_up_log(values.quiet)
    workdir = terminal.path(values.workdir)
    given = config_flags.get_override_values(values['config'])
    settings = plan(values.config, parse_axes(values.config, values.sweep, given), workdir)
    arguments = [f'--config={config_flags.get_config_filename(values["config"])}']
    arguments += [f'--config.{field}={value}' for field, value in given.items() if field != 'seeds']
    arguments += [f'--{name}' for name in ('quiet', 'tensorboard') if values[name].value]
    failed = run(settings, arguments, lambda failed: write_tables(workdir, settings, failed))
    if not values.quiet:
        print(write_tables(workdir, settings, failed))
    lost = f'; {len(failed)} of its runs failed' if failed else ''
    print(f'The tables are in {workdir}: results.csv, results.md{lost}.')
    return 2 if failed else 0
