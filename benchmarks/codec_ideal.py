"""What the counts of lcsc.kernels.entropy say that symbols take, added up in floats beside the coder."""

from __future__ import annotations

import math

from numba import njit

from lcsc.kernels.entropy import COARSE, COARSE_LIMIT, FINE, FINE_LIMIT


@njit(cache=True)
def ideal_bits(sym_N, fine_N, coarse_N, fine_FS, coarse_CS):
    """Bits: the sum of -log2 of each symbol's share before it was counted."""
    bits, size = 0.0, fine_FS.shape[1]
    for i in range(len(sym_N)):
        s, f, c = sym_N[i], fine_N[i], coarse_N[i]
        fine, coarse = fine_FS[f].sum(), coarse_CS[c].sum()
        bits -= math.log2((fine_FS[f, s] + coarse_CS[c, s]) / (fine + coarse))
        fine_FS[f, s] += FINE
        coarse_CS[c, s] += COARSE
        if fine + FINE > FINE_LIMIT:
            for j in range(size):
                fine_FS[f, j] >>= 1
        if coarse + COARSE > COARSE_LIMIT:
            for j in range(size):
                coarse_CS[c, j] = max(coarse_CS[c, j] >> 1, 1)
    return bits
