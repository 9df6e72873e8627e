"""Checkpoints as small files: without loss, or with a loss that is told."""
