"""Checkpoints: bit-identical, bounded in number, and never used if they are damaged."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ssn_jax import config as config_lib
from ssn_jax.errors import UserError
from ssn_jax.training import checkpoint, steps


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


def files_of(folder):
    return sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size)


def test_damaged_checkpoint_is_one_line(tmp_path):
    state = make_state('static')
    checkpoint.save(checkpoint.open_manager(tmp_path, 2), 3, state)
    for path in files_of(tmp_path / 'checkpoints' / '3'):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for epoch, words in ((None, 'delete it to begin anew'), (3, 'choose another one')):
        with pytest.raises(UserError, match=words) as caught:
            checkpoint.restore(checkpoint.open_manager(tmp_path, 2), state, epoch)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove'])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(damage, tmp_path, caplog):
    """Every file, at random places: what comes back is what was saved, or the one before it."""
    states = {epoch: {'x': jnp.arange(1000.0) + epoch, 'n': jnp.int32(epoch)} for epoch in (1, 2)}
    rng, used = np.random.default_rng(0), []
    for epoch, state in states.items():
        checkpoint.save(checkpoint.open_manager(tmp_path / 'good', 2), epoch, state)
    newest = tmp_path / 'good' / 'checkpoints' / '2'
    for name in [p.relative_to(tmp_path / 'good') for p in files_of(newest)] * 2:
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        shutil.copytree(tmp_path / 'good', tmp_path / 'run')
        file = tmp_path / 'run' / name
        content = bytearray(file.read_bytes())
        place = rng.integers(len(content))
        content[place] ^= 1 << rng.integers(8)
        file.unlink()
        if damage != 'remove':
            file.write_bytes(content if damage == 'flip' else content[:place])
        caplog.clear()
        manager = checkpoint.open_manager(tmp_path / 'run', 2, writes=True)
        epoch, state = checkpoint.restore(manager, states[1])
        assert same(state, states[epoch])
        used.append(epoch)
        warned = [r.getMessage() for r in caplog.records if 'going on from' in r.getMessage()]
        assert len(warned) == (epoch == 1)
        checkpoint.set_aside(manager, epoch)
        checkpoint.save(manager, 2, states[2])  # The run goes on.
        epoch, state = checkpoint.restore(checkpoint.open_manager(tmp_path / 'run', 2), states[1])
        assert epoch == 2 and same(state, states[2])
    assert 1 in used


def test_a_checkpoint_without_a_checksum_is_taken(tmp_path):
    """As older versions wrote them."""
    state = make_state('static')
    manager = checkpoint.open_manager(tmp_path, 2)
    manager.save(4, args=ocp.args.StandardSave(state))
    epoch, restored = checkpoint.restore(checkpoint.open_manager(tmp_path, 2), state)
    assert epoch == 4 and same(state, restored)


def test_no_room_for_a_checkpoint_is_one_line_and_leaves_the_one_before(tmp_path, monkeypatch):
    manager, state = checkpoint.open_manager(tmp_path, 2), {'x': jnp.arange(3.0)}
    checkpoint.save(manager, 1, state)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(manager, 'save', full)
    with pytest.raises(UserError, match=r'checkpoints/2 cannot be written \(no space left'):
        checkpoint.save(manager, 2, state)
    assert checkpoint.restore(checkpoint.open_manager(tmp_path, 2), state)[0] == 1
