"""A streamed bank gives the bits of a resident one, reads each file once and says what is wrong with it."""

from __future__ import annotations

import itertools
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.content import CHUNK
from lcsc.bank.extents import Piece, Source
from lcsc.bank.layout import Layout
from lcsc.bank.rows import Files, Row, Span, cut, long_blocks, read_row, reads
from lcsc.core.errors import BankError, EvaluationError, NonFiniteError
from lcsc.kernels import Groups

K = 11  # more than one group of rows


@pytest.fixture
def folder(tmp_path):
    """Eleven checkpoints: a tensor of several blocks, small ones, an empty one, a counter, three dtypes."""
    generator = torch.Generator().manual_seed(0)
    for k in range(K):
        tensors = {
            "a.big": torch.randn(3, CHUNK // 2 + 7, generator=generator),
            "b.half": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
            "c.float16": torch.randn(17, generator=generator).to(torch.float16),
            "d.scalar": torch.randn((), generator=generator),
            "e.empty": torch.zeros(0, 4),
            "f.steps": torch.tensor(k),
            "g.bias": torch.full((3,), -0.0),
        }
        save_file(tensors, tmp_path / f"model{k + 1:04d}.safetensors")
    return tmp_path


def signed(rows, seed=0):
    """Coefficients with both signs that sum to one, shape (rows, K)."""
    coef = np.random.default_rng(seed).normal(0, 2, (rows, K))
    return coef + (1 - coef.sum(1, keepdims=True)) / K


def collect(bank, coef_MK, **how):
    """All columns of a stream, which must come once each."""
    out = np.full((len(coef_MK), bank.layout.num_parameters), np.nan, np.float32)
    for start, block_MC in bank.stream(coef_MK, **how):
        assert np.isnan(out[:, start : start + block_MC.shape[1]]).all()
        out[:, start : start + block_MC.shape[1]] = block_MC
    assert not np.isnan(out).any()
    return out


def test_streamed_and_resident_give_the_same_bits(folder):
    streamed, resident = (
        CheckpointBank.open(folder, storage="streamed"),
        CheckpointBank.open(folder, storage="resident"),
    )
    coef_MK = np.concatenate([signed(3), np.eye(K)[[2]], [[0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5]]])
    wanted = resident.combine(torch.from_numpy(coef_MK)).numpy()
    assert collect(streamed, coef_MK).tobytes() == wanted.tobytes()
    assert collect(resident, coef_MK).tobytes() == wanted.tobytes()
    assert streamed.combine(torch.from_numpy(coef_MK)).numpy().tobytes() == wanted.tobytes()
    for m, coef_K in enumerate(coef_MK):  # alone or among others: the same bits
        assert collect(streamed, coef_K[None]).tobytes() == wanted[m].tobytes()


def test_the_sum_is_the_float64_sum_rounded_once(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    coef_K = signed(1)[0]
    names = [entry.name for entry in bank.layout.entries]
    states = [load_file(row.path) for row in bank.rows]
    exact = {n: sum(c * s[n].double() for c, s in zip(coef_K.tolist(), states, strict=True)) for n in names}
    views = bank.layout.views(torch.from_numpy(collect(bank, coef_K[None])[0]))
    for name in names:
        size = sum(abs(c) * s[name].double().abs() for c, s in zip(coef_K.tolist(), states, strict=True))
        # half a unit of float32 for the rounding, and 2**-30 for each coefficient
        bound = exact[name].abs() * 2.0**-24 + size * 2.0**-29 + 1e-45
        assert ((views[name].double() - exact[name]).abs() <= bound).all(), name


def test_a_lone_checkpoint_comes_back_bit_for_bit(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    out = collect(bank, np.eye(K)[[4, 0]])
    for m, k in enumerate((4, 0)):
        state = load_file(bank.rows[k].path)
        for name, view in bank.layout.views(torch.from_numpy(out[m])).items():
            assert view.numpy().tobytes() == state[name].float().numpy().tobytes(), name
    assert np.signbit(bank.layout.views(torch.from_numpy(out[0]))["g.bias"].numpy()).all()


def test_layer_groups_have_coefficients_of_their_own(folder):
    streamed, resident = (
        CheckpointBank.open(folder, storage="streamed"),
        CheckpointBank.open(folder, storage="resident"),
    )
    entries = streamed.layout.entries
    ends = (*(e.start for e in entries), streamed.layout.num_parameters)
    groups = Groups(ends, tuple(i % 2 for i in range(len(entries))), 2)
    coef_GK = torch.from_numpy(signed(2))
    mixed = streamed.combine(coef_GK, groups=groups)
    assert torch.equal(mixed, resident.combine(coef_GK, groups=groups))
    apart = resident.combine(coef_GK)
    for i, entry in enumerate(entries):
        assert torch.equal(mixed[entry.start : entry.stop], apart[i % 2, entry.start : entry.stop])


def test_project_is_the_transpose(folder):
    generator = torch.Generator().manual_seed(1)
    for storage in ("streamed", "resident"):
        bank = CheckpointBank.open(folder, storage=storage)
        grad_P = torch.randn(bank.layout.num_parameters, generator=generator.manual_seed(1))
        coef_K = torch.from_numpy(signed(1)[0])
        left = float(bank.combine(coef_K).double() @ grad_P.double())
        right = float(bank.project(grad_P).double() @ coef_K)
        assert left == pytest.approx(right, rel=1e-5)


def test_checkpoints_without_a_coefficient_are_not_read(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    coef_K = np.zeros((1, K))
    coef_K[0, [1, 3]] = 0.25, 0.75
    wanted = collect(bank, coef_K)
    for k in set(range(K)) - {1, 3}:
        bank.rows[k].path.write_bytes(b"gone")
    assert collect(bank, coef_K).tobytes() == wanted.tobytes()
    seen = []
    for _ in bank.stream(coef_K, progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1][0] == seen[-1][1] == sum(s.nbytes for n, s in bank.rows[1].table.items() if n != "f.steps") * 2


def test_few_file_handles_are_enough(folder, monkeypatch):
    wanted = collect(CheckpointBank.open(folder, storage="streamed"), signed(1))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (130, 130))
    assert collect(CheckpointBank.open(folder, storage="streamed"), signed(1)).tobytes() == wanted.tobytes()


def test_nan_names_file_tensor_and_count(folder):
    path = folder / "model0005.safetensors"
    tensors = load_file(path)
    tensors["a.big"].view(-1)[[0, CHUNK, CHUNK + 1]] = float("nan")
    save_file(tensors, path)
    bank = CheckpointBank.open(folder, storage="streamed")
    said = r"model0005.safetensors` holds 3 NaN or Inf in `a.big`.*leave step 5 out"
    with pytest.raises(NonFiniteError, match=said):
        collect(bank, signed(1))
    with pytest.raises(NonFiniteError, match=said):
        bank.load()
    with pytest.raises(NonFiniteError, match=said):
        CheckpointBank.open(folder, storage="resident").matrix()


def test_coefficients_beyond_float32_fail_the_candidate(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    with pytest.raises(EvaluationError, match="overflows float32"):
        collect(bank, np.full((1, K), 1e38))


def test_a_file_that_shrinks_is_noticed(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    path = bank.rows[2].path
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BankError, match=r"model0003.safetensors` ended \d+ bytes early"):
        collect(bank, signed(1))


def test_blocks_hold_whole_chunks_of_one_dtype(folder):
    bank = CheckpointBank.open(folder, storage="streamed")
    blocks = cut(bank.layout, [bank.rows[0].table])
    assert blocks[0].start == 0
    assert blocks[-1].stop == bank.layout.num_parameters
    for block, following in itertools.pairwise(blocks):
        assert block.stop == following.start
    for block in blocks:
        assert len({bank.rows[0].table[span.name].dtype for span in block.spans}) == 1
        assert all(span.a % CHUNK == 0 for span in block.spans)


def test_a_tensor_in_runs_is_read_in_blocks_and_one_in_strides_as_a_whole(tmp_path):
    """Shards along the first axis, as FSDP leaves them, are runs of the tensor; other rectangles are not."""
    shape = (2, CHUNK // 2 + 3, 3)
    numel = int(np.prod(shape))
    value = np.arange(numel, dtype=np.float32).reshape(shape)
    rows = [np.ascontiguousarray(part) for part in (value[1:], value[:1])]
    columns = [np.ascontiguousarray(part) for part in (value[:, :5], value[:, 5:])]
    pieces, offset = {}, 0
    for name, parts, places in (("rows", rows, [(1, 0, 0), (0, 0, 0)]), ("columns", columns, [(0, 0, 0), (0, 5, 0)])):
        found = []
        for part, at in zip(parts, places, strict=True):
            found.append(Piece(0, offset, part.shape, None, at))
            offset += part.nbytes
        pieces[name] = Source("float32", shape, tuple(found))
    path = tmp_path / "parts"
    path.write_bytes(b"".join(part.tobytes() for part in rows + columns))
    layout = Layout.of({"rows": shape, "columns": shape}, {})
    blocks = cut(layout, [pieces])
    long = [block.spans for block in blocks if block.stop - block.start > CHUNK]
    assert long == [(Span("columns", 0, numel),)]
    assert long_blocks(layout, [pieces]) == (numel,)
    row = Row(1, path, (path,), pieces)
    files = Files([row])
    for block in blocks:
        out_C = np.full(block.stop - block.start, np.nan, np.float32)
        plan = reads(block, pieces)
        assert (plan is None) == (block.spans == long[0])
        read_row(files, row, block, plan, out_C)
        expected = np.concatenate([value.reshape(-1)[span.a : span.b] for span in block.spans])
        np.testing.assert_array_equal(out_C, expected)
    files.close()


def test_long_blocks_are_those_of_the_cut():
    """Tensors in strides (odd ones, in the second table) and whole ones, some of one block or less, some of more."""
    sizes = [1, 2 * CHUNK + 1, CHUNK, CHUNK + 1, 5, CHUNK, 3 * CHUNK, CHUNK + 7, 0, 3 * CHUNK]
    shapes = {f"t{i}": (2, size) for i, size in enumerate(sizes)}
    whole = {name: Source("float32", shape, (Piece(0, 0, shape, None, (0, 0)),)) for name, shape in shapes.items()}
    odd = {
        name: Source("float32", shape, (Piece(0, 0, shape, (1, 2), (0, 0)),)) if i % 2 else whole[name]
        for i, (name, shape) in enumerate(shapes.items())
    }
    layout = Layout.of(shapes, {})
    for tables, long in (
        ([whole], ()),
        ([whole, odd], (4 * CHUNK + 2, 2 * CHUNK + 2, 2 * CHUNK, 2 * CHUNK + 14, 6 * CHUNK)),
    ):
        columns = [block.stop - block.start for block in cut(layout, tables)]
        assert long_blocks(layout, tables) == tuple(c for c in columns if c > CHUNK) == long


def test_content_digests_come_with_the_pass(folder, monkeypatch):
    bank = CheckpointBank.open(folder, storage="streamed")
    wanted = CheckpointBank.open(folder, storage="resident").digest
    collect(bank, signed(1))
    assert bank.digest == wanted
    before = bank.parent(3)["content"]
    path = bank.rows[3].path
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert CheckpointBank.open(folder, storage="streamed").parent(3)["content"] != before


def test_float64_files_give_the_same_bits_in_every_storage(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        save_file({"w": torch.randn(999, generator=rng, dtype=torch.float64)}, tmp_path / f"m{step}.safetensors")
    coef_K = torch.tensor([0.7, -1.1, 1.4], dtype=torch.float64)
    resident, streamed = (CheckpointBank.open(tmp_path, storage=name) for name in ("resident", "streamed"))
    assert torch.equal(resident.combine(coef_K), streamed.combine(coef_K))
