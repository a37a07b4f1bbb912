"""The losses as the publications write them: the reference of the cheap forms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from ssn_jax import synthesis
from ssn_jax.losses import terms as loss_terms
from ssn_jax.models import grid as grid_lib, systems


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
    `sparse.make_sparse_loss`, its equal at a fraction of the cost.

    Returns:
      `loss(params, generator, batch_stats, batch, key, stop_map_gradient=...) -> (loss, (terms,
      batch_stats))`, where the loss is the discriminator's (L_D), and `terms` holds its parts, the
      noise's root mean square and the generator's loss L_G = -L_D + penalty * mean(noise^2).
      With `stop_map_gradient` the score's loss does not reach the noise and the segmentation head
      through the map; that is the default where no true defect teaches the score.
    """
    unsupervised = config.supervision.kind == 'none'
    network = systems.build_network(config)
    masks_fn = masks_fn or synthesis.make_masks(config)
    noise_fn = noise_fn or synthesis.make_noise(config)

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=unsupervised):
        k_mask, k_noise = jax.random.split(key)
        layers = batch['layers']
        n, grid = 2 * len(layers[0]), grid_lib.feature_grid(layers)
        placed = synthesis.place(masks_fn(k_mask, n, grid), batch)

        def apply(batch_stats, *args, method, **options):
            variables = {'params': params, 'batch_stats': batch_stats}
            result, updates = network.apply(
                variables, *args, train=True, method=method, mutable=['batch_stats'], **options
            )
            return result, batch_stats | updates['batch_stats']

        features = grid_lib.upscale_pool(layers)
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
        loss, terms = loss_terms.discriminator_loss(
            logits,
            scores,
            placed.target,
            placed.labels,
            placed.weight,
            placed.taught * (config.system != 'gap_cam'),
        )
        power = loss_terms.mean_where(noise**2, placed.noise)
        terms |= loss_terms.generator_terms(loss, power, config.noise.penalty)
        return loss, (terms, batch_stats)

    return loss_fn


def make_hinge_loss(config: ml_collections.ConfigDict, noise_fn: Callable | None = None):
    """SimpleNet's loss; arguments and result as of `make_loss`.

    Every position is a normal example, and once more with noise an anomalous one; the hinge at
    0.5 is the truncated L1 (Liu et al., CVPR 2023, equation 7).
    """
    network = systems.build_network(config)
    noise_fn = noise_fn or synthesis.make_noise(config)

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
        normal, anomalous = loss_terms.truncated_l1(logits, noisy[:, None, None, None])
        terms = {'loss': normal + anomalous, 'normal': normal, 'anomalous': anomalous}
        return terms['loss'], (terms, updates['batch_stats'])

    return loss_fn
