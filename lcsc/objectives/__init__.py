"""Candidate -> score, one file each."""
