"""Which images an epoch shows, in which order, and which images a run keeps for what.

Everything follows from the run's seed (and the epoch) alone, on the host: there is no state to
save, and a resumed run goes on exactly where it was.
"""

from collections.abc import Callable

import ml_collections
import numpy as np

# Independent streams of random numbers from one seed.
_SHUFFLE, _ROUND, _CHOICE, PARTS = range(4)


def image_order(
    config: ml_collections.ConfigDict, labels: np.ndarray, real: np.ndarray
) -> Callable:
    """What the epochs of a run show.

    Args:
      config: the run's.
      labels: (N,) of all images that there are to show, the normal ones first.
      real: bool (N,), whether a defect is a real one. Beside drawn ones each is shown so often that
        together they are a third as many.

    Returns:
      `order(epoch)`, from an epoch's number, from 0 on, to indices (steps, batch).
    """
    total, defective = len(labels), int(labels.sum())
    if not defective:
        return lambda epoch: uniform_order(config.seed, epoch, total, config.batch_size)
    few, drawn = np.flatnonzero(real), defective - int(real.sum())
    again = max(drawn // (3 * len(few)) - 1, 0) if len(few) else 0
    normal, members = total - defective, np.concatenate([np.arange(total), np.tile(few, again)])

    def order(epoch):
        more = len(members) - normal
        found = balanced_order(config.seed, epoch, normal, more, config.batch_size)
        return members[found].astype(np.int32)

    return order


def uniform_order(seed: int, epoch: int, images: int, batch_size: int) -> np.ndarray:
    """An epoch of batches without replacement.

    Args:
      seed: the run's.
      epoch: its number, from 0 on.
      images: how many there are.
      batch_size: images a step; no more than there are.

    Returns:
      Indices (steps, batch). What does not fill a batch is left out this time.
    """
    return _batches(permutation(images, seed, _SHUFFLE, epoch), batch_size)


def balanced_order(
    seed: int, epoch: int, normal: int, defective: int, batch_size: int
) -> np.ndarray:
    """An epoch of every defective image and as many normal ones, in batches that mix both.

    The normal images that were seen least come first, ties broken at random. That is a walk
    through one random permutation of them after another, which each epoch takes up where the
    last one ended.

    Args:
      seed: the run's.
      epoch: its number, from 0 on.
      normal: how many normal images there are, indices 0..normal - 1.
      defective: how many defective ones follow them, each variant (flip) counted.
      batch_size: images a step; no more than an epoch has.

    Returns:
      Indices (steps, batch). What does not fill a batch is left out this time.
    """
    walk = np.arange(epoch * defective, (epoch + 1) * defective)
    rounds = {r: permutation(normal, seed, _ROUND, r) for r in np.unique(walk // normal)}
    normals = [rounds[step // normal][step % normal] for step in walk]
    shown = np.concatenate([np.array(normals, int), normal + np.arange(defective)])
    return _batches(shown[permutation(len(shown), seed, _SHUFFLE, epoch)], batch_size)


def choose(seed: int, candidates: np.ndarray, count: int) -> np.ndarray:
    """Chooses `count` of the candidates, sorted; a larger choice holds the smaller one."""
    return np.sort(candidates[permutation(len(candidates), seed, _CHOICE)[:count]])


def permutation(n: int, *seed: int) -> np.ndarray:
    """The numbers 0..n-1 in an order that follows from the seed."""
    return np.random.default_rng([int(s) for s in seed]).permutation(n)


def _batches(indices: np.ndarray, batch_size: int) -> np.ndarray:
    batch_size = min(batch_size, len(indices))
    steps = len(indices) // batch_size
    return indices[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)
