"""Mixed supervision: labels for all training images, masks for a tenth of the defective ones.

    ssn-jax train --config mixed --config.data.root=/data/KolektorSDD2

--config.supervision.mask_fraction=0.5 or --config.supervision.mask_count=16 for others; with 0 the
map learns from normal images and synthetic anomalies alone. Published AP-loc on KolektorSDD2 by
number of masks: 0: 47.6, 16: 59.1, 53: 68.0, 126: 76.5, 246: 81.3.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'mixed'
    config.image_size = (640, 232)
    config.data.name = 'ksdd2'
    config.data.category = 'surface'
    config.backbone.name = 'wide_resnet50_2'
    config.supervision.kind = 'masks'
    config.supervision.mask_fraction = 0.1
    config.perlin.threshold = 0.6
    config.optimizer.clip_norm = 1.0
    return config
