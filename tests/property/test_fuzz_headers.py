"""Fuzz targets: whatever the bytes, the readers give what the reference reader gives, or a BankError.

`LCSC_FUZZ_ROUNDS` is the number of mutants a test makes (for hypothesis, of examples), 300 where it is not set.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct

import numpy as np
import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.dcp_file import read_dcp
from lcsc.bank.extents import ITEMSIZE, read_source
from lcsc.bank.inert_pickle import Record, Refused, read_pickle
from lcsc.bank.pack import write_pack
from lcsc.bank.pack_read import open_pack
from lcsc.bank.safetensors_file import DTYPES, parse_header, read_safetensors
from lcsc.bank.shard_index import read_index
from lcsc.bank.torch_file import read_torch
from lcsc.core.errors import BankError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ROUNDS = int(os.environ.get("LCSC_FUZZ_ROUNDS", "300"))
quick = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=ROUNDS // 3, database=None
)
names = st.text(max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
dtypes = st.sampled_from([getattr(torch, name) for name in DTYPES.values() if name in ITEMSIZE])
shapes = st.lists(st.integers(0, 4), max_size=4)


def agrees(path, data: bytes) -> bool:
    """Whether lcsc accepts a safetensors file; where it does, it must be what the library reads."""
    path.write_bytes(data)
    try:
        table, metadata = read_safetensors(path)
    except BankError:
        return False
    library = dict(safetensors.deserialize(data))  # raises if lcsc is the laxer one
    assert table.keys() == library.keys()
    for name, found in library.items():
        source = table[name]
        assert (source.dtype, list(source.shape)) == (DTYPES[found["dtype"]], found["shape"])
        assert read_source([path], source).tobytes() == bytes(found["data"])
    with safetensors.safe_open(path, "np") as handle:
        assert metadata == (handle.metadata() or {})
    return True


@quick
@given(st.dictionaries(names, st.tuples(dtypes, shapes), max_size=6), st.dictionaries(names, st.text(max_size=9)))
def test_every_file_the_library_writes_is_read_alike(tmp_path, described, metadata):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
    metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    # of nothing at all and an empty table of metadata, the library (0.8.0) makes broken JSON
    assert agrees(tmp_path / "a", save(tensors, metadata or None))


small = st.integers(-2, 20) | st.sampled_from([0, 8, 16, 24, 2**32, 2**62, 2**63, 2**64, -(2**63)])
odd = small | st.floats() | st.booleans() | st.none() | st.text(max_size=3) | st.lists(small, max_size=3)
codes = st.sampled_from([*DTYPES, "F4", "F128", "f32"])
entries = st.fixed_dictionaries(
    {
        "dtype": codes | odd,
        "shape": st.lists(small, max_size=3) | odd,
        "data_offsets": st.lists(small, max_size=3) | odd,
    }
)
likely = st.builds(
    lambda begin, shape: {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * int(np.prod(shape))]},
    st.sampled_from([0, 4, 8, 16]),
    st.lists(st.integers(0, 3), max_size=2),
)
headers = st.dictionaries(names | st.just("__metadata__"), likely | entries | odd, max_size=4)


@quick
@given(headers, st.sampled_from([0, 4, 8, 16, 24]), st.booleans())
def test_invented_headers(tmp_path, header, size, ascii_only):
    try:
        text = json.dumps(header, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        text = b"{}"
    agrees(tmp_path / "a", struct.pack("<Q", len(text)) + text + bytes(size))


@quick
@given(likely, likely, st.sampled_from([0, 4, 8, 12, 16, 24, 36]))
def test_two_tensors_that_may_overlap(tmp_path, a, b, size):
    text = json.dumps({"a": a, "b": b}).encode()
    agrees(tmp_path / "a", struct.pack("<Q", len(text)) + text + bytes(size))


def mutated(data: bytes, seed: int) -> bytes:
    """The same bytes with a few flipped, cut, doubled or swapped pieces."""
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice(b'0123456789-.eE[]{}",:\\u\x00\xff "PK\x80')
        elif kind == 2:
            del out[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randrange(1, 30)]
        else:
            out[at:at] = rng.randbytes(rng.randrange(1, 4))
    return bytes(out)


def test_mutated_safetensors_files(tmp_path):
    """A few mutants are still good files; each must be read as the library reads it."""
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(0, 2), "c": torch.arange(3), "é": torch.tensor(2.0)}
    good = save(tensors, {"format": "pt"})
    header = 8 + struct.unpack("<Q", good[:8])[0]
    accepted = 0
    for seed in range(ROUNDS):
        front = mutated(good[8:header], seed)
        length = struct.pack("<Q", len(front)) if seed % 4 else good[:8]
        accepted += agrees(tmp_path / "a", length + front + good[header:])
    assert 0 < accepted < ROUNDS


def bank_with_everything(folder):
    """A pack of two EMAs with tied, copied and rounded tensors, and its description."""
    for rate in ("0.9", "0.99"):
        for step in (1, 2):
            table = {"w": torch.full((3, 2), float(step)), "b": torch.ones(2), "n": torch.tensor([step])}
            save_file(table, folder / f"ema_{rate}_{step:06d}.safetensors")
    to = folder.parent / "pack.safetensors"
    write_pack(CheckpointBank.open(folder, weights="ema:*", storage="streamed"), to, "bfloat16")
    header = 8 + struct.unpack("<Q", to.read_bytes()[:8])[0]
    return to, json.loads(to.read_bytes()[8:header]), to.read_bytes()[header:]


def test_mutated_packed_banks(tmp_path):
    """A mutant is refused, or all it says lies inside of the file, in rows that stand in order."""
    (tmp_path / "run").mkdir()
    path, header, data = bank_with_everything(tmp_path / "run")
    good = header["__metadata__"]["lcsc_bank"].encode()
    accepted = 0
    for seed in range(ROUNDS):
        header["__metadata__"]["lcsc_bank"] = mutated(good, seed).decode("latin-1")
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        try:
            shape = open_pack(path)
        except BankError:
            continue
        accepted += 1
        keys = list(zip(shape.rates or [shape.rate] * 4, [row.step for row in shape.rows], strict=True))
        assert len(set(keys)) == len(shape.parents) == 4
        for row in shape.rows:
            assert {*shape.constants, *shape.layout.shapes} == set(row.table)
            for source in row.table.values():
                assert read_source(row.files, source, row.base).shape == source.shape
                assert row.base + source.pieces[0].offset >= 8 + len(text)
    assert 0 < accepted < ROUNDS


def test_mutated_header_lengths(tmp_path):
    good = save({"a": torch.ones(4)})
    for k in range(64):
        data = bytearray(good)
        data[k // 8] ^= 1 << k % 8
        assert not agrees(tmp_path / "a", bytes(data))


def test_mutated_indices(tmp_path):
    for name in ("model-1.bin", "model-2.bin"):
        (tmp_path / name).write_bytes(b"x")
    weights = {"a.weight": "model-1.bin", "b.bias": "model-2.bin", "é": "model-1.bin"}
    good = json.dumps({"metadata": {"total_size": 12}, "weight_map": weights}, ensure_ascii=False).encode()
    path = tmp_path / "i.json"
    accepted = 0
    for seed in range(ROUNDS):
        data = mutated(good, seed)
        path.write_bytes(data)
        try:
            found = read_index(path)
        except BankError:
            continue
        accepted += 1
        assert found == json.loads(data)["weight_map"]
        assert set(found.values()) <= {"model-1.bin", "model-2.bin"}
    assert 0 < accepted < ROUNDS


def test_mutated_torch_files(tmp_path):
    """A mutant is refused, or only what nothing depends on was changed (a date, padding): the tensors are the same."""
    value = {"state_dict": {"w": torch.randn(3, 4), "v": torch.arange(5)}, "step": 3, "args": {"lr": 0.5}}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path = tmp_path / "a.pt"
    path.write_bytes(buffer.getvalue())
    good = read_torch(path).value
    accepted = 0
    for seed in range(ROUNDS):
        path.write_bytes(mutated(buffer.getvalue(), seed))
        try:
            found = read_torch(path).value
        except BankError:
            continue
        accepted += 1
        assert found == good
        for name, tensor in value["state_dict"].items():
            assert read_source([path], found["state_dict"][name]).tolist() == tensor.tolist()
    assert 0 < accepted < ROUNDS


def test_mutated_metadata_of_torch_distributed(tmp_path):
    """A mutant is refused, or every tensor in it is one of those that were saved."""
    state = {"w": torch.randn(3, 4), "v": torch.arange(5), "deep": {"u": torch.randn(3, 4)}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    good = (tmp_path / ".metadata").read_bytes()
    saved = {tensor.numpy().tobytes() for tensor in (state["w"], state["v"], state["deep"]["u"])}
    accepted = 0
    for seed in range(ROUNDS):
        (tmp_path / ".metadata").write_bytes(mutated(good, seed))
        try:
            table, files, _ = read_dcp(tmp_path)
        except BankError:
            continue
        accepted += 1
        assert {read_source(files, source).tobytes() for source in table.values()} <= saved
    assert 0 < accepted < ROUNDS


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(-9, 9), inner, max_size=4)
    ),
)


@quick
@given(plain, st.integers(2, 5))
def test_plain_values_are_what_pickle_reads(value, protocol):
    data = pickle.dumps(value, protocol)
    found, count = read_pickle(data, (), 10_000)
    assert found == pickle.loads(data) == value
    assert count <= len(data)
    with pytest.raises(Refused, match="more than"):
        read_pickle(data, (), count - 1)


@quick
@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_end_the_reading(data):
    for head in (b"", b"\x80\x02", b"\x80\x02}(", b"\x80\x04ccollections\nOrderedDict\n"):
        try:
            found, _ = read_pickle(head + data, ("collections.OrderedDict",), 1000)
        except Refused:
            continue
        assert not isinstance(found, Record) or found.name in ("collections.OrderedDict", "persistent")


@quick
@given(st.binary(max_size=200))
def test_header_text_is_never_a_crash(tmp_path, text):
    with pytest.raises(BankError):
        parse_header(b"{" + text, tmp_path, part=0, start=0, size=1 << 40)
