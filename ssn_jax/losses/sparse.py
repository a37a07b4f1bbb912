"""The training loss at the cost of what is new.

Equal to `direct.make_loss` in value and gradients (a test compares them parameter by parameter),
with less work:

- weights meet the frozen features at the backbone's own grids (`models/grid.py`);
- both copies of the doubled batch share their clean part, which is computed once;
- noise is drawn, generated and projected only where its mask is 1, about an eighth of the
  positions. The number of those is random and shapes are not, so there are a few programs for
  different numbers, the last one for all positions, and each batch takes the smallest that fits.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssn_jax import synthesis
from ssn_jax.losses import terms as loss_terms
from ssn_jax.models import grid as grid_lib
from ssn_jax.models.grid import feature_grid, upscale_pool
from ssn_jax.models.layers import EPSILON, MOMENTUM, SLOPE, conv2d, max_pool

# By how many standard deviations of the share of noisy positions each program exceeds the mean.
_SURPLUS = np.array([-0.5, 1.0, 3.0, np.inf])


def make_sparse_loss(
    config: ml_collections.ConfigDict,
    masks_fn: Callable,
    noise_fn: Callable,
    seeds_axis: str | None = None,
) -> Callable:
    """The loss of both players; arguments and result as of `direct.make_loss`.

    Args:
      config: the run's config.
      masks_fn: `(key, n, size) -> masks`, (n, *size, 1).
      noise_fn: `(generator, adapted, key) -> noise`, called with the K anomalous positions'
        adapted features (K, C).
      seeds_axis: the name of the axis that `vmap` maps it over, if it does.
    """
    unsupervised = config.supervision.kind == 'none'
    fraction, deviation = masked_fraction(masks_fn)

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=unsupervised):
        k_mask, k_noise = jax.random.split(key)
        layers = batch['layers']
        n, grid = 2 * len(layers[0]), feature_grid(layers)
        placed = synthesis.place(masks_fn(k_mask, n, grid), batch)
        mask = placed.noise
        # By how many standard deviations a batch's masks cover more than they do on average.
        shares = fraction + deviation / np.sqrt(n) * _SURPLUS[:-1]
        shares = [*shares, 1.0]  # Whatever is drawn fits into the last program.
        capacities = sorted({max(1, int(mask.size * share)) for share in np.clip(shares, 0, 1)})

        def run(capacity, params, generator):
            noise = functools.partial(noise_fn, generator, key=k_noise)
            return _loss(
                config, params, batch_stats, layers, placed, noise, capacity, stop_map_gradient
            )

        noisy = mask.sum()
        if seeds_axis is not None:
            # All seeds take the program that fits the one with the most. Were it each one's own,
            # vmap would run all programs and select.
            noisy = jax.lax.pmax(noisy, seeds_axis)
        fitting = jnp.searchsorted(np.array(capacities[:-1]), noisy)
        branches = [functools.partial(run, capacity) for capacity in capacities]
        (loss, of_generator), (terms, stats) = _switch(fitting, branches, params, generator)
        return loss, (terms | {'loss': loss, 'generator_loss': of_generator}, stats)

    return loss_fn


def _switch(index: jax.Array, branches: list[Callable], *players: dict) -> tuple:
    """`jax.lax.switch` with each branch's gradient inside it.

    The gradient of `jax.lax.switch` hands what a branch needs for its own out of it, in shapes that
    differ, and has every branch fill those of all others with zeros.

    Args:
      index: which branch to take.
      branches: functions of the players' parameters that return ((loss of the first, loss of the
        second), anything else). By each one's parameters only its own loss can be differentiated.
      *players: both players' parameters.
    """

    @jax.custom_vjp
    def run(*players):
        return jax.lax.switch(index, branches, *players)

    def forward(*players):
        learns = [any(x.perturbed for x in jax.tree.leaves(p)) for p in players]
        players = jax.tree.map(lambda x: x.value, players)

        def graded(branch, *players):
            def objective(i, own):
                both, rest = branch(*players[:i], own, *players[i + 1 :])
                return both[i], (both, rest)

            gradients = [None, None]
            for i in range(2):
                if learns[i]:
                    of_own = jax.grad(functools.partial(objective, i), has_aux=True)
                    gradients[i], result = of_own(players[i])
            return result, gradients

        return jax.lax.switch(index, [functools.partial(graded, b) for b in branches], *players)

    def backward(gradients, cotangents):
        scales = zip(gradients, cotangents[0], strict=True)
        return tuple(jax.tree.map(lambda x, scale=scale: scale * x, g) for g, scale in scales)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(*players)


def masked_fraction(masks_fn: Callable, n: int = 256, size: int = 32) -> tuple[float, float]:
    """Mean and standard deviation, over images, of the share of positions that a mask covers."""
    with jax.ensure_compile_time_eval():
        masks = jax.jit(masks_fn, static_argnums=(1, 2))(jax.random.key(0), n, (size, size))
        shares = np.asarray(masks).mean((1, 2, 3))
    return float(shares.mean()), float(shares.std())


def _loss(config, params, batch_stats, layers, placed, noise_fn, capacity, stop_map_gradient):
    """Loss, terms and running averages, with at most `capacity` noisy positions."""
    n, (height, width) = len(layers[0]), placed.noise.shape[1:3]
    positions = n * height * width
    flat = placed.noise.reshape(-1)
    # Noisy positions of the doubled batch, and the same of the single one they stem from.
    (where,) = jnp.nonzero(flat > 0, size=capacity, fill_value=2 * positions)
    valid = (where < 2 * positions)[:, None]
    base, stats = _base(config, params, batch_stats, layers)
    convolved = _convolved(config, params, layers, base)

    # The noise, at its positions.
    rows = base.reshape(positions, -1)[where % positions]
    seen = rows
    if config.adaptor == 'linear' and config.noise.kind == 'learned':
        projection = params['adaptor']['projection']
        seen = rows @ projection['kernel'] + projection['bias']
    noise = noise_fn(jax.lax.stop_gradient(seen)) * valid
    power = loss_terms.mean_where(noise**2, valid)

    for_map, for_score = _noise_scales(config, params, layers, base)

    # Classification head: a convolution of the features, clean ones once and noise on top.
    shape = 2 * n, height, width
    x = _convolve_sparse(noise * for_score, where, _feature_kernel(config, params), shape)
    x += jnp.concatenate([convolved, convolved])
    logits = None
    if config.system != 'gap_cam':
        # Segmentation head: clean positions once, noisy ones in their place.
        clean = 2.0 - flat[:positions] - flat[positions:]
        logits, noisy, stats['seg_head'] = _segment(
            config, params, batch_stats, layers, base, clean, (rows, noise * for_map, valid)
        )
        logits = jnp.tile(logits.reshape(-1), 2).at[where].set(noisy, mode='drop')
        logits = logits.reshape(2 * n, height, width, 1)
    loss, terms, more = _score(config, params, batch_stats, placed, logits, x, stop_map_gradient)
    terms |= loss_terms.generator_terms(loss, power, config.noise.penalty)
    return (loss, terms['generator_loss']), (terms, stats | more)


def _noise_scales(config, params, layers, base):
    """What noise is multiplied with on its way into the map and into the score."""
    some, features = synthesis.thin(base), base
    if config.adaptor == 'linear':
        projection = params['adaptor']['projection']
        some = some @ projection['kernel'] + projection['bias']
    elif config.noise.unit != 'absolute':
        features = upscale_pool(layers)
    unit = config.noise.unit
    for_map, for_score = synthesis.noise_scales(unit, some, synthesis.thin(features))
    adapted = config.system == 'gap_cam' or config.adapt_cls_features
    return for_map, for_map if adapted else for_score


def _feature_kernel(config, params):
    """The part of the classification head's 5x5 kernel that meets features."""
    kernel = params['cls_head']['conv']['kernel']
    return kernel if config.system == 'gap_cam' else kernel[:, :, :-1]


def _base(config, params, batch_stats, layers):
    """The grid (N, H, W, C) from which on all is linear up to the heads' BatchNorms.

    Returns:
      The features where the adaptor is linear, else the adapted ones; running averages.
    """
    if config.adaptor == 'linear':
        return grid_lib.by_image(upscale_pool, layers), {}
    adaptor = params['adaptor']
    x = _convolve(layers, adaptor['conv']['kernel']) + adaptor['conv']['bias']
    x, stats = _batch_norm(adaptor, batch_stats['adaptor'], x)
    return jax.nn.relu(x), {'adaptor': stats}


def _convolved(config, params, layers, base):
    """The classification head's convolution of the features: (N, H, W, D)."""
    kernel = _feature_kernel(config, params)
    if not (config.system == 'gap_cam' or config.adapt_cls_features):
        return _convolve(layers, kernel)
    if config.adaptor != 'linear':
        return conv2d(base, kernel)
    weight, bias = (params['adaptor']['projection'][name] for name in ('kernel', 'bias'))
    convolved = _convolve(layers, jnp.einsum('ab,debo->deao', weight, kernel))
    return convolved + grid_lib.convolve_constant(bias, kernel, feature_grid(layers))


def _convolve(layers, kernel):
    """`grid.convolve`, on a CPU image by image."""
    return grid_lib.by_image(lambda x: grid_lib.convolve(x, kernel), layers)


def _segment(config, params, batch_stats, layers, base, clean, noisy):
    """The segmentation head without an array of all positions' hidden channels in memory.

    Mean and variance of the hidden channels follow from mean and covariance of what they are
    linear in, and BatchNorm with them becomes part of the weights.

    Args:
      config: the run's config.
      params: the discriminator's parameters.
      batch_stats: its running averages.
      layers: outputs of the backbone (N, H_i, W_i, C_i).
      base: as `_base` returns it.
      clean: how often each of its positions counts in the statistics, (N * H * W,).
      noisy: rows of `base` (K, C), the noise on them once adapted, and which of them count (K, 1).

    Returns:
      Logits of all positions (N, H, W, 1) and of the noisy ones (K,), and running averages.
    """
    seg, linear = params['seg_head'], config.adaptor == 'linear'
    hidden, out = seg['hidden']['kernel'], seg['out']['kernel'][:, 0]

    def adapt(x, bias=False):
        if not linear:
            return x
        projection = params['adaptor']['projection']
        return x @ projection['kernel'] + (projection['bias'] if bias else 0.0)

    # Sums over positions, all less the center: products of small differences, not of large values.
    # XLA's sum over an axis is tenfold more exact than its product of a vector and a matrix.
    center = jax.lax.stop_gradient(base.mean((0, 1, 2)))
    centered = base.reshape(-1, base.shape[-1]) - center
    counted = clean[:, None] * centered
    first, second = adapt(counted.sum(0)), adapt(adapt(centered.T @ counted).T)
    rows, noise, valid = noisy
    rows = adapt(rows - center) * valid + noise
    total = clean.sum() + valid.sum()
    first, second = (first + rows.sum(0)) / total, second + rows.T @ rows
    covariance = second / total - jnp.outer(first, first)
    mean = (adapt(center, bias=True) + first) @ hidden + seg['hidden']['bias']
    variance = (hidden * (covariance @ hidden)).sum(0)
    stats = {'norm': _running(batch_stats['seg_head']['norm'], mean, variance)}

    # Scaled by the weights of the output too, a LeakyReLU only has to be summed.
    gain = seg['norm']['scale'] * jax.lax.rsqrt(variance + EPSILON) * out
    kernel = hidden * gain
    offset = seg['norm']['bias'] * out - first @ kernel

    def sum_leaky(x, out):
        return jnp.where((x > 0) == (out > 0), x, SLOPE * x).sum(-1)

    of_noisy = sum_leaky(rows @ kernel + offset, out)
    # At all positions it meets the features themselves.
    kernel = params['adaptor']['projection']['kernel'] @ kernel if linear else kernel
    offset = offset - center @ kernel

    def logits_of(inputs):
        def add(logits, chunk):
            kernel, offset, out = chunk
            x = grid_lib.project(inputs, kernel) if linear else inputs @ kernel
            return logits + sum_leaky(x + offset, out), None

        chunks = [grid_lib.split(x) for x in (kernel, offset, out)]
        zero = jnp.zeros(jax.tree.leaves(inputs)[0].shape[:1] + base.shape[1:3])
        return jax.lax.scan(add, zero, chunks)[0]

    logits = grid_lib.by_image(logits_of, layers if linear else base)
    return logits[..., None], of_noisy, stats


def _score(config, params, batch_stats, placed, logits, x, stop_map_gradient):
    """The rest of the classification head, from its convolution x of the features; the loss.

    Returns:
      The loss, its terms and the head's running averages.
    """
    cls, gap_cam = params['cls_head'], config.system == 'gap_cam'
    score = cls['score']
    x += cls['conv']['bias']
    if not gap_cam:
        seen = jax.lax.stop_gradient(logits) if stop_map_gradient else logits
        of_map = cls['conv']['kernel'][:, :, -1:]
        x += grid_lib.by_image(lambda y: conv2d(y, of_map), seen)
    x, stats = _batch_norm(cls, batch_stats['cls_head'], x)
    x = jax.nn.relu(x)
    if gap_cam:
        logits = x @ score['kernel']
        scores = logits.mean((1, 2))[:, 0] + score['bias']
    else:
        pooled = [max_pool(x), x.mean((1, 2)), max_pool(seen), seen.mean((1, 2))]
        scores = (jnp.concatenate(pooled, -1) @ score['kernel'] + score['bias'])[:, 0]
    taught = placed.taught * (not gap_cam)
    loss, terms = loss_terms.discriminator_loss(
        logits, scores, placed.target, placed.labels, placed.weight, taught
    )
    return loss, terms, {'cls_head': stats}


def _batch_norm(part, batch_stats, x):
    """BatchNorm `part['norm']` of x (N, H, W, C) by the batch's statistics; running averages."""
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    gain, offset = _affine(part['norm'], mean, variance)
    return x * gain + offset, {'norm': _running(batch_stats['norm'], mean, variance)}


def _affine(norm, mean, variance):
    """BatchNorm as gain and offset."""
    gain = norm['scale'] * jax.lax.rsqrt(variance + EPSILON)
    return gain, norm['bias'] - mean * gain


def _running(old, mean, variance):
    return {
        'mean': MOMENTUM * old['mean'] + (1 - MOMENTUM) * mean,
        'var': MOMENTUM * old['var'] + (1 - MOMENTUM) * variance,
    }


def _convolve_sparse(values, where, kernel, shape):
    """The convolution of a grid (N, H, W, C) that holds values (K, C) at `where` and 0 elsewhere.

    Each value reaches its k x k neighbours; what falls off the grid lands in a border that is cut
    off again.
    """
    size, features = kernel.shape[0], kernel.shape[-1]
    half = size // 2
    n, height, width = shape
    image, rest = where // (height * width), where % (height * width)
    row, column = rest // width, rest % width
    products = values @ kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)
    products = products.reshape(len(values), size * size, features)
    # Tap (i, j) of the value at p contributes to the output at p - (i, j) + half.
    i, j = np.divmod(np.arange(size * size), size)
    rows, columns = row[:, None] + (2 * half - i), column[:, None] + (2 * half - j)
    padded = (height + 2 * half, width + 2 * half)
    target = (image[:, None] * padded[0] + rows) * padded[1] + columns
    out = jnp.zeros((n * padded[0] * padded[1], features)).at[target].add(products)
    out = out.reshape(n, *padded, features)
    return out[:, half : half + height, half : half + width]
