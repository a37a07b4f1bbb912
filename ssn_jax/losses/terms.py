"""Losses of SuperSimpleNet (Rolih et al., ICPR 2024, section III-D)."""

import jax
import jax.numpy as jnp


def focal(logits: jax.Array, targets: jax.Array, gamma: float = 4.0) -> jax.Array:
    """Focal loss per element, without class weights (Lin et al., ICCV 2017, equation 4).

    Args:
      logits: any shape.
      targets: same shape, 0 or 1.
      gamma: how fast well-classified elements lose weight.

    Returns:
      Same shape: (1 - p_t)^gamma * -log(p_t), p_t the probability given to the target.
    """
    signed = jnp.where(targets > 0, logits, -logits)
    return jax.nn.sigmoid(-signed) ** gamma * jax.nn.softplus(-signed)


def mean_where(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of values over `where` (broadcastable weights or booleans), 0 if there is no weight."""
    weights = jnp.broadcast_to(where, values.shape).astype(values.dtype)
    total = weights.sum()
    return jnp.where(total > 0, (values * weights).sum() / jnp.maximum(total, 1e-12), 0.0)


def beyond_margin(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Truncated L1 per element (Liu et al., "SimpleNet", CVPR 2023, equation 7).

    Args:
      logits: any shape.
      targets: same shape, 0 normal or 1 anomalous.

    Returns:
      Same shape: how far each element is from where it costs nothing, below -0.5 or above 0.5.
    """
    return jax.nn.relu(0.5 + jnp.where(targets > 0, -logits, logits))


def truncated_l1(
    logits: jax.Array,
    targets: jax.Array,
    weight: jax.Array | float = 1.0,
    taught: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`beyond_margin` of anomaly logits, averaged apart over normal and anomalous positions.

    Args:
      logits: (N, H, W, 1).
      targets: (N, H, W, 1), 0 normal or 1 anomalous.
      weight: as of `discriminator_loss`.
      taught: likewise.

    Returns:
      Two scalars: the mean over normal and over anomalous positions, 0 where there are none.
    """
    each = weight * beyond_margin(logits, targets)
    return mean_where(each, taught * (targets == 0)), mean_where(each, taught * (targets > 0))


def discriminator_loss(
    logits: jax.Array,
    scores: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
    weight: jax.Array | float = 1.0,
    taught: jax.Array | float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The whole training loss: truncated L1 and focal on the map, focal on the score.

    Args:
      logits: anomaly logits (N, H, W, 1).
      scores: score logits (N,).
      mask: (N, H, W, 1), 1 where anomalous.
      labels: (N,), 1 where the image holds an anomaly.
      weight: how much a position's loss on the map counts, broadcastable to (N, H, W, 1). As in
        Božič et al., "Mixed supervision for surface-defect detection", Computers in Industry 2021,
        it scales the loss and not the number of positions that the loss is averaged over.
      taught: 1 where the map's target is known, 0 where the map is left alone; broadcastable too.

    Returns:
      The loss, and its terms by name.
    """
    normal, anomalous = truncated_l1(logits, mask, weight=weight, taught=taught)
    terms = {
        'map_l1': normal + anomalous,
        'map_focal': mean_where(weight * focal(logits, mask), taught),
        'score_focal': focal(scores, labels).mean(),
    }
    return sum(terms.values()), terms


def generator_terms(loss: jax.Array, power: jax.Array, penalty: float) -> dict[str, jax.Array]:
    """What the noise generator is judged by: L_G = -L_D + penalty * mean(noise^2).

    Args:
      loss: the discriminator's loss L_D.
      power: mean square of the noise over the positions where it is added. Masks do not depend on
        the features, so this estimates the mean over all positions, and nothing needs to be
        generated where it is not used.
      penalty: weight of the magnitude.
    """
    root = jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(power), 0.0))
    return {'loss': loss, 'noise_rms': root, 'generator_loss': -loss + penalty * power}
