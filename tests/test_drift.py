"""Whether scores have changed: how often that is told wrongly, and how soon rightly."""

import numpy as np
import pytest
from scipy import stats

import ssn_jax
from ssn_jax import drift


def first(known, scores, rate=0.05):
    """How many scores it takes until a change is noticed; None if none is."""
    watch = drift.Watch(known, rate)
    found = [i for i, score in enumerate(scores, 1) if watch.update(score)]
    assert len(found) <= 1 and watch.noticed == bool(found)
    return (found or [None])[0]


@pytest.mark.parametrize('n', [1, 5, 100])
@pytest.mark.parametrize('ties', [False, True])
def test_alarms_without_a_change_are_as_rare_as_is_said(n, ties):
    rng, alarms = np.random.default_rng([n, ties]), 0
    for _ in range(300):
        scores = rng.gamma(2.0, size=n + 150)
        scores = np.round(scores) if ties else scores
        alarms += first(scores[:n], scores[n:]) is not None
    # So many at 0.05 each, or more, happen once in a thousand times.
    assert alarms <= stats.binom.ppf(0.999, 300, 0.05)


def test_ranks_are_uniform_and_their_bets_fair():
    """Alarms are rare enough, and also not rarer than they must be: nothing is given away."""
    rng, final = np.random.default_rng(0), []
    for _ in range(3000):
        scores = np.round(rng.normal(size=13), 1)
        watch = drift.Watch(scores[:5], 1e-9)
        for score in scores[5:]:
            watch.update(score)
        final.append(watch._capital.sum())
    assert abs(np.mean(final) - 1) < 4 * np.std(final) / np.sqrt(len(final))


@pytest.mark.parametrize('change, said', [(1.0, 'risen'), (-1.0, 'fallen')])
@pytest.mark.parametrize('before', [0, 1000])
def test_a_change_by_a_standard_deviation_is_noticed(change, said, before):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        known, usual, other = rng.normal(size=200), rng.normal(size=before), rng.normal(size=100)
        watch = drift.Watch(known)
        assert not any(watch.update(score) for score in usual)
        assert any(watch.update(score) for score in other + change)
        assert said in str(watch) and watch.fewest <= watch.seen - before < 100


def test_a_few_defects_are_no_change_and_a_run_of_them_is():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=500)
        scores[rng.random(500) < 0.05] = 9
        known = rng.normal(size=200)
        assert first(known, scores, 0.01) is None
        assert first(known, rng.normal(9, 1, 40), 0.01) < 25


def test_fewer_than_it_takes_tell_nothing_and_that_is_said():
    known = np.arange(1000.0)
    watch = drift.Watch(known, 0.01)
    assert watch.fewest == 15
    for score in range(2000, 2014):
        assert not watch.update(score)
    assert 'in 14 images, and fewer than 15' in str(watch)
    for score in range(100):
        watch.update(score)
    assert 'fewer' not in str(watch)


@pytest.mark.parametrize('rate', [0, 1, -0.1, float('nan')])
def test_a_rate_outside_of_its_bounds(rate):
    with pytest.raises(ssn_jax.UserError, match='above 0 and below 1'):
        drift.Watch(np.ones(3), rate)


@pytest.mark.parametrize('known', [[], [1.0, np.nan], [np.inf]])
def test_nothing_is_told_from_scores_that_are_no_numbers(known):
    with pytest.raises(ssn_jax.UserError, match='finite scores'):
        drift.Watch(np.array(known))
    watch = drift.Watch(np.ones(3))
    with pytest.raises(ValueError, match='nan'):
        watch.update(np.nan)
    assert watch.seen == 0
