"""Training: frozen features, steps, epochs, checkpoints."""
