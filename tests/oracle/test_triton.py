"""The Triton kernels without a GPU: run by Triton's interpreter against float64, and compiled for an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]


def start(what, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "helpers_triton.py"), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(child):
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    return json.loads(out)


@pytest.fixture(scope="module")
def children():
    return start("interpret", TRITON_INTERPRET="1"), start("compile", TRITON_INTERPRET="0")


@pytest.fixture(scope="module")
def interpreted(children):
    return finish(children[0])


@pytest.mark.slow
def test_float64_sums_are_the_bits_of_the_reference(interpreted):
    found = [case for case in interpreted["combine"] if case["float64"]]
    assert len(found) > 40
    assert [case for case in found if not (case["bits"] and case["same_kind"])] == []


def test_float32_sums_are_within_the_stated_tolerance(interpreted):
    found = [case for case in interpreted["combine"] if not case["float64"]]
    assert len(found) > 40
    assert [case for case in found if not (case["worst"] <= 1 and case["same_kind"])] == []
    assert max(case["worst"] for case in found) > 0.2  # the tolerance is not idle


def test_copies_and_empty_sums_are_exact_in_float32_too(interpreted):
    exact = [case for case in interpreted["combine"] if "one-hot" in case["name"] or "zero" in case["name"]]
    assert len(exact) >= 12
    assert [case for case in exact if not case["bits"]] == []


def test_what_is_not_finite_is_found_and_nothing_else(interpreted):
    found = {case["name"]: case["finite"] for case in interpreted["combine"]}
    assert [case for case in interpreted["combine"] if case["finite"] != case["wanted_finite"]] == []
    assert not found["NaN in a row in use"]
    assert not found["Inf for one candidate"]
    assert not found["overflow"]
    assert found["NaN in a row not in use"]
    assert found["NaN in the padding only"]


def test_nothing_is_written_beside_the_results(interpreted):
    assert [case for case in interpreted["combine"] if not case["inside"]] == []


def test_coefficients_that_float32_cannot_hold_are_added_in_float64(interpreted):
    assert interpreted["small"]["bits"]


@pytest.mark.parametrize(("float64", "tolerance"), [(True, "tight"), (False, "loose")])
def test_project_is_the_sum_within_tolerance_and_the_same_every_time(interpreted, float64, tolerance):
    found = [case for case in interpreted["project"] if case["float64"] is float64]
    assert len(found) > 10
    assert [case for case in found if not (case[tolerance] <= 1 and case["again"] and case["shape"])] == []


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_with_wide_loads_and_without_spills(children):
    found = finish(children[1])
    assert not any(kernel["local"] for kernel in found.values())
    assert all(kernel["starts_at_negative_zero"] for name, kernel in found.items() if "combine" in name)
    widths = {name: kernel["load_bits"] for name, kernel in found.items()}
    assert widths.pop("combine 16 fp16 fp64 edge") == [16]  # pieces of blocks are read number by number
    assert len(widths) == 3
    assert set(map(tuple, widths.values())) == {(128,)}


REFUSED = """
import json, numpy as np, torch
from lcsc.kernels import Groups, _triton
W, out = torch.zeros(3, 8), torch.zeros(1, 8)
one = np.ones((1, 3))
calls = {
    "must be float32, bfloat16 or float16": (one, W.double(), out, None, None),
    "rows of `W_KP` must be contiguous": (one, torch.zeros(8, 3).T, out, None, None),
    "rows of `out_BP` must be contiguous": (one, W, torch.zeros(8, 3).T[:1], None, None),
    "`anchor_P` must be float32 with 8 columns": (one, W, out, None, torch.zeros(7)),
    "`out_BP` must be float32": (one, W, out.double(), None, None),
    "both must be on one device": (one, W, out.to("meta"), None, None),
    "shapes do not fit: coef": (np.ones((2, 3)), W, out, None, None),
    "columns to 7": (np.ones((1, 1, 3)), W, out, Groups((0, 7), (0,), 1), None),
}
found = {}
for text, args in calls.items():
    try:
        _triton.combine_rows(*args)
        found[text] = "accepted"
    except ValueError as error:
        found[text] = str(error)
print(json.dumps(found))
"""


def test_what_does_not_fit_is_refused_with_a_sentence():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    assert {text: said for text, said in found.items() if text not in said} == {}


APART = """
import json, numpy as np, torch
from lcsc.kernels import _triton
_triton.FAST_FLOAT64 = set()  # as on a device that is slow at float64
torch.cuda.get_device_capability = lambda device: (8, 6)
class Slow:
    type = "cuda"
ask = _triton._float64
_triton._float64 = lambda device, coef: ask(Slow, coef)
rng = np.random.default_rng(0)
W, coef = torch.from_numpy(rng.standard_normal((7, 1500)).astype(np.float32)), rng.standard_normal((21, 7))
coef[3, 2], coef[5, 1], coef[9, 0] = 0, 1e-41, 1e39
together, alone = torch.empty(21, 1500), torch.empty(21, 1500)
_triton.combine_rows(coef, W, together, None, None)
for b in range(21):
    _triton.combine_rows(coef[b : b + 1], W, alone[b : b + 1], None, None)
kinds = [ask(Slow, one) for one in coef]
exact = torch.empty(21, 1500)
_triton.combine_rows(coef, W, exact, None, None, float64=True)
print(json.dumps([torch.equal(together, alone), kinds, [torch.equal(a, b) for a, b in zip(together, exact)]]))
"""


def test_a_candidate_does_not_depend_on_the_others_of_its_call():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", APART], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    same, kinds, exact = json.loads(done.stdout)
    assert same
    assert [b for b, kind in enumerate(kinds) if kind] == [5, 9]
    assert [b for b, equal in enumerate(exact) if equal] == [5, 9]


def test_without_triton_the_remedy_is_named():
    code = "import sys; sys.modules['triton'] = None\nimport lcsc.kernels._triton"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1
    assert "MissingExtraError: combining on a CUDA device needs the package `triton`" in done.stderr
