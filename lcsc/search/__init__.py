"""The loop, its journal and its run directory."""
