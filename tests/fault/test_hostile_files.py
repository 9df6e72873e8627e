"""Every hostile file is refused by a sentence, in under a second, in little memory, and nothing in it runs."""

from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import CANARIES, payloads
from hostile_files import MEMORY, SECONDS, corpus, read_all
from hostile_packs import GOOD, packed
from safetensors import deserialize
from safetensors.torch import save

from lcsc.bank.pack_read import open_pack
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.torch_file import read_torch
from lcsc.core.errors import BankError


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return {f"block.{i}.weight": torch.randn(8, 5) for i in range(6)}


@pytest.fixture(scope="module")
def torch_file(tensors):
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors, "step": 7}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, tensors, torch_file):
    folder = tmp_path_factory.mktemp("hostile")
    cases = corpus(folder, torch_file, save(tensors, {"format": "pt"}))
    found = read_all(cases)
    assert len(found["rows"]) == len(cases) > 850
    return folder, found


def test_every_hostile_file_is_refused_with_a_sentence_soon_and_nothing_ran(outcome):
    """One test, because workers that shared its parts would each read the corpus."""
    folder, found = outcome
    rows = found["rows"]
    assert [(name, kind, message) for name, kind, message, _ in rows if kind != "BankError"] == []
    for name, _, message, _ in rows:
        assert message.startswith("`"), (name, message)
        assert message.endswith((".", "?")), (name, message)
        assert message.isprintable(), (name, message)
        assert len(message) < 1200, (name, len(message))
    slow = {name: seconds for name, _, _, seconds in found["rows"] if seconds > SECONDS}
    assert slow == {}
    assert found["grown"] < MEMORY
    assert list((folder / CANARIES).iterdir()) == []
    assert [event for event in found["events"] if not event.startswith(("os.listdir", "os.scandir"))] == []
    assert len(found["opened"]) > 500
    assert [path for path in found["opened"] if not Path(path).resolve().is_relative_to(folder)] == []


def test_the_packed_bank_that_the_corpus_edits_is_a_good_one(tmp_path):
    """What the refusals of its edits rest on."""
    (path := tmp_path / "a.safetensors").write_bytes(packed(GOOD))
    shape = open_pack(path)
    assert [row.step for row in shape.rows] == [1, 2]
    assert shape.layout.shapes == {"v": (2, 3), "w": (4,), "u": (4,)}
    assert shape.constants == ("m.running_var", "n")
    path.write_bytes(packed(GOOD | {"rates": ["0.9", "0.99"], "parents": [GOOD["parents"][0]] * 2}))
    assert open_pack(path).rates == ("0.9", "0.99")


def test_the_payloads_are_live(tmp_path):
    """What the test above rests on: `pickle.loads` runs them, so that their canaries would have been seen."""
    (tmp_path / CANARIES).mkdir()
    bombs = {name: data for name, data in payloads(tmp_path).items() if name != "importlib"}
    (tmp_path / "bombs").write_bytes(pickle.dumps(bombs))
    code = (
        "import sys, copyreg, pickle, contextlib\ncopyreg.add_extension('posix', 'system', 0x42)\n"
        "for data in pickle.load(open(sys.argv[1], 'rb')).values():\n"
        "    with contextlib.suppress(Exception): pickle.loads(data)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "bombs"], check=True, timeout=60)
    assert {path.name for path in (tmp_path / CANARIES).iterdir()} == set(bombs)


def test_every_flipped_bit_of_a_torch_file_s_data_is_found(tmp_path, torch_file):
    """`torch.load` reads such a file as if nothing had happened."""
    with zipfile.ZipFile(io.BytesIO(torch_file)) as archive:
        spans = [(read_start(torch_file, item), item.file_size) for item in archive.infolist() if item.file_size]
    places = [start + i for start, size in spans for i in range(size)]
    rng, path = random.Random(0), tmp_path / "a.pt"
    for place in rng.sample(places, 400):
        data = bytearray(torch_file)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(BankError):
            read_torch(path)


def read_start(data: bytes, item: zipfile.ZipInfo) -> int:
    name, extra = struct.unpack_from("<2H", data, item.header_offset + 26)
    return item.header_offset + 30 + name + extra


def test_no_flipped_bit_of_a_header_crashes_or_moves_a_tensor(tmp_path, torch_file, tensors):
    path = tmp_path / "a"
    path.write_bytes(torch_file)
    good = read_torch(path).value
    rng = random.Random(1)
    flips = [(torch_file, read_torch, len(torch_file), 300)]
    whole = save(tensors, {"format": "pt"})
    flips.append((whole, read_safetensors, 8 + struct.unpack("<Q", whole[:8])[0], 400))
    refused = dict.fromkeys((read_torch, read_safetensors), 0)
    for original, reader, length, count in flips:
        for _ in range(count):
            data = bytearray(original)
            data[rng.randrange(length)] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                found = reader(path)
            except BankError:
                refused[reader] += 1
                continue
            if reader is read_torch:
                assert found.value == good
            else:
                library = dict(deserialize(bytes(data)))
                assert {name: list(source.shape) for name, source in found[0].items()} == {
                    name: entry["shape"] for name, entry in library.items()
                }
    assert refused[read_torch] > 200
    assert 200 < refused[read_safetensors] < 400
