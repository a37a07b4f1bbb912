"""Scenario A, taught by shuffled features instead of noise: as fast, on any product from the start.

    python -m ssn_jax.main --config configs/shuffled.py

Where the mask is, channels of the backbone's layers come from other images and places of the batch.
That needs no scale to be tuned. This project's own; there is no published result.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'shuffled'
    config.noise.kind = 'shuffled'
    return config
