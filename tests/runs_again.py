"""The same small training as often as needed, and whether two of them ended alike."""

import csv
import json
import time

import commands
import jax
import numpy as np
import tiny

from ssn_jax import run as run_lib
from ssn_jax.training import checkpoint, steps

EPOCHS = 4


class Job:
    """The same small training as often as needed; runs differ in their workdir alone."""

    def __init__(self, folder, **data):
        self.folder = folder
        tiny.write_data(folder / 'data', **data)
        tiny.write_weights(folder / 'w.safetensors')

    def start(self, workdir, *flags):
        arguments = {
            'config': commands.ROOT / 'configs' / 'mod2.py',
            'workdir': workdir,
            'config.data.root': self.folder / 'data',
            'config.data.category': 'nut',
            'config.data.cache': self.folder / 'cache',
            'config.backbone.weights': self.folder / 'w.safetensors',
            'config.image_size': '(32, 32)',
            'config.batch_size': 3,
            'config.epochs': EPOCHS,
            'config.checkpoint.every': 1,
            'config.sparse': False,  # Compiles in half the time.
        }
        arguments |= dict(flag[2:].split('=', 1) for flag in flags)
        return commands.start(
            'main',
            *(f'--{name}={value}' for name, value in arguments.items()),
            cwd=self.folder,
        )

    def finish(self, workdir, *flags):
        """Runs to the end, which must be a good one; what was logged."""
        command = self.start(workdir, *flags)
        assert command.end() == 0, command.err[-3000:]
        return command.err


def rows(workdir):
    """The rows of train.csv as text, without how long they took; [] before the first."""
    if not (workdir / 'train.csv').exists():
        return []
    with (workdir / 'train.csv').open(newline='') as file:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(file)]


def last_state(workdir):
    """Epoch and state of the newest checkpoint, read as any command reads it."""
    config = run_lib.read_config(workdir)
    template = jax.eval_shape(lambda: steps.init_state(config, jax.random.key(0), 384))
    return checkpoint.restore(checkpoint.open_manager(workdir, 2), template)


def results(workdir):
    """results.json without what the clock says."""
    content = json.loads((workdir / 'results.json').read_text())
    return {name: value for name, value in content.items() if 'seconds' not in name}


def check_same(workdir, whole):
    """Both runs are complete, and their parameters, losses and results have the same bits."""
    assert rows(workdir) == rows(whole)
    assert [row['epoch'] for row in rows(workdir)] == [str(i + 1) for i in range(EPOCHS)]
    (epoch, state), (_, expected) = last_state(workdir), last_state(whole)
    assert epoch == EPOCHS
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    assert results(workdir) == results(whole)
    names = {p.relative_to(workdir).as_posix() for p in workdir.glob('*')}
    assert names == {p.relative_to(whole).as_posix() for p in whole.glob('*')}
    assert not list((workdir / 'checkpoints').glob('*tmp*'))


def wait_for(reached, workdir, command, seconds=120):
    """Waits until `reached(workdir)` holds of a command that is still running."""
    deadline = time.time() + seconds
    while not reached(workdir):
        assert command.process.is_alive(), command.err[-3000:]
        assert time.time() < deadline, command.err[-3000:]
        time.sleep(0.002)


# How to tell where a run is, from what is in its folder, and about how many seconds it is there.
PHASES = {
    'features': (lambda w: (w / 'config.json').exists(), 1),
    'an epoch': (lambda w: len(rows(w)) >= 1, 0.2),
    'a checkpoint': (lambda w: list(w.glob('checkpoints/*.orbax-checkpoint-tmp*')), 0.02),
    'heads': (lambda w: (w / 'heads').exists(), 0.3),
    'results': (lambda w: (w / 'figures').exists(), 0.02),
}
