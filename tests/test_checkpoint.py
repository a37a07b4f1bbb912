"""Checkpoints: bit-identical, bounded in number; a killed run ends as if it had not been."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssn_jax import checkpoint, config as config_lib, steps
from ssn_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
EPOCHS = 12


def make_state(kind, seed=0):
    """A train state of small features."""
    config = config_lib.default_config()
    config.noise.kind = kind
    return steps.init_state(config, jax.random.key(seed), 12)


def filled(state):
    """The same state with every number different from what it begins with."""
    rng = np.random.default_rng(0)

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return x + 7
        return jnp.asarray(rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(fill, state)


def same(a, b):
    """Whether two trees have the same structure, types and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


@pytest.mark.parametrize('kind', ['static', 'learned'])
def test_restored_state_is_bit_identical(kind, tmp_path):
    state = filled(make_state(kind))
    checkpoint.save(checkpoint.open_manager(tmp_path, 2), 5, state)
    epoch, restored = checkpoint.restore(checkpoint.open_manager(tmp_path, 2), make_state(kind, 1))
    assert epoch == 5
    assert same(state, restored)
    assert not same(make_state(kind), restored)


def test_without_a_checkpoint_the_given_state_comes_back(tmp_path):
    state = make_state('static')
    epoch, restored = checkpoint.restore(checkpoint.open_manager(tmp_path, 2), state)
    assert epoch == 0 and same(state, restored)


@pytest.mark.parametrize('keep', [1, 2])
def test_only_the_newest_are_kept(keep, tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep)
    state = {'x': jnp.arange(3.0)}
    for epoch in range(1, 6):
        checkpoint.save(manager, epoch, jax.tree.map(lambda x, e=epoch: x + e, state))
    kept = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())
    assert kept == list(range(1, 6))[-keep:]
    epoch, restored = checkpoint.restore(checkpoint.open_manager(tmp_path, keep), state)
    assert epoch == 5
    np.testing.assert_array_equal(restored['x'], np.arange(3.0) + 5)


def test_checkpoint_of_another_model_is_one_line(tmp_path):
    checkpoint.save(checkpoint.open_manager(tmp_path, 2), 3, make_state('static'))
    with pytest.raises(UserError) as caught:
        checkpoint.restore(checkpoint.open_manager(tmp_path, 2), make_state('learned'))
    text = str(caught.value)
    assert '\n' not in text and str(tmp_path / 'checkpoints' / '3') in text


def test_damaged_checkpoint_is_one_line(tmp_path):
    state = make_state('static')
    checkpoint.save(checkpoint.open_manager(tmp_path, 2), 3, state)
    files = [p for p in (tmp_path / 'checkpoints' / '3').rglob('*') if p.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        checkpoint.restore(checkpoint.open_manager(tmp_path, 2), state)
    assert '\n' not in str(caught.value)


# A run that is killed


@pytest.fixture
def job(tmp_path):
    """Starts the main job on the tiny data set; runs differ in their workdir alone."""
    folder = tmp_path / 'job'
    tiny.write_data(folder / 'data')
    tiny.write_weights(folder / 'w.safetensors')

    # Compiled faster, and once for all runs.
    environment = {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_backend_optimization_level=1',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    }

    def start(workdir):
        return subprocess.Popen(
            [
                *(sys.executable, '-m', 'ssn_jax.main', '--config', 'configs/mod2.py'),
                f'--workdir={workdir}',
                f'--config.data.root={folder / "data"}',
                '--config.data.category=nut',
                f'--config.data.cache={folder / "cache"}',
                f'--config.backbone.weights={folder / "w.safetensors"}',
                '--config.image_size=(64, 64)',
                '--config.batch_size=3',
                f'--config.epochs={EPOCHS}',
                '--config.checkpoint.every=1',
            ],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    """Waits for a run that must end well."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def rows(workdir):
    """The rows of a run's train.csv, as text, without how long they took."""
    with (workdir / 'train.csv').open(newline='') as file:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(file)]


def final_state(workdir):
    """Epoch and state of a run's newest checkpoint."""
    config = config_lib.from_json(workdir / 'config.json')
    template = steps.init_state(config, jax.random.key(0), 384)
    manager = checkpoint.open_manager(workdir, config.checkpoint.keep)
    return checkpoint.restore(manager, template)


@pytest.mark.slow
def test_killed_run_ends_as_if_it_had_not_been(job, tmp_path):
    """SIGKILL in the middle, the same command again: same parameters, train.csv without seam."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    process = job(killed)
    deadline = time.time() + 500
    while not (killed / 'checkpoints' / '3').is_dir():
        assert process.poll() is None and time.time() < deadline, 'no third checkpoint'
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / 'results.json').exists()
    done = max(int(p.name) for p in (killed / 'checkpoints').iterdir() if p.name.isdigit())
    assert 3 <= done < EPOCHS
    # As if the kill had come between an epoch's row and its checkpoint: the row is made again.
    with (killed / 'train.csv').open('a+') as file:
        file.seek(0)
        columns = file.readline().count(',') + 1
        file.write(','.join([str(done + 1)] + ['0'] * (columns - 1)) + '\n')

    resumed, uninterrupted = job(killed), job(whole)
    assert f'after epoch {done}' in finish(resumed)
    finish(uninterrupted)
    assert [int(row['epoch']) for row in rows(killed)] == list(range(1, EPOCHS + 1))
    assert rows(killed) == rows(whole)
    (epoch, state), (epoch_whole, state_whole) = final_state(killed), final_state(whole)
    assert epoch == epoch_whole == EPOCHS
    assert same(state, state_whole)
    kept = [p.name for p in (killed / 'checkpoints').iterdir() if p.name.isdigit()]
    assert len(kept) == 2
