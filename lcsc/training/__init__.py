"""Making checkpoints."""
