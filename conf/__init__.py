"""Hydra configuration of lcsc; shipped inside the wheel as lcsc.conf."""
