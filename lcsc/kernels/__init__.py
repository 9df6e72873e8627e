"""Tensors x coefficients."""

from lcsc.kernels.combine import combine, project

__all__ = ["combine", "project"]
