"""Pickled networks become the same tensors in safetensors files, and none of the files' own code runs."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest
import torch
from helpers_pickles import edm  # noqa: F401 - a fixture
from safetensors import safe_open
from safetensors.torch import load_file

from lcsc.bank.convert import convert
from lcsc.core.errors import BankError, ConfigError, OutputExistsError


def same(file, wanted):
    """Whether a safetensors file holds exactly these tensors, to the bit, in their dtypes."""
    found = load_file(file)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name


def snapshot(folder, network, name="network-snapshot-0000000-0.050.pkl", **more):
    """A file as EDM writes it: the EMA network beside other pickled things."""
    path = folder / name
    with open(path, "wb") as file:
        pickle.dump({"ema": network, "loss_fn": None, "dataset_kwargs": {"path": "x"}, **more}, file)
    return path


@pytest.fixture
def lines():
    return []


@pytest.fixture
def run(lines):
    """`convert` with consent, its lines collected."""
    return lambda *args, **kwargs: convert(*args, allow_code=True, say=lines.append, **kwargs)


def test_edm_snapshots_keep_every_bit_and_run_nothing(edm, tmp_path, run, lines):  # noqa: F811
    source = tmp_path / "run"
    source.mkdir()
    nets = [edm.Precond().eval().requires_grad_(False).to(dtype) for dtype in (torch.float16, torch.float32)]
    snapshot(source, nets[0], "network-snapshot-0000000-0.050.pkl", augment_pipe=edm.Augment())
    snapshot(source, nets[1], "network-snapshot-0000128-0.100.pkl")
    before = {path: path.read_bytes() for path in source.iterdir()}
    out = run(source, tmp_path / "out")
    assert [path.name for path in out] == [
        "network-snapshot-0000000-0.050.safetensors",
        "network-snapshot-0000128-0.100.safetensors",
    ]
    for path, net in zip(out, nets, strict=True):
        same(path, net.state_dict())  # torch's own idea of what belongs to a network
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in out]
    assert not edm.canary.exists()
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert lines[0].startswith("network-snapshot-0000000-0.050.pkl -> network-snapshot-0000000-0.050.safetensors: ")
    assert f"`ema`, {len(nets[0].state_dict())} tensors, " in lines[0]
    assert "without running its code" in lines[0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(edm, tmp_path, run, protocol):  # noqa: F811
    net = edm.Precond(2).to(torch.bfloat16)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": net}, protocol=protocol))
    same(run(tmp_path / "net.pkl", tmp_path / "out")[0], net.state_dict())
    assert not edm.canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_training_states_in_both_of_torchs_layouts(edm, tmp_path, run, lines, zipped):  # noqa: F811
    net = edm.Precond(3)
    optimizer = torch.optim.Adam(net.parameters())
    path = tmp_path / "training-state-000100.pt"
    torch.save({"net": net, "optimizer_state": optimizer.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    same(run(path, tmp_path / "out")[0], net.state_dict())
    assert f"`net`, {len(net.state_dict())} tensors, " in lines[0]
    assert "without running its code" in lines[0]
    assert not edm.canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_state_dicts_of_all_dtypes(tmp_path, run, zipped):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32]
    base = torch.arange(24.0).reshape(4, 6)
    wanted = {str(dtype): base.to(dtype)[1:, ::2].t() for dtype in dtypes}
    wanted |= {"scalar": torch.tensor(3.5), "nan": torch.tensor([float("nan"), -0.0]), "ünï": torch.ones(2)}
    wanted["a"] = wanted["b"] = torch.randn(3)  # tied
    wanted["expanded"] = torch.randn(3, 1).expand(3, 4)
    state = collections.OrderedDict(**wanted, step=7, best=np.float64(0.5))
    torch.save(state, tmp_path / "model000007.pt", _use_new_zipfile_serialization=zipped)
    same(run(tmp_path / "model000007.pt", tmp_path / "out")[0], wanted)


def test_numpy_arrays(tmp_path, run):
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((3, 4))),
        "half": rng.standard_normal(5).astype(np.float16),
        "big": rng.standard_normal(5).astype(">f4"),
        "sliced": rng.standard_normal((6, 4))[::2, 1:],
        "count": np.array(7),
    }
    for protocol in (2, 4, 5):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=protocol))
        out = run(tmp_path / f"{protocol}.pkl", tmp_path / "out")[0]
        wanted = {name: torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for name, a in arrays.items()}
        same(out, wanted)


def test_the_part_that_is_taken(tmp_path, run, lines):
    one, two = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    cases = {
        "ema": ({"net": two, "ema": one}, "`ema`"),
        "emas": ({"ema": {"stds": [0.05, 0.1], "emas": [two, two]}, "net": one, "optimizer": {"state": {}}}, "`net`"),
        "none": ({"ema": None, "model": one, "args": {"lr": 1}}, "`model`"),
        "deep": ({"model": {"state_dict": one}, "epoch": 3}, "`model.state_dict`"),
        "flat": (one, "1 tensors"),
    }
    for name, (value, words) in cases.items():
        torch.save(value, tmp_path / f"{name}.pt")
        same(run(tmp_path / f"{name}.pt", tmp_path / "out")[0], one)
        assert f".safetensors: {words}" in lines[-1]


def test_headers_say_where_the_tensors_come_from(tmp_path, run):
    import hashlib

    torch.save({"ema": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with safe_open(run(tmp_path / "a.pt", tmp_path / "out")[0], "np") as handle:
        assert handle.metadata() == {
            "format": "pt",
            "lcsc_source": "a.pt",
            "lcsc_source_sha256": hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest(),
            "lcsc_part": "ema",
        }


def test_the_same_line_again_continues(tmp_path, run, lines, monkeypatch):
    for k in range(3):
        torch.save({"ema": {"w": torch.full((4,), float(k))}}, tmp_path / f"{k}.pt")
    (tmp_path / "1.pt").write_bytes((tmp_path / "0.pt").read_bytes()[:200])
    with pytest.raises(BankError, match=r"`.*1.pt` is damaged, or no pickle or torch file: .* Copy it again\."):
        run(tmp_path, tmp_path / "out")
    first = tmp_path / "out" / "0.safetensors"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.safetensors"]
    stamp = first.stat().st_mtime_ns
    torch.save({"ema": {"w": torch.ones(4)}}, tmp_path / "1.pt")
    lines.clear()
    out = run(str(tmp_path / "*.pt"), tmp_path / "out")
    assert lines[0] == "0.pt -> 0.safetensors: kept from an earlier call"
    assert first.stat().st_mtime_ns == stamp
    assert [load_file(path)["w"][0].item() for path in out] == [0, 1, 2]
    monkeypatch.setattr("lcsc.bank.convert.subprocess.Popen", lambda *args, **how: pytest.fail("a child process"))
    run(tmp_path, tmp_path / "out")  # nothing is started for what is there


def test_nothing_is_overwritten(tmp_path, run, lines):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt")
    out = tmp_path / "out"
    run(tmp_path / "b.pt", out)
    torch.save({"w": torch.zeros(2)}, tmp_path / "b.pt")  # another file by now
    lines.clear()
    with pytest.raises(OutputExistsError, match=r"b.safetensors` exists already and was not made of `b.pt` as it is"):
        run(tmp_path, out)
    assert lines == []  # seen before anything is converted
    (out / "b.safetensors").unlink()
    (out / "b.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError):
        run(tmp_path, out)
    assert (out / "b.safetensors").read_text() == "mine"
    (out / "b.safetensors").unlink()
    (out / "b.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError):
        run(tmp_path, out)


def test_wrong_requests(tmp_path, run):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"unpickling can run code inside the file.*add `allow_code=true`"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BankError, match=r"nothing to convert at `.*/empty`\. Give a file, or a folder or pattern with"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(BankError, match=r"absent.pkl` cannot be read: No such file or directory"):
        run(tmp_path / "absent.pkl", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"`code` is `.*nowhere`, which is no folder"):
        run(tmp_path / "a.pt", tmp_path / "out", code=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`to` is `.*file`; no folder can be made there"):
        run(tmp_path / "a.pt", tmp_path / "file")
    (tmp_path / "a.pkl").touch()
    with pytest.raises(ConfigError, match=r"a.pkl` and `.*a.pt` would both become `a.safetensors`"):
        run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys, monkeypatch):
    from lcsc.cli.bank_convert import main as bank_convert

    monkeypatch.chdir(tmp_path)
    torch.save({"ema": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="add `allow_code=true`"):
        bank_convert(["from=a.pt", "to=out"])
    with pytest.raises(ConfigError, match="`allow_code` is `yes`; it must be true or false"):
        bank_convert(["from=a.pt", "to=out", "allow_code=yes"])
    with pytest.raises(ConfigError, match="`to` is not set"):
        bank_convert(["from=a.pt", "--allow-code"])
    bank_convert(["from=a.pt", "to=out", "--allow-code"])
    bank_convert(["a.pt", "to=out", "allow_code=true"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("a.pt -> a.safetensors: `ema`, 1 tensors, 0.0 MB, without running its code")
    assert out[1] == "1 files in `out`; see them with: lcsc bank scan out"
    assert out[2] == "a.pt -> a.safetensors: kept from an earlier call"
