"""A finished run, opened from its workdir alone: what it was, and what it has learned."""

from collections.abc import Callable
import dataclasses
import json
import pathlib

from flax import linen as nn
import jax
import ml_collections
import numpy as np

from ssn_jax import (
    checkpoint,
    config as config_lib,
    data,
    deploy,
    evaluate,
    seeds,
    steps,
    weights,
)
from ssn_jax.errors import UserError
from ssn_jax.models import backbones


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


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """A run's config.

    Raises:
      UserError: the folder is no run, or one of a newer ssn_jax.
    """
    if not workdir.is_dir():
        raise UserError(f'{workdir} is no folder: --workdir names that of a run.')
    several = seeds.single_runs(workdir)
    if several != [workdir]:
        raise UserError(f'{workdir} holds several runs: name one, such as {several[0]}.')
    config = config_lib.from_json(workdir / 'config.json')
    config_lib.validate(config)
    return config


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
    config = read_config(workdir)
    config.update_from_flattened_dict(overrides or {})
    config_lib.validate(config)
    epoch, state = _restore(workdir, config, epoch)
    backbone_variables, origin = _load_backbone(workdir, config)
    return Run(
        workdir=workdir,
        config=config,
        epoch=epoch,
        network=steps.build_network(config),
        backbone_variables=backbone_variables,
        variables=state.variables(),
        origin=origin,
        decision=_read(workdir / 'decision.json') if epoch == config.epochs else None,
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
    results = _read(workdir / 'results.json') or {}
    # What the run says it used is what it gets, whatever the hub answers today.
    if results.get('weights') == weights.RANDOM and not config.backbone.weights:
        return weights.random_backbone(config.backbone.name), weights.RANDOM
    unknown = 'weights' not in results
    return weights.load_backbone(
        config.backbone.name, config.backbone.weights, unknown and data.is_embedded(config.data)
    )


def _read(path):
    """A JSON file that may not be there yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read ({e}): repeat the command of the run.') from None


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
    fused = deploy.fuse(run.backbone_variables, run.variables, run.network)
    size = tuple(run.config.image_size)
    return deploy.make_predictor(fused, batch_size, size, run.config.precision)
