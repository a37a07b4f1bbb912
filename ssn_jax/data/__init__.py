"""Data sets of industrial surface inspection, as arrays ready for the device."""

from ssn_jax.data.pipeline import Dataset, Split, is_embedded, load

__all__ = ['Dataset', 'Split', 'is_embedded', 'load']
