"""The loss of sampled positions: which ones, what they teach, and that whole runs learn from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssn_jax import losses, map_loss, steps
from ssn_jax.config import default_config
from ssn_jax.models.features import upscale_pool

CHANNELS = (5, 9)


def make_layers(n, height=4, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(n, height, width, CHANNELS[0])), jnp.float32),
        jnp.asarray(rng.normal(size=(n, height // 2, width // 2, CHANNELS[1])), jnp.float32),
    )


def make_config(**fields):
    config = default_config()
    config.image_score, config.noise.std, config.noise.unit = 'map', 0.5, 'feature_std'
    config.update_from_flattened_dict(fields)
    return config


def test_positions_of_a_defect_and_of_normal_images():
    """Normal image: any position, all alike. Defect: inside its mask. Unknown mask: nothing."""
    layers, grid = make_layers(3), (8, 12)
    mask = np.zeros((3, *grid, 1), np.float32)
    mask[1, 2:4, 5:9] = 1
    weight = np.ones_like(mask)
    weight[1, 3] = 0.25
    batch = {'label': jnp.array([0.0, 1.0, 1.0]), 'mask': mask, 'weight': jnp.asarray(weight)}
    count = 4000
    rows, defective, weights, normal = map_loss._sample(
        jax.random.key(0), batch | {'layers': layers}, count
    )
    features = np.asarray(upscale_pool(layers)).reshape(3, -1, sum(CHANNELS))

    def places(image):
        """Which positions of an image its rows are."""
        own = np.asarray(rows).reshape(3, count, -1)[image]
        found = np.abs(own[:, None] - features[image]).max(-1)
        assert found.min(1).max() < 1e-4
        return found.argmin(1)

    histogram = np.bincount(places(0), minlength=96)
    assert abs(histogram - count / 96).max() < 6 * np.sqrt(count / 96)
    inside = np.flatnonzero(mask[1].reshape(-1))
    assert set(places(1)) == set(inside)
    defective, weights = np.asarray(defective).reshape(3, -1), np.asarray(weights).reshape(3, -1)
    assert (defective == np.array([[0], [1], [1]])).all()
    np.testing.assert_array_equal(normal, 1 - defective.reshape(-1))
    assert (weights[0] == 1).all()
    np.testing.assert_array_equal(weights[1], weight[1].reshape(-1)[places(1)])
    assert (weights[2] == 0).all()


@pytest.mark.parametrize('kind', ['l1_focal', 'cross_entropy'])
def test_loss_of_all_positions_by_hand(kind):
    """One normal and one defective image, no noise: the averages over their positions."""
    config = make_config(**{'noise.std': 0.0, 'map_loss': kind})
    layers = make_layers(2)
    mask = np.zeros((2, 8, 12, 1), np.float32)
    mask[1, 1:4, 1:4] = 1
    batch = {'layers': layers, 'label': jnp.array([0.0, 1.0]), 'mask': jnp.asarray(mask)}
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    loss_fn = steps.config_loss(config)
    loss, (terms, stats) = loss_fn(state.params, {}, state.batch_stats, batch, jax.random.key(2))

    network = steps.build_network(config)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    adapted = network.apply(variables, upscale_pool(layers), method='adapt')
    flat = adapted.reshape(-1, adapted.shape[-1])
    seen = jnp.concatenate([flat, flat[::2]])[:, None, None, :]
    logits, updates = network.apply(
        variables, seen, train=True, method='segment', mutable=['batch_stats']
    )
    logits, m = np.asarray(logits)[:, 0, 0, 0], mask.reshape(-1)
    # Noise that is none: every other normal position counts once more, as an anomaly.
    normal, noisy = logits[:96], logits[192:][: 96 // 2]
    anomalous = np.concatenate([logits[96:192][m[96:] > 0], noisy])
    if kind == 'l1_focal':
        expected = np.maximum(0.5 + normal, 0).mean() + np.maximum(0.5 - anomalous, 0).mean()
        each = np.concatenate([losses.focal(normal, 0 * normal), losses.focal(anomalous, 1.0)])
        expected += each.mean()
    else:
        expected = np.log1p(np.exp(normal)).mean() + np.log1p(np.exp(-anomalous)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(terms['loss'], expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(updates['batch_stats']), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('kind', ['static', 'learned'])
def test_training_on_a_few_positions_learns(kind):
    config = make_config(**{'noise.kind': kind, 'positions': 16, 'noise.shell': (0.5, 1.0)})
    config.batch_size, config.epochs = 4, 20
    layers = make_layers(4, 8, 8)
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    epoch, history = steps.make_epoch(config, 1), []
    for i in range(20):
        state, metrics = epoch(state, {'layers': layers}, np.arange(4)[None], jax.random.key(i))
        history.append(metrics)
    loss = [float(m['loss']) for m in history]
    assert np.mean(loss[-4:]) < 0.9 * np.mean(loss[:4])
    if kind == 'learned':  # An adversary can not hide by doing nothing.
        assert all(0.5 <= m['noise_rms'] <= 1.0 for m in history)


def test_score_is_the_maximum_of_the_map():
    network = steps.build_network(make_config())
    features = upscale_pool(make_layers(3))
    variables = network.init(jax.random.key(0), features)
    assert set(variables['params']) == {'adaptor', 'seg_head'}
    logits, scores = network.apply(variables, features)
    np.testing.assert_array_equal(scores, logits.max((1, 2, 3)))
