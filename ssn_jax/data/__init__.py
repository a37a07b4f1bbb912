"""Data sets of industrial surface inspection, as arrays ready for the device."""

from ssn_jax.data.pipeline import Dataset, Split, category_of, is_embedded, load

__all__ = ['Dataset', 'Split', 'category_of', 'is_embedded', 'load']
