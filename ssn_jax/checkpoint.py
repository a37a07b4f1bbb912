"""Checkpoints with orbax: a bounded number, restored into the state's own structure."""

import pathlib

import jax
import orbax.checkpoint as ocp

from ssn_jax.errors import UserError


def open_manager(workdir: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints; a step is the number of epochs done."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager((workdir / 'checkpoints').absolute(), options=options)


def save(manager: ocp.CheckpointManager, epoch: int, state) -> None:
    """Writes the state after `epoch` epochs; it appears whole or not at all."""
    manager.save(epoch, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, state, epoch: int | None = None) -> tuple[int, object]:
    """The newest checkpoint's epoch and state, or epoch 0 and the given state if there is none.

    Args:
      manager: as `open_manager` returns it.
      state: arrays, or their shapes, in the structure that was saved.
      epoch: restore this epoch's checkpoint instead of the newest.

    Raises:
      UserError: the checkpoint does not fit the state's shapes or can not be read.
    """
    epoch = manager.latest_step() if epoch is None else epoch
    if epoch is None:
        return 0, state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
        return epoch, manager.restore(epoch, args=ocp.args.StandardRestore(abstract))
    except Exception as e:  # Orbax raises many kinds; each means that this step is of no use.
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(
            f'the checkpoint {manager.directory / str(epoch)} can not be restored ({reason}): '
            'delete that folder to resume from the one before it.'
        ) from None
