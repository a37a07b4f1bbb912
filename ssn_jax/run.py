"""A run's folder: what is in it, and who may write there."""

import csv
import dataclasses
import importlib.util
import io
import json
import pathlib
import re
import statistics

from absl import logging
import ml_collections

from ssn_jax import config as config_lib, data, devices, files, metrics, supervision
from ssn_jax.errors import UserError


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Where a run goes unless the user says otherwise."""
    where = 'embedded' if data.is_embedded(config.data) else config.data.name
    last = config.seed if config.seeds == 1 else 'seeds'
    category = data.category_of(config.data)
    if category != where:  # KolektorSDD2 is its own.
        where = f'{where}-{category}'
    return pathlib.Path('runs') / f'{config.name}-{where}-{last}'


def check_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises UserError if the run cannot start or resume in this folder; writes nothing."""
    files.check_folder(workdir, '--workdir')
    written = workdir / 'config.json'
    if written.exists():
        theirs, ours = (
            config_lib.identity(config_lib.from_json(written)),
            config_lib.identity(config),
        )
        different = sorted(field for field in ours if ours[field] != theirs[field])
        if different:
            raise UserError(
                f'{workdir} holds a run of another config (different: {", ".join(different)}; '
                f'{different[0]} is {theirs[different[0]]!r} there and {ours[different[0]]!r} '
                'here): give this one its own --workdir, or delete that folder.'
            )
    elif workdir.is_dir() and not all(files.is_draft(p) for p in workdir.iterdir()):
        raise UserError(f'{workdir} is not empty and holds no run: choose another --workdir.')


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file of the run, whole or not at all; of several processes the first one does."""
    if devices.is_first():
        files.write(path, text)


class Log:
    """train.csv: one row of losses per epoch, without gaps or doubles after a resume.

    With `events` the rows also go to TensorBoard event files in that folder, which are made anew
    from train.csv at every start.
    """

    def __init__(self, path: pathlib.Path, epochs_done: int, events: pathlib.Path | None = None):
        self.path = path
        self.events = _open_events(events) if events and devices.is_first() else None
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline='') as f:
                self.rows = [r for r in csv.DictReader(f) if int(r['epoch']) <= epochs_done]
        for row in self.rows:
            self._add_event(row)

    def append(self, epoch: int, values: dict[str, float]) -> None:
        """Adds an epoch's row and puts the file on disk."""
        self.rows.append({'epoch': str(epoch)} | {k: f'{v:.6g}' for k, v in values.items()})
        # An older version may have written other terms into the rows before.
        names, text = dict.fromkeys(name for row in self.rows for name in row), io.StringIO()
        table = csv.DictWriter(text, names, lineterminator='\n')
        table.writeheader()
        table.writerows(self.rows)
        write(self.path, text.getvalue())
        self._add_event(self.rows[-1])

    def _add_event(self, row: dict[str, str]) -> None:
        if self.events:
            values = {name: float(v) for name, v in row.items() if v and name != 'epoch'}
            _add_events(self.events, int(row['epoch']), 'train', values)

    def close(self, epoch: int, values: dict[str, float | None]) -> None:
        """Adds the metrics of an epoch to the event files and closes them."""
        if self.events:
            _add_events(self.events, epoch, 'test', values)
            self.events.close()

    def history(self) -> dict[str, list[float]]:
        """Columns by name."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        # What a row was written without is '', what was cut off it None, which is no number.
        each = {name: [row.get(name, '') for row in self.rows] for name in names}
        return {
            name: [float('nan' if value == '' else value) for value in column]
            for name, column in each.items()
        }


def open_log(workdir: pathlib.Path, epochs_done: int, events: bool) -> Log:
    """A run's `Log` after some epochs; with TensorBoard's event files if `events`.

    Raises:
      UserError: train.csv is damaged.
    """
    file = workdir / 'train.csv'
    try:
        log = Log(file, epochs_done, workdir / 'tensorboard' if events else None)
        epochs = [int(row['epoch']) for row in log.rows]
        if epochs != list(range(epochs_done + 1 - len(epochs), epochs_done + 1)):
            raise ValueError(f'epochs before {epochs_done} are missing')
        log.history()
    except (KeyError, ValueError, TypeError, csv.Error) as e:
        raise UserError(
            f'{file} is damaged ({e}): restore it, or delete it to go on without what it held.'
        ) from None
    return log


def require_tensorboard() -> None:
    """Raises UserError if the package that writes event files is missing."""
    if importlib.util.find_spec('tensorboardX') is None:
        raise UserError("--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'.")


def _open_events(folder: pathlib.Path):
    """A `tensorboardX.SummaryWriter` on a folder whose event files it replaces."""
    import tensorboardX

    for file in folder.glob('events.out.tfevents.*'):
        file.unlink()
    return tensorboardX.SummaryWriter(str(folder))


def _add_events(writer, epoch: int, group: str, values: dict[str, float | None]) -> None:
    """Writes an epoch's values, each as group/name, and puts them on disk."""
    for name, value in values.items():
        if value is not None:
            writer.add_scalar(f'{group}/{name}', value, epoch)
    writer.flush()


def begin_workdir(config, workdir, split, locks) -> None:
    """Locks a run's folder, and writes what it holds before the run trains."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if devices.is_first():
            locks.enter_context(files.locked(workdir))
            for path in filter(files.is_draft, workdir.rglob('*')):
                path.unlink()  # Of a process that was killed: whoever writes here has the lock.
        write(workdir / 'config.json', config_lib.to_json(config))
        if config.supervision.kind == 'masks':
            masked = json.dumps(supervision.masked_files(split), indent=2) + '\n'
            write(workdir / 'masked_images.json', masked)
    except OSError as e:
        raise UserError(
            f'{workdir} cannot be written ({e.strerror}): choose another --workdir.'
        ) from None


def runs_of(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[tuple[ml_collections.ConfigDict, pathlib.Path]]:
    """The config and workdir of each seed's run, as if it were the only one.

    Args:
      config: the user's; `seeds` runs from `seed` on.
      workdir: of the one run, or the folder of their workdirs, seed-N.

    Raises:
      UserError: there are several, and the folder holds something else.
    """
    if config.seeds == 1:
        return [(config, workdir)]
    _check_folder(workdir)
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        single = config.copy_and_resolve_references()
        single.seed, single.seeds = seed, 1
        runs.append((single, workdir / f'seed-{seed}'))
    return runs


def single_runs(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs of each seed's run in a folder that `runs_of` made; else the folder itself.

    Of a sweep those that have results: results.md beside them says what failed.
    """
    if (workdir / 'config.json').exists():
        return [workdir]
    swept = [path.parent for path in workdir.glob('*/seed-*/results.json')]
    return sorted(workdir.glob('seed-*')) or sorted(swept) or [workdir]


def _check_folder(workdir: pathlib.Path) -> None:
    if (workdir / 'config.json').exists():
        raise UserError(
            f'{workdir} holds a single run, and --config.seeds makes a folder for each of '
            'several: choose another --workdir.'
        )
    paths = workdir.iterdir() if workdir.is_dir() else []
    names = [p.name for p in paths if not files.is_draft(p)]
    other = [name for name in names if not re.fullmatch(r'seed-\d+|summary\.json', name)]
    if other:
        raise UserError(
            f'{workdir} holds something else than runs of several seeds ({min(other)}): choose '
            'another --workdir.'
        )


def other_results(
    runs: list[tuple[ml_collections.ConfigDict, pathlib.Path]], workdir: pathlib.Path
) -> list[dict]:
    """Results of complete runs in a folder beside those of `runs_of`, but for the seed the same."""
    config, own = config_lib.identity(runs[0][0]) | {'seed': None}, [path for _, path in runs]
    found = []
    for file in workdir.glob('seed-*/results.json'):
        if file.parent in own or not (file.parent / 'config.json').exists():
            continue
        try:
            theirs = config_lib.identity(config_lib.from_json(file.parent / 'config.json'))
            if theirs | {'seed': None} == config:
                results = json.loads(file.read_text())
                summarise([results, results])  # Has it everything?
                found.append(results)
        except (UserError, OSError, ValueError, KeyError, TypeError) as e:
            logging.warning(
                '%s cannot be read (%s): summary.json is without it; its own command, given again, '
                'writes it anew.',
                file,
                ' '.join(str(e).split()),
            )
    return found


def summarise(results: list[dict]) -> dict:
    """What summary.json holds, of several runs' results.

    Returns:
      config, data, category, embedded and epochs of all, `seeds`, and under `metrics` each
      metric's `mean`, `std` (of a sample) and `values` by seed; None where it is undefined.
    """
    results = sorted(results, key=lambda r: r['seed'])
    summary = {k: results[0][k] for k in ('config', 'data', 'category', 'embedded', 'epochs')}
    summary |= {'seeds': [r['seed'] for r in results], 'metrics': {}, 'undefined': {}}
    for name in metrics.METRICS:
        values = [r['metrics'][name] for r in results]
        if None in values:  # What is undefined follows from the test split, for all alike.
            summary['metrics'][name] = None
            summary['undefined'][name] = results[0]['undefined'][name]
            continue
        mean, std = statistics.fmean(values), statistics.stdev(values)
        summary['metrics'][name] = {'mean': mean, 'std': std, 'values': values}
    return summary


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """A run's config.

    Raises:
      UserError: the folder is no run, or one of a newer ssn_jax.
    """
    if not workdir.is_dir():
        raise UserError(f'{workdir} is no folder: --workdir names that of a run.')
    several = single_runs(workdir)
    if several != [workdir]:
        raise UserError(f'{workdir} holds several runs: name one, such as {several[0]}.')
    config = config_lib.from_json(workdir / 'config.json')
    config_lib.validate(config)
    return config


def _read(path):
    """A JSON file that may not be there yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read ({e}): repeat the command of the run.') from None


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      workdir: its folder.
      config: as config.json says.
      results: as results.json says.
      history: the columns of train.csv by name; {} for an imported checkpoint.
    """

    workdir: pathlib.Path
    config: ml_collections.ConfigDict
    results: dict
    history: dict[str, list[float]]


def read_run(workdir: pathlib.Path) -> Run:
    """Opens a run's folder; UserError if it is none, or has no results yet."""
    config = config_lib.from_json(workdir / 'config.json')
    path = workdir / 'results.json'
    try:
        results = json.loads(path.read_text())
        needed = ('data', 'category', 'embedded', 'seed', 'backbone', 'weights', 'metrics')
        needed += ('decision', 'train_masks', 'test_images', 'parameters', 'devices')
        missing = [name for name in needed if name not in results]
        missing += [name for name in metrics.METRICS if name not in results.get('metrics', {})]
        if missing:
            raise UserError(
                f'{path} lacks {missing[0]!r}, as one of an older ssn_jax does: the command of '
                'the run, given again, writes it anew.'
            )
        history = Log(workdir / 'train.csv', config.epochs).history()
    except FileNotFoundError:
        raise UserError(
            f'{workdir} holds no results.json: let the run finish, the same command resumes it.'
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f'{workdir} holds results that cannot be read ({e}): the command of the run, given '
            'again, writes them anew.'
        ) from None
    return Run(workdir, config, results, history)
