"""Which devices train, and how a run's arrays lie on them.

A mesh has one axis: a batch's images are spread over it, everything else is on each device. `jit`
sees whole arrays, so gradients are averages and BatchNorm's statistics those of the whole batch;
what devices exchange follows from where the arrays lie. Without a mesh (None) there is one device,
and nothing here changes what is computed.

Several processes (hosts) run the same program on the same files, each with its own devices; the
first of them writes. `jax.distributed` brings them together.
"""

from collections.abc import Callable
import socket

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from ssn_jax.errors import UserError

AXIS = 'batch'
_P = jax.sharding.PartitionSpec


def connect(
    detect: bool, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Brings the processes of a run together, or does nothing for a run of one.

    Must come before anything asks for a device.

    Args:
      detect: whether the cluster's scheduler knows the rest (--distributed).
      coordinator: HOST:PORT of the first process (--coordinator).
      processes: how many there are (--num_processes).
      process: which one this is, from 0 on (--process_id).

    Raises:
      UserError: one is missing or impossible, or the processes do not find each other.
    """
    given = {'coordinator': coordinator, 'num_processes': processes, 'process_id': process}
    missing = [f'--{name}' for name, value in given.items() if value is None]
    if len(missing) == 3 and not detect:
        return
    if len(missing) == 3:
        given, hint = {}, 'no cluster that is known: add --coordinator, --num_processes and'
        hint += ' --process_id instead of --distributed.'
    else:
        _check_processes(given, missing)
        given['coordinator_address'] = given.pop('coordinator')
        hint = f'--coordinator={coordinator} must be an address of the process with '
        hint += '--process_id=0, free there, and all processes have to be started.'
    # What the processes of a machine without accelerators speak.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f'the processes cannot be brought together ({reason}): {hint}') from None
    if not is_first():
        logging.set_verbosity(logging.WARNING)  # The first one tells what all of them do.


def _check_processes(given: dict, missing: list[str]) -> None:
    if missing:
        raise UserError(
            f'several processes need --coordinator, --num_processes and --process_id: add '
            f'{" and ".join(missing)}.'
        )
    host, _, port = given['coordinator'].rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f'--coordinator={given["coordinator"]} is no HOST:PORT: name the machine and a free '
            'port of the process with --process_id=0.'
        )
    if given['num_processes'] < 1:
        raise UserError(f'--num_processes={given["num_processes"]}: it must be at least 1.')
    if not 0 <= given['process_id'] < given['num_processes']:
        raise UserError(
            f'--process_id={given["process_id"]}: it is in 0..{given["num_processes"] - 1} with '
            f'--num_processes={given["num_processes"]}.'
        )
    if given['process_id'] == 0:
        with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(('', int(port)))
            except OSError as e:
                raise UserError(
                    f'--coordinator={given["coordinator"]}: its port cannot be used here '
                    f'({e.strerror}): choose another one.'
                ) from None


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this is the only process."""
    return jax.process_count() == 1


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def share_images(predict: Callable, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """`predict(images)`, each process predicting its share and getting what all of them found.

    Args:
      predict: from images (N, ...) to a tuple of host arrays (N, ...).
      images: all of them, in every process.
    """
    processes = jax.process_count()
    if processes == 1:
        return predict(images)
    share = -(-len(images) // processes)
    mine = images[jax.process_index() * share :][:share]
    padded = np.zeros((share, *images.shape[1:]), images.dtype)
    padded[: len(mine)] = mine
    found = multihost_utils.process_allgather(predict(padded))
    return tuple(x.reshape(-1, *x.shape[2:])[: len(images)] for x in found)


def make_mesh(batch_size: int) -> jax.sharding.Mesh | None:
    """As many devices as can share a batch equally, as many of each process; None for one.

    Args:
      batch_size: images a step.

    Raises:
      UserError: the processes cannot share a batch equally.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(
            f'a batch of {batch_size} images cannot be shared equally by {processes} processes: '
            'make --config.batch_size a multiple of --num_processes that is no more than there '
            'are training images.'
        )
    mine = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    most = min(len(devices) for devices in mine)
    each = max(n for n in range(1, most + 1) if batch_size % (n * processes) == 0)
    if each < most:
        logging.info(
            'Training on %d of %d devices, the most that share a batch of %d images equally',
            each * processes,
            most * processes,
            batch_size,
        )
    if each * processes == 1:
        return None
    chosen = [d for devices in mine for d in devices[:each]]
    # By hand and not by jax.make_mesh, whose axes the code would have to name in every operation.
    return jax.sharding.Mesh(np.array(chosen), (AXIS,))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The whole array on each device."""
    return jax.sharding.NamedSharding(mesh, _P())


def spread(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The first axis, images, over the devices."""
    return jax.sharding.NamedSharding(mesh, _P(AXIS))


def put(mesh: jax.sharding.Mesh | None, tree):
    """A tree of arrays, the same in every process, on each device of the mesh."""
    if mesh is None:
        return jax.device_put(tree)

    def put_leaf(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # Can not go to other processes.
            return jax.random.wrap_key_data(put_leaf(jax.random.key_data(x)))
        if isinstance(x, jax.Array) and x.sharding == replicated(mesh):
            return x
        return jax.device_put(x, replicated(mesh))

    return jax.tree.map(put_leaf, tree)


def take_local(mesh: jax.sharding.Mesh | None, tree):
    """A tree that is on each device as one on this process's first alone."""
    return tree if mesh is None else jax.tree.map(lambda x: x.addressable_data(0), tree)


def put_images(mesh: jax.sharding.Mesh | None, array: np.ndarray) -> jax.Array:
    """An array of the host (N, ...), a device's share of rows on each.

    Zeros fill the last shares up, so that there may be more rows than N.
    """
    if mesh is None:
        return jax.device_put(array)
    share = -(-len(array) // mesh.size)
    return _rows(mesh, array, share, 0, share)


def map_images(
    mesh: jax.sharding.Mesh, fn: Callable, variables: dict, images: np.ndarray, batch_size: int
):
    """`fn(variables, images)` of all images, each device its own share, each process its devices'.

    Args:
      mesh: the devices.
      fn: from variables and images (batch_size, ...) to a tree of arrays (batch_size, ...).
      variables: the same everywhere.
      images: of the host (N, ...).
      batch_size: images at a time and device.

    Returns:
      The tree, its arrays laid out as `put_images` does it.
    """
    share = -(-len(images) // mesh.size)
    run = jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=(_P(), _P(AXIS)), out_specs=_P(AXIS), check_vma=False)
    )
    variables = put(mesh, variables)
    parts = [
        run(variables, _rows(mesh, images, share, start, batch_size))
        for start in range(0, share, batch_size)
    ]

    def join(parts):
        return jax.tree.map(lambda *x: jax.numpy.concatenate(x)[:share], *parts)

    joined = jax.shard_map(join, mesh=mesh, in_specs=(_P(AXIS),), out_specs=_P(AXIS))
    return jax.jit(joined)(parts)


def _rows(mesh, array, share, start, count):
    """Rows start..start + count of each device's share of an array, zeros beyond its end."""

    def of_device(index):
        first = (index[0].start or 0) // count * share
        begin, end = first + start, min(first + share, first + start + count)
        rows = array[begin:end]
        return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (array.ndim - 1))

    shape = (count * mesh.size, *array.shape[1:])
    return jax.make_array_from_callback(shape, spread(mesh), of_device)
