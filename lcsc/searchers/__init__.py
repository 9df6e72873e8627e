"""Strategies that propose points, one file each."""
