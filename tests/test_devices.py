"""Training on several devices: the same losses as on one."""

import json
import socket

import commands
import jax
import numpy as np
import pytest
import tiny

from ssn_jax import devices

# Three epochs of one step, on one device and on a mesh.
PROGRAM = """
import json
import jax, numpy as np
from ssn_jax import devices
from ssn_jax.config import default_config
from ssn_jax.data import sampling
from ssn_jax.losses import sparse
from ssn_jax.training import steps

def history(config, mesh):
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=s).astype(np.float32) for s in ((6, 4, 4, 5), (6, 2, 2, 7))]
    batch = {'layers': tuple(devices.put_images(mesh, x) for x in layers)}
    state = devices.put(mesh, steps.init_state(config, jax.random.key(1), 12))
    epoch = steps.make_epoch(config, 1, mesh)
    rows = []
    for i in range(3):
        order = sampling.uniform_order(0, i, 6, 4)
        key = devices.put(mesh, jax.random.fold_in(jax.random.key(2), i))
        with jax.transfer_guard('disallow'):
            state, values = epoch(state, batch, order, key)
        assert min(values.pop('bad').values()) == steps.NEVER
        rows.append([float(values[name]) for name in sorted(values)])
    return rows

mesh = devices.make_mesh(4)
assert mesh.size == 4
# Two programs for two numbers of noisy positions instead of four: half the time to compile.
sparse._SURPLUS = np.array([0.5, np.inf])
config = default_config()
config.epochs, config.batch_size, config.noise.std = 3, 4, 0.3
config.noise.kind, config.noise.discriminator_steps = 'learned', 1
print(json.dumps([history(config, m) for m in (None, mesh)]))
"""


def on_four_devices(program, folder):
    """What a program prints in a process with four devices on the host."""
    (folder / 'program.py').write_text(program)
    flags = '--xla_force_host_platform_device_count=4'
    command = commands.start(folder / 'program', cwd=folder, XLA_FLAGS=flags)
    assert command.end() == 0, command.err[-3000:]
    return command.out


@pytest.mark.slow
def test_four_devices_give_the_losses_of_one(tmp_path):
    one, four = json.loads(on_four_devices(PROGRAM, tmp_path))
    assert np.all(np.isfinite(one)) and len({row[0] for row in one}) == 3
    np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-9)


FEW = """
import pathlib
import jax, numpy as np
import test_parts, tiny
from ssn_jax import devices
from ssn_jax.training import loop, parts

mesh = devices.make_mesh(4)
config = tiny.config(pathlib.Path(), image_score='map', positions=8, batch_size=4)
shown, contents = test_parts.material(config, [(4, 128), (2, 256)])
contents = jax.tree.map(lambda x: devices.put_images(mesh, x), contents)
job = loop.Job(config, pathlib.Path('run'), None, None, [np.array([0, 2, 4]), np.array([1, 3, 5])])
one, other = (jax.tree.leaves(head) for head in parts.train(job, 2, shown, contents, mesh, False))
assert all(np.isfinite(x).all() for x in one + other)
assert any((x != y).any() for x, y in zip(one, other))
"""


@pytest.mark.slow
def test_heads_learn_from_fewer_images_than_there_are_devices(tmp_path):
    on_four_devices(FEW, tmp_path)


LAYOUT = """
import jax, numpy as np
from absl import logging
from ssn_jax import devices
logging.set_verbosity(logging.INFO)
x = np.arange(26, dtype=np.float32).reshape(13, 2)
for batch_size, size in ((8, 4), (6, 3), (2, 2)):
    mesh = devices.make_mesh(batch_size)
    assert mesh.size == size
    for count in (1, 3, 16):
        one = {'a': np.float32(1)}
        both = devices.map_images(mesh, lambda v, x: (x + v['a'], x[:, 0]), one, x, count)
        for found, expected in zip(both, (x + 1, x[:, 0])):
            np.testing.assert_array_equal(found[:13], expected)
            assert len(found) == size * -(-13 // size)
            assert len(found.addressable_shards[0].data) == -(-13 // size)
    np.testing.assert_array_equal(devices.put_images(mesh, x)[:13], x)
assert devices.make_mesh(7) is None
"""


def test_images_are_shared_by_as_many_devices_as_divide_a_batch(tmp_path):
    on_four_devices(LAYOUT, tmp_path)


def test_processes_that_can_not_share_a_batch_are_told(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(devices.UserError, match=r'--config\.batch_size.*--num_processes'):
        devices.make_mesh(3)


# Several processes


def start(folder, workdir, *arguments):
    """Starts the main job on the tiny data set."""
    return commands.start(
        *('main', '--config', commands.ROOT / 'configs/mod1_a.py', f'--workdir={workdir}'),
        *(f'--config.data.root={folder / "data"}', '--config.data.category=nut'),
        f'--config.data.cache={folder / "cache"}',
        f'--config.backbone.weights={folder / "w.safetensors"}',
        *('--config.image_size=(64, 64)', '--config.batch_size=4', '--config.epochs=2'),
        *('--config.sparse=False', '--config.decision.parts=0'),  # Compiles in half the time.
        *arguments,
        cwd=folder,
    )


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def two_processes(folder, workdir, *arguments):
    """Both, when they have ended; begins anew when someone else was faster to take the port."""
    for _ in range(3):
        address = f'--coordinator=127.0.0.1:{free_port()}'
        both = [
            start(folder, workdir, address, '--num_processes=2', f'--process_id={i}', *arguments)
            for i in (0, 1)
        ]
        try:
            if both[0].end() == 0 or 'port' not in both[0].err:
                both[1].end()
                return both
        finally:
            for command in both:
                command.process.kill()
    raise AssertionError('no free port in three attempts')


@pytest.mark.slow
def test_two_processes_end_with_the_results_of_one(tmp_path):
    """Over loopback, in one workdir that the first process writes; then the rerun of it by one."""
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'w.safetensors')
    one, two = tmp_path / 'one', tmp_path / 'two'
    alone = start(tmp_path, one)
    assert alone.end() == 0, alone.err[-3000:]
    first, second = two_processes(tmp_path, two)
    assert first.end() == second.end() == 0, (first.err + second.err)[-3000:]
    assert 'I-AUROC' in alone.out and 'I-AUROC' in first.out and 'I-AUROC' not in second.out
    results = [json.loads((folder / 'results.json').read_text()) for folder in (one, two)]
    for name, value in results[0]['metrics'].items():
        # Rounding moves a pixel by a few ranks.
        assert results[1]['metrics'][name] == pytest.approx(value, abs=1e-3), name
    threshold = results[0]['decision']['threshold']
    assert results[1]['decision']['threshold'] == pytest.approx(threshold, rel=1e-3)
    assert results[1]['devices'].startswith('2 x ')
    losses = [
        [row.split(',')[:-1] for row in (folder / 'train.csv').read_text().splitlines()[1:]]
        for folder in (one, two)
    ]
    np.testing.assert_allclose(*(np.array(x, float) for x in losses), rtol=1e-4, atol=1e-6)
    kept = {p.name for p in one.iterdir()}
    assert kept == {p.name for p in two.iterdir()} and 'checkpoints' in kept
    # A single process takes up what two have left.
    alone = start(tmp_path, two)
    assert alone.end() == 0 and 'after epoch 2' in alone.err, alone.err[-3000:]
    again = json.loads((two / 'results.json').read_text())
    assert again['metrics'] == pytest.approx(results[1]['metrics'], abs=1e-3)


WRONG = {  # What is given, and what the error holds.
    (False, 'a:1', None, None): ['--num_processes and --process_id'],
    (False, None, 2, 0): ['add --coordinator'],
    (False, 'a', 2, 0): ['--coordinator=a', 'HOST:PORT'],
    (False, 'a:99999', 2, 0): ['--coordinator=a:99999'],
    (False, 'a:1', 0, 0): ['--num_processes=0'],
    (False, 'a:1', 2, 2): ['--process_id=2', '0..1'],
}


@pytest.mark.parametrize('given', WRONG)
def test_processes_that_can_not_be(given):
    with pytest.raises(devices.UserError) as caught:
        devices.connect(*given)
    assert '\n' not in str(caught.value)
    for words in WRONG[given]:
        assert words in str(caught.value)


def test_a_taken_port_is_told():
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(devices.UserError, match=f'127.0.0.1:{port}: its port'):
            devices.connect(False, f'127.0.0.1:{port}', 2, 0)
