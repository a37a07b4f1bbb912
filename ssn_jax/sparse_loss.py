"""The training loss at the cost of what is new.

Equal to `steps.make_loss` in value and gradients (a test compares them parameter by parameter),
with less work:

- weights meet the frozen features at the backbone's own grids (`models/native.py`);
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

from ssn_jax import losses, synthesis
from ssn_jax.models import native
from ssn_jax.models.features import feature_grid, upscale_pool
from ssn_jax.models.layers import EPSILON, MOMENTUM, SLOPE, conv2d

# By how many standard deviations of the share of noisy positions each program exceeds the mean.
_SURPLUS = np.array([-0.5, 1.0, 3.0, np.inf])


def make_sparse_loss(
    config: ml_collections.ConfigDict,
    masks_fn: Callable,
    noise_fn: Callable,
    seeds_axis: str | None = None,
) -> Callable:
    """The loss of both players; arguments and result as of `steps.make_loss`.

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
        shares = fraction + deviation / np.sqrt(n) * _SURPLUS
        capacities = sorted({int(mask.size * share) for share in np.minimum(shares, 1.0)})

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
        return jax.lax.switch(fitting, branches, params, generator)

    return loss_fn


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
    (where,) = jnp.nonzero(flat > 0, size=capacity, fill_value=0)
    source = where % positions
    valid = (jnp.arange(capacity) < flat.sum())[:, None]
    # How many of a position's two copies are clean.
    clean = 2.0 - flat[:positions] - flat[positions:]
    linear = config.adaptor == 'linear'
    once, hidden, adapted, stats = _features(config, params, batch_stats, layers)

    # The noise, at its positions.
    if linear and config.noise.kind == 'learned':
        projection = params['adaptor']['projection']
        rows = upscale_pool(layers).reshape(positions, -1)[source]
        rows = rows @ projection['kernel'] + projection['bias']
    elif linear:
        rows = jnp.zeros((capacity, params['adaptor']['projection']['bias'].size))
    else:
        rows = adapted.reshape(positions, -1)[source]
    noise = noise_fn(rows) * valid
    power = losses.mean_where(noise**2, valid)

    def total_loss(logits, x):
        loss, terms, more = _score(
            config, params, batch_stats, placed, logits, x, stop_map_gradient
        )
        terms |= losses.generator_terms(loss, power, config.noise.penalty)
        return loss, (terms, stats | more)

    # Classification head: a convolution of the features, clean ones once and noise on top.
    k_features = _feature_kernel(config, params)
    x = jnp.concatenate([once, once])
    x += _convolve_sparse(noise, where, k_features, (2 * n, height, width))
    if hidden is None:
        return total_loss(None, x)

    # Segmentation head: clean positions once, noisy ones on top.
    seg = params['seg_head']
    hidden = hidden.reshape(positions, -1)
    noisy = hidden[source] + noise @ seg['hidden']['kernel']
    total = 2 * positions
    mean = (clean @ hidden + valid[:, 0] @ noisy) / total
    variance = (clean @ (hidden - mean) ** 2 + valid[:, 0] @ (noisy - mean) ** 2) / total
    stats['seg_head'] = {'norm': _running(batch_stats['seg_head']['norm'], mean, variance)}
    gain, offset = _affine(seg['norm'], mean, variance)

    def head(x):
        return jax.nn.leaky_relu(x * gain + offset, SLOPE) @ seg['out']['kernel']

    both = jnp.tile(head(hidden), (2, 1))
    change = (head(noisy) - both[where]) * valid
    return total_loss(both.at[where].add(change).reshape(2 * n, height, width, 1), x)


def make_shuffled_loss(
    config: ml_collections.ConfigDict, masks_fn: Callable, shuffle_fn: Callable
) -> Callable:
    """The loss with shuffled layers; arguments and result as of `steps.make_loss`.

    Shuffled layers are layers: everything that is linear in them happens at their own grids.

    Args:
      config: the run's config.
      masks_fn: `(key, n, size) -> masks`, (n, *size, 1).
      shuffle_fn: `(key, layers, mask) -> layers`.
    """

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=True):
        del generator
        k_mask, k_shuffle = jax.random.split(key)
        layers = jax.tree.map(synthesis.double, batch['layers'])
        placed = synthesis.place(masks_fn(k_mask, len(layers[0]), feature_grid(layers)), batch)
        layers = shuffle_fn(k_shuffle, layers, placed.noise)
        x, hidden, _, stats = _features(config, params, batch_stats, layers)
        logits = None
        if hidden is not None:
            seg = params['seg_head']
            normal, stats['seg_head'] = _batch_norm(seg, batch_stats['seg_head'], hidden)
            logits = jax.nn.leaky_relu(normal, SLOPE) @ seg['out']['kernel']
        loss, terms, more = _score(
            config, params, batch_stats, placed, logits, x, stop_map_gradient
        )
        return loss, (terms | {'loss': loss}, stats | more)

    return loss_fn


def _feature_kernel(config, params):
    """The part of the classification head's 5x5 kernel that meets features."""
    kernel = params['cls_head']['conv']['kernel']
    return kernel if config.system == 'gap_cam' else kernel[:, :, :-1]


def _features(config, params, batch_stats, layers):
    """What of both heads is linear in the features (N, H, W, C), from the layers.

    Returns:
      The classification head's convolution of the features (N, H, W, D), the segmentation head's
      hidden channels before BatchNorm (None for GAP+CAM), the adapted features where the adaptor
      is not linear, and its running averages.
    """
    adaptor, k_features = params['adaptor'], _feature_kernel(config, params)
    gap_cam, adapted, stats = config.system == 'gap_cam', None, {}
    linear = config.adaptor == 'linear'
    if linear:
        weight, bias = adaptor['projection']['kernel'], adaptor['projection']['bias']
    else:
        x = native.convolve(layers, adaptor['conv']['kernel']) + adaptor['conv']['bias']
        x, stats['adaptor'] = _batch_norm(adaptor, batch_stats['adaptor'], x)
        adapted = jax.nn.relu(x)
    if not (gap_cam or config.adapt_cls_features):
        convolved = native.convolve(layers, k_features)
    elif linear:
        convolved = native.convolve(layers, jnp.einsum('ab,debo->deao', weight, k_features))
        convolved += native.convolve_constant(bias, k_features, feature_grid(layers))
    else:
        convolved = conv2d(adapted, k_features)
    if gap_cam:
        return convolved, None, adapted, stats
    w_hidden, b_hidden = (params['seg_head']['hidden'][name] for name in ('kernel', 'bias'))
    if linear:
        hidden = native.project(layers, weight @ w_hidden) + (bias @ w_hidden + b_hidden)
    else:
        hidden = adapted @ w_hidden + b_hidden
    return convolved, hidden, adapted, stats


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
        x += conv2d(seen, cls['conv']['kernel'][:, :, -1:])
    x, stats = _batch_norm(cls, batch_stats['cls_head'], x)
    x = jax.nn.relu(x)
    if gap_cam:
        logits = x @ score['kernel']
        scores = logits.mean((1, 2))[:, 0] + score['bias']
    else:
        pooled = [x.max((1, 2)), x.mean((1, 2)), seen.max((1, 2)), seen.mean((1, 2))]
        scores = (jnp.concatenate(pooled, -1) @ score['kernel'] + score['bias'])[:, 0]
    taught = placed.taught * (not gap_cam)
    loss, terms = losses.discriminator_loss(
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
