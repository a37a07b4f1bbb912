"""Which devices train, and how a run's arrays lie on them.

A mesh has one axis: a batch's images are spread over it, everything else is on each device. `jit`
sees whole arrays, so gradients are averages and BatchNorm's statistics those of the whole batch;
what devices exchange follows from where the arrays lie. Without a mesh (None) there is one device,
and nothing here changes what is computed.
"""

from collections.abc import Callable

from absl import logging
import jax
import numpy as np

from ssn_jax.errors import UserError

AXIS = 'batch'
_P = jax.sharding.PartitionSpec


def make_mesh(batch_size: int) -> jax.sharding.Mesh | None:
    """As many devices as can share a batch equally, as many of each process; None for one.

    Args:
      batch_size: images a step.

    Raises:
      UserError: the processes can not share a batch equally.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(
            f'a batch of {batch_size} images can not be shared equally by {processes} processes: '
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
    return jax.device_put(tree, None if mesh is None else replicated(mesh))


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
