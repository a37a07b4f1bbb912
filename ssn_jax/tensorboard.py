"""TensorBoard event files, for runs that ask for them; a small writer of its own package."""

import importlib.util
import pathlib

from ssn_jax.errors import UserError


def require() -> None:
    """Raises UserError if the package that writes event files is missing."""
    if importlib.util.find_spec('tensorboardX') is None:
        raise UserError("--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'.")


def open_writer(folder: pathlib.Path):
    """A `tensorboardX.SummaryWriter` on a folder whose event files it replaces."""
    import tensorboardX

    for file in folder.glob('events.out.tfevents.*'):
        file.unlink()
    return tensorboardX.SummaryWriter(str(folder))


def add(writer, epoch: int, group: str, values: dict[str, float | None]) -> None:
    """Writes an epoch's values, each as group/name, and puts them on disk."""
    for name, value in values.items():
        if value is not None:
            writer.add_scalar(f'{group}/{name}', value, epoch)
    writer.flush()
