"""Train steps: pure functions `(state, batch, key) -> (state, metrics)`.

A batch is a dict; `batch['layers']` holds the frozen backbone's outputs (N, H_i, W_i, C_i) at
their own grids (SimpleNet: the embedding), and what is known of defects is in the fields that
`synthesis.place` describes. The two players of learned noise never share a gradient: each has its
own `jax.grad` with the other's parameters held constant.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ssn_jax import config as config_lib, devices, losses
from ssn_jax.models import heads, systems
from ssn_jax.synthesis import NoiseGenerator
from ssn_jax.training import features

# The number of the step at which something happens that does not.
NEVER = np.iinfo(np.int32).max


@struct.dataclass
class TrainState:
    """Everything a step reads and writes; a pytree of arrays.

    Attributes:
      step: batches seen so far, int32.
      params: the discriminator's parameters: adaptor and heads.
      batch_stats: running averages of its BatchNorms.
      opt_state: its optimiser's state.
      generator: the noise generator's parameters, {} for static noise.
      generator_opt_state: its optimiser's state, () for static noise.
      average: an exponential average of `params`, {} if none is kept.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    generator: dict
    generator_opt_state: optax.OptState
    average: dict = struct.field(default_factory=dict)

    def variables(self, known: float = 0.0) -> dict:
        """What is evaluated: the averaged parameters if there are any, and the statistics.

        Of two outputs of the segmentation head it is one, as of `heads.mixed`.
        """
        params = heads.mixed(self.average or self.params, known)
        return {'params': params, 'batch_stats': self.batch_stats}


def discriminator_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with one rate and weight decay for the adaptor and one for the heads.

    The rates' drops are applied by `learning_rate_factor`, since they follow the epochs and not
    the number of updates a player has had.
    """
    o = config.optimizer
    if o.heads_decay_in_gradient:
        decay = optax.add_decayed_weights(o.heads_weight_decay)
        heads = optax.chain(decay, optax.adam(o.heads_learning_rate))
    else:
        heads = optax.adamw(o.heads_learning_rate, weight_decay=o.heads_weight_decay)
    adaptor = optax.adamw(o.adaptor_learning_rate, weight_decay=o.adaptor_weight_decay)
    optimizer = optax.multi_transform(
        {'adaptor': adaptor, 'heads': heads},
        lambda params: {part: 'adaptor' if part == 'adaptor' else 'heads' for part in params},
    )
    if not o.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), optimizer)


def generator_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The noise generator's AdamW."""
    return optax.adamw(config.noise.learning_rate, weight_decay=0.0)


def learning_rate_factor(
    config: ml_collections.ConfigDict, steps_per_epoch: int, begun: int = 0
) -> Callable:
    """The factor on every learning rate as a function of the step.

    A fraction of the epochs that is no whole number of them takes effect at the next epoch. A run
    that goes on from another one began at the step `begun`, and has all rates once more.
    """
    o = config.optimizer
    boundaries = {}
    for drop in o.drops:
        own = math.ceil(drop * (config.epochs - config.epochs_before))
        step = begun + own * steps_per_epoch
        boundaries[step] = boundaries.get(step, 1.0) * o.drop_factor
    return optax.piecewise_constant_schedule(1.0, boundaries)


def init_state(config: ml_collections.ConfigDict, key: jax.Array, channels: int) -> TrainState:
    """A fresh state for backbone layers of `channels` channels together."""
    if config.system == 'simplenet':
        channels = config.simplenet.embedding
    k_network, k_generator = jax.random.split(key)
    grid = jnp.zeros((1, 8, 8, channels))
    variables = systems.build_network(config).init(k_network, grid)
    params = dict(variables['params'])
    if config.supervision.known > 0:
        params['known'] = params['seg_head']['out']['kernel']
    generator, generator_opt_state = {}, ()
    if config.noise.kind == 'learned':
        z = jnp.zeros((1, 8, 8, config.noise.z_dim))
        generator = NoiseGenerator().init(k_generator, grid, z)['params']
        generator_opt_state = generator_optimizer(config).init(generator)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables['batch_stats'],
        opt_state=discriminator_optimizer(config).init(params),
        generator=generator,
        generator_opt_state=generator_opt_state,
        # Copies: whoever donates the state may give each array once.
        average=jax.tree.map(jnp.array, params) if config.optimizer.average else {},
    )


def going_on(state: TrainState, before: TrainState) -> TrainState:
    """A fresh state that goes on from another one, which may lack the output for known defects.

    That begins as the other output, and its optimiser afresh.
    """
    there = dict(jax.tree_util.tree_leaves_with_path(before))
    state = jax.tree_util.tree_map_with_path(lambda path, x: there.get(path, x), state)
    if 'known' in state.params and 'known' not in before.params:
        begun = {
            name: tree | {'known': jnp.array(tree['seg_head']['out']['kernel'])}
            for name, tree in (('params', state.params), ('average', state.average))
            if tree
        }
        state = state.replace(**begun)
    return state


def make_step(
    config: ml_collections.ConfigDict,
    steps_per_epoch: int,
    loss_fn: Callable | None = None,
    begun: int = 0,
) -> Callable:
    """The step of the game a config describes: `step(state, batch, key) -> (state, metrics)`.

    Static noise: the discriminator alone. Learned noise: `discriminator_steps` updates of the
    discriminator, then one of the generator (0: both on every step, each by its own gradient).
    `loss_fn` replaces the config's; `begun` is as of `learning_rate_factor`.
    """
    loss_fn = loss_fn or losses.config_loss(config)
    factor_fn = learning_rate_factor(config, steps_per_epoch, begun)
    d_optimizer, g_optimizer = discriminator_optimizer(config), generator_optimizer(config)

    def generator_loss(generator, params, batch_stats, batch, key):
        # Stopping the map's gradient shields the segmentation head; the adversary sees all of L_D.
        _, (terms, _) = loss_fn(params, generator, batch_stats, batch, key, False)
        return terms['generator_loss'], terms

    def update_discriminator(state, batch, key):
        grads, (terms, batch_stats) = jax.grad(loss_fn, has_aux=True)(
            state.params, state.generator, state.batch_stats, batch, key
        )
        updates, opt_state = d_optimizer.update(grads, state.opt_state, state.params)
        factor = factor_fn(state.step)
        params = jax.tree.map(lambda p, u: p + factor * u, state.params, updates)
        average = state.average
        if average:
            # At first the average is of few steps, or it would hold on to the beginning.
            decay = jnp.minimum(config.optimizer.average, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(params, average, 1 - decay)
        state = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)
        return state.replace(average=average), terms

    def update_generator(state, batch, key):
        grads, terms = jax.grad(generator_loss, has_aux=True)(
            state.generator, state.params, state.batch_stats, batch, key
        )
        updates, opt_state = g_optimizer.update(grads, state.generator_opt_state, state.generator)
        factor = factor_fn(state.step)
        generator = jax.tree.map(lambda p, u: p + factor * u, state.generator, updates)
        return state.replace(generator=generator, generator_opt_state=opt_state), terms

    def step(state, batch, key):
        if config.noise.kind != 'learned':
            state, terms = update_discriminator(state, batch, key)
        elif config.noise.discriminator_steps == 0:
            moved, _ = update_generator(state, batch, key)
            state, terms = update_discriminator(state, batch, key)
            state = state.replace(
                generator=moved.generator, generator_opt_state=moved.generator_opt_state
            )
        else:
            period = config.noise.discriminator_steps + 1
            state, terms = jax.lax.cond(
                state.step % period == period - 1,
                update_generator,
                update_discriminator,
                state,
                batch,
                key,
            )
        return state.replace(step=state.step + 1), terms

    return step


def make_part(
    config: ml_collections.ConfigDict,
    steps: int,
    mesh: jax.sharding.Mesh | None = None,
    several: bool = False,
    begun: int = 0,
) -> Callable:
    """A part of an epoch as one compiled call.

    Args:
      config: the run's config.
      steps: how many an epoch makes.
      mesh: the devices that share each batch, as `devices.make_mesh` returns them; None is one.
      several: whether it is of several seeds at once.
      begun: as of `learning_rate_factor`.

    Returns:
      `run(state, data, order, key, start, count) -> (state, sums, bad)`: the first `count` rows of
      `order` (at least so many, batch) are the epoch's steps from `start` on and say which images
      of `data` they see. The terms are summed over the steps; `bad` tells by name the first step at
      which something became NaN or infinite, or `NEVER`. Of several seeds state (but its step,
      which they share), order, key, sums and bad have a leading axis.
    """
    seeds_axis = 'seeds' if several else None
    loss_fn = losses.config_loss(config, seeds_axis) if several else None
    step = make_step(config, steps, loss_fn, begun)

    @jax.jit  # Traced once, though its shapes are asked for before it is used.
    def advance(state, data, indices, key):
        batch = jax.tree.map(lambda x: features.restore(x[indices]), data)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, devices.spread(mesh))
        state, terms = step(state, batch, key)
        return state, terms, finite(state, terms)

    def run(state, data, order, key, start, count):
        keys = jax.random.split(key, steps)

        def body(i, carry):
            state, sums, bad = carry
            state, terms, sound = advance(state, data, order[i], keys[start + i])
            bad = {k: jnp.where(sound[k], b, jnp.minimum(b, start + i)) for k, b in bad.items()}
            return state, jax.tree.map(jnp.add, sums, terms), bad

        with jax.default_matmul_precision(config_lib.training_precision(config)):
            _, terms, sound = jax.eval_shape(advance, state, data, order[0], keys[0])
            sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), terms)
            bad = dict.fromkeys(sound, jnp.int32(NEVER))
            # The number is an argument: one program does for all parts, the last one too.
            return jax.lax.fori_loop(0, count, body, (state, sums, bad))

    def each(state, data, order, key, start, count):
        # One step for all seeds keeps the choice of the player a choice: mapped over, vmap would
        # update both players on every step and select.
        names = [field.name for field in dataclasses.fields(TrainState)]
        state_axes = TrainState(**{name: None if name == 'step' else 0 for name in names})
        axes = {'in_axes': (state_axes, None, 0, 0), 'out_axes': (state_axes, 0, 0)}
        part = functools.partial(run, start=start, count=count)
        return jax.vmap(part, **axes, axis_name=seeds_axis)(state, data, order, key)

    where = {} if mesh is None else {'out_shardings': devices.replicated(mesh)}
    # The state is not donated: until the next one is there, it may have to be written.
    return jax.jit(each if several else run, **where)


def make_epoch(
    config: ml_collections.ConfigDict,
    steps: int,
    mesh: jax.sharding.Mesh | None = None,
    several: bool = False,
    on_host: bool = False,
    longest: int = 16,
    begun: int = 0,
) -> Callable:
    """One epoch, by parts.

    Args:
      config: as of `make_part`, as are the three that follow.
      steps: how many an epoch makes.
      mesh: the devices that share each batch.
      several: whether it is of several seeds at once.
      on_host: whether the data stay on the host: what a part needs is sent before it.
      longest: the most steps of a part.
      begun: as of `learning_rate_factor`.

    Returns:
      `epoch(state, data, order, key) -> (state, metrics)`. `data` is a batch of everything there
      is; `order` (steps, batch) says, on the host, which of it each step sees; the metrics, on the
      host, are averages over the steps, and `metrics['bad']` is that of `make_part`. With a mesh
      state, data and key lie on it, the data spread.
    """
    run = make_part(config, steps, mesh, several, begun)
    size = -(-steps // -(-steps // longest))
    spread = None if mesh is None else devices.spread(mesh)

    def epoch(state, data, order, key):
        found = []
        for start in range(0, steps, size):
            rows = order[..., start : start + size, :]
            count = rows.shape[-2]
            rows = np.concatenate([rows, np.zeros_like(order[..., : size - count, :])], -2)
            seen = data
            if on_host:  # Row i is the i-th image that these steps see.
                flat = rows.reshape(-1)
                seen = jax.tree.map(lambda x, flat=flat: jax.device_put(x[flat], spread), data)
                rows = np.arange(rows.size).reshape(rows.shape)
            rows, *part = devices.put(mesh, (np.int32(rows), np.int32(start), np.int32(count)))
            state, *values = run(state, seen, rows, key, *part)
            found.append(values)
        sums, bad = zip(*jax.device_get(found), strict=True)
        metrics = jax.tree.map(lambda *x: np.sum(x, 0, np.float64) / steps, *sums)
        return state, metrics | {'bad': jax.tree.map(lambda *x: np.min(x, 0), *bad)}

    return epoch


def finite(state: TrainState, terms: dict) -> dict[str, jax.Array]:
    """Which of a step's terms, and under 'gradients' of the parameters after it, are finite.

    A gradient that is NaN or infinite leaves a parameter so; looking at one of both is enough.
    """
    parameters = jax.tree.leaves((state.params, state.generator))
    sound = jnp.stack([jnp.isfinite(x).all() for x in parameters]).all()
    return {name: jnp.isfinite(x) for name, x in terms.items()} | {'gradients': sound}


def stack(trees: list):
    """Trees of arrays, one of each seed, as one with a leading axis; the tree of one as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *trees)


def unstack(tree, count: int) -> list:
    """The trees of each of `count` seeds."""
    if count == 1:
        return [tree]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def stack_states(states: list):
    """Train states of the same step as one, which has that step."""
    return stack(states).replace(step=states[0].step)


def unstack_states(state, count: int) -> list:
    """The train states of each of `count` seeds."""
    if count == 1:
        return [state]
    each = unstack(state.replace(step=()), count)
    return [one.replace(step=state.step) for one in each]
