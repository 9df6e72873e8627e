"""Real diffusers folders become rows of a matrix; damaged ones are named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank, Layout, Selection
from lcsc.bank.memory import SHARE, Extent, bank_bytes
from lcsc.bank.pack import write_pack
from lcsc.bank.survey import survey
from lcsc.core.errors import BankError, ConfigError, NonFiniteError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(folder, change):
    """Rewrite one checkpoint's tensors."""
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_rows_are_the_checkpoints_and_steps_sort_as_numbers(tiny_bank):
    bank = CheckpointBank.open(tiny_bank)
    assert bank.steps == (50, 100, 200, 400, 1000)
    net = UNet2DModel.from_pretrained(tiny_bank / "checkpoint-400" / "unet")
    views = bank.layout.views(bank.matrix()[3])
    assert set(views) == set(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(views[name], tensor), name
    assert bank.layout.num_parameters == sum(p.numel() for p in net.parameters())
    assert bank.arch["class"] == "UNet2DModel"
    assert bank.arch["config"]["block_out_channels"] == [8]


def test_sharded_checkpoints_give_the_same_rows(tiny_bank, tmp_path):
    whole = CheckpointBank.open(tiny_bank)
    for step in whole.steps:
        net = UNet2DModel.from_pretrained(tiny_bank / f"checkpoint-{step}" / "unet")
        net.save_pretrained(tmp_path / "sharded" / f"checkpoint-{step}" / "unet", max_shard_size="20KB")
    sharded = CheckpointBank.open(tmp_path / "sharded")
    assert len(sharded.rows[0].files) > 1
    assert torch.equal(sharded.matrix(), whole.matrix())


def test_plain_safetensors_files_are_a_bank(tiny_bank, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for step in (50, 1000):
        shutil.copy(tiny_bank / f"checkpoint-{step}" / "unet" / WEIGHTS, flat / f"model{step:06d}.safetensors")
    bank = CheckpointBank.open(flat)
    assert bank.steps == (50, 1000)
    assert bank.arch is None
    assert torch.equal(bank.matrix(), CheckpointBank.open(tiny_bank).matrix()[[0, 4]])


def test_raw_weights_are_taken_beside_their_ema(tiny_bank):
    for folder in tiny_bank.iterdir():
        shutil.copytree(folder / "unet", folder / "unet_ema")
        edit(folder, lambda tensors: tensors["conv_in.bias"].zero_())
    raw, ema = CheckpointBank.open(tiny_bank), CheckpointBank.open(tiny_bank, component="unet_ema")
    assert (raw.rows[0].path.parent.name, raw.kind) == ("unet", "raw")
    assert (ema.rows[0].path.parent.name, ema.kind) == ("unet_ema", "ema")
    assert any("raw" in note for note in raw.notes)
    first, *notes = raw.lines
    assert first.startswith("bank: 5 checkpoints (raw) x 10,")
    assert ", resident, " in first
    assert notes == [f"note: {note}" for note in raw.notes]
    assert torch.equal(CheckpointBank.open(tiny_bank, weights="ema").matrix(), ema.matrix())
    assert not torch.equal(raw.matrix(), ema.matrix())


@pytest.mark.parametrize(
    ("select", "steps"),
    [
        (Selection(start=100, stop=400), (100, 200, 400)),
        (Selection(every=2), (50, 200, 1000)),
        (Selection(last=2), (400, 1000)),
        (Selection(every=2, last=2, stop=400), (100, 400)),
    ],
)
def test_selection(tiny_bank, select, steps):
    assert CheckpointBank.open(tiny_bank, select=select).steps == steps


def test_empty_selection_is_refused(tiny_bank):
    with pytest.raises(BankError, match="no checkpoint left: 5 steps from 50 to 1000"):
        CheckpointBank.open(tiny_bank, select=Selection(start=5000))
    with pytest.raises(ConfigError, match="both must be at least 1"):
        Selection(every=0)


def test_digest_follows_the_contents(tiny_bank):
    before = CheckpointBank.open(tiny_bank).digest
    assert CheckpointBank.open(tiny_bank).digest == before
    edit(tiny_bank / "checkpoint-50", lambda tensors: tensors["conv_in.bias"].add_(1))
    assert CheckpointBank.open(tiny_bank).digest != before


def test_no_checkpoint_names_the_patterns(tmp_path):
    with pytest.raises(BankError, match=r"no checkpoint found under .*Tried checkpoint-<step>/<component>/"):
        CheckpointBank.open(tmp_path)


def test_other_shapes_name_both_files_and_the_tensor(tiny_bank):
    edit(tiny_bank / "checkpoint-200", lambda t: t.update({"conv_in.bias": torch.zeros(9)}))
    with pytest.raises(
        BankError, match=r"checkpoint-50/unet/.*checkpoint-200/unet/.*` differ: `conv_in.bias` is \(8,\) vs \(9,\)"
    ):
        CheckpointBank.open(tiny_bank)


def test_a_dropped_key_is_named_and_ten_at_most(tiny_bank):
    edit(tiny_bank / "checkpoint-1000", lambda t: t.pop("conv_out.weight"))
    with pytest.raises(BankError, match="`conv_out.weight` is only in step 50"):
        CheckpointBank.open(tiny_bank)
    edit(tiny_bank / "checkpoint-1000", lambda t: [t.pop(name) for name in list(t)[1:]])
    with pytest.raises(BankError, match=r"and \d+ more") as caught:
        CheckpointBank.open(tiny_bank)
    assert str(caught.value).count("is only in step") == 10


def test_truncated_file_is_named(tiny_bank):
    path = tiny_bank / "checkpoint-100" / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        BankError, match=r"checkpoint-100/unet/.*` is truncated: its tensors need \d+ bytes of data and \d+ are there"
    ):
        CheckpointBank.open(tiny_bank)


def test_nan_names_file_key_and_count(tiny_bank):
    edit(tiny_bank / "checkpoint-200", lambda t: t["conv_out.weight"].view(-1)[:3].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"checkpoint-200/.* holds 3 NaN or Inf in `conv_out.weight`"):
        CheckpointBank.open(tiny_bank).matrix()


def test_two_files_of_one_step_are_refused(tiny_bank):
    shutil.copytree(tiny_bank / "checkpoint-50", tiny_bank / "checkpoint-00050")
    with pytest.raises(BankError, match="step 50 stands twice"):
        CheckpointBank.open(tiny_bank)


def test_other_config_is_refused(tiny_bank):
    path = tiny_bank / "checkpoint-400" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "norm_num_groups": 2}))
    with pytest.raises(BankError, match="describe different networks"):
        CheckpointBank.open(tiny_bank)


def test_integers_and_statistics_are_copied_from_the_last(tmp_path):
    for step in (1, 2):
        tensors = {
            "w": torch.full((3,), float(step)),
            "bn.running_var": torch.full((2,), float(step)),
            "bn.num_batches_tracked": torch.tensor(step),
        }
        save_file(tensors, tmp_path / f"m{step}.safetensors")
    bank = CheckpointBank.open(tmp_path)
    assert [entry.name for entry in bank.layout.entries] == ["w"]
    assert bank.constants["bn.running_var"].tolist() == [2.0, 2.0]
    assert bank.constants["bn.num_batches_tracked"].item() == 2
    said = "note: 2 tensors (such as `bn.running_var`) are copied from step 2, not averaged"
    assert bank.lines.count(said) == 1
    first = CheckpointBank.open(tmp_path, select=Selection(stop=1))
    assert first.lines[-1] == said.replace("step 2", "step 1")
    write_pack(bank, tmp_path.with_name(f"{tmp_path.name}.safetensors"))
    assert CheckpointBank.open(tmp_path.with_name(f"{tmp_path.name}.safetensors")).lines.count(said) == 1


def test_layout_round_trip():
    layout = Layout.of({"b": (2, 2), "a": (3,)})
    tensors = {"a": torch.arange(3.0), "b": torch.arange(4.0).view(2, 2)}
    row_P = layout.flatten(tensors)
    assert row_P.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert torch.equal(layout.views(row_P)["b"], tensors["b"])


def test_tied_tensors_stay_tied(tmp_path):
    for step in (1, 2):
        torch.manual_seed(step)
        net = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False))
        net[1].weight = net[0].weight
        torch.save(net.state_dict(), tmp_path / f"net-{step}.pt")
    bank = CheckpointBank.open(tmp_path)
    assert bank.layout.num_parameters == 12
    assert bank.layout.ties == {"1.weight": "0.weight"}
    views = bank.layout.views(bank.combine(torch.tensor([-1.0, 2.0])))
    assert views["0.weight"].data_ptr() == views["1.weight"].data_ptr()
    first, last = (torch.load(tmp_path / f"net-{step}.pt")["0.weight"] for step in (1, 2))
    assert torch.allclose(views["1.weight"], 2 * last - first)


def test_storage_auto_takes_what_fits(tiny_bank, monkeypatch):
    free = {"bytes": 10**12}
    monkeypatch.setattr("lcsc.bank.memory.available_bytes", lambda: free["bytes"])
    assert CheckpointBank.open(tiny_bank).storage == "resident"
    bank = CheckpointBank.open(tiny_bank)
    need = {s: bank_bytes(Extent.of(bank.rows, bank.layout), s) for s in ("resident", "delta")}
    free["bytes"] = int(need["resident"] / SHARE) - 1
    smaller = CheckpointBank.open(tiny_bank)
    assert (smaller.storage, smaller.config["storage"]) == ("delta", "delta")
    assert CheckpointBank.open(tiny_bank, storage="exact").storage == "streamed"
    free["bytes"] = int(need["delta"] / SHARE) - 1
    smallest = CheckpointBank.open(tiny_bank)
    assert (smallest.storage, smallest.config["storage"]) == ("streamed", "exact")
    with pytest.raises(ConfigError, match="no bank storage named `ram`"):
        CheckpointBank.open(tiny_bank, storage="ram")
    with pytest.raises(BankError, match="stored as `streamed`, which has no matrix"):
        smallest.matrix()


def test_delta_bank_is_nearer_than_half_precision_weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(20000, generator=generator)
    for step in range(1, 13):  # a run in which neighbours are near
        weights = weights + 0.01 * torch.randn(20000, generator=generator)
        save_file({"w": weights}, tmp_path / f"m{step}.safetensors")
    exact = CheckpointBank.open(tmp_path, storage="resident")
    coef = torch.randn(12, generator=generator).double()
    coef += (1 - coef.sum()) / 12
    wanted = exact.combine(coef)
    step = (wanted - exact.matrix()[-1]).norm()
    delta = CheckpointBank.open(tmp_path, storage="delta")
    half = CheckpointBank.open(tmp_path, storage="resident", dtype="bfloat16")
    errors = [float((bank.combine(coef) - wanted).norm() / step) for bank in (delta, half)]
    assert errors[0] < 0.005 < 0.05 < errors[1]
    assert torch.equal(delta.combine(torch.eye(12)[6].double()), exact.matrix()[6])  # the anchor is exact
    grad = torch.randn(20000, generator=generator)
    assert torch.allclose(delta.project(grad), exact.project(grad), rtol=1e-2, atol=0.5)
    blocks = torch.cat([torch.from_numpy(W_KC.copy()) for _, W_KC in delta.blocks(4096)], 1)
    rows, anchor = exact.matrix(), exact.matrix()[6]
    assert ((blocks - rows).abs() <= (rows - anchor).abs() * 2**-8 + rows.abs() * 2**-22).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64"])
def test_weights_that_cannot_be_combined_are_refused_not_copied(tmp_path, dtype):
    for step in (1, 2):
        weight = torch.full((2, 2), float(step)).to(getattr(torch, dtype))
        save_file({"w": weight, "v.weight": weight.clone(), "b": torch.ones(2)}, tmp_path / f"m{step}.safetensors")
    text = rf"m1.safetensors` holds `v.weight` and 1 other in {dtype}; only weights in float64, float32"
    with pytest.raises(BankError, match=text):
        CheckpointBank.open(tmp_path)
    assert [str(problem).split("` holds")[1][:12] for problem in survey(tmp_path).problems] == [" `v.weight` "]
    for step in (1, 2):
        norm = {"bn.running_var": torch.ones(2).to(getattr(torch, dtype)), "b": torch.full((2,), float(step))}
        save_file(norm, tmp_path / f"m{step}.safetensors")
    bank = CheckpointBank.open(tmp_path)
    assert bank.combine(torch.tensor([0.5, 0.5])).tolist() == [1.5, 1.5]
    assert bank.constants.keys() == {"bn.running_var"}
