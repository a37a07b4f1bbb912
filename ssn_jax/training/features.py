"""Frozen features of everything that is trained on, computed once."""

from collections.abc import Callable
import functools
import math

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax import devices
from ssn_jax.errors import UserError
from ssn_jax.fused import engine, forward
from ssn_jax.losses import targets
from ssn_jax.models import grid as grid_lib


def keep_on_host(config, split, network, backbone, mesh) -> bool:
    """Whether features stay on the host: as the config says, or as devices are too small."""
    several = jax.process_count() > 1
    if config.features.place != 'auto' or several:
        if config.features.place == 'host' and several:
            raise UserError(
                '--config.features.place=host is for one process: with several, each keeps its '
                'share of the features on its devices.'
            )
        return config.features.place == 'host'
    needed = layers_bytes(
        forward.backbone, backbone, split.images.shape, network.frozen, config.features.dtype
    )
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', math.inf)
    limit *= mesh.size if mesh else 1  # Which share them.
    # The other half is for a step's own arrays.
    if needed > limit / 2:
        logging.info(
            'Features of %.1f GB stay on the host: the devices have %.1f GB',
            needed / 1e9,
            limit / 1e9,
        )
    return needed > limit / 2


def training_data(config, split, network, backbone, mesh, on_host):
    """Everything that is trained on, as one batch: on the devices of the mesh, or on the host."""
    logging.info('%d images: their features are computed once', len(split.labels))
    # SimpleNet keeps an embedding, which is no output of the graph.
    if mesh is None and engine.choose(config.engine) == 'openvino' and hasattr(network, 'adaptor'):
        layers = extract_by_openvino(config, backbone, split.images)
        layers = layers if on_host else jax.device_put(layers)
    else:
        layers = extract_layers(
            functools.partial(forward.backbone, precision=config.precision),
            backbone,
            split.images,
            frozen=network.frozen,
            mesh=mesh,
            dtype=config.features.dtype,
            to_host=on_host,
        )
    known, grid = {}, grid_lib.feature_grid(layers)
    if split.labels.any():
        known = targets.truth(config.supervision, split, grid)
    if config.product_share:
        known['product'] = targets.product(split, grid)
    if not on_host:
        known = {k: devices.put_images(mesh, x) for k, x in known.items()}
    return {'layers': layers} | known


def extract_layers(
    backbone: Callable,
    variables: dict,
    images: np.ndarray,
    batch_size: int = 16,
    frozen: Callable = lambda stages: stages[1:],
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    to_host: bool = False,
) -> tuple[jax.Array | np.ndarray, ...]:
    """Frozen features of a whole split, computed once and left on the devices.

    Args:
      backbone: `backbone(variables, images)` gives the stages' outputs, as `forward.backbone` does.
      variables: its arrays.
      images: uint8 RGB (N, H, W, 3).
      batch_size: images at a time (and device).
      frozen: what to keep of the stages' outputs, as the network says.
      mesh: the devices that share the images; None is one.
      dtype: the precision they are kept in.
      to_host: keep them in the host's memory instead; the mesh is not used then.

    Returns:
      layer2 and layer3 (N, H_i, W_i, C_i) at their own grids, an eighth of the feature grid's
      memory; or what `frozen` makes of them. bfloat16 is kept as the bits that it is, uint16, for
      `restore`: to join or take from bfloat16 arrays, XLA on a CPU makes float32 copies of all.
      On a mesh they are spread as `devices.map_images` does it, and N may be larger.
    """

    def layers_of(v, x):
        return tuple(_store(y, dtype) for y in frozen(backbone(v, x)))

    if mesh is not None and not to_host:
        return devices.map_images(mesh, layers_of, variables, images, batch_size)

    # Into arrays of their final size: batches that are joined in the end take twice the memory.
    @functools.partial(jax.jit, donate_argnums=0)
    def write(kept, variables, batch, start):
        layers = layers_of(variables, batch)
        return [
            jax.lax.dynamic_update_slice_in_dim(all_of, new, start, 0)
            for all_of, new in zip(kept, layers, strict=True)
        ]

    run = jax.jit(layers_of)
    variables = jax.device_put(variables)
    batch_size = min(batch_size, len(images))
    shapes = jax.eval_shape(layers_of, variables, images[:1])
    new = np.empty if to_host else jnp.empty
    kept = [new((len(images), *x.shape[1:]), x.dtype) for x in shapes]
    for start in range(0, len(images), batch_size):
        # The last batch is whole too, and begins earlier.
        start = min(start, len(images) - batch_size)
        batch = images[start : start + batch_size]
        if not to_host:
            kept = write(kept, variables, batch, start)
            continue
        for all_of, layer in zip(kept, jax.device_get(run(variables, batch)), strict=True):
            all_of[start : start + batch_size] = layer
    return tuple(kept)


def extract_by_openvino(config, backbone, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """`extract_layers` on a CPU: of images, uint8 (N, H, W, 3), the layers that the config chooses.

    Returns:
      Arrays (N, H_i, W_i, C_i) in the host's memory, as `extract_layers` keeps them.
    """
    from ssn_jax.fused import graph

    size = images.shape[1:3]
    model = graph.features(backbone, size, tuple(config.features.layers))
    run = engine.OpenVino(model, size, config.precision)
    dtype, kept = jnp.dtype(config.features.dtype), None
    for start in range(0, len(images), 16):
        found = [x.astype(dtype) for x in run(images[start : start + 16])]
        if dtype == jnp.bfloat16:
            found = [x.view(np.uint16) for x in found]
        if kept is None:
            kept = tuple(np.empty((len(images), *x.shape[1:]), x.dtype) for x in found)
        for all_of, x in zip(kept, found, strict=True):
            all_of[start : start + 16] = x
    return kept


def _store(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array of any shape in the type that it is kept in; `restore` is the way back."""
    x = x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, np.uint16) if x.dtype == jnp.bfloat16 else x


def restore(x: jax.Array) -> jax.Array:
    """What was taken of the layers that `extract_layers` keeps, of any shape, to compute with.

    Of the bits of bfloat16 it makes float32; any other array stays as it is.
    """
    if x.dtype != np.uint16:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)


def layers_bytes(
    backbone: Callable,
    variables: dict,
    shape: tuple[int, ...],
    frozen: Callable = lambda stages: stages[1:],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> int:
    """How much memory `extract_layers` of images of `shape` (N, H, W, 3) takes."""
    image = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.uint8)
    layers = jax.eval_shape(lambda v, x: frozen(backbone(v, x)), variables, image)
    return shape[0] * sum(x.size for x in layers) * jnp.dtype(dtype).itemsize
