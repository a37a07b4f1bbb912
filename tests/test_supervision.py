"""What a run may know of its defects: choices, flips, masks at the feature grid, noise."""

import dataclasses

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import supervision, synthesis
from ssn_jax.config import default_config
from ssn_jax.data import Split, augment
from ssn_jax.errors import UserError
from ssn_jax.losses import targets, terms as loss_terms

SIZE = (8, 12)


def make_split(labels, has_mask=None, size=SIZE):
    """Images whose pixels all hold their number; a defect is the upper left quarter."""
    labels = np.array(labels, np.int32)
    n = len(labels)
    has_mask = np.ones(n, bool) if has_mask is None else np.array(has_mask, bool)
    masks = np.zeros((n, *size), np.uint8)
    masks[(labels > 0) & has_mask, : size[0] // 2, : size[1] // 2] = 1
    images = np.tile(np.arange(n, dtype=np.uint8)[:, None, None, None], (1, *size, 3))
    names = tuple('defect' if label else 'good' for label in labels)
    return Split(images, masks, has_mask, labels, names, tuple(f'{i}.png' for i in range(n)))


def config_of(kind, **fields):
    config = default_config()
    config.supervision.kind = kind
    config.supervision.update(fields)
    return config


# What is known


def test_without_supervision_only_normal_images_are_left():
    split = supervision.training_split(config_of('none'), make_split([1, 0, 1, 0]))
    assert split.files == ('1.png', '3.png')
    assert not split.labels.any() and not split.masks.any()


def test_labels_leave_no_mask():
    given = make_split([1, 0, 1, 0])
    split = supervision.training_split(config_of('labels'), given)
    assert split.labels.tolist() == [1, 0, 1, 0]
    assert split.has_mask.tolist() == [False, True, False, True]
    assert not split.masks.any() and given.masks.any()
    assert not augment.Shown(default_config(), split).masked


def test_labels_alone_are_the_same_whatever_the_masks_say():
    given = make_split([1, 0, 1, 0])
    poisoned = dataclasses.replace(given, masks=np.ones_like(given.masks))
    one, other = (supervision.training_split(config_of('labels'), x) for x in (given, poisoned))
    assert all(np.array_equal(getattr(one, x), getattr(other, x)) for x in vars(one))


def test_auto_takes_what_there_is():
    split = supervision.training_split(config_of('auto'), make_split([1, 0, 1, 0], [1, 1, 0, 1]))
    assert split.labels.tolist() == [1, 0, 1, 0] and split.has_mask.tolist() == [1, 1, 0, 1]
    assert split.masks[0].any() and not split.masks[1:].any()
    assert supervision.training_split(config_of('auto'), make_split([0, 0])).files == (
        '0.png',
        '1.png',
    )


@pytest.mark.parametrize('fraction, count', [(0, 0), (0.1, 1), (0.25, 1), (0.5, 3), (1, 5)])
def test_a_fraction_of_the_masks(fraction, count):
    """Of 5 defective images, halves rounded up: 0.5, 1.25 -> 1, 2.5 -> 3."""
    given = make_split([1, 1, 0, 1, 1, 1])
    split = supervision.training_split(config_of('masks', mask_fraction=float(fraction)), given)
    known = split.has_mask & (split.labels > 0)
    assert known.sum() == count
    assert (split.masks[known] == given.masks[known]).all()
    assert not split.masks[~known].any() and split.has_mask[2]
    assert supervision.masked_files(split) == [f'{i}.png' for i in np.flatnonzero(known)]


def test_a_number_of_masks_chosen_by_seed():
    given, chosen = make_split([1] * 8 + [0]), set()
    for seed in range(6):
        config = config_of('masks', mask_count=3)
        config.seed = seed
        files = supervision.masked_files(supervision.training_split(config, given))
        assert len(files) == 3
        chosen.add(tuple(files))
    assert len(chosen) > 1


def test_masks_that_are_not_there_or_empty_are_not_chosen():
    given = make_split([1, 1, 1, 0], has_mask=[True, False, True, True])
    given.masks[2] = 0  # Lost in resizing.
    split = supervision.training_split(config_of('masks'), given)
    assert supervision.masked_files(split) == ['0.png']
    with pytest.raises(UserError, match='only 1 defective'):
        supervision.training_split(config_of('masks', mask_count=2), given)


@pytest.mark.parametrize('kind', ['labels', 'masks'])
def test_supervision_needs_defects(kind):
    with pytest.raises(UserError, match=r'no defective image.*train/DEFECT'):
        supervision.training_split(config_of(kind), make_split([0, 0]))


@pytest.mark.parametrize('kind', ['none', 'labels', 'masks'])
def test_training_needs_normal_images(kind):
    with pytest.raises(UserError, match='no normal image'):
        supervision.training_split(config_of(kind), make_split([1, 1]))


# Flips


def test_flipped_defects_follow_the_normal_images_with_their_masks():
    """As they are, upside down, mirrored, turned by 180°: what lies in a corner tells."""
    given = make_split([1, 0, 1, 0, 0])
    given.images[:, 0, 0] = 200  # The upper left corner, which the masks mark too.
    shown = augment.Shown(default_config(), given)
    images, masks = zip(*(shown[i] for i in range(len(shown))), strict=True)
    assert [image[4, 6, 0] for image in images] == [1, 3, 4] + 4 * [0, 2]
    assert shown.labels.tolist() == [0] * 3 + [1] * 8
    assert shown.has_mask.all() and shown.masked
    corners = [(0, 0), (-1, 0), (0, -1), (-1, -1)]
    for i, corner in enumerate(np.repeat(corners, 2, axis=0), 3):
        assert images[i][tuple(corner)].tolist() == [200] * 3
        assert masks[i][tuple(corner)] == 1 and masks[i].sum() == 4 * 6
    assert not any(mask.any() for mask in masks[:3])


# Masks at the feature grid


def test_distance_weights_match_published_ones():
    expected = rule.reference('distance_weights')
    mask = (expected['mask'] > 0).astype(np.uint8)
    dilated = cv2.dilate(mask, np.ones((7, 7), np.uint8))
    np.testing.assert_array_equal(dilated, expected['dilated'])
    weights = targets.distance_weights(dilated)
    rule.check_close(weights, expected['weights'], 8)


def test_distance_weights_by_hand():
    """A bar of 5 x 3 in the open: 1 from the edge, 2 in its middle row's inner part."""
    mask = np.zeros((7, 9), np.uint8)
    mask[2:5, 2:7] = 1
    edge, middle = 3 * (1 / 2) ** 2, 3.0
    expected = np.ones((7, 9))
    expected[2:5, 2:7] = edge
    expected[3, 3:6] = middle
    rule.check_close(targets.distance_weights(mask), expected, 8)
    assert (targets.distance_weights(mask * 0) == 1).all()
    full = targets.distance_weights(np.ones((5, 6), np.uint8))
    rule.check_close(full, np.full((5, 6), 3.0), 8)


def test_truth_at_the_feature_grid():
    """A defect of 2 x 2 pixels grows to 8 x 8 and covers 2 x 2 positions of a grid of quarters."""
    split = make_split([0, 1, 1], has_mask=[True, True, False], size=(16, 24))
    split.masks[:] = 0
    split.masks[1, 7:9, 11:13] = 1
    truth = targets.truth(default_config().supervision, split.masks, (4, 6))
    assert {name: x.dtype for name, x in truth.items()} == dict.fromkeys(
        ('mask', 'weight'), np.float32
    )
    expected = np.zeros((3, 4, 6, 1))
    expected[1, 1:3, 2:4] = 1
    np.testing.assert_array_equal(truth['mask'], expected)
    # The four pixels in the middle of a position are 2 and 3 from the edge, of 4 at most:
    # 3 * (2 or 3 / 4)^2, of which three have the shorter way.
    inside = (3 * 3 * (2 / 4) ** 2 + 3 * (3 / 4) ** 2) / 4
    rule.check_close(truth['weight'][expected > 0], np.full(4, inside), 16)
    assert (truth['weight'][[0, 2]] == 1).all()
    # From the first position beside the defect to the second: what lies in the grid of them.
    truth = targets.truth(default_config().supervision, split.masks, (4, 6), (0, 2))
    np.testing.assert_array_equal(truth['mask'], expected)
    assert (truth['beside'][1] == 1 - expected[1]).all() and not truth['beside'][[0, 2]].any()
    truth = targets.truth(default_config().supervision, split.masks, (4, 6), (1, 2))
    edges = np.zeros((4, 6, 1))
    edges[:, [0, -1]] = 1
    np.testing.assert_array_equal(truth['beside'][1], edges)


# Noise and losses


def test_noise_keeps_off_true_defects_by_hand():
    """A normal image, a defect with its mask, one without; noise is drawn everywhere but once."""
    drawn = np.ones((6, 1, 3, 1), np.float32)
    drawn[3] = 0  # The normal image's second copy stays as it is.
    truth = {
        'label': jnp.array([0.0, 1.0, 1.0]),
        'known': jnp.array([1.0, 1.0, 0.0]),
        'mask': jnp.zeros((3, 1, 3, 1)).at[1, 0, 0].set(1),
        'weight': jnp.ones((3, 1, 3, 1)).at[1].set(jnp.array([[[3.0], [0.5], [1.0]]])),
    }
    placed = synthesis.place(drawn, truth)
    once, masked, unknown = [1, 1, 1], [0, 1, 1], [0, 0, 0]
    assert placed.noise[:, 0, :, 0].tolist() == [once, masked, unknown, [0, 0, 0], masked, unknown]
    assert placed.target[:, 0, :, 0].tolist() == [
        *(once, [1, 1, 1], unknown),
        *([0, 0, 0], [1, 1, 1], unknown),
    ]
    # The distance weight holds on the true defect alone.
    assert placed.weight[1, 0, :, 0].tolist() == placed.weight[4, 0, :, 0].tolist() == [3, 1, 1]
    assert placed.taught.ravel().tolist() == [1, 1, 0, 1, 1, 0]
    assert placed.labels.tolist() == [1, 1, 1, 0, 1, 1]


def test_without_truth_all_images_are_normal():
    drawn = rule.draw_input('drawn', (4, 3, 5, 1)) > 0
    placed = synthesis.place(drawn.astype(np.float32), {})
    np.testing.assert_array_equal(placed.noise, drawn)
    np.testing.assert_array_equal(placed.target, drawn)
    assert (placed.weight == 1).all() and (placed.taught == 1).all()
    np.testing.assert_array_equal(placed.labels, drawn.any((1, 2, 3)))


def test_an_unmasked_defect_teaches_the_score_alone():
    """Two images of two positions; the second one's map has no target, by hand."""
    logits = jnp.array([0.2, -1.0, 9.0, -9.0]).reshape(2, 1, 2, 1)
    target = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(2, 1, 2, 1)
    weight = jnp.array([3.0, 0.5, 1.0, 1.0]).reshape(2, 1, 2, 1)
    taught = jnp.array([1.0, 0.0]).reshape(2, 1, 1, 1)
    scores, labels = jnp.array([0.0, 0.0]), jnp.array([1.0, 1.0])
    _, terms = loss_terms.discriminator_loss(logits, scores, target, labels, weight, taught)
    rule.check_close(terms['map_l1'], 3 * (0.5 - 0.2), 16)  # -1 is beyond 0.5.
    focal = loss_terms.focal(logits, target).ravel()
    rule.check_close(terms['map_focal'], (3 * focal[0] + 0.5 * focal[1]) / 2, 16)
    rule.check_close(terms['score_focal'], 0.5**4 * np.log(2), 16)
