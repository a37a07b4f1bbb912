"""Learned noise with a bounded adversary: it chooses the direction, its size stays in a shell.

    ssn-jax train --config mod2_bounded

The root mean square of its noise lies between 0.25 and 0.75 of the features' own spread, so it can
neither hide anomalies by making none nor blow them up; there is no penalty on its size. Half of the
noisy positions get static noise, so that the discriminator forgets neither. Otherwise as
calibrated.py; three updates of the discriminator to one of the generator, as in mod2.py.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'mod2_bounded'
    config.image_score = 'map'
    config.positions = 64
    config.noise.kind = 'learned'
    config.noise.unit = 'feature_std'
    config.noise.std = 0.5
    config.noise.shell = (0.25, 0.75)
    config.noise.static_share = 0.5
    config.noise.penalty = 0.0
    config.optimizer.adaptor_learning_rate = 2e-4
    config.optimizer.heads_learning_rate = 4e-4
    config.optimizer.average = 0.99
    config.batch_size = 16
    return config
