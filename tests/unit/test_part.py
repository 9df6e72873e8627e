"""A part of a bank's columns gives the bits of the whole and reads its own bytes alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import Piece, Source, cut_source, read_source, whole_rows
from lcsc.bank.pack import write_pack
from lcsc.bank.part import BankPart
from lcsc.core.errors import BankError, ConfigError, NonFiniteError
from lcsc.kernels import Groups

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

K = 5


def tensors(k):
    generator = torch.Generator().manual_seed(k)
    return {
        "a.weight": torch.randn(40, 33, generator=generator),
        "b.half": torch.randn(6, 5, generator=generator).to(torch.bfloat16),
        "c.scale": torch.randn((), generator=generator),
        "d.strided": torch.randn(9, 7, generator=generator),
        "e.wide": torch.randn(700, 500, generator=generator),
        "f.count": torch.tensor(k),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same five checkpoints in three formats; in torch's, one tensor lies in strides."""
    root = tmp_path_factory.mktemp("banks")
    for kind in ("safetensors", "torch", "dcp"):
        (root / kind).mkdir()
    for k in range(K):
        state = tensors(k)
        save_file(state, root / "safetensors" / f"model{k + 1:04d}.safetensors")
        state["d.strided"] = state["d.strided"].T.contiguous().T
        torch.save(state, root / "torch" / f"model{k + 1:04d}.pt")
        dcp.save(state, checkpoint_id=root / "dcp" / f"step_{k + 1}", no_dist=True)
    write_pack(CheckpointBank.open(root / "safetensors", storage="streamed"), root / "bank.safetensors")
    return root


COEF = torch.tensor([[0.3, -1.1, 0.7, 1.9, -0.8], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)


def cuts(P):
    """Ends that fall into tensors, between them and at odd places, and an empty range."""
    return [0, 1, 17, 40 * 33, 40 * 33 + 3, 40 * 33 + 30, 40 * 33 + 31, 1400, 1414, 150_001, 150_001, P - 1, P]


@pytest.mark.parametrize("storage", ["resident", "delta", "streamed"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp", "bank.safetensors"])
def test_the_bits_are_those_of_the_whole_wherever_it_is_cut(folders, kind, storage):
    bank = CheckpointBank.open(folders / kind, storage=storage)
    whole = bank.combine(COEF)
    ends = cuts(bank.layout.num_parameters)
    parts = [BankPart.columns(bank, a, b) for a, b in itertools.pairwise(ends)]
    assert [part.num_columns for part in parts] == np.diff(ends).tolist()
    assert torch.equal(torch.cat([part.combine(COEF) for part in parts], 1).view(torch.int32), whole.view(torch.int32))
    out = torch.empty(ends[3])
    alone = BankPart.columns(bank, 0, ends[3]).combine(COEF[0], out=out)
    assert alone is out
    assert torch.equal(out, whole[0, : ends[3]])


@pytest.mark.parametrize("storage", ["resident", "streamed"])
def test_layer_groups_are_those_of_the_whole(folders, storage):
    bank = CheckpointBank.open(folders / "torch", storage=storage)
    starts = [entry.start for entry in bank.layout.entries]
    groups = Groups((0, starts[1], starts[3], starts[4], bank.layout.num_parameters), (1, 0, 1, 2), 3)
    coef = torch.randn(2, 3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = bank.combine(coef, groups=groups)
    ends = cuts(bank.layout.num_parameters)
    got = [BankPart.columns(bank, a, b).combine(coef, groups=groups) for a, b in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(got, 1), whole)


def test_of_each_tensor_its_own_span(folders):
    bank = CheckpointBank.open(folders / "dcp", storage="resident")
    part = BankPart(bank, {"e.wide": (1003, 9000), "c.scale": (0, 1), "d.strided": (10, 12), "a.weight": (5, 5)})
    assert part.places == {"c.scale": slice(0, 1), "d.strided": slice(1, 3), "e.wide": slice(3, 8000)}
    views = bank.layout.views(bank.combine(COEF[0]))
    got = part.combine(COEF[0])
    for name, (a, b) in {"c.scale": (0, 1), "d.strided": (10, 12), "e.wide": (1003, 9000)}.items():
        assert torch.equal(got[part.places[name]], views[name].reshape(-1)[a:b]), name


def bytes_read():
    """What this process has asked the system to read."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("storage", ["resident", "delta", "streamed"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_half_of_the_columns_is_half_of_the_bytes(folders, kind, storage):
    bank = CheckpointBank.open(folders / kind, storage=storage)
    P = bank.layout.num_parameters
    whole = K * sum((e.stop - e.start) * (2 if e.name == "b.half" else 4) for e in bank.layout.entries)
    again = 1 / K if storage == "delta" else 0  # differences need the row they are taken from once more
    BankPart.columns(bank, 0, P).combine(COEF[0])  # loads what is loaded once
    for start, stop in ((0, P // 2), (P // 2, P)):
        part = BankPart.columns(bank, start, stop)
        before = bytes_read()
        part.combine(COEF[0])
        # 16 KiB: what looking at /proc and a strided tensor's gaps take
        assert abs(bytes_read() - before - whole * (1 + again) / 2) < 2**14


def test_another_part_may_be_damaged(folders, tmp_path):
    for k in range(2):
        save_file(tensors(k) | {"z": torch.tensor([1.0, float("nan") if k else 0.0])}, tmp_path / f"m{k}.safetensors")
    bank = CheckpointBank.open(tmp_path, storage="streamed")
    P, coef = bank.layout.num_parameters, torch.tensor([0.5, 0.5])
    assert torch.isfinite(BankPart.columns(bank, 0, P - 2).combine(coef)).all()
    with pytest.raises(NonFiniteError, match=r"m1.safetensors` holds 1 NaN or Inf in `z`"):
        BankPart.columns(bank, P - 1, P).combine(coef)


@pytest.mark.parametrize("storage", ["resident", "streamed"])
def test_a_flipped_bit_of_a_torch_file_is_noticed_in_tensors_that_are_held_whole(tmp_path, storage):
    state = {"a": torch.arange(4000.0), "b": torch.arange(3000.0)}
    for k in range(2):
        torch.save({name: tensor + k for name, tensor in state.items()}, tmp_path / f"model{k + 1}.pt")
    path = tmp_path / "model2.pt"
    data = bytearray(path.read_bytes())
    at = data.index((torch.arange(4000.0) + 1).numpy().tobytes())
    bank = CheckpointBank.open(tmp_path, storage=storage)
    data[at + 2] ^= 1
    path.write_bytes(data)
    half = torch.tensor([0.5, 0.5])
    assert BankPart(bank, {"b": (0, 3000)}).combine(half)[0] == 0.5
    with pytest.raises(BankError, match=r"model2.pt.*`a`"):
        BankPart(bank, {"a": (0, 4000), "b": (0, 10)}).combine(half)


def test_what_is_no_part_is_refused(folders):
    bank = CheckpointBank.open(folders / "safetensors", storage="streamed")
    P = bank.layout.num_parameters
    for start, stop in ((-1, 4), (5, 4), (0, P + 1)):
        with pytest.raises(
            ConfigError, match=f"the columns are {start} to {stop}; they must rise and lie between 0 and {P}"
        ):
            BankPart.columns(bank, start, stop)
    with pytest.raises(ConfigError, match="takes `f.count`, which is no combined tensor"):
        BankPart(bank, {"f.count": (0, 1)})
    with pytest.raises(ConfigError, match="takes elements 3 to 2 of `c.scale`; they must lie between 0 and 1"):
        BankPart(bank, {"c.scale": (3, 2)})


@st.composite
def saved(draw):
    """A tensor as files may hold it: in one piece, in strides, in runs of rows or in a grid of rectangles."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    whole = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2**16, shape, dtype=np.uint16)
    kind = draw(st.sampled_from(["plain", "strided", "rows", "grid"]))
    if kind == "plain":
        return whole, [(whole, None, (0,) * len(shape))]
    if kind == "strided":
        order = draw(st.permutations(range(len(shape))))
        moved = np.ascontiguousarray(whole.transpose(order)).transpose(np.argsort(order))
        return whole, [(moved, tuple(s // 2 for s in moved.strides), (0,) * len(shape))]
    axes = [0] if kind == "rows" else range(len(shape))
    ends = [
        sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) if i in axes else [0, n]
        for i, n in enumerate(shape)
    ]
    boxes = [[]]
    for axis in ends:
        boxes = [[*box, (a, b)] for box in boxes for a, b in itertools.pairwise(axis)]
    parts = [(whole[tuple(slice(*s) for s in box)], None, tuple(a for a, _ in box)) for box in boxes]
    return whole, draw(st.permutations(parts))


@settings(max_examples=80, deadline=None)
@given(saved(), st.data())
def test_cutting_a_tensor_is_slicing_it(tmp_path_factory, tensor, data):
    whole, parts = tensor
    path = tmp_path_factory.getbasetemp() / "cut.bin"
    pieces, raw = [], b"\0\0\0\0"
    for array, stride, at in parts:
        place = None if len(parts) == 1 else at
        pieces.append(Piece(0, len(raw), array.shape, stride, place))
        raw += (
            array.tobytes() if stride is None else np.lib.stride_tricks.as_strided(array, (array.size,), (2,)).tobytes()
        )
    path.write_bytes(raw)
    source = Source("float16", whole.shape, tuple(pieces))
    a = data.draw(st.integers(0, whole.size - 1))
    b = data.draw(st.integers(a + 1, whole.size))
    low, high = whole_rows(source, a, b)
    assert low <= a < b <= high
    if source.runs is not None:
        assert (low, high) == (a, b)
    got = read_source((path,), cut_source(source, low, high), 0).reshape(-1).view(np.uint16)
    assert got.tolist() == whole.reshape(-1)[low:high].tolist()
