"""The epochs of one run, or of several that differ in their seed alone."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
import traceback

from absl import logging
import jax
import ml_collections
import numpy as np
import tqdm

from ssn_jax import config as config_lib, devices, run as run_lib, signals
from ssn_jax.data import augment, sampling
from ssn_jax.errors import UserError
from ssn_jax.fused import fold
from ssn_jax.models import backbones
from ssn_jax.training import checkpoint, features, parts, steps

# How many drawn defects are learnt, and in how many steps, by the product's angle: there are more
# images of it where that may be any.
_DRAWN = {'same': 2500, 'any': 7500}
_STEPS = {'same': 1500, 'any': 6000}
# What is drawn counts as so many real defects.
_DRAWN_COUNT_AS = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is to be trained.

    Attributes:
      config: the run's.
      folder: where its checkpoints are.
      open_log: from the number of epochs behind it to what its epochs are told (`append`).
      keep_model: is told the epoch and the network's variables of every checkpoint.
      parts: of the training images, for each of which a head is wanted that never saw it.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    open_log: Callable
    keep_model: Callable
    parts: Sequence[np.ndarray] = ()


def train(jobs, split, network, backbone_variables, quiet=False):
    """Runs the epochs that are missing, and then trains the heads of the parts.

    Returns:
      Of each run its final state, its log, and the variables of its parts' heads.
    """
    config = jobs[0].config
    shown = augment.Shown(config, split)
    mesh = devices.make_mesh(sampling.image_order(config, shown.labels, shown.real)(0).shape[1])
    starts = [find_start(job, mesh) for job in jobs]
    states = [start.state for start in starts]
    missing = sorted({start.done for start in starts} - {config.epochs})
    if missing or any(job.parts for job in jobs):
        backbone = fold.fuse_backbone(backbone_variables)
        on_host = features.keep_on_host(config, shown, network, backbone, mesh)
        with naming_nans(config):
            contents = features.training_data(
                config, shown, network, backbone, mesh, on_host, jobs[0].folder
            )
    # A kill between two seeds' checkpoints leaves seeds at different epochs: those of the same
    # go on together.
    for done in missing:
        members = [i for i, start in enumerate(starts) if start.done == done]
        together = [starts[i] for i in members]
        trained = train_together(together, shown, contents, mesh, on_host, quiet)
        for i, state in zip(members, trained, strict=True):
            states[i] = state
    heads = []
    for job, state in zip(jobs, devices.take_local(mesh, states), strict=True):
        with naming_nans(job.config):
            total = int(state.step)
            heads.append(job.parts and parts.train(job, total, shown, contents, mesh, on_host))
    logs = [start.log for start in starts]
    return list(zip(devices.take_local(mesh, states), logs, heads, strict=True))


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
      job: the run.
      done: epochs that it has behind it.
      state: after them.
      manager: of its checkpoints.
      log: its train.csv.
      key: the epochs' keys follow from it.
    """

    job: Job
    done: int
    state: steps.TrainState
    manager: object
    log: object
    key: jax.Array


def find_start(job, mesh) -> Start:
    """A run's newest checkpoint, or its beginning: that of the run that it extends, if any."""
    config = job.config
    k_init, k_epochs = jax.random.split(jax.random.key(config.seed))
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)

    def fresh(config):
        # As one program: each of its operations would be compiled by itself.
        state = jax.jit(lambda key: steps.init_state(config, key, channels))(k_init)
        return devices.put(mesh, state)

    manager = checkpoint.open_manager(job.folder, config.checkpoint.keep, writes=True)
    done, state = checkpoint.restore(manager, fresh(config))
    if done:
        logging.info('Resuming %s after epoch %d', job.folder, done)
        checkpoint.set_aside(manager, done)
    elif config.extend:
        extended = pathlib.Path(config.extend)
        known = run_lib.read_config(extended).supervision.known
        theirs = config_lib.with_found(config, {'supervision.known': known})
        checkpoints = checkpoint.open_manager(extended, config.checkpoint.keep)
        done, before = checkpoint.restore(checkpoints, fresh(theirs))
        if not done:
            raise UserError(f'{config.extend} has no checkpoint to go on from: restore it.')
        state = steps.going_on(state, before)
        logging.info('Going on from epoch %d of %s', done, config.extend)
    return Start(job, done, state, manager, job.open_log(done), k_epochs)


def train_together(starts, shown, contents, mesh, on_host, quiet):
    """Trains runs that differ in their seed alone from the same epoch on; their last states."""
    config, several = starts[0].job.config, len(starts)
    orders = [sampling.image_order(start.job.config, shown.labels, shown.real) for start in starts]
    per_epoch = len(orders[0](0))
    # Of the steps, those of the run that this one goes on from: its epochs may have been shorter.
    begun = 0
    if config.extend:
        own = (starts[0].done - config.epochs_before) * per_epoch
        begun = int(devices.take_local(mesh, starts[0].state).step) - own
    run_epoch = steps.make_epoch(config, per_epoch, mesh, several > 1, on_host, begun=begun)
    logging.info('%d images, %d steps per epoch', len(shown), per_epoch)
    state = devices.put(mesh, steps.stack_states([start.state for start in starts]))
    done = saved = starts[0].done

    def train_epoch(epoch):
        keys = steps.stack([jax.random.fold_in(start.key, epoch) for start in starts])
        order = steps.stack([next_order(epoch - 1) for next_order in orders])
        # Looking for a NaN goes through the epoch operation by operation, on the host.
        guard = 'allow' if config.debug_nans else 'disallow'
        keys, order = devices.put(mesh, keys), np.asarray(order)
        with jax.transfer_guard(guard), naming_nans(config):
            return run_epoch(state, contents, order, keys)

    def save():
        """Writes the checkpoints of the last epoch that is done, if they are not; its number."""
        nonlocal saved
        if saved < done:
            for start, one in zip(starts, steps.unstack_states(state, several), strict=True):
                checkpoint.save(start.manager, done, one)
                start.job.keep_model(done, one.variables(config.supervision.known))
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
                each = steps.unstack(values, several)
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
    return steps.unstack_states(state, several)


def how_to_go_on(starts, epoch) -> str:
    """What a training says that is stopped with checkpoints of this epoch, 0 for none."""
    if not epoch:
        return 'nothing is saved yet, the same command begins anew.'
    folder = starts[0].manager.directory.parent
    folder = folder if len(starts) == 1 else folder.parent
    return f'epoch {epoch} is saved in {folder}, the same command goes on from there.'


def check_finite(start, epoch, per_epoch, bad, save) -> None:
    """Saves the state before an epoch and raises UserError if something of it was not finite."""
    found = describe_bad(bad)
    if not found:
        return
    step, what = found
    saved = save()
    last = f'the last good checkpoint is {start.manager.directory / str(saved)}'
    if not saved:
        last = 'no epoch before it was complete'
    seed = start.job.config.seed
    raise UserError(
        f'epoch {epoch}, step {step + 1} of {per_epoch} (seed {seed}): {what} became NaN or '
        f'infinite; {last}. The same command with --config.debug_nans=True finds the '
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
        ours = str(pathlib.Path(__file__).parents[1])
        places = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(ours)]
        where = f'{places[-1].filename}, line {places[-1].lineno}: {places[-1].line}'
        raise UserError(f'{str(e).splitlines()[0]} ({where})') from None


def find_lessons(config, split) -> dict[str, float]:
    """How much is drawn, for how long, and what known defects count, where -1 or 0 asks for it."""
    found, config = {}, config.copy_and_resolve_references()
    if config.supervision.known < 0 and (defects := int(split.labels.sum())):
        found['supervision.known'] = defects / (defects + _DRAWN_COUNT_AS)
        logging.info('Found: --config.supervision.known=%.2g', found['supervision.known'])
    if config.drawn.count < 0:
        config.drawn.count = found['drawn.count'] = _DRAWN[config.product.angle]
        logging.info('Found: --config.drawn.count=%d', config.drawn.count)
    if not config.epochs:
        shown = augment.Shown(config, split)
        per_epoch = len(sampling.image_order(config, shown.labels, shown.real)(0))
        found['epochs'] = max(1, round(_STEPS[config.product.angle] / per_epoch))
        logging.info('Found: --config.epochs=%d, of %d steps each', found['epochs'], per_epoch)
    return found


def describe_bad(bad: dict[str, int]) -> tuple[int, str] | None:
    """The first bad step, from an epoch's `metrics['bad']`, and what was bad; None for none."""
    step = min(bad.values())
    if step == steps.NEVER:
        return None
    names = [name for name, first in bad.items() if first == step]
    # A bad term makes its sums and gradients bad too.
    terms = [name for name in names if name not in ('loss', 'generator_loss', 'gradients')]
    sums = [name for name in names if name != 'gradients']
    named = terms or sums[:1]
    return int(step), f'the loss ({", ".join(named)})' if named else 'a gradient of the loss'
