"""Prediction over the local devices, and the metrics of a test split."""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
import numpy as np

from ssn_jax import devices, metrics
from ssn_jax.data import Split
from ssn_jax.fused import fold, forward


def make_predictor(
    network: nn.Module, batch_size: int, precision: str = 'float32'
) -> Callable[[dict, dict, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Compiled prediction, data-parallel with `jax.pmap` over all local devices.

    Args:
      network: the trained network, evaluated in its fused form (`fused/`).
      batch_size: images per device and call.
      precision: as of `forward.predict`.

    Returns:
      `predict(backbone_variables, variables, images)` for uint8 RGB images (N, H, W, 3) of any N:
      full-size anomaly logits (N, H, W) and score logits (N,), float32 on the host. The last
      batch is padded; the padding is cut off again. Of several processes each predicts a share
      and gets all.
    """
    local = jax.local_devices()
    # With a name of their own making, programs would never come from the compilation cache.
    run = functools.partial(forward.predict, precision=precision)
    parallel = jax.pmap(run, 'devices', devices=local)
    replicate = jax.pmap(lambda arrays, _: arrays, 'devices', in_axes=(None, 0), devices=local)

    def predict(backbone_variables, variables, images):
        fused = forward.prepare(fold.fuse(backbone_variables, variables, network))
        arrays = replicate(fused, np.arange(len(local)))
        # A small split on many devices needs no batch larger than its share.
        per_device = min(batch_size, -(-len(images) // len(local)))
        chunk = per_device * len(local)
        maps, scores = [], []
        for start in range(0, len(images), chunk):
            part = images[start : start + chunk]
            padded = np.zeros((chunk, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            sharded = padded.reshape(len(local), per_device, *part.shape[1:])
            s, m = jax.device_get(parallel(arrays, sharded))
            maps.append(m.reshape(chunk, *m.shape[2:])[: len(part)])
            scores.append(s.reshape(chunk)[: len(part)])
        return np.concatenate(maps), np.concatenate(scores)

    return devices.share_images(predict)


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
