"""Which images an epoch shows, in which order, and which images a run keeps for what.

Everything follows from the run's seed (and the epoch) alone, on the host: there is no state to
save, and a resumed run goes on exactly where it was.
"""

import numpy as np

# Independent streams of random numbers from one seed.
_SHUFFLE, _ROUND, _CHOICE = range(3)


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
    return _batches(_permutation(images, seed, _SHUFFLE, epoch), batch_size)


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
    rounds = {r: _permutation(normal, seed, _ROUND, r) for r in np.unique(walk // normal)}
    normals = [rounds[step // normal][step % normal] for step in walk]
    shown = np.concatenate([np.array(normals, int), normal + np.arange(defective)])
    return _batches(shown[_permutation(len(shown), seed, _SHUFFLE, epoch)], batch_size)


def choose(seed: int, candidates: np.ndarray, count: int) -> np.ndarray:
    """Chooses `count` of the candidates, sorted; a larger choice holds the smaller one."""
    return np.sort(candidates[_permutation(len(candidates), seed, _CHOICE)[:count]])


def _permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng([int(s) for s in seed]).permutation(n)


def _batches(indices: np.ndarray, batch_size: int) -> np.ndarray:
    batch_size = min(batch_size, len(indices))
    steps = len(indices) // batch_size
    return indices[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)
