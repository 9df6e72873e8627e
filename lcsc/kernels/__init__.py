"""Tensors x coefficients."""

from lcsc.kernels._reference import round_coef
from lcsc.kernels.combine import Groups, combine, project

__all__ = ["Groups", "combine", "project", "round_coef"]
