"""The CPU kernels against exact sums (math.fsum, fractions) and torch's conversions, and bits against bits."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lcsc.kernels import _arrays, _llvm, _numba, _reference
from lcsc.kernels._numba import accumulate, combine_rows, finish, project_rows, round_coef

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """What the kernels read: numpy's own numbers, or the bits of a half-precision tensor."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.itemsize == 2 else tensor.numpy()


def bank(dtype: str, K: int, P: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as the kernels read them, and the same numbers as torch widens them."""
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((K, P))).to(NAMES[dtype])
    rows[:, :: max(1, P // 7)] = -0.0
    return bits(rows), rows.double().numpy()


def coefs(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-6, 6, shape)


def combined(coef: np.ndarray, W_KP: np.ndarray, dtype: str, **more) -> np.ndarray:
    """The result as bit patterns."""
    out_BP = np.full((len(coef), W_KP.shape[1]), np.float32(7))
    combine_rows(coef, W_KP, out_BP, dtype=dtype, **more)
    return out_BP.view(np.uint32)


def reference(coef_BK: np.ndarray, wide_KP: np.ndarray, anchor_P: np.ndarray | None = None) -> np.ndarray:
    return np.stack([_reference.combine(coef_K, wide_KP, anchor_P) for coef_K in coef_BK]).view(np.uint32)


def test_coefficients_are_rounded_to_29_bits():
    rng = np.random.default_rng(0)
    given = np.concatenate(
        [rng.standard_normal(300) * 2.0 ** rng.integers(-60, 60, 300), [0.0, -0.0, 1.0, 0.1, 2.0**29]]
    )
    given = np.concatenate([given, [2.0**29 + 1, 2.0**29 + 3, -(2.0**30 + 2)]])  # ties
    for value, rounded in zip(given, round_coef(given), strict=True):
        unit = Fraction(2) ** (math.frexp(value)[1] - 29)
        assert Fraction(float(rounded)) == round(Fraction(float(value)) / unit) * unit  # Python rounds ties to even
    assert np.array_equal(round_coef(round_coef(given)), round_coef(given))
    assert np.signbit(round_coef(np.array([-0.0])))[0]
    assert np.isnan(round_coef(np.array([np.nan])))[0]


def test_the_anchors_coefficient_is_the_exact_sum():
    coef_BK = np.random.default_rng(0).uniform(-1, 1, (20, 7)) * 2.0 ** np.random.default_rng(1).integers(
        -90, 90, (20, 7)
    )
    exact = [float(sum(map(Fraction, row), Fraction(0))) for row in coef_BK.tolist()]
    assert _reference.sum_coef(coef_BK).tolist() == exact
    assert _reference.sum_coef(coef_BK.reshape(4, 5, 7)).shape == (4, 5)
    assert np.isnan(_reference.sum_coef(np.array([[np.inf, -np.inf, 1.0]]))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_less_than_one_unit_from_the_exact_sum_and_the_bits_of_the_definition(dtype):
    W_KP, wide_KP = bank(dtype, 23, 1037)
    coef_BK = coefs(6, 23)
    out_BP = combined(coef_BK, W_KP, dtype)
    assert np.array_equal(out_BP, reference(coef_BK, wide_KP))
    for coef_K, out_P in zip(round_coef(coef_BK), out_BP.view(np.float32), strict=True):
        for p in range(0, 1037, 13):
            terms = coef_K * wide_KP[:, p]
            assert all(
                Fraction(float(t)) == Fraction(float(c)) * Fraction(float(w))
                for t, c, w in zip(terms, coef_K, wide_KP[:, p], strict=True)
            )
            exact = math.fsum(terms)
            assert abs(float(out_P[p]) - exact) < np.spacing(np.float32(abs(exact)))


def test_float64_rows():
    W_KP, wide_KP = bank("float64", 9, 205)
    coef_BK = coefs(2, 9)
    out_BP = combined(coef_BK, W_KP, "float64").view(np.float32)
    exact_BP = np.array(
        [[math.fsum(c * w for c, w in zip(row, col, strict=True)) for col in wide_KP.T] for row in coef_BK]
    )
    assert np.abs(out_BP - exact_BP).max() < 1e-7 * np.abs(coef_BK).sum(1).max() * np.abs(wide_KP).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_precision_number_is_widened_exactly(dtype):
    every = np.arange(2**16, dtype=np.uint16)
    wanted = torch.from_numpy(every.view(np.int16)).view(NAMES[dtype]).float().numpy()
    found = combined(np.ones((1, 1)), every[None], dtype)[0].view(np.float32)
    finite = np.isfinite(wanted)
    assert np.array_equal(found[finite].view(np.uint32), wanted[finite].view(np.uint32))
    assert np.array_equal(found[~finite], wanted[~finite], equal_nan=True)


def test_one_hot_rows_are_copies_alone_and_in_a_batch():
    W_KP = np.random.default_rng(0).standard_normal((11, 333)).astype(np.float32)
    W_KP[:, :6] = [-0.0, 0.0, 1e-45, -1e-40, np.finfo(np.float32).max, np.finfo(np.float32).tiny]
    coef_BK = coefs(7, 11)
    coef_BK[[0, 2, 3, 6]] = np.eye(11)[[4, 10, 0, 5]]
    alone = np.concatenate([combined(coef_K[None], W_KP, "float32") for coef_K in coef_BK])
    assert np.array_equal(alone[[0, 2, 3, 6]], W_KP.view(np.uint32)[[4, 10, 0, 5]])
    assert np.array_equal(combined(coef_BK, W_KP, "float32"), alone)


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 19])
@pytest.mark.parametrize("B", [1, 2, 3, 4, 5, 8, 11])
def test_any_number_of_rows_and_candidates(K, B):
    W_KP, wide_KP = bank("float32", K, 97, seed=K)
    coef_BK = coefs(B, K)
    coef_BK[np.random.default_rng(B).random((B, K)) < 0.2] = 0
    assert np.array_equal(combined(coef_BK, W_KP, "float32"), reference(coef_BK, wide_KP))


@pytest.mark.parametrize("B", [1, 2, 3, 5, 9])
def test_rows_without_coefficient_are_not_read(B):
    W_KP, wide_KP = bank("float32", 18, 300)
    W_KP[[2, 5]] = np.nan
    coef_BK = coefs(B, 18)
    coef_BK[:, 2], coef_BK[:, 5] = 0.0, -0.0
    keep = [k for k in range(18) if k not in (2, 5)]
    wanted = reference(coef_BK[:, keep], wide_KP[keep])
    assert np.array_equal(combined(coef_BK, W_KP, "float32"), wanted)
    coef_BK[B // 2, 5] = 1  # one candidate wants it: the others stay clean
    out_BP = combined(coef_BK, W_KP, "float32")
    others = np.arange(B) != B // 2
    assert np.array_equal(out_BP[others], wanted[others])
    assert np.isnan(out_BP[~others].view(np.float32)).all()
    assert not combined(np.zeros((B, 18)), W_KP, "float32").view(np.float32).any()


def aligned(B: int, P: int) -> np.ndarray:
    """A result at a cache line, as torch's are."""
    out_BP = torch.full((B, P), 7.0).numpy()
    assert out_BP.ctypes.data % 64 == 0
    return out_BP


@pytest.mark.parametrize("bypass", [0, 2**60], ids=["past the caches", "through the caches"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("place", [0, 31, 32, 4095, 4096, 9999])
def test_results_that_are_not_finite_are_noticed(monkeypatch, bypass, value, place):
    monkeypatch.setattr(_numba, "BYPASS_BYTES", bypass)
    W_KP = np.ones((3, 10000), np.float32)
    out_BP = aligned(2, 10000)
    assert combine_rows(np.full((2, 3), 2.0), W_KP, out_BP, dtype="float32") is True
    W_KP[1, place] = value
    assert combine_rows(np.full((2, 3), 2.0), W_KP, out_BP, dtype="float32") is False  # 3e38 twice overflows
    assert np.flatnonzero(~np.isfinite(out_BP[1])).tolist() == [place]
    acc_BC = np.full((1, 10000), -0.0)
    accumulate(acc_BC, np.full((1, 3), 2.0), W_KP, "float32")
    assert finish(acc_BC, out_BP[:1]) is False
    assert finish(acc_BC[:, place + 1 :], out_BP[:1, place + 1 :]) is True


@pytest.mark.parametrize("bypass", [0, 2**60], ids=["past the caches", "through the caches"])
@pytest.mark.parametrize("first", [0, 1, 16, 37])
def test_blocks_threads_and_alignment_do_not_change_bits(monkeypatch, bypass, first):
    monkeypatch.setattr(_numba, "BYPASS_BYTES", bypass)
    monkeypatch.setattr(_arrays, "THREAD_BYTES", 0)
    W_KP, wide_KP = bank("float32", 13, 20011)
    W_KP, wide_KP, coef_BK = W_KP[:, first:], wide_KP[:, first:], coefs(3, 13)
    wanted = reference(coef_BK, wide_KP)
    for threads in (1, 2, 3):
        for most in (2**10, 2**18):
            monkeypatch.setattr(_arrays, "SUM_BYTES", most)
            buffer_BP = aligned(3, 20080)
            assert combine_rows(coef_BK, W_KP, buffer_BP[:, first:20011], dtype="float32", threads=threads)
            assert np.array_equal(buffer_BP[:, first:20011].view(np.uint32), wanted)
            assert (buffer_BP[:, :first] == 7).all()
            assert (buffer_BP[:, 20011:] == 7).all()


def test_streaming_in_pieces_gives_the_resident_bits():
    for dtype in ("float32", "bfloat16"):
        W_KP, _ = bank(dtype, 21, 5003)
        coef_BK = coefs(5, 21)
        coef_BK[1] = np.eye(21)[6]
        coef_BK[2, 3:9] = 0
        memory = np.full((5, 6000), np.nan)
        acc_BC, out_BC = memory[:, 500:5503], np.empty((5, 5003), np.float32)
        acc_BC[...] = -0.0
        for columns in (slice(0, 1), slice(1, 1234), slice(1234, 5003)):
            for rows in (slice(0, 1), slice(1, 9), slice(9, 21)):
                accumulate(acc_BC[:, columns], coef_BK[:, rows], W_KP[rows, columns], dtype)
        assert finish(acc_BC, out_BC)
        assert np.array_equal(out_BC.view(np.uint32), combined(coef_BK, W_KP, dtype))
        assert np.isnan(memory[:, :500]).all()
        assert np.isnan(memory[:, 5503:]).all()


def test_layer_groups_are_separate_combinations_side_by_side():
    starts, groups = np.array([0, 3, 3, 40, 41, 4500, 9001, 9733]), np.array([0, 1, 2, 1, 0, 2, 1])
    W_KP, wide_KP = bank("float32", 10, 9733)
    for B in (1, 5):
        coef_BGK = coefs(B, 3, 10)
        coef_BGK[0, 1, ::2] = 0
        out_BP = combined(coef_BGK, W_KP, "float32", starts_S=starts, groups_S=groups)
        for s, g in enumerate(groups):
            part = slice(starts[s], starts[s + 1])
            assert np.array_equal(out_BP[:, part], reference(coef_BGK[:, g], wide_KP[:, part]))


def test_deltas_to_an_anchor():
    W_KP, wide_KP = bank("bfloat16", 6, 4999)
    anchor_P = np.random.default_rng(9).standard_normal(4999).astype(np.float32)
    coef_BK = coefs(4, 6)
    coef_BK[1] = np.eye(6)[2]
    coef_BK[2] -= coef_BK[2].mean()  # the anchor's coefficient is about zero
    assert np.array_equal(combined(coef_BK, W_KP, "bfloat16", anchor_P=anchor_P), reference(coef_BK, wide_KP, anchor_P))
    one_hot = combined(coef_BK, W_KP, "bfloat16", anchor_P=anchor_P)[1].view(np.float32)
    assert np.array_equal(one_hot, (anchor_P.astype(np.float64) + wide_KP[2]).astype(np.float32))
    given = combined(coef_BK, W_KP, "bfloat16", anchor_P=anchor_P, anchor_coef_B=np.zeros(4))
    assert np.array_equal(given, reference(coef_BK, wide_KP))
    two = np.stack([coef_BK, 2 * coef_BK], axis=1)
    parts = {"starts_S": np.array([0, 777, 4999]), "groups_S": np.array([1, 0])}
    out_BP = combined(two, W_KP, "bfloat16", anchor_P=anchor_P, **parts)
    assert np.array_equal(out_BP[:, :777], reference(2 * coef_BK, wide_KP, anchor_P)[:, :777])
    assert np.array_equal(out_BP[:, 777:], reference(coef_BK, wide_KP, anchor_P)[:, 777:])


def test_any_layout_of_the_rows(tmp_path):
    W_KP, wide_KP = bank("float32", 8, 999)
    coef_BK, grad_P = coefs(2, 8), bank("float32", 1, 999, seed=5)[0][0]
    wanted, dots = combined(coef_BK, W_KP, "float32"), project_rows(grad_P, W_KP, dtype="float32")
    wide = np.full((8, 3000), np.nan, np.float32)
    wide[:, 1001:2000] = W_KP
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 13 + W_KP.tobytes())  # numbers at odd addresses
    mapped = np.memmap(path, np.float32, "r", 13, (8, 999))
    reverse = W_KP[::-1].copy()[::-1]
    for rows in (wide[:, 1001:2000], mapped, reverse):
        assert np.array_equal(combined(coef_BK, rows, "float32"), wanted)
        assert np.array_equal(project_rows(grad_P, rows, dtype="float32"), dots)
    same = np.broadcast_to(W_KP[0], (8, 999))  # one row eight times
    assert np.array_equal(combined(coef_BK, same, "float32"), reference(coef_BK, np.stack([wide_KP[0]] * 8)))


def test_a_bank_of_more_than_2_to_the_31_bytes_per_row():
    """Rows 9 GB apart in memory that is never touched in between."""
    if sys.maxsize < 2**40:
        pytest.skip("needs a 64-bit address space")
    gap, P = 9 * 2**28, 70
    with mmap.mmap(-1, 4 * (2 * gap + P), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) as memory:  # no reserve
        flat = np.frombuffer(memory, np.float32)
        W_KP = np.lib.stride_tricks.as_strided(flat, (3, P), (4 * gap, 4))
        small, wide_KP = bank("float32", 3, P)
        W_KP[...] = small
        coef_BK, grad_P = coefs(2, 3), small[0].copy()
        assert np.array_equal(combined(coef_BK, W_KP, "float32"), reference(coef_BK, wide_KP))
        assert np.array_equal(project_rows(grad_P, W_KP, dtype="float32"), project_rows(grad_P, small, dtype="float32"))
        del flat, W_KP


def in_the_order_of_the_definition(grad_P: np.ndarray, wide_KP: np.ndarray) -> np.ndarray:
    """Blocks of 65536 columns; in each, column i goes to sum i mod 32; sums and blocks are added in order."""

    def in_order(terms: np.ndarray) -> np.ndarray:
        return np.cumsum(np.concatenate([np.zeros_like(terms[:1]), terms]), axis=0)[-1]  # cumsum cannot reorder

    blocks = []
    for start in range(0, grad_P.size, 65536):
        terms = (wide_KP[:, start : start + 65536] * grad_P[start : start + 65536].astype(np.float64)).T
        terms = np.concatenate([terms, np.zeros((-len(terms) % 32, len(wide_KP)))])
        blocks.append(in_order(in_order(terms.reshape(-1, 32, len(wide_KP)))))
    return in_order(np.array(blocks))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_project_is_the_exact_dot_product_to_float64_rounding(monkeypatch, dtype):
    monkeypatch.setattr(_arrays, "THREAD_BYTES", 0)
    P = 2 * _numba.BLOCK + 12345
    W_KP, wide_KP = bank(dtype, 7, P)
    grad_P, anchor_P = (bank("float32", 1, P, seed=s)[0][0] for s in (3, 4))
    found = [project_rows(grad_P, W_KP, dtype=dtype, threads=threads) for threads in (1, 2, 3)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    exact_K, size_K = _reference.project(grad_P, wide_KP), np.abs(wide_KP) @ np.abs(grad_P.astype(np.float64))
    assert (np.abs(found[0] - exact_K) <= 1e-13 * size_K).all()
    assert np.array_equal(found[0], in_the_order_of_the_definition(grad_P, wide_KP))
    both = project_rows(grad_P, W_KP, dtype=dtype, anchor_P=anchor_P)
    exact = _reference.project(grad_P, wide_KP, anchor_P)
    assert (np.abs(both - exact) <= 1e-13 * (size_K + np.abs(anchor_P) @ np.abs(grad_P))).all()


def test_empty_things():
    assert combine_rows(np.zeros((2, 3)), np.zeros((3, 0), np.float32), np.zeros((2, 0), np.float32), dtype="float32")
    assert combine_rows(np.zeros((0, 3)), np.zeros((3, 5), np.float32), np.zeros((0, 5), np.float32), dtype="float32")
    out_BP = np.ones((1, 5), np.float32)
    assert combine_rows(np.zeros((1, 0)), np.zeros((0, 5), np.float32), out_BP, dtype="float32")
    assert (out_BP == 0).all()
    assert project_rows(np.zeros(0, np.float32), np.zeros((3, 0), np.float32), dtype="float32").tolist() == [0, 0, 0]
    assert finish(np.zeros((2, 0)), np.zeros((2, 0), np.float32))


F = np.float32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: combine_rows(np.ones((1, 3)), np.ones((2, 4), F), np.ones((1, 4), F), dtype="float32"), "do not fit"),
        (lambda: combine_rows(np.ones((2, 2)), np.ones((2, 4), F), np.ones((1, 4), F), dtype="float32"), "do not fit"),
        (lambda: combine_rows(np.ones((1, 2)), np.ones((2, 5), F), np.ones((1, 4), F), dtype="float32"), "do not fit"),
        (lambda: combine_rows(np.ones((1, 2)), np.ones((2, 4), F), np.ones((1, 4), F), dtype="int8"), "`int8`"),
        (lambda: combine_rows(np.ones((1, 2)), np.ones((2, 4), F), np.ones((1, 4), F), dtype="float64"), "8 bytes"),
        (
            lambda: combine_rows(np.ones((1, 2)), np.ones((4, 2), F).T, np.ones((1, 4), F), dtype="float32"),
            "contiguous",
        ),
        (lambda: combine_rows(np.ones((1, 2)), np.ones((2, 4), F), np.ones((1, 4)), dtype="float32"), "`out_BP`"),
        (lambda: accumulate(np.ones((1, 4)), np.ones((1, 3)), np.ones((2, 4), F), "float32"), "do not fit"),
        (lambda: finish(np.ones((1, 4)), np.ones((1, 5), F)), "do not fit"),
        (lambda: project_rows(np.ones(3, F), np.ones((2, 4), F), dtype="float32"), "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("starts", "groups", "text"),
    [
        ([0, 2], [0], "do not fill 4"),
        ([1, 4], [0], "do not fill 4"),
        ([0, 3, 2, 4], [0, 0, 0], "do not fill 4"),
        ([0, 4], [0, 1], "do not fill 4"),
        ([0, 4], [2], "not all in"),
        ([0, 4], [-1], "not all in"),
    ],
)
def test_segments_that_do_not_fit_are_refused(starts, groups, text):
    with pytest.raises(ValueError, match=text):
        combined(np.ones((1, 2, 3)), np.ones((3, 4), F), "float32", starts_S=starts, groups_S=groups)


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


DIGEST = """
import hashlib, numpy as np
from lcsc.kernels._numba import combine_rows
rng = np.random.default_rng(0)
W_KP = rng.permuted(np.tile(np.arange(2**16, dtype=np.uint16), (11, 1)), axis=1)
out_BP = np.empty((5, 2**16), np.float32)
combine_rows(rng.uniform(-6, 6, (5, 11)), W_KP, out_BP, dtype="float16", threads=1)
assert 0.5 < np.isfinite(out_BP).mean() < 0.9 and np.isinf(out_BP).any()
out_BP[np.isnan(out_BP)] = np.nan  # which NaN it is may differ
print(hashlib.sha256(out_BP.tobytes()).hexdigest())
"""


def test_a_processor_without_fused_multiply_add_and_half_precision_gives_the_same_bits(tmp_path, capsys):
    """On x86-64 `generic` has neither; numba compiles for it in a process of its own."""
    plain = run(DIGEST, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    exec(DIGEST, {})
    assert capsys.readouterr().out == plain


def test_compiled_loops_are_not_kept_when_their_steps_change():
    """numba looks at the loops' own file alone, so that file has to change whenever the steps do."""
    found = hashlib.sha256(Path(_llvm.__file__).read_bytes()).hexdigest()[:16]
    assert found == _numba.STEPS, f"_llvm.py changed: write `{found}` into `STEPS` in _numba.py"


SMALL = """
import numpy as np
from lcsc.kernels._numba import finish
out_BP = np.empty((1, 3), np.float32)
assert finish(np.ones((1, 3)), out_BP) and (out_BP == 1).all()
"""


def test_nothing_can_be_cached(tmp_path):
    (tmp_path / "file").write_text("")
    run(SMALL, NUMBA_CACHE_DIR=str(tmp_path / "file" / "below"))
    space: dict = {}
    exec("def add(a, b): return a + b\ndef fail(a): raise KeyError", space)  # numba finds no place to keep these
    assert _numba._Compiled(space["add"])(2, 3) == 5
    with pytest.raises(KeyError):
        _numba._Compiled(space["fail"])(2)


def test_a_damaged_cache_is_not_used(tmp_path):
    run(SMALL, NUMBA_CACHE_DIR=str(tmp_path))
    damaged = [path for path in tmp_path.rglob("*.nb*") if path.write_bytes(b"\x80\x04nonsense")]
    assert {path.suffix for path in damaged} == {".nbi", ".nbc"}
    run(SMALL, NUMBA_CACHE_DIR=str(tmp_path))


FORK = """
import os, numpy as np
from lcsc.kernels import _arrays, _numba
_arrays.THREAD_BYTES = 0
W_KP, out_BP = np.ones((4, 9999), np.float32), np.empty((1, 9999), np.float32)
work = lambda: _numba.combine_rows(np.ones((1, 4)), W_KP, out_BP, dtype="float32", threads=2)
work()
child = os.fork()
if child == 0:
    work()
    os._exit(0 if (out_BP == 4).all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_threads_work_in_a_forked_child():
    run(FORK)


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("0", None), ("4,2", None), ("", None)])
def test_default_threads(monkeypatch, asked, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert _arrays.default_threads() == (threads or len(os.sched_getaffinity(0)))
