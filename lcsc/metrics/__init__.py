"""Distances between image sets, and the detectors whose features they compare."""
