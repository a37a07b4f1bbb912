"""SuperSimpleNet for industrial surface inspection, in JAX and Flax.

A run is trained with

    config = ssn_jax.default_config()
    config.data.update(name='folder', root='/data/nuts')
    ssn_jax.train(config, 'runs/nuts')

and then is a function of frames, uint8 RGB (H, W, 3):

    model = ssn_jax.load('runs/nuts')
    result = model(frame)
    result.score, result.p_value, result.defective, result.map, result.regions
"""

import importlib

__version__ = '0.1.0'

# Imported when first used: what trains takes seconds to import, and inference needs none of it.
_LAZY = {
    'UserError': ('ssn_jax.errors', 'UserError'),
    'default_config': ('ssn_jax.config', 'default_config'),
    'load': ('ssn_jax.predictor', 'load'),
    'train': ('ssn_jax.pipeline', 'train_and_evaluate'),
}
__all__ = ['UserError', '__version__', 'default_config', 'load', 'train']


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
