"""The main job: `train_and_evaluate(config, workdir)`, from records to results."""

from collections.abc import Iterator
import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import sys
import time
import traceback

from absl import logging
import jax
import ml_collections
import numpy as np
import tqdm

from ssn_jax import (
    checkpoint,
    config as config_lib,
    data,
    decision,
    deploy,
    devices,
    evaluate,
    files,
    metrics,
    sampling,
    seeds,
    signals,
    steps,
    supervision,
    tensorboard,
    weights,
)
from ssn_jax.errors import UserError
from ssn_jax.models import backbones, features as features_lib


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
        self.events = tensorboard.open_writer(events) if events and devices.is_first() else None
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
            tensorboard.add(self.events, int(row['epoch']), 'train', values)

    def close(self, epoch: int, values: dict[str, float | None]) -> None:
        """Adds the metrics of an epoch to the event files and closes them."""
        if self.events:
            tensorboard.add(self.events, epoch, 'test', values)
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


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    events: bool = False,
    quiet: bool = False,
) -> dict:
    """Trains a config to its last epoch, or resumes it, and measures it there.

    Args:
      config: as `config.default_config` describes it.
      workdir: receives config.json, train.csv, checkpoints/, results.json and figures/; with
        several seeds (`config.seeds`) a folder seed-N for each that does, and summary.json.
      events: whether to write TensorBoard event files to tensorboard/ too.
      quiet: shows no progress bar.

    Returns:
      What results.json holds; of several seeds, what summary.json does.

    Raises:
      UserError: the config, the data, the weights or the workdir are of no use, or something
        became NaN or infinite.
    """
    config_lib.validate(config)
    if data.is_embedded(config.data):
        config = weights.with_trained_backbone(config)
    runs = seeds.runs_of(config, workdir)
    for run in runs:
        check_workdir(*run)
    if events:
        tensorboard.require()
    dataset = data.load(config.data, config.image_size, config.resize)
    rest, held_out = supervision.hold_out(config, dataset.train)
    split = supervision.training_split(config, rest)
    if config.supervision.kind != 'none':
        logging.info(
            'Supervision: %d defective training images, %d of them with their mask',
            split.labels.sum(),
            len(supervision.masked_files(split)),
        )
    if dataset.embedded:
        logging.warning(
            'No --config.data.root: this run uses the embedded, procedurally drawn %s images. '
            'Its figures say nothing about a real data set.',
            dataset.category,
        )
    backbone_variables, origin = weights.load_backbone(
        config.backbone.name, config.backbone.weights, allow_random=dataset.embedded
    )
    logging.info('Backbone %s, weights: %s', config.backbone.name, origin)

    devices.wait_for_all('workdir checked')  # Before the first one writes there.
    network = steps.build_network(config)
    with contextlib.ExitStack() as locks:
        for run in runs:
            begin_workdir(*run, split, locks)
        trained = train(runs, split, network, backbone_variables, events, quiet)
        predict = evaluate.make_predictor(network, config.eval_batch_size, config.precision)

        def measure_run(run, state, log):
            variables = backbone_variables, state.variables()
            return measure(*run, dataset, split, held_out, predict, variables, origin, log)

        results = [measure_run(run, *after) for run, after in zip(runs, trained, strict=True)]
        if config.seeds == 1:
            return results[0]
        summary = seeds.summarise(results + seeds.other_results(runs, workdir))
        write(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary


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


def measure(config, workdir, dataset, split, held_out, predict, variables, origin, log) -> dict:
    """Evaluates a trained run, chooses its threshold and writes both with figures; its results."""
    maps, scores = predict(*variables, dataset.test.images)
    values, reasons = evaluate.evaluate(maps, scores, dataset.test)
    log.close(config.epochs, values)

    def scores_of(images):
        return evaluate.predict_scores(predict, *variables, images=images)

    chosen = decision.decide(config, scores_of, split, held_out)
    if chosen['threshold'] is not None:
        on_test = decision.rates(scores, dataset.test.labels, chosen['threshold'])
        chosen |= {f'test_{name}': value for name, value in on_test.items()}

    history = log.history()
    seconds = history.get('seconds')  # An imported checkpoint was not trained here.
    results = {
        'config': config.name,
        'data': dataset.name,
        'category': dataset.category,
        'embedded': dataset.embedded,
        'seed': config.seed,
        'epochs': config.epochs,
        'backbone': config.backbone.name,
        'weights': origin,
        'metrics': values,
        'undefined': reasons,
        'decision': chosen,
        'supervision': config.supervision.kind,
        'train_images': len(split.labels),
        'train_defects': int(split.labels.sum()),
        'train_masks': len(supervision.masked_files(split)),
        'test_images': len(dataset.test.labels),
        'parameters': sum(count(v['params']) for v in variables),
        'train_seconds': round(sum(seconds), 1) if seconds else None,
        'loss_grew': loss_grew(history),
        # The first epoch after a start compiles: the median leaves it out.
        'seconds_per_epoch': round(float(np.median(seconds)), 2) if seconds else None,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    }
    if values['I-AUROC'] is not None:
        # As the publication chose it: on the images that it is then measured on.
        results['youden_on_test'] = metrics.youden(scores, dataset.test.labels)
    if devices.is_first():
        draw_figures(workdir / 'figures', results, dataset.test, maps, scores, log)
    write(workdir / 'decision.json', json.dumps(chosen, indent=2) + '\n')
    write(workdir / 'results.json', json.dumps(results, indent=2) + '\n')
    return results


def loss_grew(history: dict[str, list[float]]) -> bool | None:
    """Tells whether the loss ended at more than twice what it began at; None without a history."""
    if not history.get('loss'):
        return None
    first, last = history['loss'][0], history['loss'][-1]
    if last > 2 * first:
        logging.warning(
            'The loss grew from %.4g to %.4g: the training may have diverged.', first, last
        )
    return last > 2 * first


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
      config: of the run.
      done: epochs that it has behind it.
      state: after them.
      manager: of its checkpoints.
      log: its train.csv.
      key: the epochs' keys follow from it.
    """

    config: ml_collections.ConfigDict
    done: int
    state: steps.TrainState
    manager: object
    log: Log
    key: jax.Array


def train(runs, split, network, backbone_variables, events=False, quiet=False):
    """Runs the epochs that are missing; returns each run's final state and its log."""
    config, _ = runs[0]
    labels = supervision.shown_labels(config, split.labels)
    mesh = devices.make_mesh(image_order(config, labels)(0).shape[1])
    starts = [find_start(*run, mesh, events) for run in runs]
    states = [start.state for start in starts]
    missing = sorted({start.done for start in starts} - {config.epochs})
    if missing:
        split = supervision.shown(config, split)
        backbone = deploy.prepare_backbone(deploy.fuse_backbone(backbone_variables))
        on_host = keep_on_host(config, split, network, backbone, mesh)
        with naming_nans(config):
            contents = training_data(config, split, network, backbone, mesh, on_host)
    del split  # Its copies of the images take as much memory as a part of the features.
    # A kill between two seeds' checkpoints leaves seeds at different epochs: those of the same
    # go on together.
    for done in missing:
        members = [i for i, start in enumerate(starts) if start.done == done]
        together = [starts[i] for i in members]
        trained = train_together(together, labels, contents, mesh, on_host, quiet)
        for i, state in zip(members, trained, strict=True):
            states[i] = state
    logs = [start.log for start in starts]
    return list(zip(devices.take_local(mesh, states), logs, strict=True))


def find_start(config, workdir, mesh, events) -> Start:
    """A run's newest checkpoint, or its beginning."""
    k_init, k_epochs = jax.random.split(jax.random.key(config.seed))
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)
    # As one program: each of its operations would be compiled by itself.
    state = jax.jit(lambda key: steps.init_state(config, key, channels))(k_init)
    manager = checkpoint.open_manager(workdir, config.checkpoint.keep, writes=True)
    done, state = checkpoint.restore(manager, devices.put(mesh, state))
    if done:
        logging.info('Resuming %s after epoch %d', workdir, done)
        checkpoint.set_aside(manager, done)
    file = workdir / 'train.csv'
    try:
        log = Log(file, done, workdir / 'tensorboard' if events else None)
        epochs = [int(row['epoch']) for row in log.rows]
        if epochs != list(range(done + 1 - len(epochs), done + 1)):
            raise ValueError(f'epochs before {done} are missing')
        log.history()
    except (KeyError, ValueError, TypeError, csv.Error) as e:
        raise UserError(
            f'{file} is damaged ({e}): restore it, or delete it to go on without what it held.'
        ) from None
    return Start(config, done, state, manager, log, k_epochs)


def train_together(starts, labels, contents, mesh, on_host, quiet):
    """Trains runs that differ in their seed alone from the same epoch on; their last states."""
    config, several = starts[0].config, len(starts)
    orders = [image_order(start.config, labels) for start in starts]
    per_epoch = len(orders[0](0))
    run_epoch = steps.make_epoch(config, per_epoch, mesh, several > 1, on_host)
    logging.info('%d images, %d steps per epoch', len(labels), per_epoch)
    state = devices.put(mesh, seeds.stack_states([start.state for start in starts]))
    done = saved = starts[0].done

    def train_epoch(epoch):
        keys = seeds.stack([jax.random.fold_in(start.key, epoch) for start in starts])
        order = seeds.stack([next_order(epoch - 1) for next_order in orders])
        # Looking for a NaN goes through the epoch operation by operation, on the host.
        guard = 'allow' if config.debug_nans else 'disallow'
        keys, order = devices.put(mesh, keys), np.asarray(order)
        with jax.transfer_guard(guard), naming_nans(config):
            return run_epoch(state, contents, order, keys)

    def save():
        """Writes the checkpoints of the last epoch that is done, if they are not; its number."""
        nonlocal saved
        if saved < done:
            for start, one in zip(starts, seeds.unstack_states(state, several), strict=True):
                checkpoint.save(start.manager, done, one)
            saved = done
        return saved

    epochs = range(done + 1, config.epochs + 1)
    shown, last = not quiet and devices.is_first(), config.epochs
    # A bar is for a terminal; a log file gets a line an epoch.
    bar = shown and sys.stderr.isatty()
    progress = tqdm.tqdm(epochs, 'epoch', initial=done, total=last, disable=not bar)
    with signals.held() as wait:
        try:
            for epoch in progress:
                began = time.time()
                following, values = wait(functools.partial(train_epoch, epoch))
                each = seeds.unstack(values, several)
                for start, one in zip(starts, each, strict=True):
                    check_finite(start, epoch, per_epoch, one.pop('bad'), save)
                state, done = following, epoch
                each = [{name: float(v) for name, v in sorted(one.items())} for one in each]
                seconds = (time.time() - began) / several  # Of each: their sum is what it took.
                for start, one in zip(starts, each, strict=True):
                    start.log.append(epoch, one | {'seconds': seconds})
                if epoch % config.checkpoint.every == 0 or epoch == config.epochs:
                    save()
                loss = f'{np.mean([one["loss"] for one in each]):.4f}'
                progress.set_postfix(loss=loss)
                if shown and not bar:
                    logging.info('epoch %d of %d: loss %s', epoch, last, loss)
        except KeyboardInterrupt as e:
            problem = ''
            try:
                if devices.is_alone():  # Several processes can only write together.
                    save()
            except UserError as error:
                problem = f'error: {error} '
            raise type(e)(problem + how_to_go_on(starts, saved)) from None
    return seeds.unstack_states(state, several)


def how_to_go_on(starts, epoch) -> str:
    """What a training says that is stopped with checkpoints of this epoch, 0 for none."""
    if not epoch:
        return 'nothing is saved yet, the same command begins anew.'
    folder = starts[0].manager.directory.parent
    folder = folder if len(starts) == 1 else folder.parent
    return f'epoch {epoch} is saved in {folder}, the same command goes on from there.'


def check_finite(start, epoch, per_epoch, bad, save) -> None:
    """Saves the state before an epoch and raises UserError if something of it was not finite."""
    found = steps.describe_bad(bad)
    if not found:
        return
    step, what = found
    saved = save()
    last = f'the last good checkpoint is {start.manager.directory / str(saved)}'
    if not saved:
        last = 'no epoch before it was complete'
    raise UserError(
        f'epoch {epoch}, step {step + 1} of {per_epoch} (seed {start.config.seed}): {what} became '
        f'NaN or infinite; {last}. The same command with --config.debug_nans=True finds the '
        'operation.'
    )


@contextlib.contextmanager
def naming_nans(config) -> Iterator[None]:
    """With `config.debug_nans` a NaN or infinity is a UserError that names the operation."""
    if not config.debug_nans:
        yield
        return
    try:
        with jax.debug_nans(True), jax.debug_infs(True):
            yield
    except FloatingPointError as e:
        ours = os.path.dirname(__file__)
        places = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(ours)]
        where = f'{places[-1].filename}, line {places[-1].lineno}: {places[-1].line}'
        raise UserError(f'{str(e).splitlines()[0]} ({where})') from None


def image_order(config, labels):
    """`order(epoch)`: indices (steps, batch) into the training images, flips included."""
    total, defective = len(labels), int(labels.sum())
    if not defective:
        return lambda epoch: sampling.uniform_order(config.seed, epoch, total, config.batch_size)
    return lambda epoch: sampling.balanced_order(
        config.seed, epoch, total - defective, defective, config.batch_size
    )


def keep_on_host(config, split, network, backbone, mesh) -> bool:
    """Whether features stay on the host: as the config says, or as devices are too small."""
    several = jax.process_count() > 1
    if config.features.place != 'auto' or several:
        if config.features.place == 'host' and several:
            raise UserError(
                '--config.features.place=host is for one process: with several, each keeps its '
                'share of the features on its devices.'
            )
        return config.features.place == 'host'
    needed = features_lib.layers_bytes(
        deploy.backbone, backbone, split.images.shape, network.frozen, config.features.dtype
    )
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', math.inf)
    limit *= mesh.size if mesh else 1  # Which share them.
    # The other half is for a step's own arrays.
    if needed > limit / 2:
        logging.info(
            'Features of %.1f GB stay on the host: the devices have %.1f GB',
            needed / 1e9,
            limit / 1e9,
        )
    return needed > limit / 2


def training_data(config, split, network, backbone, mesh, on_host):
    """Everything that is trained on, as one batch: on the devices of the mesh, or on the host."""
    logging.info('%d images: their features are computed once', len(split.labels))
    layers = features_lib.extract_layers(
        functools.partial(deploy.backbone, precision=config.precision),
        backbone,
        split.images,
        frozen=network.frozen,
        mesh=mesh,
        dtype=config.features.dtype,
        to_host=on_host,
    )
    known, grid = {}, features_lib.feature_grid(layers)
    if split.labels.any():
        known = supervision.truth(config.supervision, split, grid)
    if config.product_share:
        known['product'] = supervision.product(split, grid)
    if not on_host:
        known = {k: devices.put_images(mesh, x) for k, x in known.items()}
    return {'layers': layers} | known


def count(params: dict) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def draw_figures(folder, results, split, maps, scores, log) -> None:
    """Overlays of the best and worst test images, loss curves, ROC, PR and histogram."""
    from ssn_jax import figures  # Matplotlib takes a second to import; only here is it needed.

    data_name = 'embedded data' if results['embedded'] else results['data']
    title = f'{results["config"]} · {results["category"]} ({data_name})'
    masks = np.where(split.has_mask[:, None, None], split.masks, 0)
    figures.overlays(
        folder / 'overlays.png',
        split.images,
        masks,
        decision.sigmoid(maps),
        decision.sigmoid(scores),
        split.labels,
        split.files,
        title,
    )
    curves = {name: column for name, column in log.history().items() if name != 'seconds'}
    if curves:
        figures.loss_curves(folder / 'losses.png', curves, title)
    if results['metrics']['I-AUROC'] is not None:
        figures.roc_curve(folder / 'roc.png', scores, split.labels, f'{title} · test split')
    if results['metrics']['AP-loc'] is not None:
        known = split.has_mask
        figures.pr_curve(folder / 'pixel_pr.png', maps[known], split.masks[known], title)
    threshold = results['decision']['threshold']
    figures.score_histogram(folder / 'scores.png', scores, split.labels, title, threshold)


def format_table(results: dict) -> str:
    """The seven metrics, or several seeds' summary of them, as a table for the terminal."""
    if 'seeds' in results:
        return seeds.format_summary(results)
    embedded = ', embedded data' if results['embedded'] else ''
    head = f'{results["config"]} on {results["data"]} {results["category"]}{embedded}'
    return '\n'.join(
        [
            f'{head}, {results["epochs"]} epochs, seed {results["seed"]}',
            *metric_lines(results['metrics'], results['undefined']),
            f'  {decision_line(results["decision"])}',
        ]
    )


def summary(workdir: pathlib.Path) -> str:
    """Where everything of a run is, in one line."""
    parts = {
        'results.json': 'metrics',
        'summary.json': 'mean and deviation of the metrics over the runs seed-*/',
        'decision.json': 'threshold',
        'train.csv': 'losses',
        'figures': 'pictures',
        'checkpoints': 'trained states',
        'tensorboard': 'event files',
    }
    there = [
        f'{name}{"/" * (workdir / name).is_dir()} ({what})'
        for name, what in parts.items()
        if (workdir / name).exists()
    ]
    return f'Everything is in {workdir}: {", ".join(there)}.'


def metric_lines(values: dict, undefined: dict, digits: int = 2) -> list[str]:
    """A line for each metric, in percent, or why it is undefined."""
    shown = {name: undefined.get(name) for name in metrics.METRICS}
    for name, value in values.items():
        if value is not None:
            shown[name] = f'{100 * value:{digits + 4}.{digits}f} %'
    return [f'  {name:12s} {text}' for name, text in shown.items()]


def decision_line(chosen: dict) -> str:
    """The decision and what it does on the test split, in words."""
    if chosen['threshold'] is None:
        return f'no threshold: {chosen["undefined"]}'
    text = f'defective from probability {decision.sigmoid(chosen["threshold"]):.4g} on'
    text += f' (logit {chosen["threshold"]:.4g}; {chosen["method"]}, chosen on: {chosen["split"]})'
    for name in ('tpr', 'fpr'):
        value = chosen[f'test_{name}']
        text += f', test {name.upper()} {"unknown" if value is None else f"{100 * value:.1f} %"}'
    return text
