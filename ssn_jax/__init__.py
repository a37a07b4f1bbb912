"""SuperSimpleNet for industrial surface inspection, in JAX and Flax."""

__version__ = '0.1.0'
