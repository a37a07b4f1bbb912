"""Full supervision: SuperSimpleNet with the masks of all defective training images.

    ssn-jax train --config supervised --config.data.root=/data/KolektorSDD2

Published on KolektorSDD2: AP-det 97.8, AP-loc 81.3. Small hardware:
--config.backbone.name=resnet18.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'supervised'
    config.image_size = (640, 232)
    config.data.name = 'ksdd2'
    config.data.category = 'surface'
    config.backbone.name = 'wide_resnet50_2'
    config.supervision.kind = 'masks'
    config.perlin.threshold = 0.6
    config.optimizer.clip_norm = 1.0
    return config
