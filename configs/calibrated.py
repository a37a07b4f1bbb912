"""Scenario A's map alone, taught by static noise in units of the features' own spread.

    ssn-jax train --config calibrated

Noise of 0.5 standard deviations a channel, at a sample of the positions; the score is the map's
maximum. No classification head: it learns to tell noise, and not defects.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'calibrated'
    config.image_score = 'map'
    config.positions = 64
    config.noise.unit = 'feature_std'
    config.noise.std = 0.5
    # The sample of positions is small, so rates are twice the published ones and weights averaged.
    config.optimizer.adaptor_learning_rate = 2e-4
    config.optimizer.heads_learning_rate = 4e-4
    config.optimizer.average = 0.99
    config.batch_size = 16
    return config
