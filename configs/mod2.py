"""Learned noise v2: a generator bounded by beta * tanh plays against the discriminator.

    ssn-jax train --config mod2

Random z, magnitude penalty 10 * mean(noise^2), one generator step after three discriminator steps,
each player by its own gradient. Published for screw after 300 epochs, where the two gradients
cancelled: I-AUROC 67.8 at beta 0.1, 72.3 at 0.05, 46.8 at 0.5, 48.4 at 0.0015.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'mod2'
    config.noise.kind = 'learned'
    return config
