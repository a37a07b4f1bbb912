"""Learned noise v1: an unconstrained generator and a naive adversary.

    ssn-jax train --config mod2_v1

No bound, no random input, no penalty; both players move on every step. Published for screw: the
loss goes to about 82 and I-AUROC is 39.8, since the discriminator's gradient was zero throughout.
Here each player has its own gradient. Measured on screw (map alone, 600 steps of 16, three seeds):
the discriminator wins within two epochs, the map loss is 1e-6, I-AUROC 47.4.
"""

from ssn_jax.config import default_config


def get_config():
    config = default_config()
    config.name = 'mod2_v1'
    config.noise.kind = 'learned'
    config.noise.bounded = False
    config.noise.z_dim = 0
    config.noise.penalty = 0.0
    config.noise.discriminator_steps = 0
    return config
