"""The published SuperSimpleNet: WideResNet50-2, linear adaptor, static noise.

    ssn-jax train --config baseline

Published after 300 epochs: bottle I-AUROC 100.0 / AUPRO 90.4, screw 92.9 / 95.3; 33.7 M parameters.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'baseline'
    config.backbone.name = 'wide_resnet50_2'
    return config
