"""Scenario A's map alone, taught by defects drawn into normal images, and by noise in their unit.

python -m ssn_jax.main --config configs/drawn.py

"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'drawn'
    config.image_score = 'map'
    config.positions = 64
    config.drawn.copies = 8
    config.map_loss = 'cross_entropy'
    config.features.layers = (1, 2, 3)
    config.noise.unit = 'feature_std'
    config.noise.std = 0.5
    config.optimizer.adaptor_learning_rate = 2e-4
    config.optimizer.heads_learning_rate = 4e-4
    config.optimizer.average = 0.995
    config.supervision.dilation = 3
    config.supervision.distance_weight = 1.0
    config.supervision.distance_power = 0.0
    config.features.dtype = 'bfloat16'
    config.batch_size = 16
    config.epochs = 10
    return config
