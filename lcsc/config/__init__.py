"""Configuration: the registry's parts as Hydra groups."""
