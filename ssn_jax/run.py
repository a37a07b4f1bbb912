"""A run's folder: what is in it, who may write there, and whether a command fits what it holds.

| file | content |
|---|---|
| config.json | what was asked for |
| found.json | what the run found for itself, in fields of the config |
| origin.json | fingerprints of data and weights, and the versions it began with |
| log.txt | what it said |
| train.csv | the losses, a row an epoch |
| checkpoints/ | what training goes on from |
| heads/ | the same of the heads that never saw a part of the images, until there are scores |
| model.safetensors | what inference needs: the backbone, and the network of the last checkpoint |
| scores.csv | scores of training images by heads that never saw them, and of test images |
| decision.json, results.json, figures/ | of the finished run |
"""

from collections.abc import Iterator, Sequence
import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import logging as py_logging
import os
import pathlib
import subprocess

from absl import logging
from flax import traverse_util
import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

from ssn_jax import (
    __version__,
    config as config_lib,
    data,
    decision,
    devices,
    files,
    metrics,
)
from ssn_jax.data import images
from ssn_jax.errors import UserError

_MODEL = 'model.safetensors'
_PACKAGE = str(pathlib.Path(__file__).parent) + os.sep


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Where a run goes unless the user says otherwise."""
    where = 'embedded' if data.is_embedded(config.data) else data.layout_of(config.data)
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
        # What a finished run infers in may change.
        theirs, ours = (
            config_lib.identity(c) | {'precision': config_lib.training_precision(c)}
            for c in (config_lib.from_json(written), config)
        )
        different = sorted(field for field in ours if ours[field] != theirs[field])
        if different:
            raise UserError(
                f'{workdir} holds a run of another config (different: {", ".join(different)}; '
                f'{different[0]} is {theirs[different[0]]!r} there and {ours[different[0]]!r} '
                'here): give this one its own --workdir, or delete that folder.'
            )
    elif workdir.is_dir() and not all(
        # The latter is written first, and a process can be killed then.
        files.is_draft(p) or p.name == 'found.json'
        for p in workdir.iterdir()
    ):
        raise UserError(f'{workdir} is not empty and holds no run: choose another --workdir.')


def single_runs(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs of each seed's run in a folder that `runs_of` made; else the folder itself.

    Of a sweep those that have results: results.md beside them says what failed.
    """
    if (workdir / 'config.json').exists():
        return [workdir]
    swept = [path.parent for path in workdir.glob('*/seed-*/results.json')]
    return sorted(workdir.glob('seed-*')) or sorted(swept) or [workdir]


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """A run's config, with what it has found for itself.

    Raises:
      UserError: the folder is no run, or one of a newer ssn_jax.
    """
    if not workdir.is_dir():
        raise UserError(f'{workdir} is no folder: --workdir names that of a run.')
    several = single_runs(workdir)
    if several != [workdir]:
        raise UserError(f'{workdir} holds several runs: name one, such as {several[0]}.')
    config = config_lib.from_json(workdir / 'config.json')
    config = config_lib.with_found(config, read_found(workdir) or {})
    config_lib.validate(config)
    return config


def with_white(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a run that has begun: if it found no range, white is that of 16 bits."""
    return config_lib.with_found(config, {'data.range': config.data.range or images.WHITE})


def read_found(workdir: pathlib.Path) -> dict | None:
    """The fields that a run has found for itself; None if it has not begun."""
    if not (workdir / 'config.json').exists():
        return None
    return read_json(workdir / 'found.json') or {}


def read_json(path: pathlib.Path) -> dict | None:
    """A JSON file of a run; None where it is not there yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read ({e}): repeat the command of the run.') from None


def read_scores(workdir: pathlib.Path) -> decision.Scores | None:
    """What scores.csv of a run holds; None if there is none.

    Raises:
      UserError: it is damaged.
    """
    path = workdir / 'scores.csv'
    try:
        return decision.Scores.from_csv(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'{path} cannot be read ({e}): delete it, and the command of the run makes it anew.'
        ) from None


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file of the run, whole or not at all; of several processes the first one does."""
    if devices.is_first():
        files.write(path, text)


# --- What it is made from -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run is made from besides its config, told by content and not by place.

    Attributes:
      data: SHA-256 of the data set's images and masks by split, 'train' and 'test'.
      backbone: of the frozen weights.
      weights: where those come from, one line.
      extends: SHA-256 of the model.safetensors of the run that it goes on from; '' if of none.
    """

    data: dict[str, str]
    backbone: str
    weights: str
    extends: str = ''


def read_origin(workdir: pathlib.Path) -> Origin | None:
    """What a run was made from; None if it has not begun."""
    written = read_json(workdir / 'origin.json')
    try:
        names = ('data', 'backbone', 'weights')
        return written and Origin(*(written[x] for x in names), written.get('extends', ''))
    except (KeyError, TypeError):
        raise UserError(f'{workdir / "origin.json"} is damaged: restore it.') from None


def weights_origin(workdir: pathlib.Path) -> str:
    """Where the backbone's weights of a run come from, one line."""
    if origin := read_origin(workdir):
        return origin.weights
    return (read_json(workdir / 'imported.json') or {}).get('weights', str(workdir / _MODEL))


def check_origin(workdir: pathlib.Path, origin: Origin, warn: bool = True) -> None:
    """Raises UserError if a run has begun with other training images or weights.

    Other test images are a warning: they change what is measured, and not what was learned.
    """
    began = read_origin(workdir)
    if began is None:
        imported = read_json(workdir / 'imported.json') or {}
        if imported.get('backbone') in (None, origin.backbone):
            return
        began = Origin(origin.data, imported['backbone'], imported['weights'])
    again = f'restore them, or give this run its own --workdir ({workdir} stays as it is).'
    if began.data['train'] != origin.data['train']:
        raise UserError(
            f'{workdir} holds a run of other training images or masks than those that '
            f'--config.data names now: {again}'
        )
    if began.backbone != origin.backbone:
        raise UserError(
            f'{workdir} holds a run on other backbone weights ({began.weights}) than '
            f'{origin.weights}: {again}'
        )
    if began.extends != origin.extends:
        raise UserError(
            f'{workdir} holds a run that went on from another one, or from none, or that one was '
            f'trained again since: {again}'
        )
    if warn and began.data['test'] != origin.data['test']:
        logging.warning(
            '%s was begun with other test images or masks: its results are of those that are there '
            'now.',
            workdir,
        )


def has_model(workdir: pathlib.Path) -> bool:
    """Whether there is a model.safetensors."""
    return (workdir / _MODEL).exists()


def model_digest(workdir: pathlib.Path) -> str:
    """The SHA-256 of a run's model.safetensors."""
    return files.digest(workdir / _MODEL)


def versions() -> dict[str, str]:
    """What computes: the versions of this package and of jax, and the commit of this code."""
    return {'ssn_jax': __version__, 'jax': jax.__version__, 'commit': commit()}


def commit() -> str:
    """The commit of this code, with '-dirty' if files differ from it; 'unknown' without git."""
    file = pathlib.Path(__file__)

    def git(*arguments):
        command = ['git', *arguments]
        return subprocess.run(command, cwd=file.parent, check=True, capture_output=True, text=True)

    try:
        git('ls-files', '--error-unmatch', file.name)  # The checkout around it may be another's.
        done = git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return done.stdout.strip()


# --- While it trains ------------------------------------------------------------------------------


def begin(
    config: ml_collections.ConfigDict,
    found: dict,
    workdir: pathlib.Path,
    origin: Origin,
    backbone: dict,
    said: Sequence[py_logging.LogRecord] = (),
) -> contextlib.ExitStack:
    """Locks a run's folder, writes what it holds before the run trains, and begins its log.

    Args:
      config: what was asked for.
      found: fields that the run has found for itself.
      workdir: the folder.
      origin: what the run is made from.
      backbone: the backbone's variables.
      said: what was logged before, as `remembered` has it.

    Returns:
      What ends the lock and the log.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if devices.is_first():
                stack.enter_context(files.locked(workdir))
                # Another one may have begun here while this one prepared its data.
                check_workdir(config, workdir)
                check_origin(workdir, origin, warn=False)
                for folder in (workdir, workdir / 'figures'):
                    for path in filter(files.is_draft, folder.glob('.*')):
                        path.unlink()  # Of a process that was killed: who writes has the lock.
            if found:
                write(workdir / 'found.json', json.dumps(found, indent=2) + '\n')
            write(workdir / 'config.json', config_lib.to_json(config))
            if not (workdir / 'origin.json').exists():
                values = dataclasses.asdict(origin) | versions()
                write(workdir / 'origin.json', json.dumps(values, indent=2) + '\n')
            if not has_model(workdir):
                write_model(workdir, Model(backbone))
            if devices.is_first():
                stack.enter_context(_logged(workdir / 'log.txt', said))
        except OSError as e:
            raise UserError(
                f'{workdir} cannot be written ({e.strerror}): choose another --workdir.'
            ) from None
        return stack.pop_all()


@contextlib.contextmanager
def remembered() -> Iterator[list[py_logging.LogRecord]]:
    """Within the block what is logged is collected, for a log that is opened later."""
    found = []
    handler = py_logging.Handler()
    handler.emit = found.append
    with _handling(handler):
        yield found


@contextlib.contextmanager
def _logged(path: pathlib.Path, said: Sequence[py_logging.LogRecord]) -> Iterator[None]:
    """Within the block what is logged is appended to a file too, after what was said before."""
    handler = py_logging.FileHandler(path)
    handler.setFormatter(py_logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    handler.handleError = lambda record: None  # A full disk is told by what must be written.
    with _handling(handler):
        for record in said:
            handler.handle(record)
        yield


@contextlib.contextmanager
def _handling(handler):
    handler.addFilter(_is_told)
    logger = logging.get_absl_logger()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _is_told(record: py_logging.LogRecord) -> bool:
    """Whether a message is this package's, or a library's warning."""
    # What orbax finds wrong with a checkpoint, `checkpoint.restore` tells.
    ours = record.pathname.startswith(_PACKAGE)
    return ours or (record.levelno >= py_logging.WARNING and 'orbax' not in record.pathname)


class Log:
    """train.csv: one row of losses per epoch, without gaps or doubles after a resume.

    With `events` the rows also go to TensorBoard event files in that folder, which are made anew
    from train.csv at every start.
    """

    def __init__(self, path: pathlib.Path, epochs_done: int, events: pathlib.Path | None = None):
        self.path, self.events = path, None
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline='') as f:
                self.rows = [r for r in csv.DictReader(f) if int(r['epoch']) <= epochs_done]
        if events and devices.is_first():
            self.history()  # Raises if it is damaged, before the old files are deleted.
            self.events = _open_events(events)
        for row in self.rows:
            self._show(row, 'train')

    def append(self, epoch: int, values: dict[str, float]) -> None:
        """Adds an epoch's row and puts the file on disk."""
        self.rows.append({'epoch': str(epoch)} | {k: f'{v:.6g}' for k, v in values.items()})
        # An older version may have written other terms into the rows before.
        names, text = dict.fromkeys(name for row in self.rows for name in row), io.StringIO()
        table = csv.DictWriter(text, names, lineterminator='\n')
        table.writeheader()
        table.writerows(self.rows)
        write(self.path, text.getvalue())
        self._show(self.rows[-1], 'train')

    def close(self, epoch: int, values: dict[str, float | None]) -> None:
        """Adds the metrics of an epoch to the event files and closes them."""
        self._show({'epoch': epoch} | values, 'test')
        if self.events:
            self.events.close()

    def _show(self, row: dict, group: str) -> None:
        """Adds an epoch's values to the event files, each as group/name, and puts them on disk."""
        if not self.events:
            return
        for name, value in row.items():
            if name != 'epoch' and value not in ('', None):
                self.events.add_scalar(f'{group}/{name}', float(value), int(row['epoch']))
        self.events.flush()

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


# --- What it has learned, and its results ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """What inference needs, as model.safetensors holds it.

    Attributes:
      backbone: the backbone's parameters and statistics.
      network: the trained network's; None before the first checkpoint.
      epoch: how many epochs it had been trained.
    """

    backbone: dict
    network: dict | None = None
    epoch: int = 0


def write_model(workdir: pathlib.Path, model: Model) -> None:
    """Writes model.safetensors; of several processes the first one does.

    Results and a decision on another model are deleted before: they are none of this one's.

    Raises:
      UserError: it cannot be written.
    """
    parts = {'backbone': model.backbone} | ({'network': model.network} if model.network else {})
    flat = traverse_util.flatten_dict(parts, sep='/')
    arrays = {
        # Of an array that is on several devices any one holds all of it. What is not contiguous
        # (ported weights are transposed) safetensors would write in the order of its memory.
        name: np.ascontiguousarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)
        for name, x in flat.items()
    }
    if not devices.is_first():
        return
    try:
        content = safetensors.numpy.save(arrays, {'epoch': str(model.epoch)})
        if has_model(workdir) and model_digest(workdir) == hashlib.sha256(content).hexdigest():
            return
        for name in ('results.json', 'decision.json', 'scores.csv', 'int8.xml', 'int8.bin'):
            (workdir / name).unlink(missing_ok=True)
        files.write(workdir / _MODEL, content)
    except OSError as e:
        raise UserError(
            f'{workdir / _MODEL} cannot be written ({e.strerror}): see to it, then the same '
            'command goes on from the last checkpoint.'
        ) from None


def read_model(workdir: pathlib.Path, verified: bool = True) -> Model:
    """Reads model.safetensors; if `verified`, its SHA-256 must be that of results.json.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / _MODEL
    expected = verified and (read_json(workdir / 'results.json') or {}).get('model_sha256')
    try:
        if expected and files.digest(path) != expected:
            raise ValueError('its SHA-256 is not that of results.json')
        with safetensors.safe_open(path, 'numpy') as file:
            epoch = int(file.metadata()['epoch'])
            flat = {tuple(name.split('/')): file.get_tensor(name) for name in file.keys()}
        parts = traverse_util.unflatten_dict(flat)
        return Model(parts['backbone'], parts.get('network'), epoch)
    except FileNotFoundError:
        raise UserError(
            f'{path} does not exist: the command that trained this run writes it anew.'
        ) from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'{path} is damaged ({str(e).splitlines()[0]}): delete it, and the command that '
            'trained this run writes it anew.'
        ) from None


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
    config = config_lib.with_found(
        config_lib.from_json(workdir / 'config.json'), read_found(workdir) or {}
    )
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
