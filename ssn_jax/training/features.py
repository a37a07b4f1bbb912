"""Frozen features of everything that is trained on, computed once."""

from collections.abc import Callable
import math
import pathlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax import config as config_lib, devices, files
from ssn_jax.errors import UserError
from ssn_jax.fused import engine, forward
from ssn_jax.losses import targets
from ssn_jax.models import grid as grid_lib

_BATCH = 16  # Images at a time, and device.


def keep_on_host(config, shown, network, backbone, mesh) -> bool:
    """Whether features stay on the host: as the config says, or as devices are too small."""
    several = jax.process_count() > 1
    if config.features.place != 'auto' or several:
        if config.features.place == 'host' and several:
            raise UserError(
                '--config.features.place=host is for one process: with several, each keeps its '
                'share of the features on its devices.'
            )
        return config.features.place == 'host'
    layers = layer_shapes(backbone, shown.shape, network.frozen, config.features.dtype)
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in layers)
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


def training_data(
    config, shown, network, backbone, mesh, on_host: bool, folder: pathlib.Path
) -> dict:
    """Everything that is trained on, as one batch: on the devices of the mesh, or on the host.

    Images are made, extracted and forgotten, part by part.

    Args:
      config: the run's.
      shown: an `augment.Shown`.
      network: what is trained.
      backbone: as `fold.fuse_backbone` returns it.
      mesh: the devices that share the images; None is one.
      on_host: whether the batch stays on the host.
      folder: where what does not fit into the host's memory lies, in a file without a name.

    Returns:
      layers: layer2 and layer3 (N, H_i, W_i, C_i) at their own grids, an eighth of the feature
      grid's memory, or what `network.frozen` makes of them; with defects label, known and, where
      the map is the score, real (N,); with masks mask and weight, for `config.surroundings` beside
      and for `config.product_share` product, of padded images own, all (N, h, w, 1) at the
      feature grid. bfloat16 is kept as the bits that it is, uint16, for `restore`: to join or take
      from bfloat16 arrays, XLA on a CPU makes float32 copies of all. On a mesh they are spread as
      `devices.map_images` does it, and N may be larger.
    """
    logging.info('%d images: their features are computed once', len(shown))
    dtype = config.features.dtype
    shapes = layer_shapes(backbone, shown.shape, network.frozen, dtype)
    grid = grid_lib.feature_grid(shapes)
    masked = bool(shown.labels.any() and shown.masked)
    names = ['mask', 'weight'] * masked + ['product'] * bool(config_lib.product_share(config))
    names += ['beside'] * (masked and any(config.surroundings))
    names += ['own'] * (shown.padded and config.image_score == 'map')
    wanted = dict.fromkeys(names, ((len(shown), *grid, 1), np.float32))
    spread = mesh is not None and not on_host
    if spread:
        wanted['images'] = shown.shape, np.uint8
    else:
        wanted |= {f'layer{i}': (x.shape, x.dtype) for i, x in enumerate(shapes)}
        run = extractor(config, network, backbone, shown.shape[1:3])
    kept = files.allocate(wanted, folder)
    for places, images, masks in shown.parts(_BATCH):
        found = {'images': images} if spread else {}
        if masked:
            found |= targets.truth(config.supervision, masks, grid, config.surroundings)
        parts = [shown.inside(i) for i in range(places.start, places.stop)]
        if 'product' in wanted:
            # Of defective images nothing is said.
            normal = np.flatnonzero(shown.labels[places] == 0)
            found['product'] = np.zeros((len(images), *grid, 1), np.float32)
            found['product'][normal] = targets.product(
                images[normal], grid, [parts[i] for i in normal]
            )
        if 'own' in wanted:
            found['own'] = targets.own(parts, images.shape[1:3], grid)
            if 'beside' in found:
                found['beside'] *= found['own']
        if not spread:
            found |= {f'layer{i}': x for i, x in enumerate(run(images))}
        for name, values in found.items():
            kept[name][places] = values
    if spread:
        images, layers_of = kept.pop('images'), _frozen_layers(config, network)
        layers = devices.map_images(mesh, layers_of, backbone, images, _BATCH)
    else:
        layers = tuple(kept.pop(f'layer{i}') for i in range(len(shapes)))
        layers = layers if on_host else jax.device_put(layers)
    if shown.labels.any():
        kept |= {'label': np.float32(shown.labels), 'known': np.float32(shown.has_mask)}
        if config.image_score == 'map' and shown.real.any():
            kept['real'] = np.float32(shown.real)
    if not on_host:
        kept = {name: devices.put_images(mesh, x) for name, x in kept.items()}
    return {'layers': layers} | kept


def extractor(config, network, backbone, size: tuple[int, int]) -> Callable:
    """What makes frozen features of images, on this process's first device.

    Args:
      config: the run's.
      network: what is trained.
      backbone: as `fold.fuse_backbone` returns it.
      size: of the images.

    Returns:
      From images, uint8 RGB (n, *size, 3), to what is kept of them, arrays (n, H_i, W_i, C_i) in
      the host's memory.
    """
    dtype = jnp.dtype(config.features.dtype)
    # SimpleNet keeps an embedding, which is no output of the graph.
    if hasattr(network, 'adaptor') and engine.choose(config.engine) == 'openvino':
        from ssn_jax.fused import graph

        model = graph.features(backbone, size, tuple(config.features.layers))
        compiled = engine.OpenVino(model, size, config_lib.training_precision(config))
        bits = np.uint16 if dtype == jnp.bfloat16 else dtype
        return lambda images: [x.astype(dtype).view(bits) for x in compiled(images)]
    layers_of, variables = jax.jit(_frozen_layers(config, network)), jax.device_put(backbone)

    def run(images):
        padded = np.zeros((-(-len(images) // _BATCH) * _BATCH, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        parts = [
            jax.device_get(layers_of(variables, padded[start : start + _BATCH]))
            for start in range(0, len(padded), _BATCH)
        ]
        return [np.concatenate(x)[: len(images)] for x in zip(*parts, strict=True)]

    return run


def _frozen_layers(config, network):
    precision = config_lib.training_precision(config)

    def layers_of(variables, images):
        stages = forward.backbone(variables, images, precision)
        return tuple(_store(x, config.features.dtype) for x in network.frozen(stages))

    return layers_of


def _store(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """An array of any shape in the type that it is kept in; `restore` is the way back."""
    x = x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, np.uint16) if x.dtype == jnp.bfloat16 else x


def restore(x: jax.Array) -> jax.Array:
    """What was taken of the layers that `training_data` keeps, of any shape, to compute with.

    Of the bits of bfloat16 it makes float32; any other array stays as it is.
    """
    if x.dtype != np.uint16:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)


def layer_shapes(
    backbone, shape: tuple[int, ...], frozen: Callable, dtype: jax.typing.DTypeLike
) -> list[jax.ShapeDtypeStruct]:
    """Shapes and types of the layers that are kept of images of `shape` (N, H, W, 3)."""
    image = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.uint8)

    def layers_of(variables, images):
        return tuple(_store(x, dtype) for x in frozen(forward.backbone(variables, images)))

    found = jax.eval_shape(layers_of, backbone, image)
    return [jax.ShapeDtypeStruct((shape[0], *x.shape[1:]), x.dtype) for x in found]
