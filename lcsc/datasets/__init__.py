"""Sets of images in memory; one per file."""
