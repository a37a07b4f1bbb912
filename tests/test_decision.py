"""Thresholds, what they promise, and how rare a score is."""

import dataclasses

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest
from test_supervision import config_of

from ssn_jax import decision

COUNTS = strategies.integers(1, 60)


def make_scores(values, labels, part='1', defects=None):
    values = np.float32(values)
    named = [part] * len(values), [f'{i}.png' for i in range(len(values))]
    return decision.Scores(*named, defects or ['x'] * len(values), np.array(labels), values, values)


def test_a_run_with_defects_takes_youdens_threshold():
    scores = make_scores([0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 1])
    chosen = decision.decide(config_of('labels'), scores + make_scores([9], [0], 'test'))
    # From 4 on: 2 of 3 defects, no normal image. From 2 on: all of them, 1 of 3.
    assert (chosen['threshold'], chosen['tpr'], chosen['fpr']) == (4.0, pytest.approx(2 / 3), 0.0)
    assert (chosen['split'], chosen['method'], chosen['images']) == ('out of part', 'Youden', 6)
    assert chosen['probability'] == pytest.approx(1 / (1 + np.exp(-4)))
    # Where a missed defect is as bad as two false alarms, all are to be found.
    chosen = decision.by_youden(scores.score, scores.label, 2)
    assert (chosen['threshold'], chosen['tpr']) == (2.0, 1.0) and '2 false' in chosen['method']


def test_a_run_without_defects_keeps_to_a_rate_of_false_alarms():
    """Of 9 scores the second highest is reached by 2 of 10 at most, 0.25 asked for."""
    config = config_of('none')
    config.decision.fpr = 0.25
    scores = make_scores(range(9), [0] * 9)
    chosen = decision.decide(config, scores + make_scores([20], [1]))
    assert 7 < chosen['threshold'] < 7.001 and chosen['fpr'] == pytest.approx(1 / 9)
    assert (chosen['promised'], chosen['asked'], chosen['tpr']) == (0.2, 0.25, None)
    assert (chosen['split'], chosen['images']) == ('out of part (normal)', 9)
    # Beta(2, 8): 1 - (1 - x)^9 - 9 x (1 - x)^8 is its distribution function.
    interval = decision.by_rate(scores.score, 0.25)['interval']
    below = [1 - (1 - x) ** 9 - 9 * x * (1 - x) ** 8 for x in interval]
    np.testing.assert_allclose(below, [0.05, 0.95], rtol=1e-9)
    assert chosen['interval'] == decision.by_rate(scores.score, 0.25, of_parts=True)['interval']
    chosen = decision.decide(config, make_scores(range(9), [0] * 9, 'train'))
    assert chosen['split'] == 'train (normal)' and not {'promised', 'interval'} & set(chosen)


@pytest.mark.parametrize(('rate', 'told'), [(0.25, False), (0.2, False), (0.1, True), (0, False)])
def test_too_few_images_for_a_rate_are_told(rate, told, caplog):
    found = decision.by_rate(np.float32([1, 2, 3, 4]), rate)
    assert ('4 normal images can promise none below 0.2' in caplog.text) == told
    assert ('9 images could' in caplog.text) == told
    assert found['promised'] == 0.2 and found['threshold'] > 4


@pytest.mark.parametrize('scores', [[], [np.nan, 1], [np.inf, 1]])
def test_no_threshold_from_scores_that_are_no_numbers(scores):
    chosen = decision.decide(config_of('none'), make_scores(scores, [0] * len(scores)))
    assert chosen['threshold'] is None and 'finite scores' in chosen['undefined']


@hypothesis.settings(deadline=None)
@hypothesis.given(COUNTS, strategies.floats(0, 1), strategies.booleans(), COUNTS)
@hypothesis.example(3, 5e-324, False, 0)
def test_a_rate_is_kept_among_scores_any_of_which_may_be_the_new_one(n, fpr, ties, seed):
    """Of n + 1 scores each is as likely to be the new one: so often it is called defective."""
    every = np.random.default_rng(seed).normal(size=n + 1).astype(np.float32)
    every = np.round(every) if ties else every
    alarms = []
    for i in range(n + 1):
        found = decision.by_rate(np.delete(every, i), fpr)
        alarms.append(every[i] >= found['threshold'])
    assert np.mean(alarms) <= found['promised'] + 1e-9
    assert found['promised'] <= max(fpr, 1 / (n + 1)) + 1e-9
    if not ties:  # And not more seldom than it must.
        assert np.mean(alarms) == pytest.approx(found['promised'])
        assert found['promised'] > min(fpr, n / (n + 1)) - 1 / (n + 1) - 1e-9


def test_the_rate_that_is_seen_lies_in_the_interval_as_often_as_it_says():
    """Scores are uniform, so a threshold's rate is known: 1 minus it."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        found = decision.by_rate(rng.random(100).astype(np.float32), 0.05)
        low, high = found['interval']
        inside += low <= 1 - found['threshold'] <= high
    # Within four standard deviations of a binomial of 400.
    assert abs(inside / 400 - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 400)


def test_the_interval_is_wider_where_the_heads_of_the_parts_were_seen_to_differ():
    """At 10 % its variance is 2.7 times as large, so it is about 1.64 times as wide."""
    scores = np.random.default_rng(0).random(1999).astype(np.float32)
    for fpr, wider in ((0.05, np.sqrt(1.8)), (0.1, np.sqrt(2.7))):
        plain, found = (decision.by_rate(scores, fpr, of_parts=x)['interval'] for x in (0, 1))
        assert (found[1] - found[0]) / (plain[1] - plain[0]) == pytest.approx(wider, rel=0.02)
        assert found[0] < plain[0] < fpr < plain[1] < found[1]


def test_p_values_by_hand():
    normal = np.float32([3, 1, 2, 2])
    found = decision.p_values(np.float32([0, 2, 2.5, 3, 4]), normal)
    np.testing.assert_allclose(found, [1, 4 / 5, 2 / 5, 2 / 5, 1 / 5])


def test_evidence_by_hand():
    """Of 1 to 100 the median is 50.5, and the highest five reach 96."""
    maxima = np.random.default_rng(0).permutation(np.arange(1, 101)).astype(np.float32)
    logits = np.float32([-1e9, 50.5, (50.5 + 96) / 2, 96, 2 * 96 - 50.5, 1e9, np.nan])
    found = decision.evidence(logits.reshape(7, 1), maxima).ravel()
    np.testing.assert_allclose(found, [0, 0, 0.25, 0.5, 1, 1, np.nan], atol=1e-6)
    assert found.dtype == np.float32
    # The same of logits on any other scale; but without any to compare with, probabilities.
    again = decision.evidence(logits * 3 - 7, maxima * 3 - 7)
    np.testing.assert_allclose(again, found, atol=1e-5)
    np.testing.assert_array_equal(decision.evidence(logits[1:6], ()), decision.sigmoid(logits[1:6]))
    alike = decision.evidence(np.float32([1, 2, 3]), np.float32([2, 2]))
    np.testing.assert_array_equal(alike, [0, 0, 1])


def test_recall_of_each_kind_of_defect():
    scores = make_scores([1, 2, 3, 9], [1, 1, 1, 0], 'test', ['a', 'a', 'b', 'good'])
    found = decision.recall_by_defect(scores, 2.0)
    assert list(found) == ['a', 'b'] and (found['a']['found'], found['a']['images']) == (1, 2)
    # All of one: 0.05 of the chances lie below the least rate, x^1 = 0.05.
    np.testing.assert_allclose(found['b']['interval'], [0.05, 1])


def test_scores_as_a_file():
    first = make_scores([1 / 3, -2], [0, 1], '2', ['good', 'a, "b"'])
    both = first + make_scores([5], [0], 'test')
    again = decision.Scores.from_csv(both.to_csv())
    for field in dataclasses.fields(again):
        a, b = (getattr(x, field.name) for x in (both, again))
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(again.unseen().score, np.float32([1 / 3]))
    # New images take their place; those that were trained on say nothing.
    np.testing.assert_array_equal((both + make_scores([7], [0], 'new')).unseen().score, [7])
    assert not make_scores([1], [0], 'train').unseen().score.size
    with pytest.raises((KeyError, ValueError)):
        decision.Scores.from_csv(both.to_csv().replace('score', 'other'))


def test_rates_by_hand():
    scores, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 0, 1])
    assert decision.rates(scores, labels, 3.0) == {'tpr': 0.5, 'fpr': 0.5}
    assert decision.rates(scores, labels * 0, 3.0) == {'tpr': None, 'fpr': 0.5}
