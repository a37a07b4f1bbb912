"""The loss of a network whose score is its map's maximum: every position is judged by itself.

Adaptor and segmentation head look at one position at a time, so any sample of positions gives an
unbiased estimate of the loss, at a cost that follows from the sample and not from the grid.
"""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from ssn_jax import losses, synthesis
from ssn_jax.models.features import feature_grid, sample_features


def make_map_loss(
    config: ml_collections.ConfigDict, network: nn.Module, noise_fn: Callable
) -> Callable:
    """The loss of both players; arguments and result as of `steps.make_loss`.

    Each image gives `config.positions` positions: a normal one any, a defective one those of its
    defect, weighted as its mask is (one whose mask is unknown gives none). Every other position of
    normal images comes once more with noise. Anomalies are what has noise, and defects.

    Args:
      config: the run's config.
      network: a `SuperSimpleNet` without a classification head.
      noise_fn: `(generator, adapted, key) -> noise`, called with adapted features (K, C).
    """

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=True):
        del stop_map_gradient  # The map feeds nothing.

        def apply(x, method, **options):
            variables = {'params': params, 'batch_stats': batch_stats}
            x, updates = network.apply(
                variables, x, train=True, method=method, mutable=['batch_stats'], **options
            )
            return x, updates.get('batch_stats', {})

        k_places, k_noise = jax.random.split(key)
        rows, target, weight, normal = _sample(k_places, batch, config.positions)
        adapted, of_adaptor = apply(rows, 'adapt')
        noisy = normal[::2]
        noise = noise_fn(generator, adapted[::2], k_noise) * noisy[:, None]
        [scale] = synthesis.noise_scales(config.noise.unit, adapted)
        seen = jnp.concatenate([adapted, adapted[::2] + noise * scale])
        target = jnp.concatenate([target, noisy])
        weight = jnp.concatenate([weight, noisy])
        logits, of_head = apply(seen[:, None, None, :], 'segment')

        target, weight = (x[:, None, None, None] for x in (target, weight))
        # A row of weight 0 is none: it counts in no average.
        taught = weight > 0
        if config.map_loss == 'cross_entropy':
            # Beyond a margin the truncated L1 is content; this one goes on telling apart.
            each = weight * losses.focal(logits, target, gamma=0.0)
            parts = [losses.mean_where(each, taught * (target == of)) for of in (0, 1)]
            terms = {'map_cross_entropy': sum(parts)}
        else:
            parts = losses.truncated_l1(logits, target, weight=weight, taught=taught)
            focal = losses.mean_where(weight * losses.focal(logits, target), taught)
            terms = {'map_l1': sum(parts), 'map_focal': focal}
        loss = sum(terms.values())
        power = losses.mean_where(noise**2, noisy[:, None])
        terms |= losses.generator_terms(loss, power, config.noise.penalty)
        return loss, (terms, batch_stats | of_adaptor | of_head)

    return loss_fn


def _sample(key, batch, positions):
    """Features at sampled positions (K, C); of each (K,) its target, its weight, is it normal."""
    layers = batch['layers']
    n, (height, width) = len(layers[0]), feature_grid(layers)
    label = batch.get('label', jnp.zeros(n))[:, None]
    mask = batch.get('mask', jnp.zeros((n, height, width, 1))).reshape(n, -1)
    # Beside a defect nothing is sure.
    chances = jnp.where(label > 0, mask, 1.0)
    if positions:
        sums = jnp.cumsum(chances, 1)
        drawn = jax.random.uniform(key, (n, positions)) * sums[:, -1:]
        places = jax.vmap(lambda s, d: jnp.searchsorted(s, d, side='right'))(sums, drawn)
        places = jnp.minimum(places, height * width - 1)
    else:
        places = jnp.broadcast_to(jnp.arange(height * width), chances.shape)
    weight = jnp.take_along_axis(chances, places, 1)
    if 'weight' in batch:
        of_place = jnp.take_along_axis(batch['weight'].reshape(n, -1), places, 1)
        weight = weight * jnp.where(label > 0, of_place, 1.0)
    rows = sample_features(layers, places)
    target = jnp.broadcast_to(label, places.shape).reshape(-1)
    return rows.reshape(-1, rows.shape[-1]), target, weight.reshape(-1), 1 - target
