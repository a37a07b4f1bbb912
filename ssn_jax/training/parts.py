"""Heads that never saw a part of the training images: what they say of it, new images get too.

Features are shared with the head that is used, which is trained on all of them. A part's head takes
as many steps, or its logits would lie on another scale, but each with a share of the positions (or
of the batch, where positions are not chosen), so that all of them together cost little more than
the one that is used.
"""

import functools
import pathlib
import shutil

from absl import logging
import cv2
import jax
import ml_collections
import numpy as np
from scipy.sparse import csgraph
from scipy.spatial import distance
from sklearn import neighbors

from ssn_jax import devices, signals
from ssn_jax.data import Split, augment, records, sampling
from ssn_jax.errors import UserError
from ssn_jax.models import backbones
from ssn_jax.training import checkpoint, steps

# Images that differ by less than so much of what is usual are of one piece.
_NEAR = 0.1
# They are compared at so many pixels a side; what is usual, so many tell. Distances of the same
# pixels are computed to be below the last.
_SIDE, _COMPARED, _ROUNDING = 64, 500, 0.01
# Within the run's folder, until the scores are written.
_HEADS = 'heads'


def groups(config: ml_collections.ConfigDict, images: Split) -> np.ndarray:
    """Which training images show the same: no head may judge one that has seen another.

    Args:
      config: the run's; `decision.group` is how many follow each other by name, and 0 is for those
        that look alike.
      images: the training images.

    Returns:
      int (N,), the same for images of a group.
    """
    count, group = len(images.labels), config.decision.group
    if group:
        found = np.zeros(count, int)
        # No piece lies half in one folder and half in another.
        kinds = list(zip(images.labels, map(records.added_by, images.files), strict=True))
        for number, kind in enumerate(sorted(set(kinds))):
            own = np.flatnonzero([x == kind for x in kinds])
            found[own] = np.arange(len(own)) // group * len(set(kinds)) + number
        return found
    # Small, brightness and contrast taken away: what is left is what the picture shows.
    small = np.stack([_small(image) for image in images.images])
    some = small[np.unique(np.linspace(0, count - 1, _COMPARED).astype(int))]
    usual = np.median(distance.pdist(some)) if count > 1 else 0.0
    near = neighbors.radius_neighbors_graph(small, max(_NEAR * usual, _ROUNDING))
    number, found = csgraph.connected_components(near)
    if number < count:
        _, firsts = np.unique(found, return_index=True)
        second = np.setdiff1d(np.arange(count), firsts)[0]
        first = firsts[found[second]]
        logging.info(
            '%d training images look like others, such as %s like %s: they count as of one piece',
            *(count - number, images.files[second], images.files[first]),
        )
    return found


def _small(image):
    size = (_SIDE, _SIDE)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    small -= small.mean((0, 1))
    return small.ravel() / (small.std() + 1)


def split(config: ml_collections.ConfigDict, images: Split, groups: np.ndarray) -> list[np.ndarray]:
    """Parts of the training images, of each class about as many in each.

    Args:
      config: the run's; `decision.parts` is their number, and the seed says what lies in which.
      images: the training images.
      groups: int (N,); images of the same group lie in the same part.

    Returns:
      Of each part its images, ascending; none where normal images are of fewer than two groups, or,
      without drawn defects, real ones are.
    """
    number, members = config.decision.parts, {}
    for label in np.unique(images.labels):
        own = np.flatnonzero(images.labels == label)
        names, sizes = np.unique(groups[own], return_counts=True)
        members[label] = own, names, sizes
        if label == 0 or not config.drawn.count:  # A head without real defects has drawn ones.
            number = min(number, len(names))
    if number < 2:
        return []
    part_of = np.zeros(len(images.labels), int)
    for own, names, sizes in members.values():
        filled = np.zeros(number, int)
        order = sampling.permutation(len(names), config.seed, sampling.PARTS)
        for i in order[np.argsort(-sizes[order], kind='stable')]:
            smallest = filled.argmin()
            filled[smallest] += sizes[i]
            part_of[own[groups[own] == names[i]]] = smallest
    return [np.flatnonzero(part_of == i) for i in range(number)]


def train(
    job,
    total: int,
    shown: augment.Shown,
    contents: dict,
    mesh: jax.sharding.Mesh | None,
    on_host: bool,
) -> list[dict]:
    """Trains a head for each part, on everything but what was made of its images.

    Each goes on from its own checkpoints in the run's folder, which `forget` removes.

    Args:
      job: the `loop.Job`, whose own head is trained.
      total: the steps that this one has taken.
      shown: what it was trained on.
      contents: the features of that, as `features.training_data` returns them.
      mesh: as of `steps.make_epoch`.
      on_host: likewise.

    Returns:
      The heads' variables, in the parts' order.
    """
    number, config = len(job.parts), job.config.copy_and_resolve_references()
    logging.info('%d heads, each without a part of the images, for the threshold', number)
    if config.positions:
        config.positions = max(1, config.positions // (number + 1))
    else:
        config.batch_size = max(config.batch_size // number, 2)

    kept = [without(shown, part) for part in job.parts]
    orders = [sampling.image_order(config, shown.labels[one], shown.real[one]) for one in kept]
    # Parts differ in size: what one has more of waits for the next epoch.
    per_epoch, batch = (min(n) for n in zip(*(order(0).shape for order in orders), strict=True))
    # From the beginning, if the run itself went on from another one.
    config.epochs, config.epochs_before = max(1, round(total / per_epoch)), 0
    # Devices share a batch equally: its first images fill it up.
    sharing = 1 if mesh is None else mesh.size
    columns = np.arange(-(-batch // sharing) * sharing) % batch

    k_init, k_epochs = jax.random.split(jax.random.key(config.seed))
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)
    begun = devices.put(mesh, jax.jit(lambda key: steps.init_state(config, key, channels))(k_init))
    # One after the other: mapped over the heads, a CPU's products of matrices take longer.
    run_epoch, heads = steps.make_epoch(config, per_epoch, mesh, False, on_host), []
    done = saved = 0
    try:
        with signals.held() as wait:
            for number, (one, following) in enumerate(zip(kept, orders, strict=True), 1):
                where = job.folder / _HEADS / str(number)
                manager = checkpoint.open_manager(where, keep=1, writes=True)
                done, state = checkpoint.restore(manager, begun)
                saved = done

                def train_epoch(epoch, state, one=one, following=following):
                    order = np.int32(one[following(epoch)][:per_epoch, columns])
                    key = devices.put(mesh, jax.random.fold_in(k_epochs, epoch))
                    return run_epoch(state, contents, order, key)[0]

                while done < config.epochs:
                    state = wait(functools.partial(train_epoch, done, state))
                    done += 1
                    if done % config.checkpoint.every == 0 or done == config.epochs:
                        checkpoint.save(manager, done, state)
                        saved = done
                state_here = devices.take_local(mesh, state)
                heads.append(state_here.variables(config.supervision.known))
    except KeyboardInterrupt as e:
        problem = ''
        try:
            if saved < done and devices.is_alone():  # Several processes can only write together.
                checkpoint.save(manager, done, state)
        except UserError as error:
            problem = f'error: {error} '
        raise type(e)(
            f'{problem}the network is trained and saved in {job.folder}, the same command goes on '
            'with the threshold.'
        ) from None
    return heads


def without(shown: augment.Shown, part: np.ndarray) -> np.ndarray:
    """Which of the images that are shown have nothing of a part's training images."""
    made_of = np.stack([shown.sources, shown.donors])
    return np.flatnonzero(~np.isin(made_of, part).any(0))


def forget(folder: pathlib.Path) -> None:
    """Removes the heads' checkpoints: their scores are written."""
    if devices.is_first():
        shutil.rmtree(folder / _HEADS, ignore_errors=True)
