"""Data sets of industrial surface inspection, as arrays ready for the device."""

from ssn_jax.data.records import category_of, is_embedded, layout_of, load
from ssn_jax.data.splits import Dataset, Split

__all__ = ['Dataset', 'Split', 'category_of', 'is_embedded', 'layout_of', 'load']
