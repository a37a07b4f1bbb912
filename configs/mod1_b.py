"""Scenario B: ResNet18 with a convolutional adaptor (3x3, BatchNorm, ReLU), static noise.

    ssn-jax train --config mod1_b

Published after 300 epochs: bottle I-AUROC 71.3 / AUPRO 29.7, screw 46.6 / 20.2; 5.7 M parameters.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'mod1_b'
    config.adaptor = 'conv'
    return config
