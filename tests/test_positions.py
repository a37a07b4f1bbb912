"""The loss of sampled positions: which ones, what they teach, and that whole runs learn from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import losses
from ssn_jax.config import default_config
from ssn_jax.losses import positions, terms as loss_terms
from ssn_jax.models import systems
from ssn_jax.models.grid import upscale_pool
from ssn_jax.training import steps

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


def places_of(rows, layers, image, n):
    """Which positions of an image some rows are."""
    features = np.asarray(upscale_pool(layers)).reshape(n, -1, sum(CHANNELS))[image]
    found = np.abs(np.asarray(rows)[:, None] - features).max(-1)
    assert found.min(1).max() < 10 * rule.tolerance(40)  # Of values of up to 5, both rounded.
    return found.argmin(1)


def test_positions_of_a_defect_and_of_normal_images():
    """Normal image: any position, all alike. Defect: inside its mask. Unknown mask: nothing."""
    layers, grid = make_layers(4), (8, 12)
    mask = np.zeros((4, *grid, 1), np.float32)
    mask[1, 2:4, 5:9] = 1
    weight = np.ones_like(mask)
    weight[1, 3] = 0.25
    batch = {'label': jnp.array([0.0, 1, 1, 0]), 'mask': mask, 'weight': jnp.asarray(weight)}
    batch |= {'layers': layers}
    count = 4000
    sampled = positions._sample(jax.random.key(0), batch, count, 0.0)
    assert sampled.first == 2 * count
    # The normal images come first, with all their positions; the others give a quarter as many.
    parts = np.split(np.arange(len(sampled.weight)), [count, 2 * count, 2 * count + count // 4])
    rows, defective, weights = ([np.asarray(x)[p] for p in parts] for x in sampled[:3])
    for image, of_image in ((0, 0), (3, 1)):
        histogram = np.bincount(places_of(rows[of_image], layers, image, 4), minlength=96)
        assert abs(histogram - count / 96).max() < 6 * np.sqrt(count / 96)
        assert (defective[of_image] == 0).all() and (weights[of_image] == 1).all()
    places = places_of(rows[2], layers, 1, 4)
    assert set(places) == set(np.flatnonzero(mask[1].reshape(-1)))
    np.testing.assert_array_equal(weights[2], weight[1].reshape(-1)[places])
    assert (defective[2] == 1).all() and (defective[3] == 1).all() and (weights[3] == 0).all()


def test_what_lies_beside_a_defect_is_normal():
    """Of the half with the defects as many positions again, where `beside` says, and no others."""
    layers = make_layers(4)
    mask, beside = np.zeros((2, 4, 8, 12, 1), np.float32)
    mask[2, 2:4, 5:9] = 1
    beside[2, 1:5, 4:10] = 1
    beside -= mask
    batch = {'label': jnp.array([0.0, 0, 1, 1]), 'mask': mask, 'beside': beside, 'layers': layers}
    batch = jax.tree.map(jnp.asarray, batch)
    sampled = positions._sample(jax.random.key(0), batch, 400, 0.0)
    known, unknown = (slice(1000 + i, 1000 + i + 100) for i in (0, 100))
    assert len(sampled.weight) == 1200 and sampled.first == 800
    places = places_of(sampled.features[known], layers, 2, 4)
    assert set(places) == set(np.flatnonzero(beside[2].reshape(-1)))
    assert (sampled.weight[known] == 1).all() and (sampled.weight[unknown] == 0).all()
    assert (sampled.kind[1000:] == 0).all()


def test_share_of_the_product():
    """A share of a normal image's positions lies on the product, the others anywhere."""
    layers, grid, count = make_layers(1), (8, 12), 8000
    product = np.zeros((1, *grid, 1), np.float32)
    product[0, :3, :4] = 1
    batch = {'layers': layers, 'product': jnp.asarray(product)}
    sampled = positions._sample(jax.random.key(0), batch, count, 0.6)
    places = places_of(sampled.features, layers, 0, 1)
    on_product = product.reshape(-1)[places].mean()
    assert abs(on_product - (0.6 + 0.4 * 12 / 96)) < 0.03


def test_positions_of_padded_images_are_their_own():
    """On the product and anywhere; all of them count for nothing outside where all are taken."""
    layers, grid = make_layers(4), (8, 12)
    own, product = np.zeros((2, 4, *grid, 1), np.float32)
    own[:, 2:5], product[:, 4:6, 3] = 1, 1
    batch = {'layers': layers, 'own': own, 'product': product * own}
    sampled = positions._sample(jax.random.key(0), batch, 900, 0.5)
    histogram = np.bincount(sampled.places, minlength=96)
    assert set(np.flatnonzero(histogram)) == set(np.flatnonzero(own[0]))
    assert histogram[4 * 12 + 3] > 0.45 * 3600
    every = positions._sample(jax.random.key(0), batch, 0, 0.0)
    np.testing.assert_array_equal(every.weight, own.ravel())
    # Those that the strongest are of are too.
    asked = positions._ask(jax.random.key(0), batch, np.ones(4), 1024)
    assert set(asked.places.ravel().tolist()) == set(np.flatnonzero(own[0]))


def test_shares_of_noise_and_defects():
    """Two normal rows, one defect that counts and one that does not, four rows of noise."""
    kind = jnp.array([0.0, 0, 1, 1, 2, 2, 2, 2])
    taught = jnp.array([True, True, True, False, True, True, True, True])
    expected = [0.5, 0.5, 0.5, 0, 0.125, 0.125, 0.125, 0.125]
    np.testing.assert_array_equal(positions._shares(kind, taught, 0.5, 0.1), expected)
    # Of one kind of anomaly alone, it has all.
    only = positions._shares(kind, taught * (kind != 1), 0.5, 0.1)
    np.testing.assert_array_equal(only, [0.5, 0.5, 0, 0, 0.25, 0.25, 0.25, 0.25])
    assert not np.isnan(positions._shares(kind, taught * False, 0.5, 0.1)).any()
    # What is misplaced has its own weight, whatever else there is.
    kind = kind.at[4:6].set(3)
    expected = [0.5, 0.5, 0.5, 0, 0.25, 0.25, 0.25, 0.25]
    np.testing.assert_array_equal(positions._shares(kind, taught, 0.5, 0.1), expected)
    # The strongest of normal images too.
    kind, expected = kind.at[1].set(positions._HARD), np.float32([1, 0.1, *expected[2:]])
    np.testing.assert_array_equal(positions._shares(kind, taught, 0.5, 0.1), expected)
    # And what is around those of defective ones, which no other output learns.
    kind, expected = kind.at[1].set(positions._AROUND), np.float32([1, 0.2, *expected[2:]])
    around = positions._shares(kind, taught, 0.5, 0.1, 1.0, 0.2)
    np.testing.assert_array_equal(around, expected)
    assert positions._shares(kind, taught, 0.5, 0.1)[1] == 0


@pytest.mark.parametrize('kind', ['l1_focal', 'cross_entropy'])
def test_loss_of_all_positions_by_hand(kind):
    """One normal and one defective image, no noise: the averages over their positions."""
    config = make_config(**{'noise.std': 0.0, 'map_loss': kind})
    layers = make_layers(2)
    mask = np.zeros((2, 8, 12, 1), np.float32)
    mask[1, 1:4, 1:4] = 1
    batch = {'layers': layers, 'label': jnp.array([0.0, 1.0]), 'mask': jnp.asarray(mask)}
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    loss_fn = jax.jit(losses.config_loss(config))
    loss, (terms, stats) = loss_fn(state.params, {}, state.batch_stats, batch, jax.random.key(2))

    network = systems.build_network(config)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    adapted = network.apply(variables, upscale_pool(layers), method='adapt')
    flat = adapted.reshape(-1, adapted.shape[-1])
    seen = jnp.concatenate([flat, flat[:96:2]])[:, None, None, :]
    logits, updates = network.apply(
        variables, seen, train=True, method='segment', mutable=['batch_stats']
    )
    logits, m = np.asarray(logits)[:, 0, 0, 0], mask.reshape(-1)
    # Noise that is none: every other normal position counts once more, as an anomaly.
    normal, defect, noisy = logits[:96], logits[96:192][m[96:] > 0], logits[192:]

    def mean(each):
        return each(normal, 0).mean() + (each(defect, 1).mean() + each(noisy, 1).mean()) / 2

    if kind == 'l1_focal':
        expected = mean(lambda z, y: np.maximum(0.5 + (1 - 2 * y) * z, 0))
        expected += mean(lambda z, y: loss_terms.focal(z, np.full_like(z, y))) / 2
    else:
        expected = mean(lambda z, y: np.log1p(np.exp((1 - 2 * y) * z)))
    for actual in (loss, terms['loss']):
        rule.check_close(actual, expected, 2 * sum(CHANNELS) + 1024 + len(logits))
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(updates['batch_stats']), strict=True):
        rule.check_close(a, b, 2 * sum(CHANNELS) + len(logits))


def test_two_outputs_are_mixed_into_one():
    """Logits of the mixed network are the mean of both outputs', weighted by the share."""
    config = make_config(**{'supervision.known': 0.3})
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    known = state.params['known'] + jax.random.normal(
        jax.random.key(2), state.params['known'].shape
    )
    state = state.replace(params=state.params | {'known': known})
    features, network = upscale_pool(make_layers(2)), systems.build_network(config)

    def logits(share):
        variables = state.variables(share)
        assert set(variables['params']) == {'adaptor', 'seg_head'}
        return np.asarray(network.apply(variables, features)[0])

    rule.check_close(logits(0.3), 0.7 * logits(0.0) + 0.3 * logits(1.0), 1024)
    assert np.abs(logits(0.0) - logits(1.0)).max() > 0.1


def test_the_output_for_known_defects_learns_these_above_all():
    """Drawn defects and real ones have channels of their own, and normal positions have both.

    Half of the normal positions have some of what drawn ones have: to be called defective costs
    less where drawn ones weigh more.
    """
    rng = np.random.default_rng(0)
    fine, coarse = (np.zeros(x.shape, np.float32) for x in make_layers(12))
    fine += 0.1 * rng.normal(size=fine.shape).astype(np.float32)
    label, real = np.float32([0] * 6 + [1] * 6), np.float32([0] * 9 + [1] * 3)
    fine[:3, ..., 0] += 1
    fine[6:9, ..., 0] += 1
    fine[9:, ..., 1] += 1
    mask = np.ones((12, 8, 12, 1), np.float32) * label[:, None, None, None]
    batch = {'layers': (fine, coarse), 'label': label, 'real': real, 'mask': mask}
    batch |= {'weight': np.ones_like(mask)}
    config = make_config(
        **{'supervision.known': 0.5, 'map_loss': 'cross_entropy', 'noise.std': 0.0}
    )
    config.positions, config.batch_size, config.epochs = 8, 12, 60
    state = steps.init_state(config, jax.random.key(0), sum(CHANNELS))
    step = jax.jit(steps.make_step(config, 1))
    for i in range(60):
        state, terms = step(state, batch, jax.random.fold_in(jax.random.key(1), i))
    assert {'map_cross_entropy', 'known_cross_entropy'} <= set(terms)
    network, features = systems.build_network(config), upscale_pool((fine, coarse))

    def means(share):
        logits, _ = network.apply(state.variables(share), features)
        return [float(np.asarray(logits)[of].mean()) for of in np.s_[:6, 6:9, 9:]]

    (normal, drawn, of_real), (normal_too, known_drawn, known_real) = means(0.0), means(1.0)
    assert of_real > normal + 1 and known_real > normal_too + 1
    assert known_drawn < drawn - 0.5


@pytest.mark.parametrize('kind', ['static', 'learned'])
def test_training_on_a_few_positions_learns(kind):
    config = make_config(**{'noise.kind': kind, 'positions': 16})
    config.batch_size, config.epochs = 4, 20
    layers = make_layers(4, 8, 8)
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    epoch, history = steps.make_epoch(config, 1), []
    for i in range(20):
        state, metrics = epoch(state, {'layers': layers}, np.arange(4)[None], jax.random.key(i))
        history.append(metrics)
    loss = [float(m['loss']) for m in history]
    assert np.mean(loss[-4:]) < 0.9 * np.mean(loss[:4])


def test_places_that_are_sampled_are_those_of_the_features():
    layers = make_layers(3)
    sampled = positions._sample(jax.random.key(3), {'layers': layers}, 50, 0.0)
    features = np.asarray(upscale_pool(layers)).reshape(3, -1, sum(CHANNELS))
    images = np.repeat(np.arange(3), 50)
    rule.check_close(sampled.features, features[images, np.asarray(sampled.places)], 40)


def test_what_is_misplaced_is_learned():
    """Two halves that look unlike, told apart by where they lie: swapped, they are anomalies."""
    fields = {'product.place': 'same', 'misplaced': 1.0, 'noise.std': 0.0}
    config = make_config(**fields, positions=32, map_loss='cross_entropy')
    config.batch_size, config.epochs = 4, 1
    network = systems.build_network(config)
    layers = make_layers(4, 8, 8)
    halves = [np.asarray(x).copy() * 0.1 for x in layers]
    for x in halves:
        x[:, : x.shape[1] // 2] += 1
    layers = tuple(map(jnp.asarray, halves))
    state = steps.init_state(config, jax.random.key(1), sum(CHANNELS))
    epoch = steps.make_epoch(config, 1)
    for i in range(150):
        state, _ = epoch(state, {'layers': layers}, np.arange(4)[None], jax.random.key(i))
    features = upscale_pool(layers)
    upright, turned = (
        network.apply(state.variables(), x)[0][:, 2:-2] for x in (features, features[:, ::-1])
    )
    assert turned.mean() > upright.mean() + 0.5


def test_without_a_head_the_map_alone_is_learned():
    network = systems.build_network(make_config())
    features = upscale_pool(make_layers(3))
    variables = network.init(jax.random.key(0), features)
    assert set(variables['params']) == {'adaptor', 'seg_head'}
    logits, scores = network.apply(variables, features)
    assert logits.shape == (*features.shape[:3], 1)
    assert scores is None


def test_the_strongest_positions():
    """Those that are judged highest, of images that are asked; others do not count."""
    layers = make_layers(4)
    batch, of = {'layers': layers}, jnp.array([0.0, 1, 1, 0])
    grids = np.asarray(upscale_pool(layers)).reshape(4, -1, sum(CHANNELS))
    asked = positions._ask(jax.random.key(0), batch, of, 1024)
    logits = asked.features[..., 0]
    best, (rows, kind, weight, places) = positions._strongest(asked, logits, 5)
    assert best.shape == (2, 8) and (kind == 5).all() and (weight == 1).all()
    images = set()
    for part in np.split(np.arange(len(weight)), 2):
        found = np.asarray(places)[part]
        image = 1 if np.abs(grids[1][found] - rows[part]).max() < 1e-4 else 2
        images.add(image)
        np.testing.assert_allclose(rows[part], grids[image][found], atol=10 * rule.tolerance(40))
        # 1,024 draws of 96 positions leave none out.
        assert grids[image][found, 0].max() == grids[image][:, 0].max()
        assert grids[image][found, 0].min() >= np.sort(grids[image][:, 0])[-8]
    assert images == {1, 2}
    for count, strong in {256: 2, 160: 1, 8: 1}.items():
        best, _ = positions._strongest(asked, logits[:, :count], 5)
        assert best.shape == (2, strong)
    asked = positions._ask(jax.random.key(0), batch, jnp.zeros(4), 1024)
    assert (positions._strongest(asked, logits, 5)[1][2] == 0).all()


@pytest.mark.parametrize('found', [64, 65])
def test_what_is_normal_around_the_strongest_positions(found):
    """A ring, but for what is masked or looks defective; nothing if they are less than a quarter.

    16 of 2,048 positions are the strongest; `found` ones look defective to the other output.
    """
    height, width = 16, 24
    layers = make_layers(2, height // 2, width // 2)
    mask = np.zeros((2, height, width, 1), np.float32)
    mask[:, 4, 8] = 1
    asked = positions._ask(
        jax.random.key(0), {'layers': layers, 'mask': mask}, jnp.array([1.0, 1]), 2048
    )
    logit = np.full((height, width), -4.0, np.float32)
    logit[8, 8:14], logit[8, 6:8] = 6, 2
    where = np.asarray(asked.at)
    logits = logit[where[..., 0], where[..., 1]]
    # The strongest ones are drawn again and again, and are few positions of the grid.
    best, _ = positions._strongest(asked, logits, 5)
    unaware = np.where(np.arange(2048) < found, 1.0, -1.0) * np.ones((2, 1))
    _, kind, weight, places = positions._around(asked, logits, best, unaware, (2, 4))
    assert (kind == positions._AROUND).all() and len(weight) == 2 * 64
    strong = where[0][np.asarray(best[0])]
    rows, columns = np.divmod(np.arange(height * width), width)
    distance = np.abs(np.stack([rows, columns], -1)[:, None] - strong).max(-1).min(-1)
    expected = (distance > 2) & (distance <= 4) & (logit.ravel() < 0) & (mask[0].ravel() == 0)
    taught = set(np.asarray(places)[:64][np.asarray(weight)[:64] > 0].tolist())
    if found == 64:
        assert weight[:64].all() and taught <= set(np.flatnonzero(expected))
        assert len(taught) > 40
    else:
        assert not taught


def test_a_defect_without_a_mask_ends_somewhere():
    """What lies beside it has some of its features; the output for known defects tells them."""
    layers = make_layers(8, 24, 36)
    fine, coarse = 0.1 * np.array(layers[0]), np.zeros_like(layers[1])
    fine[4:, 7:9, 11:13, 0] += 3
    fine[4:, 7:9, 13:16, :2] += 1
    label = np.float32([0] * 4 + [1] * 4)
    mask = np.zeros((8, 48, 72, 1), np.float32)
    batch = {'layers': (fine, coarse), 'label': label, 'real': label, 'mask': mask}
    batch |= {'weight': np.ones_like(mask)}
    features, found = upscale_pool((fine[4:], coarse[4:])), {}
    for surroundings in ((0, 0), (2, 6)):
        config = make_config(surroundings=surroundings, positions=32, map_loss='cross_entropy')
        config.supervision.known, config.batch_size, config.epochs = 0.5, 8, 100
        state = steps.init_state(config, jax.random.key(0), sum(CHANNELS))
        step = jax.jit(steps.make_step(config, 1))
        for i in range(100):
            state, _ = step(state, batch, jax.random.fold_in(jax.random.key(1), i))
        logits, _ = systems.build_network(config).apply(state.variables(1.0), features)
        inside, beside = logits[:, 15:17, 23:25].mean(), logits[:, 15:17, 28:31].mean()
        found[surroundings] = float(inside), float(beside)
    (inside, beside), (inside_too, ended) = found.values()
    assert inside_too > 0.8 * inside and ended < 0.5 * beside, found


def test_who_is_taught_fewer_positions_asks_fewer(monkeypatch):
    asked, ask = set(), positions._ask
    monkeypatch.setattr(positions, '_ask', lambda *given: asked.add(given[-1]) or ask(*given))
    mask = np.ones((8, 8, 12, 1), np.float32)
    truth = {'label': np.float32([0] * 4 + [1] * 4), 'mask': mask, 'weight': mask}
    batch = {'layers': make_layers(8), 'known': truth['label']} | truth
    for positions_, expected in {32: 1024, 8: 256, 0: 1024}.items():
        config = make_config(hard_normal=0.1, positions=positions_, map_loss='cross_entropy')
        state = steps.init_state(config, jax.random.key(0), sum(CHANNELS))
        jax.eval_shape(steps.make_step(config, 1), state, batch, jax.random.key(1))
        assert asked == {expected}
        asked.clear()


def test_what_is_hard_is_learned():
    """A normal position that looks like a defect, rare among those drawn at random, is learned.

    It is one of 96, and has the features of the defects but for one channel.
    """
    layers = make_layers(8)
    fine = np.array(layers[0])
    fine[4:, 1, 2], fine[:4, 1, 2] = 4, 4
    fine[:4, 1, 2, 0] = -1
    coarse = np.zeros_like(layers[1])
    mask = np.zeros((8, 8, 12, 1), np.float32)
    mask[4:, 2:4, 4:6] = 1
    truth = {'label': np.float32([0] * 4 + [1] * 4), 'mask': mask, 'weight': np.ones_like(mask)}
    batch = {'layers': (fine, coarse), 'known': truth['label']} | truth
    found = {}
    for hard in (0.0, 1.0):
        config = make_config(hard_normal=hard, positions=4, map_loss='cross_entropy')
        config.batch_size, config.epochs = 8, 60
        state = steps.init_state(config, jax.random.key(0), sum(CHANNELS))
        step = jax.jit(steps.make_step(config, 1))
        for i in range(60):
            state, _ = step(state, batch, jax.random.fold_in(jax.random.key(1), i))
        network = systems.build_network(config)
        logits, _ = network.apply(state.variables(), upscale_pool((fine[:4], coarse[:4])))
        found[hard] = float(np.asarray(logits).reshape(4, -1).max(1).mean())
    assert found[1.0] < found[0.0] - 0.5, found
