"""The training losses; `config_loss` chooses."""

from collections.abc import Callable

import ml_collections

from ssn_jax import synthesis
from ssn_jax.losses import direct, positions, sparse
from ssn_jax.models import systems


def config_loss(config: ml_collections.ConfigDict, seeds_axis: str | None = None) -> Callable:
    """The loss that a config trains with, in its cheapest form.

    `seeds_axis` names the axis that `vmap` maps it over, if it does.
    """
    if config.system == 'simplenet':
        return direct.make_hinge_loss(config)
    if config.image_score == 'map':
        return positions.make_map_loss(
            config, systems.build_network(config), synthesis.make_noise(config)
        )
    if not config.sparse:
        return direct.make_loss(config)
    return sparse.make_sparse_loss(
        config, synthesis.make_masks(config), synthesis.make_noise(config), seeds_axis
    )
