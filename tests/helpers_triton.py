"""Cases for the Triton kernels, checked against the float64 definition; and what a child process does with them.

    python tests/helpers_triton.py interpret     the cases on CPU tensors, with TRITON_INTERPRET=1
    python tests/helpers_triton.py compile       the kernels compiled for an H100, which needs no GPU

Both print JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from lcsc.kernels import Groups, _reference, round_coef

U, TINY = 2.0**-24, 2.0**-149
SENTINEL = 12345.0


@dataclass(frozen=True)
class Case:
    name: str
    K: int
    P: int
    B: int = 1
    dtype: torch.dtype = torch.float32
    starts: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    anchor: bool = False
    pad: int = 0  # columns left and right of the bank and of the results
    coef: str = "normal"
    bank: str = "normal"


CASES = [
    *(Case(f"{dtype}, P={P}", 5, P, dtype=dtype) for dtype in (torch.bfloat16, torch.float16) for P in (2048, 2500)),
    *(Case(f"P={P}", 3, P) for P in (0, 1, 31, 1023, 1024, 1025, 4096)),
    *(Case(f"K={K}", K, 700) for K in (1, 2, 4, 5, 9, 40)),
    *(Case(f"B={B}", 7, 1300, B=B) for B in (0, 2, 3, 5, 8, 16, 17, 33)),
    *(Case(f"B={B} bfloat16 padded", 6, 1301, B=B, dtype=torch.bfloat16, pad=3) for B in (3, 16)),
    Case("aligned slices", 6, 1500, B=3, pad=16),
    Case("one-hot", 5, 1300, B=5, coef="one-hot", pad=1),
    Case("one-hot, float16", 5, 1300, B=5, dtype=torch.float16, coef="one-hot"),
    Case("one-hot, B=1", 5, 1300, coef="one-hot"),
    Case("all zero", 4, 1100, B=2, coef="zero"),
    Case("sparse", 9, 1100, B=4, coef="sparse"),
    Case("sparse, B=1", 9, 1100, coef="sparse"),
    Case("anchor", 5, 1300, B=3, anchor=True, pad=5),
    Case("anchor, coefficients that cancel", 4, 1300, B=2, anchor=True, coef="cancel"),
    Case("anchor, bfloat16", 5, 2048, anchor=True, dtype=torch.bfloat16),
    Case("one group in pieces", 5, 2100, starts=(0, 1, 1024, 1024, 2100), groups=(0, 0, 0, 0)),
    Case("groups", 5, 5000, B=3, starts=(0, 7, 1000, 2048, 2049, 4096, 5000), groups=(2, 0, 1, 0, 2, 1)),
    Case(
        "groups, sparse, anchor",
        6,
        3000,
        B=16,
        starts=(0, 511, 513, 3000),
        groups=(1, 0, 2),
        coef="sparse",
        anchor=True,
    ),
    Case("groups, padded", 5, 2222, starts=(0, 2, 1025, 2222), groups=(1, 0, 1), pad=7, dtype=torch.float16),
    Case("groups, sparse, B=1", 7, 2500, starts=(0, 900, 2048, 2500), groups=(2, 1, 0), coef="sparse"),
    Case("groups, one unused", 3, 64, starts=(0, 64), groups=(1,), coef="one-hot"),
    Case("subnormal rows", 4, 1100, B=2, bank="subnormal"),
    Case("subnormal rows, one-hot", 4, 1100, B=4, bank="subnormal", coef="one-hot"),
    Case("negative zeros", 4, 1100, B=4, bank="negative zero", coef="one-hot"),
    Case("negative zeros, B=1", 4, 1100, bank="negative zero", coef="one-hot"),
    Case("small coefficients", 4, 1100, B=2, coef="small"),
    Case("cancellation", 6, 1100, bank="alike", coef="cancel"),
    Case("NaN in a row in use", 4, 1100, B=3, bank="nan"),
    Case("NaN in a row not in use", 4, 1100, B=3, bank="nan", coef="not the last"),
    Case("Inf for one candidate", 4, 1100, B=17, bank="inf", coef="last candidate"),
    Case("Inf behind a group", 4, 1100, starts=(0, 1099, 1100), groups=(0, 1), bank="inf"),
    Case("overflow", 3, 1100, bank="huge"),
    Case("NaN in the padding only", 3, 1100, bank="nan outside", pad=2),
]


def make(case):
    """Coefficients (float64), bank, groups, anchor; the bank is a column slice of a larger one where padded."""
    rng = np.random.default_rng(len(case.name))
    K, P = case.K, case.P
    wide = rng.standard_normal((K, P + 2 * case.pad)).astype(np.float32)
    if case.bank == "alike":
        wide = (wide[:1] + 1e-3 * wide).astype(np.float32)
    if case.bank == "subnormal":
        wide = (wide * np.float32(2.0**-130)).astype(np.float32)
    if case.bank == "negative zero":
        wide[:, ::3] = -0.0
    if case.bank == "huge":
        wide[:, -1] = 3e38
    if case.bank in ("nan", "inf"):
        wide[-1, -1] = np.nan if case.bank == "nan" else np.inf
    if case.bank == "nan outside":
        wide[:, : case.pad] = wide[:, P + case.pad :] = np.nan
    W_KP = torch.from_numpy(wide).to(case.dtype)[:, case.pad : case.pad + P]
    groups = Groups(case.starts, case.groups, max(case.groups) + 1) if case.starts else None
    inner = (K,) if groups is None else (groups.num_groups, K)
    coef = rng.uniform(-3, 3, (case.B, *inner))
    if case.coef == "one-hot":
        coef = np.zeros_like(coef)
        for b in range(case.B):
            coef[b, ..., (2 * b + 1) % K] = 1
    if case.coef == "zero":
        coef[:] = 0
    if case.coef == "sparse":
        coef[rng.uniform(size=coef.shape) < 0.6] = 0
    if case.coef == "cancel":
        coef[..., -1] = -coef[..., :-1].sum(axis=-1)
    if case.coef == "small":
        coef *= 1e-41
    if case.coef == "not the last":
        coef[..., -1] = 0
    if case.coef == "last candidate":
        coef[:-1, ..., -1] = 0
    anchor = torch.from_numpy(rng.standard_normal(P + 1).astype(np.float32))[1:] if case.anchor else None
    return coef, W_KP, groups, anchor


def expect(coef, W_KP, groups, anchor):
    """The definition, candidate by candidate and segment by segment; and the tolerance of float32 sums."""
    K, P = W_KP.shape
    wide = W_KP.float().numpy()
    base = None if anchor is None else anchor.numpy()
    starts, ids = ((0, P), (0,)) if groups is None else (groups.starts, groups.groups)
    out, bound = (np.zeros((len(coef), P), kind) for kind in (np.float32, np.float64))
    with np.errstate(all="ignore"):
        for b, numbers_GK in enumerate(coef if coef.ndim == 3 else coef[:, None]):
            for start, stop, g in zip(starts, starts[1:], ids, strict=False):
                part = None if base is None else base[start:stop]
                out[b, start:stop] = _reference.combine(numbers_GK[g], wide[:, start:stop], part)
                sizes = np.abs(numbers_GK[g]) @ np.abs(wide[:, start:stop].astype(np.float64))
                if base is not None:
                    sizes += abs(math.fsum(round_coef(numbers_GK[g]))) * np.abs(part)
                terms = K + (base is not None)
                bound[b, start:stop] = (terms + 2) * U * sizes + (terms + 2) * TINY
    return out, bound


def check_combine(case, call, device="cpu"):
    """What `call(coef, W_KP, out_BP, groups, anchor) -> finite` makes of a case, as plain numbers."""
    coef, W_KP, groups, anchor = make(case)
    wanted, bound = expect(coef, W_KP, groups, anchor)
    wide = torch.full((case.B, case.P + 2 * case.pad), SENTINEL, device=device)
    bank = torch.empty(case.K, case.P + 2 * case.pad, dtype=case.dtype, device=device)
    bank[:, case.pad : case.pad + case.P] = W_KP.to(device)
    if case.bank == "nan outside":
        bank[:, : case.pad] = bank[:, case.pad + case.P :] = math.nan
    inner = slice(case.pad, case.pad + case.P)
    there = None if anchor is None else anchor.to(device)
    finite = call(coef, bank[:, inner], wide[:, inner], groups, there)
    found = wide[:, inner].cpu().numpy().copy()
    wide[:, inner] = SENTINEL
    known = np.isfinite(wanted) & np.isfinite(bound)
    error = np.abs(found.astype(np.float64)[known] - wanted[known])
    return {
        "name": case.name,
        "bits": bool(np.array_equal(found.view(np.int32)[known], wanted.view(np.int32)[known])),
        "worst": float((error / bound[known]).max(initial=0)),
        "finite": bool(finite),
        "wanted_finite": bool(np.isfinite(wanted).all()),
        "same_kind": bool(np.array_equal(np.isfinite(found), np.isfinite(wanted))),
        "inside": bool((wide == SENTINEL).all()),
    }


def check_project(case, call, terms, device="cpu"):
    """`call(grad_P, W_KP, anchor)` against sums without rounding errors: errors as shares of the two tolerances."""
    _, W_KP, _, anchor = make(case)
    grad_P = torch.from_numpy(np.random.default_rng(9).standard_normal(case.P).astype(np.float32))
    wide, grad = W_KP.double().numpy(), grad_P.double().numpy()
    wanted = _reference.project(grad_P.numpy(), W_KP.float().numpy(), None if anchor is None else anchor.numpy())
    sizes = np.array([math.fsum(abs(row * grad)) for row in wide])
    if anchor is not None:
        sizes += math.fsum(abs(anchor.double().numpy() * grad))
    args = [None if t is None else t.to(device) for t in (grad_P, W_KP, anchor)]
    found, again = call(*args), call(*args)
    error = np.abs(found.cpu().double().numpy() - wanted)
    tight = U * np.abs(wanted) + (case.P + 2) * 2.0**-53 * sizes + TINY
    loose = (terms + 2) * U * sizes + (case.P + 1) * TINY
    return {
        "name": f"project, {case.name}",
        "shape": list(found.shape) == [case.K] and found.dtype == torch.float32,
        "tight": float((error / tight).max()),
        "loose": float((error / loose).max()),
        "again": bool(torch.equal(found, again)),
    }


PROJECT = [
    *(Case(f"P={P}", 3, P) for P in (0, 1, 1000, 8191, 8192, 8193, 20000)),
    Case("K=1", 1, 9000),
    *(Case(str(dtype), 7, 9001, dtype=dtype, pad=3) for dtype in (torch.bfloat16, torch.float16)),
    Case("anchor", 4, 9000, anchor=True, dtype=torch.bfloat16),
    Case("subnormal", 4, 3000, bank="subnormal"),
    Case("alike", 6, 17000, bank="alike"),
]


def interpret():
    """Every case in both kinds of sums."""
    from lcsc.kernels import _triton

    result = {"combine": [], "project": []}
    for float64 in (True, False):

        def combine(*args, float64=float64):
            return _triton.combine_rows(*args, float64=float64)

        def project(*args, float64=float64):
            return _triton.project_rows(*args, float64=float64)

        for case in CASES:
            if float64 or case.coef != "small":
                result["combine"].append(check_combine(case, combine) | {"float64": float64})
        result["project"] += [check_project(c, project, _triton.DOT_TERMS) | {"float64": float64} for c in PROJECT]
    result["small"] = check_combine(next(c for c in CASES if c.coef == "small"), _triton.combine_rows)
    return result


def compiled():
    """Widths of the loads of rows and bytes spilled, for a few kernels built for compute capability 9.0."""
    import triton.language as tl
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lcsc.kernels import _triton

    def one(kernel, types, fixed, warps, aligned):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in fixed else types[name] for name in names}
        wide = [n for n in types if types[n][0] == "*"] + aligned
        attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in wide}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, attrs)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        ptx = build(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        loads = re.findall(r"ld\.global\.L1::evict_first(?:\.L2::cache_hint)?(?:\.v(\d))?\.b(\d+)", ptx)
        starts = "0d8000000000000000" in ptx or "0f80000000" in ptx
        return {
            "load_bits": sorted({int(n or 1) * int(bits) for n, bits in loads}),
            "local": ".local" in ptx,
            "starts_at_negative_zero": starts,
        }

    result = {}
    for BB, dtype, acc, edge, zeros in [
        (1, "fp32", "fp64", 0, 0),
        (1, "bf16", "fp32", 0, 1),
        (16, "fp16", "fp64", 1, 1),
    ]:
        pointers = {"blocks": "i32", "counts": "i32", "rows": "i32", "coefs": acc, "anchor_coefs": acc, "bad": "i32"}
        pointers |= {"W": dtype, "anchor": "fp32", "out": "fp32"}
        types = {name: "*" + kind for name, kind in pointers.items()}
        types |= dict.fromkeys(("stride", "out_stride", "B", "N"), "i32")
        block, warps, unroll = _triton.plan(BB, 4 if dtype == "fp32" else 2)
        fixed = {"BB": BB, "BLOCK": block, "UNROLL": unroll, "ACC": tl.float64 if acc == "fp64" else tl.float32}
        fixed |= {"ANCHOR": True, "ZEROS": bool(zeros), "EDGE": bool(edge)}
        key = f"combine {BB} {dtype} {acc}" + " edge" * edge
        result[key] = one(_triton._combine_kernel, types, fixed, warps, ["stride", "out_stride"])
    types = {
        "W": "*bf16",
        "stride": "i32",
        "grad": "*fp32",
        "sums": "*fp64",
        "K": "i32",
        "P": "i32",
        "first_block": "i32",
    }
    fixed = {"BLOCK": _triton.DOT_BLOCK, "ACC": tl.float64, "EDGE": False}
    result["project bf16"] = one(_triton._dot_kernel, types, fixed, _triton.DOT_WARPS, ["stride"])
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps(interpret() if sys.argv[1] == "interpret" else compiled()))
