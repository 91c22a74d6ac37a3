"""Training: inputs, the loop and what it measures, checkpoints."""
