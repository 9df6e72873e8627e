"""Lightning's ModelCheckpoint files; EMA by LitEma and by Lightning's own callback."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers_layouts import assert_same, by_label, net, said
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lcsc.bank.bank import CheckpointBank, Selection
from lcsc.bank.find import choose, find_groups
from lcsc.bank.survey import survey
from lcsc.core.errors import BankError


class LitEma(nn.Module):
    """Names and update of ldm/modules/ema.py (CompVis/latent-diffusion, MIT): the dots go, buffers may have none."""

    def __init__(self, model, decay):
        super().__init__()
        self.m_name2s_name = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, p in model.named_parameters():
            if p.requires_grad:
                s_name = name.replace(".", "")
                self.m_name2s_name.update({name: s_name})
                self.register_buffer(s_name, p.clone().detach().data)

    def forward(self, model):
        with torch.no_grad():
            shadow = dict(self.named_buffers())
            for name, p in model.named_parameters():
                if p.requires_grad:
                    short = shadow[self.m_name2s_name[name]]
                    short.sub_((1.0 - self.decay) * (short - p))

    def copy_to(self, model):
        shadow = dict(self.named_buffers())
        for name, p in model.named_parameters():
            p.data.copy_(shadow[self.m_name2s_name[name]].data)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = net(1)
        self.first_stage = nn.Linear(2, 2)

    def training_step(self, batch, index):
        return self.model(batch).square().mean() + self.first_stage.weight.square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class WithLitEma(Plain):
    def __init__(self):
        super().__init__()
        self.model_ema = LitEma(self.model, 0.999)

    def on_train_batch_end(self, *_):
        self.model_ema(self.model)


def train(module, path, *callbacks, steps=12, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*is deprecated.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        save = ModelCheckpoint(dirpath=path, every_n_train_steps=4, save_top_k=-1, save_last=True, **settings)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[save, *callbacks],
        )
        trainer.fit(module, torch.randn(8, 4, 1, 5, 5))


def saved(item):
    return torch.load(item.path, weights_only=True)


def without_ema(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}


def test_model_checkpoint(folder):
    path = folder("lightning") / "version_0" / "checkpoints"
    train(Plain(), path)
    group = choose(find_groups(path.parent.parent))
    assert (group.label, group.layout, group.steps) == ("raw", "Lightning", (4, 8, 12))
    assert [item.path.name for item in group.checkpoints] == [
        "epoch=0-step=4.ckpt",
        "epoch=0-step=8.ckpt",
        "epoch=1-step=12.ckpt",
    ]
    assert said(group, "passed over (a step that is there already): last.ckpt (step 12)")
    assert said(group, "`optimizer_states` (training state)")
    for item in group.checkpoints:
        assert_same(item, saved(item)["state_dict"])
        assert_same(item, Plain.load_from_checkpoint(item.path, weights_only=True).state_dict())
    (path / "epoch=1-step=12.ckpt").rename(path / "away")
    group = choose(find_groups(path))
    assert [item.path.name for item in group.checkpoints][2] == "last.ckpt"
    assert group.steps == (4, 8, 12), "global_step inside"


def test_names_with_metrics_and_without_steps(folder):
    path = folder("epochs")
    train(Plain(), path, filename="run-{epoch}-{missing_loss:.2f}", save_weights_only=True)
    group = choose(find_groups(path))
    assert group.steps == (8, 12), "the epoch is in the name, the step inside the file"
    named, last = group.checkpoints
    assert named.path.name.startswith("run-epoch=0-missing_loss=0.00")
    assert last.path.name.startswith("run-epoch=1")


def test_lit_ema(folder):
    path = folder("lit_ema")
    train(WithLitEma(), path)
    groups = by_label(find_groups(path))
    assert {label: (g.layout, g.steps) for label, g in groups.items()} == {
        "raw": ("LitEma", (4, 8, 12)),
        "ema 0.999": ("LitEma", (4, 8, 12)),
    }
    assert said(
        groups["ema 0.999"],
        "3 tensors (such as `model.body.1.num_batches_tracked`) have no EMA in any file; the raw "
        "weights' stand in both",
    )
    for item in groups["raw"].checkpoints:
        assert_same(item, without_ema(saved(item)["state_dict"]))
    for item in groups["ema 0.999"].checkpoints:
        module = WithLitEma()
        module.load_state_dict(saved(item)["state_dict"])
        module.model_ema.copy_to(module.model)
        assert_same(item, {f"model.{name}": tensor for name, tensor in module.model.state_dict().items()})
    assert choose(list(groups.values())).kind == "raw"


def test_lit_ema_that_lost_a_tensor_is_not_filled_with_raw_weights(tmp_path):
    """Buffers, which no file averages, stand in both; an EMA that one file alone lacks is refused, wherever it is."""
    names = [f"model.l{i}.w" for i in range(3)]
    for step in (1, 2, 3):
        state = {name: torch.full((2,), float(step)) for name in names} | {"model.l0.buffer": torch.ones(2)}
        state |= {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(step)}
        state |= {f"model_ema.l{i}w": torch.full((2,), 100.0 + step) for i in range(3) if (step, i) != (2, 1)}
        torch.save({"state_dict": state}, tmp_path / f"m-step={step}.ckpt")
    sentence = r"step=2.ckpt` holds no EMA of `model.l1.w`, but `.*step=1.ckpt` does"
    with pytest.raises(BankError, match=sentence):
        CheckpointBank.open(tmp_path, weights="ema")
    with pytest.raises(BankError, match=sentence):
        CheckpointBank.open(tmp_path, weights="ema", select=Selection(2, 2))
    found = survey(tmp_path)
    (problem,) = found.problems
    notes = [note for row in found.groups for note in row.group.notes]
    assert [note for note in notes if "EMA" in note] == [
        "1 tensor (`model.l0.buffer`) has no EMA in any file; the raw weights' stand in both"
    ]
    assert str(problem).startswith(f"`{tmp_path}/m-step=2.ckpt` holds no EMA of `model.l1.w`")
    bank = CheckpointBank.open(tmp_path, weights="ema", select=Selection(every=2))
    assert bank.steps == (1, 3)
    assert dict(bank.layout.views(bank.combine(torch.tensor([0.5, 0.5])))).keys() == {*names, "model.l0.buffer"}
    assert bank.combine(torch.tensor([0.5, 0.5])).unique().tolist() == [1.0, 102.0]
    assert CheckpointBank.open(tmp_path, weights="raw").steps == (1, 2, 3)


def test_lit_ema_names_that_fit_two_tensors_or_none(tmp_path):
    tensors = {"model.a.b": torch.zeros(2), "model.ab": torch.zeros(2), "model_ema.decay": torch.tensor(0.5)}
    tensors["model_ema.num_updates"] = torch.tensor(3)
    torch.save({"state_dict": {**tensors, "model_ema.ab": torch.ones(2)}}, tmp_path / "m-step=1.ckpt")
    with pytest.raises(BankError, match=r"`ab` has lost its dots and fits both `model.a.b` and `model.ab`"):
        find_groups(tmp_path)
    torch.save({"state_dict": {**tensors, "model_ema.ac": torch.ones(2)}}, tmp_path / "m-step=1.ckpt")
    with pytest.raises(BankError, match=r"the EMA tensor `ac` belongs to no raw tensor \(0 of 1 do\)"):
        find_groups(tmp_path)


def test_weight_averaging_callback(folder):
    """Lightning puts the average under `state_dict` and the raw weights under `current_model_state`."""
    path = folder("averaging")
    train(Plain(), path, EMAWeightAveraging(decay=0.9))
    groups = by_label(find_groups(path))
    assert {label: g.steps for label, g in groups.items()} == {"raw": (4, 8, 12), "ema": (4, 8, 12)}
    for label, key in (("raw", "current_model_state"), ("ema", "state_dict")):
        for item in groups[label].checkpoints:
            assert_same(item, saved(item)[key])


def test_a_step_saved_twice_is_refused(folder):
    path = folder("twice")
    train(Plain(), path, steps=4)
    torch.save(saved(choose(find_groups(path)).checkpoints[0]), path / "epoch=0-step=4-v1.ckpt")
    with pytest.raises(BankError, match="step 4 stands twice: `.*step=4.ckpt` and `.*step=4-v1.ckpt`"):
        find_groups(path)
