"""Losses against the published numbers, closed forms, and inputs that could make a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax.losses import terms as loss_terms


def test_losses_match_published_losses():
    expected = rule.reference('losses')
    logits, target = expected['logits'], expected['target']
    focal = loss_terms.focal(logits, target)
    # The published one takes the logarithm of p_t = 1 - p: what p rounds by counts 1 / p_t fold.
    inverse = 1 + np.exp(np.where(target > 0, -logits, logits))
    rule.check_close(focal, expected['focal'], 16, spread=inverse)
    rule.check_close(focal.mean(), expected['focal_mean'], focal.size)
    normal, anomalous = loss_terms.truncated_l1(logits, target)
    rule.check_close(normal, expected['l1_normal'], logits.size)
    rule.check_close(anomalous, expected['l1_anomalous'], logits.size)


def test_focal_by_hand():
    """At p = 3/4: (1/4)^4 * log(4/3) for the right target, (3/4)^4 * log(4) for the wrong one."""
    logits = jnp.log(3.0) * jnp.array([1.0, 1.0, -1.0, -1.0])
    right, wrong = 0.25**4 * np.log(4 / 3), 0.75**4 * np.log(4)
    focal = loss_terms.focal(logits, jnp.array([1, 0, 0, 1]))
    # A product: each value rounds in its own last places.
    rule.check_close(focal, [right, wrong, right, wrong], 64, spread=0)


def test_focal_without_gamma_is_cross_entropy():
    logits, target = rule.draw_input('logits', (50,)), np.arange(50) % 2
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.where(target, np.log(p), np.log(1 - p))
    rule.check_close(loss_terms.focal(logits, target, gamma=0.0), expected, 16)


@pytest.mark.parametrize('target', [0.0, 1.0])
@pytest.mark.parametrize('logit', [-100.0, 100.0])
def test_focal_at_extreme_logits(logit, target):
    """Certain and right costs nothing; certain and wrong costs its distance, with slope ±1."""
    value, slope = jax.value_and_grad(loss_terms.focal)(jnp.float32(logit), jnp.float32(target))
    wrong = (logit > 0) != (target > 0)
    rule.check_close(value, 100.0 if wrong else 0.0, 16, spread=1)
    rule.check_close(slope, np.sign(logit) if wrong else 0.0, 16, spread=1)


def test_truncated_l1_by_hand():
    logits = jnp.array([[-2.0, -0.5, 0.0, 1.0], [2.0, 0.5, 0.0, -1.0]]).reshape(2, 2, 2, 1)
    target = jnp.array([[0, 0, 0, 0], [1, 1, 1, 0]]).reshape(2, 2, 2, 1)
    normal, anomalous = loss_terms.truncated_l1(logits, target)
    assert float(normal) == pytest.approx((0 + 0 + 0.5 + 1.5 + 0) / 5)
    assert float(anomalous) == pytest.approx((0 + 0 + 0.5) / 3)


def test_mean_where_by_hand():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert float(loss_terms.mean_where(values, jnp.array([[True], [False]]))) == pytest.approx(1.5)
    weights = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    assert float(loss_terms.mean_where(values, weights)) == pytest.approx((1 + 12) / 4)
    assert float(loss_terms.mean_where(values, jnp.zeros((2, 2)))) == 0.0


@pytest.mark.parametrize('target', [0.0, 1.0])
def test_a_mask_of_one_kind_gives_finite_loss_and_gradient(target):
    """No anomalous (or no normal) position in the whole batch: its mean is 0 and not 0/0."""
    logits, scores = rule.draw_input('map', (3, 4, 5, 1)), rule.draw_input('score', (3,))
    mask, labels = jnp.full(logits.shape, target), jnp.full(3, target)
    absent = loss_terms.truncated_l1(logits, mask)[1 - int(target)]
    assert float(absent) == 0.0

    (loss, _), grads = jax.value_and_grad(loss_terms.discriminator_loss, (0, 1), has_aux=True)(
        logits, scores, mask, labels
    )
    assert np.isfinite(loss) and loss > 0
    for grad in grads:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_discriminator_loss_is_the_sum_of_its_terms():
    expected = rule.reference('losses')
    logits, mask = expected['logits'], expected['target']
    scores, labels = logits[:, 3, 5, 0], mask[:, 3, 5, 0]
    loss, terms = loss_terms.discriminator_loss(logits, scores, mask, labels)
    l1 = expected['l1_normal'] + expected['l1_anomalous']
    rule.check_close(terms['map_l1'], l1, logits.size)
    rule.check_close(terms['map_focal'], expected['focal_mean'], logits.size)
    rule.check_close(terms['score_focal'], expected['focal'][:, 3, 5, 0].mean(), 16)
    rule.check_close(loss, sum(map(float, terms.values())), 3)
