"""Candidates as files that other libraries load."""
