"""Train steps: pure functions `(state, batch, key) -> (state, metrics)`.

A batch is a dict; `batch['layers']` holds the frozen backbone's outputs (N, H_i, W_i, C_i) at
their own grids (SimpleNet: the embedding), and what is known of defects is in the fields that
`synthesis.place` describes. The two players of learned noise never share a gradient: each has its
own `jax.grad` with the other's parameters held constant.
"""

from collections.abc import Callable
import functools
import math

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ssn_jax import devices, losses, map_loss, sparse_loss, synthesis
from ssn_jax.models import features as features_lib
from ssn_jax.models.heads import NoiseGenerator
from ssn_jax.models.simplenet import SimpleNet
from ssn_jax.models.supersimplenet import GapCam, SuperSimpleNet

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

    def variables(self) -> dict:
        """What is evaluated: the averaged parameters if there are any, and the statistics."""
        return {'params': self.average or self.params, 'batch_stats': self.batch_stats}


def build_network(config: ml_collections.ConfigDict) -> SuperSimpleNet | GapCam | SimpleNet:
    """The trained network a config describes."""
    match config.system:
        case 'gap_cam':
            return GapCam(config.adaptor, tuple(config.features.layers))
        case 'simplenet':
            return SimpleNet(config.simplenet.embedding, config.simplenet.hidden)
    return SuperSimpleNet(
        config.adaptor,
        config.adapt_cls_features,
        classify=config.image_score == 'head',
        layers=tuple(config.features.layers),
    )


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


def learning_rate_factor(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Callable:
    """The factor on every learning rate as a function of the step.

    A fraction of the epochs that is no whole number of them takes effect at the next epoch.
    """
    o = config.optimizer
    boundaries = {}
    for drop in o.drops:
        step = math.ceil(drop * config.epochs) * steps_per_epoch
        boundaries[step] = boundaries.get(step, 1.0) * o.drop_factor
    return optax.piecewise_constant_schedule(1.0, boundaries)


def init_state(config: ml_collections.ConfigDict, key: jax.Array, channels: int) -> TrainState:
    """A fresh state for backbone layers of `channels` channels together."""
    if config.system == 'simplenet':
        channels = config.simplenet.embedding
    k_network, k_generator = jax.random.split(key)
    grid = jnp.zeros((1, 8, 8, channels))
    variables = build_network(config).init(k_network, grid)
    generator, generator_opt_state = {}, ()
    if config.noise.kind == 'learned':
        z = jnp.zeros((1, 8, 8, config.noise.z_dim))
        generator = NoiseGenerator().init(k_generator, grid, z)['params']
        generator_opt_state = generator_optimizer(config).init(generator)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=discriminator_optimizer(config).init(variables['params']),
        generator=generator,
        generator_opt_state=generator_opt_state,
        # Copies: whoever donates the state may give each array once.
        average=jax.tree.map(jnp.array, variables['params']) if config.optimizer.average else {},
    )


def make_noise(config: ml_collections.ConfigDict) -> Callable:
    """`noise(generator, adapted, key)`: noise for adapted features, both (..., C).

    It is in units of `config.noise.unit`: what calls it knows the features' own spread.
    """
    settings = config.noise

    def static(generator, adapted, key):
        del generator
        return synthesis.static_noise(key, adapted.shape, settings.std)

    def learned(generator, adapted, key):
        z = jax.random.normal(key, (*adapted.shape[:-1], settings.z_dim))
        raw = NoiseGenerator().apply({'params': generator}, jax.lax.stop_gradient(adapted), z)
        if any(settings.shell):
            noise = synthesis.shell_noise(raw, settings.shell)
        else:
            noise = synthesis.bounded_noise(raw, settings.beta if settings.bounded else None)
        if not settings.static_share:
            return noise
        k_static, k_which = jax.random.split(jax.random.fold_in(key, 1))
        static = synthesis.static_noise(k_static, adapted.shape, settings.std)
        which = jax.random.bernoulli(k_which, settings.static_share, (*adapted.shape[:-1], 1))
        return jnp.where(which, static, noise)

    return learned if settings.kind == 'learned' else static


def make_masks(config: ml_collections.ConfigDict) -> Callable:
    """`masks(key, n, size)`: where anomalies are put, (n, *size, 1)."""
    perlin = config.perlin
    return lambda key, n, size: synthesis.perlin_masks(key, n, size, perlin.threshold, perlin.empty)


def make_loss(
    config: ml_collections.ConfigDict,
    masks_fn: Callable | None = None,
    noise_fn: Callable | None = None,
) -> Callable:
    """The loss of both players, as a function of both players' parameters.

    Args:
      config: the run's config.
      masks_fn: `(key, n, size) -> masks`; None is the config's, as `make_masks` returns it.
      noise_fn: `(generator, adapted, key) -> noise`; None is the config's.

    The direct form, which reads like the publication; with `config.sparse` the step uses
    `sparse_loss.make_sparse_loss`, its equal at a fraction of the cost.

    Returns:
      `loss(params, generator, batch_stats, batch, key, stop_map_gradient=...) -> (loss, (terms,
      batch_stats))`, where the loss is the discriminator's (L_D), and `terms` holds its parts, the
      noise's root mean square and the generator's loss L_G = -L_D + penalty * mean(noise^2).
      With `stop_map_gradient` the score's loss does not reach the noise and the segmentation head
      through the map; that is the default where no true defect teaches the score.
    """
    unsupervised = config.supervision.kind == 'none'
    network = build_network(config)
    masks_fn = masks_fn or make_masks(config)
    noise_fn = noise_fn or make_noise(config)

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=unsupervised):
        k_mask, k_noise = jax.random.split(key)
        layers = batch['layers']
        n, grid = 2 * len(layers[0]), features_lib.feature_grid(layers)
        placed = synthesis.place(masks_fn(k_mask, n, grid), batch)

        def apply(batch_stats, *args, method, **options):
            variables = {'params': params, 'batch_stats': batch_stats}
            result, updates = network.apply(
                variables, *args, train=True, method=method, mutable=['batch_stats'], **options
            )
            return result, batch_stats | updates['batch_stats']

        features = features_lib.upscale_pool(layers)
        adapted, batch_stats = apply(batch_stats, features, method='adapt')
        thin = synthesis.thin(adapted), synthesis.thin(features)
        scales = synthesis.noise_scales(config.noise.unit, *thin)
        adapted, features = synthesis.double(adapted), synthesis.double(features)
        noise = noise_fn(generator, adapted, k_noise) * placed.noise
        adapted, features = adapted + noise * scales[0], features + noise * scales[1]
        (logits, scores), batch_stats = apply(
            batch_stats, adapted, features, method='discriminate',
            stop_map_gradient=stop_map_gradient,
        )  # fmt: skip
        loss, terms = losses.discriminator_loss(
            logits,
            scores,
            placed.target,
            placed.labels,
            placed.weight,
            placed.taught * (config.system != 'gap_cam'),
        )
        power = losses.mean_where(noise**2, placed.noise)
        terms |= losses.generator_terms(loss, power, config.noise.penalty)
        return loss, (terms, batch_stats)

    return loss_fn


def make_hinge_loss(config: ml_collections.ConfigDict, noise_fn: Callable | None = None):
    """SimpleNet's loss; arguments and result as of `make_loss`.

    Every position is a normal example, and once more with noise an anomalous one; the hinge at
    0.5 is the truncated L1 (Liu et al., CVPR 2023, equation 7).
    """
    network = build_network(config)
    noise_fn = noise_fn or make_noise(config)

    def loss_fn(params, generator, batch_stats, batch, key):
        variables = {'params': params, 'batch_stats': batch_stats}
        clean = network.apply(variables, network.features(batch['layers']), method='adapt')
        [scale] = synthesis.noise_scales(config.noise.unit, synthesis.thin(clean))
        noise = noise_fn(generator, clean, key) * scale
        logits, updates = network.apply(
            variables,
            jnp.concatenate([clean, clean + noise]),
            train=True,
            method='discriminate',
            mutable=['batch_stats'],
        )
        noisy = jnp.arange(len(logits)) >= len(clean)
        normal, anomalous = losses.truncated_l1(logits, noisy[:, None, None, None])
        terms = {'loss': normal + anomalous, 'normal': normal, 'anomalous': anomalous}
        return terms['loss'], (terms, updates['batch_stats'])

    return loss_fn


def config_loss(config: ml_collections.ConfigDict, seeds_axis: str | None = None) -> Callable:
    """The loss that a config trains with, in its cheapest form.

    `seeds_axis` names the axis that `vmap` maps it over, if it does.
    """
    if config.system == 'simplenet':
        return make_hinge_loss(config)
    if config.image_score == 'map':
        return map_loss.make_map_loss(config, build_network(config), make_noise(config))
    if not config.sparse:
        return make_loss(config)
    return sparse_loss.make_sparse_loss(config, make_masks(config), make_noise(config), seeds_axis)


def make_step(
    config: ml_collections.ConfigDict, steps_per_epoch: int, loss_fn: Callable | None = None
) -> Callable:
    """The step of the game a config describes: `step(state, batch, key) -> (state, metrics)`.

    Static noise: the discriminator alone. Learned noise: `discriminator_steps` updates of the
    discriminator, then one of the generator (0: both on every step, each by its own gradient).
    `loss_fn` replaces the config's.
    """
    loss_fn = loss_fn or config_loss(config)
    factor_fn = learning_rate_factor(config, steps_per_epoch)
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
) -> Callable:
    """A part of an epoch as one compiled call.

    Args:
      config: the run's config.
      steps: how many an epoch makes.
      mesh: the devices that share each batch, as `devices.make_mesh` returns them; None is one.
      several: whether it is of several seeds at once.

    Returns:
      `run(state, data, order, key, start, count) -> (state, sums, bad)`: the first `count` rows of
      `order` (at least so many, batch) are the epoch's steps from `start` on and say which images
      of `data` they see. The terms are summed over the steps; `bad` tells by name the first step at
      which something became NaN or infinite, or `NEVER`. Of several seeds state (but its step,
      which they share), order, key, sums and bad have a leading axis.
    """
    seeds_axis = 'seeds' if several else None
    step = make_step(config, steps, config_loss(config, seeds_axis) if several else None)

    @jax.jit  # Traced once, though its shapes are asked for before it is used.
    def advance(state, data, indices, key):
        batch = jax.tree.map(lambda x: features_lib.restore(x[indices]), data)
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

        with jax.default_matmul_precision(config.precision):
            _, terms, sound = jax.eval_shape(advance, state, data, order[0], keys[0])
            sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), terms)
            bad = dict.fromkeys(sound, jnp.int32(NEVER))
            # The number is an argument: one program does for all parts, the last one too.
            return jax.lax.fori_loop(0, count, body, (state, sums, bad))

    def each(state, data, order, key, start, count):
        # One step for all seeds keeps the choice of the player a choice: mapped over, vmap would
        # update both players on every step and select.
        state_axes = TrainState(None, *[0] * 6)
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
) -> Callable:
    """One epoch, by parts.

    Args:
      config: as of `make_part`, as are the three that follow.
      steps: how many an epoch makes.
      mesh: the devices that share each batch.
      several: whether it is of several seeds at once.
      on_host: whether the data stay on the host: what a part needs is sent before it.
      longest: the most steps of a part.

    Returns:
      `epoch(state, data, order, key) -> (state, metrics)`. `data` is a batch of everything there
      is; `order` (steps, batch) says, on the host, which of it each step sees; the metrics, on the
      host, are averages over the steps, and `metrics['bad']` is that of `make_part`. With a mesh
      state, data and key lie on it, the data spread.
    """
    run = make_part(config, steps, mesh, several)
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


def describe_bad(bad: dict[str, int]) -> tuple[int, str] | None:
    """The first bad step, from an epoch's `metrics['bad']`, and what was bad; None for none."""
    step = min(bad.values())
    if step == NEVER:
        return None
    names = [name for name, first in bad.items() if first == step]
    # A bad term makes its sums and gradients bad too.
    terms = [name for name in names if name not in ('loss', 'generator_loss', 'gradients')]
    sums = [name for name in names if name != 'gradients']
    named = terms or sums[:1]
    return int(step), f'the loss ({", ".join(named)})' if named else 'a gradient of the loss'
