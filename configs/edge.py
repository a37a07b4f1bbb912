"""auto.py on EfficientNet-Lite0: for small computers.

    ssn-jax train --config edge

docs/results.md has what it reaches.
"""

from ssn_jax.config import load


def get_config():
    config = load('auto')
    config.name = 'edge'
    config.backbone.name = 'efficientnet_lite0'
    return config
