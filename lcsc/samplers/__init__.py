"""Rules that make images of noise with a declared number of network calls; one per file."""
