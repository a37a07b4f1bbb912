"""Thresholds: on which images they are chosen, and how."""

import numpy as np
import pytest
from test_supervision import config_of, make_split

from ssn_jax import decision


def scores_of(images):
    """An image's score is its number."""
    return images[:, 0, 0, 0].astype(np.float32)


def test_a_run_with_defects_takes_youdens_threshold():
    trained, held_out = make_split([0, 0, 1, 0, 1, 1]), make_split([])
    chosen = decision.decide(config_of('labels'), scores_of, trained, held_out)
    # From 4 on: 2 of 3 defects, no normal image. From 2 on: all of them, 1 of 3.
    assert (chosen['threshold'], chosen['tpr'], chosen['fpr']) == (4.0, pytest.approx(2 / 3), 0.0)
    assert (chosen['split'], chosen['method'], chosen['images']) == ('train', 'Youden', 6)
    assert chosen['probability'] == pytest.approx(1 / (1 + np.exp(-4)))


def test_a_run_without_defects_keeps_to_a_rate_of_false_alarms():
    config = config_of('none')
    config.decision.fpr = 0.25
    # Defects among the images kept aside do not count.
    held_out = make_split([0, 0, 0, 0, 1])
    chosen = decision.decide(config, scores_of, make_split([0] * 9), held_out)
    assert 2 < chosen['threshold'] <= 3 and chosen['fpr'] == 0.25 and chosen['tpr'] is None
    assert (chosen['split'], chosen['images']) == ('held out (normal)', 4)
    assert '0.25' in chosen['method']
    chosen = decision.decide(config, scores_of, make_split([0] * 8), make_split([]))
    assert (chosen['split'], chosen['images']) == ('train (normal)', 8)


@pytest.mark.parametrize(('rate', 'told'), [(0.25, False), (0.2, True), (0.0, False)])
def test_too_few_images_for_a_rate_are_told(rate, told, caplog):
    config = config_of('none')
    config.decision.fpr = rate
    decision.decide(config, scores_of, make_split([0] * 4), make_split([]))
    assert ('chosen on 4 normal images: too few' in caplog.text) == told


def test_no_threshold_from_scores_that_are_no_numbers():
    chosen = decision.decide(
        config_of('labels'), lambda x: scores_of(x) * np.nan, make_split([0, 1]), make_split([])
    )
    assert chosen['threshold'] is None and 'non-finite' in chosen['undefined']


def test_rates_by_hand():
    scores, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 0, 1])
    assert decision.rates(scores, labels, 3.0) == {'tpr': 0.5, 'fpr': 0.5}
    assert decision.rates(scores, labels * 0, 3.0) == {'tpr': None, 'fpr': 0.5}
