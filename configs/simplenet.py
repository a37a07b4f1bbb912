"""SimpleNet: one projection, noise on every position, one discriminator, hinge loss.

    ssn-jax train --config simplenet --config.data.root=/data/mvtec_ad

The published settings for MVTec AD. Published on KolektorSDD2: AP-det 88.4; for that set add
--config.data.name=ksdd2 --config.image_size='(640, 232)' --config.resize='(0, 0)'.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'simplenet'
    config.system = 'simplenet'
    config.epochs = 160
    config.batch_size = 8
    config.resize = (329, 329)
    config.image_size = (288, 288)
    config.backbone.name = 'wide_resnet50_2'
    config.optimizer.drops = ()
    config.optimizer.heads_decay_in_gradient = True
    return config
