"""A coded bank is the same bank in less room."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank, Selection
from lcsc.bank.coded import write_coded
from lcsc.bank.optimizer_file import find_optimizer, read_optimizer
from lcsc.bank.survey import survey
from lcsc.codec.chain import Chain, file_name
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import BankError, ConfigError, OutputExistsError


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints of a training with a batch norm (something to copy), a tied tensor, and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 40))
    net[2].weight = net[0].weight
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
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
    del bank
    gc.collect()
    assert not place.exists()


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
    state = torch.load(folder / "checkpoint-50" / "optimizer.bin", weights_only=True)["state"]
    coded = Chain(to).read(50)
    assert coded["exp_avg/0.weight"].bits.tobytes() == state[0]["exp_avg"].numpy().tobytes()
    assert coded["exp_avg_sq/0.weight"].bits.tobytes() == state[0]["exp_avg_sq"].numpy().tobytes()
    assert float(coded["state/step/0.weight"].bits) == 10.0

    code, out, err = lcsc("verify", str(to), f"bank={folder}")
    assert (code, err) == (0, "")
    assert f"the same bits as {folder}" in out
    code, out, err = lcsc("bank", "unpack", f"from={to}", f"to={tmp_path / 'plain'}", "last=2")
    assert (code, err) == (0, "")
    plain = tmp_path / "plain" / "checkpoint-000050"
    assert torch.equal(load_file(plain / "optimizer.safetensors")["optimizer/exp_avg/0.weight"], state[0]["exp_avg"])
    again = read_optimizer(find_optimizer(plain / "model.safetensors"), {})
    assert again["exp_avg_sq/0.weight"].bits.tobytes() == state[0]["exp_avg_sq"].numpy().tobytes()
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
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    code, _, err = lcsc("verify", str(to))
    assert code == 2
    assert f"`{file}` is no whole coded checkpoint" in err


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
    ],
)
def test_settings_that_contradict_are_refused(folder, lcsc, tmp_path, words, said):
    code, _, err = lcsc("bank", "pack", f"from={folder}", f"to={tmp_path / 'out'}", *words)
    assert code == 2
    assert said in err


def test_no_optimizer_is_said(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model-5.safetensors")
    assert find_optimizer(tmp_path / "model-5.safetensors") is None
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "optimizer.pt")
    with pytest.raises(BankError, match="holds no optimizer"):
        read_optimizer(tmp_path / "optimizer.pt", {"a": (3,)})
    with pytest.raises(ConfigError):
        CodecSettings(bits_v=0)
