"""Prediction over the local devices, and the metrics of a test split."""

from collections.abc import Callable

from flax import linen as nn
import jax
import numpy as np

from ssn_jax import deploy, metrics
from ssn_jax.data import Split
from ssn_jax.models import features as features_lib
from ssn_jax.models.supersimplenet import SuperSimpleNet


def is_fused(network: nn.Module) -> bool:
    """Whether a network has a fused form (`deploy.py`)."""
    return isinstance(network, SuperSimpleNet)


def direct_form(backbone: nn.Module, network: nn.Module) -> Callable:
    """`predict((backbone_variables, variables), images)`, as `deploy.predict` without fusing."""

    def predict(variables, images):
        backbone_variables, trained = variables
        layers = backbone.apply(backbone_variables, features_lib.normalise(images))[1:]
        logits, scores = network.apply(trained, network.features(network.frozen(layers)))
        return scores, network.full_size_map(logits, images.shape[1:3])[..., 0]

    return predict


def make_predictor(
    backbone: nn.Module, network: nn.Module, batch_size: int
) -> Callable[[dict, dict, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Compiled prediction, data-parallel with `jax.pmap` over all local devices.

    Args:
      backbone: the frozen feature extractor.
      network: the trained network. A SuperSimpleNet is evaluated in its fused form
        (`deploy.py`), the others as they are written.
      batch_size: images per device and call.

    Returns:
      `predict(backbone_variables, variables, images)` for uint8 RGB images (N, H, W, 3) of any N:
      full-size anomaly logits (N, H, W) and score logits (N,), float32 on the host. The last
      batch is padded; the padding is cut off again.
    """
    devices = jax.local_device_count()
    fused = is_fused(network)
    parallel = jax.pmap(deploy.predict if fused else direct_form(backbone, network))
    replicate = jax.pmap(lambda arrays, _: arrays, in_axes=(None, 0))

    def predict(backbone_variables, variables, images):
        arrays = backbone_variables, variables
        if fused:
            arrays = deploy.prepare(deploy.fuse(*arrays, network))
        arrays = replicate(arrays, np.arange(devices))
        # A small split on many devices needs no batch larger than its share.
        per_device = min(batch_size, -(-len(images) // devices))
        chunk = per_device * devices
        maps, scores = [], []
        for start in range(0, len(images), chunk):
            part = images[start : start + chunk]
            padded = np.zeros((chunk, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            sharded = padded.reshape(devices, per_device, *part.shape[1:])
            s, m = jax.device_get(parallel(arrays, sharded))
            maps.append(m.reshape(chunk, *m.shape[2:])[: len(part)])
            scores.append(s.reshape(chunk)[: len(part)])
        return np.concatenate(maps), np.concatenate(scores)

    return predict


def predict_scores(predict: Callable, *variables: dict, images: np.ndarray) -> np.ndarray:
    """Score logits (N,) of images (N, H, W, 3), without holding all their maps at once."""
    parts = [images[i : i + 256] for i in range(0, len(images), 256)]
    return np.concatenate([predict(*variables, part)[1] for part in parts])


def evaluate(
    maps: np.ndarray, scores: np.ndarray, split: Split
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The seven metrics of predictions (N, H, W) and (N,) on a split.

    Both are logits: every metric depends on their order alone, and a sigmoid in float32 would
    tie what is confidently normal or anomalous.

    Returns:
      Values by metric name, None where undefined, and the reason for each None.
    """
    return metrics.evaluate(scores, maps, split.labels, split.masks, split.has_mask)
