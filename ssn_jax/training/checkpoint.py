"""Checkpoints with orbax: a bounded number, with checksums, restored into the state's structure."""

import hashlib
import json
import pathlib
import shutil

from absl import logging
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from ssn_jax import devices
from ssn_jax.errors import UserError
from ssn_jax.models import backbones
from ssn_jax.training import steps


def open_manager(workdir: pathlib.Path, keep: int, writes: bool = False) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints; a step is the number of epochs done.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints to keep.
      writes: whether it is the run itself, which removes what was half-written when it was killed.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=writes
    )
    return ocp.CheckpointManager(
        (workdir / 'checkpoints').absolute(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def save(manager: ocp.CheckpointManager, epoch: int, state) -> None:
    """Writes the state after `epoch` epochs, and its checksum; it appears whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    try:
        manager.save(
            epoch, args=ocp.args.StandardSave(state), custom_metadata={'sha256': digest(state)}
        )
        manager.wait_until_finished()
    except Exception as e:  # Orbax raises many kinds.
        for half in pathlib.Path(manager.directory).glob(f'{epoch}.orbax-checkpoint-tmp*'):
            shutil.rmtree(half, ignore_errors=True)
        raise UserError(
            f'the checkpoint {manager.directory / str(epoch)} cannot be written ({_reason(e)}): '
            'see to it, then the same command goes on from the last one.'
        ) from None


def restore(manager: ocp.CheckpointManager, state, epoch: int | None = None) -> tuple[int, object]:
    """The newest checkpoint's epoch and state, or epoch 0 and the given state if there is none.

    Args:
      manager: as `open_manager` returns it.
      state: arrays, or their shapes, in the structure that was saved.
      epoch: restore this epoch's checkpoint instead of the newest that can be.

    Raises:
      UserError: no checkpoint fits the state's shapes and its own checksum.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    epochs = sorted(manager.all_steps(), reverse=True) if epoch is None else [epoch]
    problems = []
    for number in epochs:
        if problems:
            logging.warning('%s: going on from the one before it.', problems[-1])
        try:
            return number, _restore(manager, number, abstract)
        except Exception as e:  # Orbax raises many kinds; each means that this one is of no use.
            folder = manager.directory / str(number)
            problems.append(f'the checkpoint {folder} cannot be restored ({_reason(e)})')
    if not problems:
        return 0, state
    instead = 'choose another one' if epoch else 'there is none before it; delete it to begin anew'
    raise UserError(f'{problems[-1]}: {instead}.')


def set_aside(manager: ocp.CheckpointManager, epoch: int) -> None:
    """Renames the checkpoints after `epoch`, which could not be restored, to N.damaged.

    They would be in the way of those that are still to be written.
    """
    unusable = [number for number in manager.all_steps() if number > epoch]
    for later in unusable:
        folder = pathlib.Path(manager.directory) / str(later)
        if devices.is_first():
            damaged = folder.with_name(f'{later}.damaged')
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
        devices.wait_for_all(f'set aside {later}')
    if unusable:
        manager.reload()


def read_variables(workdir: pathlib.Path, config: ml_collections.ConfigDict, epoch: int) -> dict:
    """The network's variables at one of a run's checkpoints.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    known = [p.name for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit()]
    if str(epoch) not in known:
        known = ', '.join(sorted(known, key=int)) or 'none'
        raise UserError(f'{workdir} holds no checkpoint of epoch {epoch}: it has {known}.')
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)
    # Shapes are enough for a template.
    template = jax.eval_shape(
        lambda: steps.init_state(config, jax.random.key(config.seed), channels)
    )
    _, state = restore(open_manager(workdir, config.checkpoint.keep), template, epoch)
    return state.variables(config.supervision.known)


def digest(state) -> str:
    """The SHA-256 of a tree's arrays, their types and shapes."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(state):
        x = np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)
        found.update(f'{x.dtype} {x.shape};'.encode())
        found.update(np.ascontiguousarray(x).data)
    return found.hexdigest()


def _restore(manager, epoch, abstract):
    """A checkpoint's state, verified; those of older versions have no checksum."""
    # By hand, since orbax logs what is wrong with it as an error of its own.
    described = pathlib.Path(manager.directory, str(epoch), '_CHECKPOINT_METADATA').read_text()
    expected = (json.loads(described)['custom_metadata'] or {}).get('sha256')
    state = manager.restore(epoch, args=ocp.args.StandardRestore(abstract))
    if expected not in (None, digest(state)):
        raise ValueError('its content is not what was written: the checksum differs')
    return state


def _reason(error: Exception) -> str:
    if 'No space left' in str(error):
        return 'no space left'
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
