"""Losses against the published numbers, closed forms, and inputs that could make a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import losses


def test_losses_match_published_losses():
    expected = rule.reference('losses')
    logits, target = expected['logits'], expected['target']
    focal = losses.focal(logits, target)
    assert rule.relative_error(focal, expected['focal']) < 1e-4
    assert float(focal.mean()) == pytest.approx(float(expected['focal_mean']), rel=1e-4)
    normal, anomalous = losses.truncated_l1(logits, target)
    assert float(normal) == pytest.approx(float(expected['l1_normal']), rel=1e-4)
    assert float(anomalous) == pytest.approx(float(expected['l1_anomalous']), rel=1e-4)


def test_focal_by_hand():
    """At p = 3/4: (1/4)^4 * log(4/3) for the right target, (3/4)^4 * log(4) for the wrong one."""
    logits = jnp.log(3.0) * jnp.array([1.0, 1.0, -1.0, -1.0])
    right, wrong = 0.25**4 * np.log(4 / 3), 0.75**4 * np.log(4)
    np.testing.assert_allclose(
        losses.focal(logits, jnp.array([1, 0, 0, 1])), [right, wrong, right, wrong], rtol=1e-5
    )


def test_focal_without_gamma_is_cross_entropy():
    logits, target = rule.draw_input('logits', (50,)), np.arange(50) % 2
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.where(target, np.log(p), np.log(1 - p))
    np.testing.assert_allclose(losses.focal(logits, target, gamma=0.0), expected, rtol=1e-5)


@pytest.mark.parametrize('target', [0.0, 1.0])
@pytest.mark.parametrize('logit', [-100.0, 100.0])
def test_focal_at_extreme_logits(logit, target):
    """Certain and right costs nothing; certain and wrong costs its distance, with slope ±1."""
    value, slope = jax.value_and_grad(losses.focal)(jnp.float32(logit), jnp.float32(target))
    wrong = (logit > 0) != (target > 0)
    assert float(value) == pytest.approx(100.0 if wrong else 0.0, abs=1e-4)
    assert float(slope) == pytest.approx(np.sign(logit) if wrong else 0.0, abs=1e-4)


def test_truncated_l1_by_hand():
    logits = jnp.array([[-2.0, -0.5, 0.0, 1.0], [2.0, 0.5, 0.0, -1.0]]).reshape(2, 2, 2, 1)
    target = jnp.array([[0, 0, 0, 0], [1, 1, 1, 0]]).reshape(2, 2, 2, 1)
    normal, anomalous = losses.truncated_l1(logits, target)
    assert float(normal) == pytest.approx((0 + 0 + 0.5 + 1.5 + 0) / 5)
    assert float(anomalous) == pytest.approx((0 + 0 + 0.5) / 3)


def test_mean_where_by_hand():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert float(losses.mean_where(values, jnp.array([[True], [False]]))) == pytest.approx(1.5)
    weights = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    assert float(losses.mean_where(values, weights)) == pytest.approx((1 + 12) / 4)
    assert float(losses.mean_where(values, jnp.zeros((2, 2)))) == 0.0


@pytest.mark.parametrize('target', [0.0, 1.0])
def test_a_mask_of_one_kind_gives_finite_loss_and_gradient(target):
    """No anomalous (or no normal) position in the whole batch: its mean is 0 and not 0/0."""
    logits, scores = rule.draw_input('map', (3, 4, 5, 1)), rule.draw_input('score', (3,))
    mask, labels = jnp.full(logits.shape, target), jnp.full(3, target)
    absent = losses.truncated_l1(logits, mask)[1 - int(target)]
    assert float(absent) == 0.0

    (loss, _), grads = jax.value_and_grad(losses.discriminator_loss, (0, 1), has_aux=True)(
        logits, scores, mask, labels
    )
    assert np.isfinite(loss) and loss > 0
    for grad in grads:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_discriminator_loss_is_the_sum_of_its_terms():
    expected = rule.reference('losses')
    logits, mask = expected['logits'], expected['target']
    scores, labels = logits[:, 3, 5, 0], mask[:, 3, 5, 0]
    loss, terms = losses.discriminator_loss(logits, scores, mask, labels)
    assert float(terms['map_l1']) == pytest.approx(
        float(expected['l1_normal'] + expected['l1_anomalous']), rel=1e-4
    )
    assert float(terms['map_focal']) == pytest.approx(float(expected['focal_mean']), rel=1e-4)
    score_focal = expected['focal'][:, 3, 5, 0].mean()
    assert float(terms['score_focal']) == pytest.approx(float(score_focal), rel=1e-4)
    assert float(loss) == pytest.approx(sum(map(float, terms.values())), rel=1e-6)
