"""Train steps: five published steps, the two players' gradients, the schedule, the epoch."""

import functools

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rule

from ssn_jax import devices, losses, synthesis
from ssn_jax.config import default_config
from ssn_jax.data import sampling
from ssn_jax.losses import direct, sparse as sparse_lib, terms as loss_terms
from ssn_jax.models import grid as grid_lib, systems, weights
from ssn_jax.training import steps

# Additions behind a value of the reference file's steps: a 5x5 convolution of 385 channels, and the
# mean of as many positions as a batch has.
TERMS = 25 * 385 + 6 * 16 * 24
EPOCHS = 10
PER_EPOCH = 7


# Biases right before a BatchNorm, which takes them away again. Their gradients are rounding error
# on both sides, which AdamW turns into steps of up to the learning rate in any direction.
WITHOUT_EFFECT = {
    'feature_adaptor.projection.bias': 1e-4,
    'discriminator.seg.0.bias': 2e-4,
    'discriminator.dec_head.0.bias': 2e-4,
}


@pytest.fixture(autouse=True)
def quick_masks(monkeypatch):
    """Masks that compile quickly, and two programs of the sparse loss instead of four."""
    monkeypatch.setattr(synthesis, 'make_masks', lambda config: scattered)
    monkeypatch.setattr(sparse_lib, '_SURPLUS', np.array([3.0, np.inf]))


def rule_state(config, channels):
    """A train state whose parameters follow the rule of the reference files."""
    variables = rule.network(systems.build_network(config), channels)
    variables = jax.tree.map(jnp.asarray, variables)
    generator, generator_opt_state = {}, ()
    if config.noise.kind == 'learned':
        generator = rule.generator(channels, config.noise.z_dim)['params']
        generator = jax.tree.map(jnp.asarray, generator)
        generator_opt_state = steps.generator_optimizer(config).init(generator)
    return steps.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=steps.discriminator_optimizer(config).init(variables['params']),
        generator=generator,
        generator_opt_state=generator_opt_state,
    )


# Five steps of the published implementation


@pytest.fixture
def trajectory(monkeypatch):
    """Expected numbers, the loss on the reference file's features, batch, config and state."""
    expected = rule.reference('train_trajectory')
    config = default_config()
    config.epochs = 5
    features = np.abs(rule.draw_input('train_features', (3, 16, 24, 384)))
    noise = 0.015 * rule.draw_input('train_noise', (6, 16, 24, 384))
    # The file gives the feature grid itself, not the backbone's layers it is made of.
    monkeypatch.setattr(grid_lib, 'upscale_pool', lambda layers: layers[0])
    loss_fn = direct.make_loss(
        config,
        masks_fn=lambda key, n, size: jnp.asarray(expected['mask']),
        noise_fn=lambda generator, adapted, key: jnp.asarray(noise),
    )
    state = rule_state(config, 384)
    return expected, loss_fn, {'layers': (features,)}, config, state


def by_name(state):
    """A state's parameters and statistics by PyTorch's names."""
    return rule.by_torch_name(
        {'params': state.params, 'batch_stats': state.batch_stats}, weights.head_name
    )


def test_first_step_matches_published_step(trajectory, monkeypatch):
    """Map, score and loss of the first step, and the norm of every parameter's gradient."""
    expected, loss_fn, batch, _, state = trajectory
    seen = {}

    def spy(logits, scores, mask, labels, weight, taught):
        seen.update(map=logits, score=scores, labels=labels)
        return published_loss(logits, scores, mask, labels, weight, taught)

    published_loss = loss_terms.discriminator_loss
    monkeypatch.setattr(loss_terms, 'discriminator_loss', spy)

    def with_outputs(params):
        loss, _ = loss_fn(params, {}, state.batch_stats, batch, jax.random.key(0))
        return loss, dict(seen)

    (loss, outputs), grads = jax.jit(jax.value_and_grad(with_outputs, has_aux=True))(state.params)
    rule.check_close(outputs['map'], expected['map_step1'], TERMS)
    rule.check_close(outputs['score'], expected['score_step1'], TERMS, rule.SCORES)
    np.testing.assert_array_equal(outputs['labels'], expected['mask'].any((1, 2, 3)))
    rule.check_close(loss, np.float32(expected['losses'][0]), TERMS)

    grads = rule.by_torch_name({'params': grads}, weights.head_name)
    norms = {k.split(':')[1]: float(v) for k, v in expected.items() if k.startswith('gradnorm:')}
    rule.check_gradients({name: np.linalg.norm(grads[name]) for name in grads}, norms, 3e-4)


def test_five_steps_match_published_steps(trajectory):
    """Every loss and learning rate on the way, every parameter and statistic at the end."""
    expected, loss_fn, batch, config, state = trajectory
    start = by_name(state)
    step = jax.jit(steps.make_step(config, 1, loss_fn))
    factor = steps.learning_rate_factor(config, 1)
    for i in range(5):
        state, metrics = step(state, batch, jax.random.key(i))
        rule.check_close(metrics['loss'], np.float32(expected['losses'][i]), TERMS)
        if i < 4:  # After the last step no rate is needed any more.
            rates = float(factor(state.step)) * np.array([1e-4, 2e-4, 2e-4])
            np.testing.assert_allclose(rates, expected['lrs_after_step'][i], rtol=1e-6)

    final = by_name(state)
    assert {k.split(':')[1] for k in expected if k.startswith('norm:')} == final.keys()
    for name, value in final.items():
        norm, head = expected[f'norm:{name}'], expected[f'head:{name}']
        way, published = (
            x.ravel()[: head.size] - start[name].ravel()[: head.size] for x in (value, head)
        )
        if name in WITHOUT_EFFECT:  # Both sides may have gone the whole way, apart.
            apart = 2 * 4.4 * WITHOUT_EFFECT[name]
            assert np.abs(way - published).max() <= apart
            assert abs(np.linalg.norm(value) - norm) <= apart * value.size**0.5
        else:
            rule.check_gradients(way, published, 0.01)
            assert np.linalg.norm(value) == pytest.approx(norm, rel=1e-3), name


# The two players of learned noise


LAYERS = (
    np.abs(rule.draw_input('layer2', (6, 4, 4, 8))),
    np.abs(rule.draw_input('layer3', (6, 2, 2, 4))),
)
BATCH = {'layers': LAYERS}
PENALTY = {'static': None, 'v1': 0.0, 'v2': 10.0}


def game(kind, sparse=False, penalty=None):
    """The config of a game on small features: 'static', 'v1' or 'v2'."""
    config = default_config()
    config.epochs = EPOCHS
    config.sparse = sparse
    if kind != 'static':
        config.noise.kind = 'learned'
    if kind == 'v1':
        config.noise.update(bounded=False, z_dim=0, penalty=0.0, discriminator_steps=0)
    if penalty is not None:
        config.noise.penalty = penalty
    return config


def same(a, b):
    """Whether two trees are bit-identical."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def flat(tree):
    """A tree of arrays as one vector."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def gradient_used(opt_state):
    """The gradient behind an AdamW's first update: its first moment is a tenth of it."""
    moments = optax.tree_utils.tree_get_all_with_path(opt_state, 'mu')
    return np.concatenate([flat(moment) for _, moment in moments]) / 0.1


def check_used(used, grads):
    """Asserts array by array that a gradient in one vector is this tree of them."""
    rule.check_gradients(ravel_pytree(grads)[1](jnp.float32(used)), grads)


def scattered(key, n, size):
    """Masks that compile faster than Perlin's, which have their own tests."""
    return jax.random.bernoulli(key, 0.3, (n, *size, 1)).astype(jnp.float32)


def config_loss(config):
    """The config's loss, in the form it asks for."""
    make = sparse_lib.make_sparse_loss if config.sparse else direct.make_loss
    return make(config, scattered, synthesis.make_noise(config))


@functools.cache
def compiled_step(kind, sparse=False, penalty=None):
    """The step of a game, compiled once for all tests."""
    config = game(kind, sparse, penalty)
    return jax.jit(steps.make_step(config, PER_EPOCH, config_loss(config)))


def test_generator_gradient_is_minus_the_discriminators_loss():
    """A generator step follows -dL_D + penalty * d(mean noise^2), its only terms.

    Of the sparse loss only each player's own can be differentiated; tests/test_sparse.py says
    that both are the direct form's.
    """
    config = game('v2', penalty=10.0)
    loss_fn = config_loss(config)
    state, key = rule_state(config, 12).replace(step=jnp.int32(3)), jax.random.key(3)

    @jax.jit
    def gradients(generator):
        def loss_and_power(generator):
            args = (state.params, generator, state.batch_stats, BATCH, key)
            loss, (terms, _) = loss_fn(*args, stop_map_gradient=False)
            return loss, terms['generator_loss'] + loss

        _, pull = jax.vjp(loss_and_power, generator)
        return pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

    of_loss, of_power = map(flat, gradients(state.generator))
    assert np.linalg.norm(of_loss) > 1e-4
    assert np.linalg.norm(of_power) > 1e-4

    after, _ = compiled_step('v2', penalty=10.0)(state, BATCH, key)
    used = gradient_used(after.generator_opt_state)
    rule.check_gradients(used, of_power - of_loss)
    # Not the penalty alone, as where both players' gradients cancel.
    assert np.linalg.norm(used - of_power) > 1e-2 * np.linalg.norm(used)


def test_loss_follows_the_generator():
    """The generator's gradient is that of finite differences: it is cut nowhere on its way."""
    config = game('v2')
    loss_fn, state = config_loss(config), rule_state(config, 12)

    def loss(generator):
        args = (state.params, generator, state.batch_stats, BATCH, jax.random.key(3))
        return loss_fn(*args, stop_map_gradient=False)[0]

    grad = jax.jit(jax.grad(loss))(state.generator)
    size, value = np.linalg.norm(flat(grad)), jax.jit(loss)
    there, back = (
        value(jax.tree.map(lambda p, g, h=h: p + h * g / size, state.generator, grad))
        for h in (0.02, -0.02)
    )
    assert size > 1e-3
    assert float(there - back) / 0.04 == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize('sparse', [True, False])
def test_three_discriminator_steps_then_one_generator_step(sparse):
    """Eight steps; who does not move stays bit-identical, with statistics and optimiser."""
    step = compiled_step('v2', sparse, 10.0)
    state, movers = rule_state(game('v2'), 12), ''
    for i in range(8):
        before = state
        state, metrics = step(state, BATCH, jax.random.key(i))
        assert int(state.step) == i + 1
        assert np.isfinite(flat(metrics)).all()
        discriminator = [
            not same(getattr(before, name), getattr(state, name))
            for name in ('params', 'batch_stats', 'opt_state')
        ]
        generator = [
            not same(getattr(before, name), getattr(state, name))
            for name in ('generator', 'generator_opt_state')
        ]
        assert len(set(discriminator)) == 1 and len(set(generator)) == 1
        movers += {(True, False): 'D', (False, True): 'G'}[discriminator[0], generator[0]]
    assert movers == 'DDDGDDDG'


@pytest.mark.parametrize('kind', ['static', 'v1', 'v2'])
def test_discriminator_gradient_is_its_own(kind):
    """On its step the discriminator follows dL_D, which is not zero; in v1 both players do."""
    config = game(kind)
    loss_fn = config_loss(config)
    state, key = rule_state(config, 12), jax.random.key(0)
    players = state.params, state.generator, state.batch_stats, BATCH, key

    @jax.jit
    def gradients(params, generator):
        def loss(params, generator, **options):
            return loss_fn(params, generator, *players[2:], **options)[0]

        of_all = functools.partial(loss, stop_map_gradient=False)
        generators = jax.grad(of_all, 1)(params, generator) if kind == 'v1' else {}
        return jax.grad(loss)(params, generator), generators

    grads, full = gradients(*players[:2])
    after, _ = compiled_step(kind, penalty=PENALTY[kind])(state, BATCH, key)
    used = gradient_used(after.opt_state)
    for part in ('adaptor', 'seg_head', 'cls_head'):
        assert np.linalg.norm(flat(grads[part])) > 1e-4
    check_used(used, grads)
    assert not same(state.batch_stats, after.batch_stats)
    if kind == 'v1':
        ascent = jax.tree.map(lambda x: -x, full)
        assert np.linalg.norm(flat(ascent)) > 1e-4
        check_used(gradient_used(after.generator_opt_state), ascent)
        assert not same(state.generator, after.generator)
    else:
        assert same(state.generator, after.generator)


def test_static_noise_has_no_generator():
    state = jax.eval_shape(lambda key: steps.init_state(game('static'), key, 12), jax.random.key(0))
    assert state.generator == {} and state.generator_opt_state == ()


@pytest.mark.parametrize('kind', ['static', 'v2'])
def test_same_key_same_step(kind):
    step, state = compiled_step(kind, penalty=PENALTY[kind]), rule_state(game(kind), 12)
    first, again, other = (step(state, BATCH, jax.random.key(k)) for k in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize('beta', [0.05, 0.5])
def test_learned_noise_stays_within_beta_and_depends_on_z(beta):
    config = game('v2')
    config.noise.beta = beta
    generator = jax.tree.map(lambda p: 30 * p, rule_state(config, 12).generator)
    noise_fn = synthesis.make_noise(config)
    adapted = rule.draw_input('adapted', (2, 8, 8, 12))
    noise, other = (np.asarray(noise_fn(generator, adapted, jax.random.key(k))) for k in (0, 1))
    assert beta * 0.99 < np.abs(noise).max() <= np.float32(beta)
    assert np.abs(noise - other).max() > 0.1 * beta


def test_noise_does_not_teach_the_adaptor_through_the_generator():
    config = game('v2')
    noise_fn, generator = synthesis.make_noise(config), rule_state(config, 12).generator
    adapted = rule.draw_input('adapted', (2, 8, 8, 12))
    grad = jax.grad(lambda a: noise_fn(generator, a, jax.random.key(0)).sum())(adapted)
    assert not np.any(grad)


# Optimisers


def test_a_gradient_is_clipped_as_a_whole():
    config = game('static')
    config.optimizer.clip_norm = 0.5
    optimizer, plain = steps.discriminator_optimizer(config), game('static')
    params = {'adaptor': jnp.ones(2), 'seg_head': jnp.ones(3)}
    grads = {'adaptor': jnp.array([3.0, 0.0]), 'seg_head': jnp.array([0.0, 4.0, 0.0])}
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    # The norm of both parts together is 5: a tenth is left.
    rule.check_close(gradient_used(opt_state), [0.3, 0, 0, 0.4, 0], 16)
    optimizer = steps.discriminator_optimizer(plain)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    rule.check_close(gradient_used(opt_state), [3, 0, 0, 4, 0], 16)


def test_decay_in_the_gradient_reaches_the_heads_alone():
    """SimpleNet's Adam: the gradient is g + decay * p; its projection's AdamW sees g."""
    config = game('static')
    config.optimizer.update(heads_decay_in_gradient=True, heads_weight_decay=0.1)
    optimizer = steps.discriminator_optimizer(config)
    params = {'adaptor': jnp.array([2.0]), 'discriminator': jnp.array([3.0])}
    grads = {'adaptor': jnp.array([1.0]), 'discriminator': jnp.array([-0.3])}
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)
    rule.check_close(gradient_used(opt_state), [1, 0], 16)
    assert float(updates['adaptor'][0]) == pytest.approx(-1e-4 * (1 + 0.01 * 2), rel=1e-4)


# SimpleNet


def test_hinge_loss_by_hand():
    """Without noise both copies are alike: relu(0.5 + x) + relu(0.5 - x), on average."""
    config = default_config()
    config.system, config.noise.std = 'simplenet', 0.0
    config.simplenet.update(embedding=6, hidden=5)
    state = steps.init_state(config, jax.random.key(0), 99)
    embedding = rule.draw_input('embedding', (2, 3, 4, 6))
    arguments = {}, state.batch_stats, {'layers': (embedding,)}, jax.random.key(1)
    loss, (terms, _) = jax.jit(losses.config_loss(config))(state.params, *arguments)
    params = jax.device_get(state.params)
    x = embedding @ params['adaptor']['kernel'] + params['adaptor']['bias']
    parts = params['discriminator']
    x = x @ parts['hidden']['kernel']
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    x = -np.where(x > 0, x, 0.2 * x) @ parts['out']['kernel']
    expected = np.maximum(0.5 + x, 0).mean() + np.maximum(0.5 - x, 0).mean()
    rule.check_close(loss, expected, 6 + 6 + 24 + 5 + 24)
    rule.check_close(terms['normal'] + terms['anomalous'], loss, 1)


# Learning rates and epochs


def test_learning_rates_drop_with_the_epochs():
    factor = steps.learning_rate_factor(game('static'), PER_EPOCH)
    factors = [float(factor(jnp.int32(i))) for i in range(EPOCHS * PER_EPOCH)]
    expected = [1.0] * (8 * PER_EPOCH) + [0.4] * PER_EPOCH + [0.16] * PER_EPOCH
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_drops_begin_with_the_first_whole_epoch():
    """The boundary is exact, whatever 0.8 * epochs and 0.9 * epochs are in floating point."""
    config = game('static')
    for epochs in range(5, 301):
        config.epochs = epochs
        factor = steps.learning_rate_factor(config, 1)
        first, second = -(-epochs * 8 // 10), -(-epochs * 9 // 10)
        at = jnp.array([0, first - 1, first, second - 1, second])
        expected = [1, 1, 0.4 if first < second else 0.16, 0.4, 0.16]
        np.testing.assert_allclose(factor(at), expected, rtol=1e-6, err_msg=str(epochs))


def test_drops_on_the_same_epoch_multiply():
    config = game('static')
    config.epochs, config.optimizer.drops = 10, (0.31, 0.35)
    factor = steps.learning_rate_factor(config, 2)
    np.testing.assert_allclose(factor(jnp.array([7, 8])), [1.0, 0.16], rtol=1e-6)


def test_who_goes_on_from_another_run_has_all_rates_once_more():
    """Three epochs of 5 steps after 30 of 2; the second drop is at their end."""
    config = game('static')
    config.epochs, config.epochs_before = 33, 30
    config.optimizer.drops = (0.4, 0.9)
    factor = steps.learning_rate_factor(config, 5, begun=60)
    at = jnp.array([60, 69, 70, 74])
    np.testing.assert_allclose(factor(at), [1.0, 1.0, 0.4, 0.4], rtol=1e-6)


@pytest.mark.parametrize('player, at', [('params', (54, 58)), ('generator', (55, 59))])
def test_both_players_updates_shrink_after_the_drop(player, at):
    """The same state and batch before and after step 56 of 70: the update is 0.4 times as long."""
    step, start = compiled_step('v2', penalty=10.0), rule_state(game('v2'), 12)
    before, after = (
        flat(getattr(step(start.replace(step=jnp.int32(i)), BATCH, jax.random.key(0))[0], player))
        - flat(getattr(start, player))
        for i in at
    )
    assert np.linalg.norm(after) / np.linalg.norm(before) == pytest.approx(0.4, rel=1e-3)


def test_an_epoch_shows_the_images_of_its_order(monkeypatch):
    """Steps that only record which images they were given, and when."""

    def make_step(config, steps_per_epoch, loss_fn, begun):
        def step(state, batch, key):
            (ids,) = batch['layers']
            return state.at[ids].add(1 + state.max()), {'loss': jax.random.uniform(key)}

        return step

    monkeypatch.setattr(steps, 'make_step', make_step)
    monkeypatch.setattr(steps, 'finite', lambda state, terms: {'loss': terms['loss'] >= 0})
    epoch = steps.make_epoch(default_config(), 3)
    data, order = {'layers': (jnp.arange(8),)}, np.array([[6, 2], [0, 4], [1, 7]])
    runs = [epoch(jnp.zeros(8, jnp.int32), data, order, jax.random.key(k)) for k in (0, 0, 1)]
    for state, _ in runs:
        assert state.tolist() == [2, 3, 1, 0, 2, 0, 1, 3]
    losses_ = [float(metrics['loss']) for _, metrics in runs]
    assert losses_[0] == losses_[1] != losses_[2]


def test_epochs_are_reproducible_and_learn():
    """Ten epochs twice: identical states; the loss falls."""
    config = game('v2')
    config.batch_size = 3
    epoch = steps.make_epoch(config, 2)

    def run():
        state, history = rule_state(config, 12), []
        for i in range(EPOCHS):
            key = jax.random.fold_in(jax.random.key(2), i)
            order = sampling.uniform_order(0, i, 6, 3)
            state, metrics = epoch(state, jax.tree.map(jnp.asarray, BATCH), order, key)
            history.append(float(metrics['loss']))
        return jax.device_get(state), history

    (first, losses_first), (again, losses_again) = run(), run()
    assert same(first, again)
    assert losses_first == losses_again
    assert np.mean(losses_first[-3:]) < np.mean(losses_first[:3])


@pytest.mark.parametrize(('parts', 'on_host'), [([3, 3], True), ([3, 2], True), ([3, 3, 1], False)])
def test_epochs_in_parts_are_those_at_once(parts, on_host, monkeypatch):
    """Also of a prime number of steps, and with features that stay on the host."""
    config = default_config()
    config.system = 'simplenet'  # Compiles soonest.
    config.simplenet.update(embedding=7, hidden=16)
    keys = jax.random.split(jax.random.key(0), 2)
    layers = (jax.random.uniform(keys[0], (8, 4, 5, 7)),)
    order = np.random.default_rng(0).integers(0, 8, (sum(parts), 2))

    def run(layers, **options):
        epoch = steps.make_epoch(config, sum(parts), **options)
        state = steps.init_state(config, keys[1], 7)
        return epoch(state, {'layers': layers}, order, jax.random.key(1))

    expected, values = run(layers)
    sent, put = [], devices.put
    monkeypatch.setattr(devices, 'put', lambda mesh, tree: sent.append(tree) or put(mesh, tree))
    layers = jax.device_get(layers) if on_host else layers
    actual, in_parts = run(layers, on_host=on_host, longest=3)
    assert [int(part[2]) for part in sent] == parts
    rule.check_close(in_parts['loss'], values['loss'], 1000)
    start, *ends = map(by_name, (steps.init_state(config, keys[2], 7), actual, expected))
    for name in start.keys() - WITHOUT_EFFECT.keys():
        ours, at_once = (end[name] - start[name] for end in ends)
        rule.check_gradients(ours, at_once, 0.01)


def test_averaged_weights_follow_the_weights():
    """Each step moves the average towards the weights, at first by most of the way."""
    config = default_config()
    config.image_score, config.noise.std, config.optimizer.average = 'map', 0.3, 0.5
    config.batch_size, config.epochs = 2, 3
    layers = (jax.random.normal(jax.random.key(0), (2, 4, 4, 3)),)
    state = steps.init_state(config, jax.random.key(1), 3)
    epoch = steps.make_epoch(config, 1)
    expected = jax.device_get(state.params)
    for i in range(3):
        state, _ = epoch(state, {'layers': layers}, np.arange(2)[None], jax.random.key(i))
        decay = min(0.5, (1 + i) / (10 + i))
        expected = jax.tree.map(
            lambda a, p, decay=decay: decay * a + (1 - decay) * np.asarray(p),
            expected,
            state.params,
        )
    shown = state.variables()
    assert shown['batch_stats'] is state.batch_stats
    for a, b in zip(jax.tree.leaves(shown['params']), jax.tree.leaves(expected), strict=True):
        rule.check_close(a, b, 16)
    config.optimizer.average = 0.0
    state = steps.init_state(config, jax.random.key(1), 3)
    assert state.variables()['params'] is state.params


@pytest.mark.parametrize('average', [0.0, 0.5])
def test_going_on_with_another_output(average):
    """What a state has stays; the new output begins as the old one, its optimiser afresh."""
    config = default_config()
    config.image_score, config.optimizer.average = 'map', average
    before = steps.init_state(config, jax.random.key(1), 3)
    before = jax.tree.map(lambda x: x + 1, before)
    config.supervision.known = 0.5
    fresh = steps.init_state(config, jax.random.key(2), 3)
    state = steps.going_on(fresh, before)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for params, old in ((state.params, before.params), (state.average, before.average)):
        if old:
            np.testing.assert_array_equal(params['known'], old['seg_head']['out']['kernel'])
            rest = {name: tree for name, tree in params.items() if name != 'known'}
            jax.tree.map(np.testing.assert_array_equal, rest, old)
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if 'known' in str(path)
    ]
    assert len(moments) == 2 and not any(x.any() for x in moments)
    assert state.step == before.step
    jax.tree.map(np.testing.assert_array_equal, steps.going_on(fresh, state), state)
