"""Training on several devices: the same losses as on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ssn_jax import devices

ROOT = pathlib.Path(__file__).parents[1]

# Three epochs of one step, on one device and on a mesh.
PROGRAM = """
import json
import jax, numpy as np
from ssn_jax import devices, sampling, sparse_loss, steps
from ssn_jax.config import default_config

def history(config, mesh):
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=s).astype(np.float32) for s in ((6, 4, 4, 5), (6, 2, 2, 7))]
    batch = {'layers': tuple(devices.put_images(mesh, x) for x in layers)}
    state = devices.put(mesh, steps.init_state(config, jax.random.key(1), 12))
    epoch = steps.make_epoch(config, 1, mesh)
    rows = []
    for i in range(3):
        order = devices.put(mesh, sampling.uniform_order(0, i, 6, 4))
        key = devices.put(mesh, jax.random.fold_in(jax.random.key(2), i))
        with jax.transfer_guard('disallow'):
            state, values = epoch(state, batch, order, key)
        rows.append([float(values[name]) for name in sorted(values)])
    return rows

mesh, found = devices.make_mesh(4), {}
assert mesh.size == 4
# Two programs for two numbers of noisy positions instead of four: half the time to compile.
sparse_loss._SURPLUS = np.array([0.5, np.inf])
for form in ('sparse', 'direct'):
    for kind in ('static', 'learned'):
        config = default_config()
        config.epochs, config.batch_size, config.noise.std = 3, 4, 0.3
        config.sparse, config.noise.kind = form == 'sparse', kind
        config.noise.discriminator_steps = 1
        found[f'{form} {kind}'] = [history(config, m) for m in (None, mesh)]
print(json.dumps(found))
"""


def on_four_devices(program, *arguments):
    """What a program prints in a process with four devices on the host."""
    environment = {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=1',
        'PYTHONPATH': str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, '-c', program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_four_devices_give_the_losses_of_one():
    for name, (one, four) in json.loads(on_four_devices(PROGRAM)).items():
        assert np.all(np.isfinite(one)) and len({row[0] for row in one}) == 3
        np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-9, err_msg=name)


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
        both = devices.map_images(mesh, lambda v, x: (x + v['a'], x[:, 0]), {'a': 1.0}, x, count)
        for found, expected in zip(both, (x + 1, x[:, 0])):
            np.testing.assert_array_equal(found[:13], expected)
            assert len(found) == size * -(-13 // size)
            assert len(found.addressable_shards[0].data) == -(-13 // size)
    np.testing.assert_array_equal(devices.put_images(mesh, x)[:13], x)
assert devices.make_mesh(7) is None
"""


def test_images_are_shared_by_as_many_devices_as_divide_a_batch():
    on_four_devices(LAYOUT)


def test_one_device_needs_no_mesh():
    assert devices.make_mesh(8) is None or jax.local_device_count() > 1
    assert isinstance(devices.put_images(None, np.zeros((2, 3))), jax.Array)


def test_processes_that_can_not_share_a_batch_are_told(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(devices.UserError, match=r'--config\.batch_size.*--num_processes'):
        devices.make_mesh(3)
