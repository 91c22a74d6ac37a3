"""Training: inputs, the loop, checkpoints."""
