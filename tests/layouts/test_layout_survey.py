"""The survey: digests that do not depend on the format, exact counts of NaN, gaps, duplicates, damage."""

from __future__ import annotations

import shutil
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers_layouts import net
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcsc.bank.bank import CheckpointBank
from lcsc.bank.content import CHUNK, chunk_sums, content_digest
from lcsc.bank.extents import raw_dtype
from lcsc.bank.pack import write_pack
from lcsc.bank.survey import Gaps, count_nonfinite, gaps, survey
from lcsc.core.digests import value_digest
from lcsc.core.errors import BankError, NonFiniteError

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def plain_sum(chunk):
    """Fletcher's two sums over words of four bytes."""
    data = chunk.tobytes()
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    return f"{sum(words) % 2**64:016x}{sum((i + 1) * word for i, word in enumerate(words)) % 2**64:016x}"


def plain_digest(tensors):
    """The definition, in torch and Python's integers alone."""
    rows = []
    for name in sorted(tensors):
        flat = tensors[name].contiguous().reshape(-1)
        chunks = [flat[start : start + CHUNK].view(torch.uint8).numpy() for start in range(0, len(flat), CHUNK)]
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        rows.append([name, dtype, list(tensors[name].shape), [plain_sum(chunk) for chunk in chunks]])
    return value_digest(rows)


def test_the_digest_does_not_depend_on_the_format(tmp_path):
    torch.manual_seed(0)
    long = torch.randn(5 * CHUNK + 5, dtype=torch.float64)  # more than one block
    tensors = {**net(1).state_dict(), "long": long, "wide": long[:30].reshape(5, 6).t(), "none": torch.zeros(0, 3)}
    tensors["half"], tensors["number"] = torch.randn(7).bfloat16(), torch.tensor(3.0)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "a-1.pt")  # `wide` is stored in strides
    save_file(whole, tmp_path / "a-2.safetensors")
    names = sorted(whole)
    for k in range(2):
        save_file({n: whole[n] for n in names[k::2]}, tmp_path / f"a-3-0000{k + 1}-of-00002.safetensors")
    found = survey(tmp_path)
    assert found.problems == ()
    [row] = found.groups
    assert {file.digest for file in row.files} == {plain_digest(tensors)}
    assert row.duplicates == ((1, 2, 3),)
    assert row.constant
    assert content_digest({"long": ("float64", long.shape, chunk_sums(long.numpy()))}) == plain_digest({"long": long})


@given(st.sampled_from(FLOATS), st.binary(min_size=16, max_size=256))
def test_nonfinite_numbers_are_counted_as_torch_counts_them(dtype, data):
    bits = np.frombuffer(data[: len(data) // 16 * 16], raw_dtype(dtype))
    tensor = torch.frombuffer(bytearray(bits.tobytes()), dtype=getattr(torch, dtype))
    assert count_nonfinite(bits, dtype) == int((~torch.isfinite(tensor.double())).sum())


def test_integers_are_always_finite():
    assert count_nonfinite(np.full(9, -1, np.int64), "int64") == 0
    assert count_nonfinite(np.array([1, np.nan, np.inf * 1j], np.complex64), "complex64") == 2


def test_every_step_and_every_nan_is_found(tmp_path):
    for step in (100, 200, 300):
        torch.save(net(step).state_dict(), tmp_path / f"net-{step}.pt")
    tensors = net(400).state_dict()
    tensors["head.weight"].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    tensors["body.1.running_var"][0] = float("nan")
    torch.save(tensors, tmp_path / "net-400.pt")
    shutil.copy(tmp_path / "net-100.pt", tmp_path / "net-700.pt")
    found = survey(tmp_path)
    [row] = found.groups
    assert [file.step for file in row.files] == [100, 200, 300, 400, 700]
    assert row.finite is False
    assert dict(row.files[3].bad) == {"head.weight": 3, "body.1.running_var": 1}
    assert row.duplicates == ((100, 700),)
    assert not row.constant
    size = sum(t.numel() * t.itemsize for t in tensors.values())
    assert (row.nbytes, row.dtypes) == (5 * size, {"float32": 66, "int64": 1})
    assert row.extent.num_parameters == sum(p.numel() for p in net(1).parameters())
    [problem] = found.problems
    assert isinstance(problem, NonFiniteError)
    assert "net-400.pt` holds 1 NaN or Inf in `body.1.running_var`, 4 in all its tensors" in str(problem)
    headers = survey(tmp_path, read=False)
    assert headers.problems == ()
    assert headers.groups[0].finite is None
    assert headers.groups[0].files[0].digest is None


def test_a_flipped_bit_in_a_torch_file_is_found(tmp_path):
    for step in (1, 2):
        torch.save(net(step).state_dict(), tmp_path / f"net-{step}.pt")
    path = tmp_path / "net-2.pt"
    raw = bytearray(path.read_bytes())
    at = raw.index(net(2).head.weight.detach().numpy().tobytes())
    raw[at + 1] ^= 1
    path.write_bytes(raw)
    assert survey(tmp_path, read=False).problems == ()
    [problem] = survey(tmp_path).problems
    assert "net-2.pt" in str(problem)


def test_all_damage_is_listed_and_the_rest_is_read(tmp_path):
    for step in (1, 2, 3, 4):
        save_file(net(step).state_dict(), tmp_path / f"net-{step}.safetensors")
    for step in (2, 4):
        path = tmp_path / f"net-{step}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    found = survey(tmp_path)
    assert found.groups[0].group.steps == (1, 3)
    assert ["net-2" in str(found.problems[0]), "net-4" in str(found.problems[1])] == [True, True]
    for step in (1, 3):
        (tmp_path / f"net-{step}.safetensors").unlink()
    with pytest.raises(BankError, match="net-2.safetensors"):
        survey(tmp_path)


def test_differences_are_problems(tmp_path):
    tensors = net(1).state_dict()
    save_file(tensors, tmp_path / "net-1.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "head.bias"}, tmp_path / "net-2.safetensors")
    [problem] = survey(tmp_path).problems
    assert "`head.bias` is only in step 1" in str(problem)


def test_components_and_weights_narrow_it(tmp_path):
    for step in (1, 2):
        torch.save({"model": net(step).state_dict(), "ema": net(9).state_dict()}, tmp_path / f"n{step}.pt")
    assert [row.group.kind for row in survey(tmp_path).groups] == ["raw", "ema"]
    [row] = survey(tmp_path, weights="ema").groups
    assert row.constant


@pytest.mark.parametrize(
    ("steps", "expected", "text"),
    [
        ([5], Gaps(None, ()), "-"),
        ([100, 200], Gaps(100, ()), "every 100"),
        ([100, 200, 300, 400], Gaps(100, ()), "every 100"),
        ([100, 200, 500, 600], Gaps(100, ((200, 500),)), "every 100, not 200-500"),
        ([100, 200, 300, 301], Gaps(100, ((300, 301),)), "every 100, not 300-301"),
        ([1, 2, 4, 8, 16], Gaps(None, ((1, 2), (2, 4), (4, 8), (8, 16))), "irregular"),
        ([0, 10, 30, 40, 60, 70, 90, 100, 120, 130], None, "every 10, not 10-30, 40-60, 70-90 and 1 more"),
    ],
)
def test_gaps(steps, expected, text):
    found = gaps(steps)
    assert expected is None or found == expected
    assert str(found) == text


def test_reading_needs_little_memory(tmp_path):
    big = torch.zeros(12 * 2**20)
    for step in (1, 2):
        save_file({"w": big, "b": big[:9].clone()}, tmp_path / f"big-{step}.safetensors")
    survey(tmp_path, read=False)
    seen = []
    tracemalloc.start()
    found = survey(tmp_path, progress=lambda done, total: seen.append((done, total)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.groups[0].finite
    assert peak < 12 << 20, "48 MB files in blocks of 4 MB"
    assert seen[-1] == (found.groups[0].nbytes, found.groups[0].nbytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_many_checkpoints_share_what_is_equal(tmp_path):
    """One table for all, and at most 3,000 bytes for each checkpoint, as the memory prediction counts."""
    count = 200
    tensors = {f"layer.{n}.weight": torch.zeros(2) for n in range(60)}
    for step in range(count):
        save_file(tensors, tmp_path / f"m{step}.safetensors", {"step": str(step), "same": "text " * 50})
    from lcsc.bank.find import find_groups

    find_groups(tmp_path / "m0.safetensors")
    tracemalloc.start()
    [group] = find_groups(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len({id(item.table) for item in group.checkpoints}) < 5, "the header's length shifts offsets"
    assert held < 3000 * count


def test_a_packed_bank_has_the_digests_of_its_checkpoints(tmp_path):
    (run := tmp_path / "run").mkdir()
    for step in (1, 2, 30):
        torch.save(net(step).state_dict(), run / f"net-{step}.pt")
    write_pack(CheckpointBank.open(run, storage="streamed"), to := tmp_path / "bank.safetensors")
    [loose], [packed] = survey(run).groups, survey(to).groups
    assert packed.group.layout == "packed bank"
    assert [(row.step, row.digest) for row in packed.files] == [(row.step, row.digest) for row in loose.files]
    assert (packed.extent, packed.finite) == (loose.extent, True)


def test_a_flipped_bit_in_a_distributed_checkpoint_is_found(tmp_path):
    tensors = net(1).state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled.*")
        dcp.save(tensors, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    assert survey(tmp_path).problems == ()
    [path] = (tmp_path / "step-1").glob("*.distcp")
    raw = bytearray(path.read_bytes())
    raw[raw.index(tensors["head.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(raw)
    assert survey(tmp_path, read=False).problems == ()
    [problem] = survey(tmp_path).problems
    assert path.name in str(problem)
