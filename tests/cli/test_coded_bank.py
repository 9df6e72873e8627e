"""A coded bank is the same bank in less room."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.coded import write_coded
from lcsc.bank.optimizer_file import contents_of, find_optimizer, read_optimizer
from lcsc.bank.survey import survey
from lcsc.codec.arrays import Array
from lcsc.codec.chain import Chain, ChainWriter, file_name
from lcsc.codec.container import Container, pack
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import BankError, ConfigError, OutputExistsError


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints of a training with a batch norm (something to copy), a tied tensor, and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 40))
    net[2].weight = net[0].weight
    biases, weights = ([p for p in net.parameters() if (p.ndim < 2) == first] for first in (True, False))
    optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=1e-3)
    for step in (10, 20, 30, 40, 50):
        for _ in range(2):
            net(torch.randn(8, 40)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        (place := tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        torch.save(net.state_dict(), place / "pytorch_model.bin")
        torch.save(optimizer.state_dict(), place / "optimizer.bin")
    return tmp_path / "run"


def test_the_coded_bank_is_the_bank(folder, tmp_path):
    loose = CheckpointBank.open(folder)
    write_coded(loose, tmp_path / "coded", CodecSettings(anchor_every=3))
    bank = CheckpointBank.open(tmp_path / "coded")
    assert bank.steps == loose.steps
    assert bank.layout == loose.layout
    assert bank.layout.ties == {"2.weight": "0.weight"}
    assert bank.digest == loose.digest
    assert [p["content"] for p in bank.parents] == [p["content"] for p in loose.parents]
    assert bank.parents[1]["files"] == {file_name(20): (tmp_path / "coded" / file_name(20)).stat().st_size}
    coef = torch.tensor([[2.0, -1.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    for storage in ("resident", "streamed"):
        again = CheckpointBank.open(tmp_path / "coded", storage=storage)
        assert torch.equal(again.combine(coef), loose.combine(coef))
        grad_P = torch.ones(loose.layout.num_parameters)
        assert torch.equal(again.project(grad_P), loose.project(grad_P))
    some = CheckpointBank.open(tmp_path / "coded", select=Selection(start=20, stop=40, every=2))
    wanted = CheckpointBank.open(folder, select=Selection(start=20, stop=40, every=2))
    assert some.digest == wanted.digest
    assert {n: t.tolist() for n, t in some.constants.items()} == {n: t.tolist() for n, t in wanted.constants.items()}


def test_decoded_numbers_go_with_the_bank(folder, tmp_path):
    write_coded(CheckpointBank.open(folder), tmp_path / "coded", CodecSettings())
    bank = CheckpointBank.open(tmp_path / "coded", storage="streamed")
    place = bank.rows[0].files[0].parent
    assert place.is_dir()
    assert bank.matrix is not None
    left = place.with_name("lcsc-coded-0123456789abcdef")  # by a process that was killed
    left.mkdir()
    other = CheckpointBank.open(tmp_path / "coded")
    assert place.is_dir()
    assert not left.exists()
    del bank, other
    gc.collect()
    assert not place.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reference", None),
        ("tensors", [["a", "float32"]]),
        ("tensors", [[["a"], "float32", [1]]]),
        ("parts", [[0, "w", [0], "planes", ["none"], "raw", "0"]]),
        ("about", {"kind": "new", "rate": None, "arch": None, "ties": {}}),
        ("about", {"kind": "raw", "rate": None, "arch": 3, "ties": {}}),
        ("about", {"kind": "raw", "rate": None, "arch": None, "ties": {"a": "none"}}),
    ],
)
def test_a_header_that_describes_no_checkpoint_is_refused(tmp_path, key, value):
    """Even where its checksum is right, as in a file that somebody made to do harm."""
    ChainWriter(tmp_path).append(1, {"a": Array("float32", np.arange(3, dtype="f4"))})
    file = Container(tmp_path / file_name(1))
    header = {**file.header, "about": {"kind": "raw", "rate": None, "arch": None, "ties": {}}, key: value}
    if value is None:
        del header[key]
    (tmp_path / file_name(1)).write_bytes(pack(header, []))
    with pytest.raises(BankError, match=r"is no whole coded checkpoint"):
        CheckpointBank.open(tmp_path)


def test_a_scan_tells_of_a_coded_bank(folder, tmp_path):
    write_coded(CheckpointBank.open(folder), tmp_path / "coded", CodecSettings())
    (row,) = survey(tmp_path / "coded").groups
    assert (row.group.layout, row.group.steps, row.finite) == ("coded bank", (10, 20, 30, 40, 50), True)
    with pytest.raises(BankError, match=r"raw"):
        CheckpointBank.open(tmp_path / "coded", weights="ema")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_coded(CheckpointBank.open(folder), tmp_path / "coded", CodecSettings())


def test_an_optimizer_is_coded_beside_the_weights(folder, lcsc, tmp_path):
    to = tmp_path / "coded"
    code, out, err = lcsc("bank", "pack", f"from={folder}", f"to={to}", "codec=lossless", "optimizer=true")
    assert (code, err) == (0, "")
    assert "5 checkpoints, codec lossless" in out
    assert CheckpointBank.open(to).digest == CheckpointBank.open(folder).digest
    state = torch.load(folder / "checkpoint-50" / "optimizer.bin", weights_only=True)
    coded = Chain(to).read(50)
    assert coded["exp_avg/0.weight"].bits.tobytes() == state["state"][4]["exp_avg"].numpy().tobytes()
    assert coded["exp_avg_sq/0.weight"].bits.tobytes() == state["state"][4]["exp_avg_sq"].numpy().tobytes()
    assert float(coded["state/step/0.weight"].bits) == 10.0

    code, out, err = lcsc("verify", str(to), f"bank={folder}")
    assert (code, err) == (0, "")
    assert f"the same bits as {folder}" in out
    again = tmp_path / "again"  # a coded bank is coded again with its optimizer
    assert lcsc("bank", "pack", f"from={to}", f"to={again}", "codec=lossless", "optimizer=true")[0] == 0
    code, out, err = lcsc("bank", "unpack", f"from={again}", f"to={tmp_path / 'plain'}", "last=2")
    assert (code, err) == (0, "")
    plain = tmp_path / "plain" / "checkpoint-000050"
    unpacked = torch.load(plain / "optimizer.bin", weights_only=True)
    assert unpacked["param_groups"] == state["param_groups"]
    assert [list(slots) for slots in unpacked["state"].values()] == [list(slots) for slots in state["state"].values()]
    for index, slots in state["state"].items():
        assert all(torch.equal(unpacked["state"][index][slot], tensor) for slot, tensor in slots.items())
    model = torch.load(folder / "checkpoint-50" / "pytorch_model.bin", weights_only=True)
    unpacked = load_file(plain / "model.safetensors")
    assert unpacked.keys() == model.keys()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in model.items())


def test_verify_tells_what_is_wrong(folder, lcsc, tmp_path):
    to = tmp_path / "lossy"
    assert lcsc("bank", "pack", f"from={folder}", f"to={to}", "codec=lossy", "bits_w=3")[0] == 0
    assert lcsc("verify", str(to))[0] == 0
    code, _, err = lcsc("verify", str(to), f"bank={folder}")
    assert code == 2
    assert "it was coded with loss" in err
    file = to / file_name(30)
    code, _, err = lcsc("verify", str(file))
    assert code == 2
    assert "is one of a chain of coded checkpoints" in err
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    code, _, err = lcsc("verify", str(to))
    assert code == 2
    assert f"`{file}` is no whole coded checkpoint" in err


@pytest.mark.faults
def test_a_network_codes_and_is_refused_where_it_computes_otherwise(folder, lcsc, tmp_path, monkeypatch):
    from lcsc.codec import neural

    to, words = tmp_path / "neural", ["codec=lossy", "optimizer=true"]
    code, out, err = lcsc("bank", "pack", f"from={folder}", f"to={to}", *words, "coder=neural")
    assert (code, err) == (0, "")
    assert "5 checkpoints, codec lossy by coder neural" in out
    assert lcsc("bank", "pack", f"from={folder}", f"to={tmp_path / 'counts'}", *words)[0] == 0
    assert lcsc("verify", str(to))[::2] == (0, "")
    assert CheckpointBank.open(to).digest == CheckpointBank.open(tmp_path / "counts").digest
    monkeypatch.setattr(neural, "_arithmetic", lambda: "0" * 32)
    for line in (["verify", str(to)], ["bank", "scan", str(to)]):
        code, _, err = lcsc(*line)
        assert code == 2
        assert f"`{to / file_name(10)}` was coded by a network (coder=neural) that does not compute here" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["codec=zip"], "`codec` is `zip`"),
        (["codec=lossy", "bits_w=four"], "`bits_w` is `four`; it must be a whole number"),
        (["codec=lossless", "dtype=float16"], "`dtype` is `float16`, and a codec keeps"),
        (["codec=lossy", "coder=lstm"], "`coder` is `lstm`; it must be one of counts, neural"),
        (["codec=lossless", "coder=neural"], "`coder` is `neural` and `codec` is `lossless`"),
        (["coder=neural"], "`coder` is a setting of a codec, and there is none"),
        (["tau=1"], "`tau` is a setting of a codec, and there is none"),
        (["codec=lossless", "optimizer=yes"], "`optimizer` is `yes`"),
        (["codec=lossless", "bits_w=3"], "`bits_w` says what is lost, and codec=lossless loses nothing"),
        (["codec=lossy", "layers=*:6,x"], "`layers` is `*:6,x`; give patterns of names with their bits"),
        (["codec=lossy", "joint=1"], "`joint` is `1`; it must be true or false"),
        (["codec=lossy", "tau=1", "optimizer=true"], "does not name its parameters, so that moments cannot be dropped"),
    ],
)
def test_settings_that_contradict_are_refused(folder, lcsc, tmp_path, words, said):
    code, _, err = lcsc("bank", "pack", f"from={folder}", f"to={tmp_path / 'out'}", *words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "out").exists()


def test_layers_have_bits_of_their_own(folder, lcsc, tmp_path):
    to = tmp_path / "coded"
    words = ("codec=lossy", "layers=0.w*:32,*:2", "joint=false")
    assert lcsc("bank", "pack", f"from={folder}", f"to={to}", *words)[0] == 0
    coded, loose = CheckpointBank.open(to), CheckpointBank.open(folder)
    views = [bank.layout.views(bank.matrix()[-1]) for bank in (coded, loose)]
    assert torch.equal(views[0]["0.weight"], views[1]["0.weight"])
    (tmp_path / "below").write_text("")
    code, _, err = lcsc("bank", "unpack", f"from={to}", f"to={tmp_path / 'below' / 'x'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be written: File exists" in err
    assert lcsc("bank", "unpack", f"from={to}", f"to={to / 'x'}")[0] == 2


def test_an_optimizer_of_several_checkpoints_is_nobodys(lcsc, tmp_path):
    for step in (5, 10):
        save_file({"a": torch.full((3,), float(step))}, tmp_path / f"model-{step}.safetensors")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    out = tmp_path.parent / "out"
    code, _, err = lcsc("bank", "pack", f"from={tmp_path}", f"to={out}", "codec=lossless", "optimizer=true")
    assert code == 2
    assert "lies beside 2 checkpoints and can be that of one alone" in err
    assert not out.exists()


def test_no_optimizer_is_said(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model-5.safetensors")
    assert find_optimizer(tmp_path / "model-5.safetensors") is None
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "optimizer.pt")
    with pytest.raises(BankError, match="holds no optimizer"):
        read_optimizer(tmp_path / "optimizer.pt", {"a": (3,)})
    state = {"state": {0: {"exp_avg": torch.ones(3), "rate": float("nan")}}, "param_groups": [{"betas": (0.9, 1)}]}
    torch.save(state, tmp_path / "optimizer.pt")
    found = read_optimizer(tmp_path / "optimizer.pt", {"a": (3,)})
    assert (list(found.tensors), found.named) == (["exp_avg/a"], False)
    again = contents_of(json.loads(json.dumps(found.about["optimizer"]["contents"])), {"exp_avg/a": 1})
    assert str(again) == "{'state': {0: {'exp_avg': 1, 'rate': nan}}, 'param_groups': [{'betas': (0.9, 1)}]}"
    torch.save({**state, "more": {1.5: 2}}, tmp_path / "optimizer.pt")
    with pytest.raises(BankError, match="holds a dict at `more`, and tensors and plain values can be coded"):
        read_optimizer(tmp_path / "optimizer.pt", {})
    with pytest.raises(ConfigError):
        CodecSettings(bits_v=0)
