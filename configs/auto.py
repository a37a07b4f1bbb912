"""The recommended recipe, for any product: the network learns from drawn defects.

    ssn-jax train --config auto

What depends on the product is found from its normal images (`ssn_jax/training/product.py`): where
it lies at any angle, turned copies are normal too; where it lies at the same place in every image,
the map knows places, and what is normal elsewhere is an anomaly. Scenario A's network without a
classification head. An epoch is all drawn defects and as many normal images. Half of the anomalies'
weight is that of drawn defects (`ssn_jax/data/defects.py`), the other half that of noise of 0.5
standard deviations a channel. Features beside a drawn defect are changed by it, and are taught to
be normal: the map ends where the defect does. The positions of normal images that look least normal
are taught to be so too: an image's score is its map's maximum. Real defects, if there are any, have
an output of their own beside, mixed into the map. docs/results.md has what the recipe reaches.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'auto'
    config.product.update(angle='auto', place='auto', surface='auto')
    config.data.masks = 'region'
    config.supervision.kind = 'auto'
    config.supervision.known = -1.0
    config.image_score = 'map'
    config.positions = 32
    config.product_share = 0.5
    config.surroundings = (2, 6)
    config.hard_normal = 0.1
    config.map_loss = 'cross_entropy'
    config.features.dtype = 'bfloat16'
    config.drawn.count = -1
    config.noise.unit = 'feature_std'
    config.noise.std = 0.5
    # What is drawn has sharp edges and is defective all over.
    config.supervision.dilation = 3
    config.supervision.distance_weight = 1.0
    config.supervision.distance_power = 0.0
    config.optimizer.adaptor_learning_rate = 2e-4
    config.optimizer.heads_learning_rate = 4e-4
    config.optimizer.average = 0.995
    config.batch_size = 64
    config.epochs = 0
    return config
