"""The order of an epoch's images, and what is chosen by seed."""

import itertools

import numpy as np
import pytest

from ssn_jax.config import default_config
from ssn_jax.data import sampling


@pytest.mark.parametrize('images, batch_size', [(10, 3), (12, 4), (5, 32), (4, 4), (7, 1), (1, 2)])
def test_a_uniform_epoch_shows_every_image_at_most_once(images, batch_size):
    order = sampling.uniform_order(0, 1, images, batch_size)
    batch = min(images, batch_size)
    assert order.shape == (images // batch, batch)
    assert len(set(order.ravel().tolist())) == order.size
    assert order.min() >= 0 and order.max() < images


def test_orders_follow_from_seed_and_epoch_alone():
    for make in (
        lambda seed, epoch: sampling.uniform_order(seed, epoch, 40, 4),
        lambda seed, epoch: sampling.balanced_order(seed, epoch, 40, 12, 4),
    ):
        first = make(3, 5)
        np.testing.assert_array_equal(first, make(3, 5))
        for other in (make(3, 6), make(4, 5)):
            assert first.shape == other.shape and (first != other).any()
        assert (np.diff(first.ravel()) < 0).any()  # Shuffled at all.


def test_balanced_epochs_by_hand():
    """5 normal images and 4 variants of one defective one: 8 images an epoch, 4 of each kind.

    Least seen first: the walk takes 4 normals an epoch, so after epochs 0 to 4 (20 of them) each
    of the 5 was seen 4 times, and never has one been seen twice more often than another.
    """
    seen = np.zeros(5, int)
    for epoch in range(5):
        order = sampling.balanced_order(7, epoch, normal=5, defective=4, batch_size=8)
        assert order.shape == (1, 8)
        shown = np.bincount(order.ravel(), minlength=9)
        assert shown[5:].tolist() == [1, 1, 1, 1]
        assert shown[:5].sum() == 4
        # Nobody is taken who was seen more often than somebody who is left out.
        assert seen[shown[:5] > 0].max() <= seen[shown[:5] == 0].min(initial=99)
        seen += shown[:5]
        assert seen.max() - seen.min() <= 1
    assert seen.tolist() == [4] * 5


def test_fewer_normal_than_defective_images_are_shown_several_times():
    order = sampling.balanced_order(0, 3, normal=3, defective=8, batch_size=16)
    shown = np.bincount(order.ravel(), minlength=11)
    assert shown[3:].tolist() == [1] * 8
    assert sorted(shown[:3].tolist()) == [2, 3, 3]


def test_batches_of_a_balanced_epoch_mix_both_kinds():
    order = sampling.balanced_order(0, 1, normal=500, defective=96, batch_size=32)
    assert order.shape == (6, 32)
    shares = (order >= 500).mean(1)
    assert 0.2 < shares.min() and shares.max() < 0.8


def test_what_does_not_fill_a_batch_is_another_each_time():
    orders = [sampling.balanced_order(0, epoch, 100, 20, 32) for epoch in range(20)]
    assert {order.shape for order in orders} == {(1, 32)}
    defective = np.concatenate([order.ravel() for order in orders])
    assert len(set(defective[defective >= 100])) == 20


def test_a_larger_choice_holds_the_smaller_one():
    candidates = np.array([3, 5, 8, 13, 21, 34])
    choices = [sampling.choose(1, candidates, n).tolist() for n in range(7)]
    for smaller, larger in itertools.pairwise(choices):
        assert set(smaller) < set(larger) <= set(candidates.tolist())
        assert larger == sorted(larger)
    assert any(sampling.choose(s, candidates, 3).tolist() != choices[3] for s in range(2, 6))


@pytest.mark.parametrize('drawn, real, times', [(0, 5, 1), (40, 5, 2), (90, 5, 6), (40, 0, 1)])
def test_real_defects_are_a_third_of_the_drawn_ones(drawn, real, times):
    config = default_config()
    config.batch_size = 4
    labels = np.repeat([0, 1], [20, real + drawn])
    order = sampling.image_order(config, labels, np.repeat([False, True, False], [20, real, drawn]))
    shown = np.bincount(order(0).ravel(), minlength=len(labels))
    counts = np.split(shown, [20, 20 + real])
    rest = (drawn + times * real) * 2 % 4
    assert abs(counts[1] - times).sum() + abs(counts[2] - 1).sum() <= rest
    assert counts[0].sum() == shown.sum() - counts[1].sum() - counts[2].sum()
