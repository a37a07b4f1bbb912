"""A finished run, opened from its workdir alone: what it was, and what it has learned."""

from collections.abc import Callable
import dataclasses
import pathlib

import cv2
from flax import linen as nn
import jax
import ml_collections
import numpy as np

from ssn_jax import config as config_lib, data, decision as decision_lib, evaluate, run as run_lib
from ssn_jax.errors import UserError
from ssn_jax.fused import fold, forward
from ssn_jax.models import backbones, systems, weights
from ssn_jax.training import checkpoint, steps


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      workdir: the run's folder.
      config: what config.json says, with the overrides it was opened with.
      epoch: the checkpoint's, the number of epochs that had been trained.
      network: the trained network.
      backbone_variables: the backbone's parameters and statistics.
      variables: the network's parameters and statistics, on the device.
      origin: where the backbone's weights come from, one line.
      decision: what decision.json says (see `decision.decide`); None if the run has not written
        it yet, or if this is not its last epoch, on which it was chosen.
    """

    workdir: pathlib.Path
    config: ml_collections.ConfigDict
    epoch: int
    network: nn.Module
    backbone_variables: dict
    variables: dict
    origin: str
    decision: dict | None


def open_run(workdir: pathlib.Path, epoch: int | None = None, overrides: dict | None = None) -> Run:
    """Opens a run; reads no images, so what it learned from may be gone.

    Args:
      workdir: the run's folder.
      epoch: which checkpoint; None: the newest.
      overrides: values of config fields, by 'group.field', instead of the run's own.

    Raises:
      UserError: the folder is no run, has no such checkpoint, or the weights are missing.
    """
    workdir = pathlib.Path(workdir)
    config = run_lib.read_config(workdir)
    config.update_from_flattened_dict(overrides or {})
    config_lib.validate(config)
    epoch, state = _restore(workdir, config, epoch)
    backbone_variables, origin = _load_backbone(workdir, config)
    return Run(
        workdir=workdir,
        config=config,
        epoch=epoch,
        network=systems.build_network(config),
        backbone_variables=backbone_variables,
        variables=state.variables(),
        origin=origin,
        decision=run_lib._read(workdir / 'decision.json') if epoch == config.epochs else None,
    )


def _restore(workdir, config, epoch):
    """The epoch and the state of a checkpoint."""
    known = [p.name for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit()]
    if not known:
        raise UserError(f'{workdir} holds no checkpoint yet: let the run get to its first one.')
    if epoch is not None and str(epoch) not in known:
        known = ', '.join(sorted(known, key=int))
        raise UserError(f'{workdir} holds no checkpoint of epoch {epoch}: it has {known}.')
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)
    # Shapes are enough for a template.
    template = jax.eval_shape(
        lambda: steps.init_state(config, jax.random.key(config.seed), channels)
    )
    manager = checkpoint.open_manager(workdir, config.checkpoint.keep)
    return checkpoint.restore(manager, template, epoch)


def _load_backbone(workdir, config):
    """The backbone's variables as the run had them, and where they come from."""
    results = run_lib._read(workdir / 'results.json') or {}
    # What the run says it used is what it gets, whatever the hub answers today.
    if results.get('weights') == weights.RANDOM and not config.backbone.weights:
        return weights.random_backbone(config.backbone.name), weights.RANDOM
    unknown = 'weights' not in results
    return weights.load_backbone(
        config.backbone.name, config.backbone.weights, unknown and data.is_embedded(config.data)
    )


def predict(run: Run, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Anomaly logits (N, H, W) and score logits (N,) of uint8 RGB images (N, H, W, 3).

    `config.eval_batch_size` images a device at a time, over all local devices.
    """
    config = run.config
    predictor = evaluate.make_predictor(run.network, config.eval_batch_size, config.precision)
    return predictor(run.backbone_variables, run.variables, images)


def make_predictor(
    run: Run, batch_size: int
) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """The run's predictor compiled for one device and batch size, arrays on the device.

    Returns:
      uint8 RGB images (batch_size, *image_size, 3) -> score logits (batch_size,), anomaly logits
      (batch_size, *image_size).
    """
    fused = fold.fuse(run.backbone_variables, run.variables, run.network)
    size = tuple(run.config.image_size)
    return forward.make_predictor(fused, batch_size, size, run.config.precision)


def strongest_region(logits: np.ndarray) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """The connected region around a map's highest value.

    Args:
      logits: (H, W).

    Returns:
      Its bounding box (x, y, width, height), and all regions (H, W), bool: wherever the probability
      is at least half-way between its median and its highest value.
    """
    probability = decision_lib.sigmoid(logits)
    regions = probability >= (np.median(probability) + probability.max()) / 2
    _, labels, stats, _ = cv2.connectedComponentsWithStats(regions.astype(np.uint8))
    # Of the logits: float32 probabilities are all 1 from a logit of 17 on.
    strongest = labels.ravel()[logits.argmax()]
    return tuple(int(v) for v in stats[strongest, :4]), regions


class View:
    """Where in an image a map lies, which covers its middle if the run cuts images.

    Attributes:
      part: slices of the image's rows and columns, whose part the map covers.
      origin: (x, y), where the map begins in pixels of the image.
      scale: (x, y), pixels of the image to one of the map.
    """

    def __init__(self, config: ml_collections.ConfigDict, size: tuple[int, int]):
        cut = np.array(config.image_size)
        whole = np.array(config.resize) if any(config.resize) else cut
        offset = (whole - cut) // 2
        low, high = offset * size / whole, (offset + cut) * size / whole
        self.part = tuple(map(slice, np.floor(low).astype(int), np.ceil(high).astype(int)))
        self.origin, self.scale = low[::-1], (np.array(size) / whole)[::-1]

    def box(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """A box (x, y, width, height) of the map in pixels of the image, rounded outwards."""
        low = np.floor(self.origin + np.array(box[:2]) * self.scale + 1e-6)
        high = np.ceil(self.origin + (np.array(box[:2]) + box[2:]) * self.scale - 1e-6)
        return tuple(int(x) for x in (*low, *(high - low)))
