"""Scenario A: SuperSimpleNet on ResNet18 with its linear adaptor, static noise.

    ssn-jax train --config mod1_a

Published after 300 epochs: bottle I-AUROC 100.0 / AUPRO 86.8, screw 51.1 / 71.0; 4.5 M parameters.
"""

from ssn_jax.config import default_config


def get_config():
    return default_config()
