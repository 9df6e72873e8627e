"""Ways to make a model from a bank, one file each."""
