"""Backbones, the feature grid, and the trained networks."""
