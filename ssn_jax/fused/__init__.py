"""Trained networks, folded for inference."""
