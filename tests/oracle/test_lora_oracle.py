"""LoRA banks written by PEFT and diffusers, combined here and by PEFT, and loaded back by PEFT."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.lora import combine_products
from lcsc.operators.lora import Lora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

K = 4
STEPS = [500 * (k + 1) for k in range(K)]


class Net(torch.nn.Module):
    """Everything PEFT puts plain LoRA on: linear layers, convolutions (3x3, 1x1, 1-d), an embedding."""

    def __init__(self):
        super().__init__()
        self.q, self.value = torch.nn.Linear(12, 9), torch.nn.Linear(9, 14)
        self.conv, self.point = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 5, 1)
        self.line = torch.nn.Conv1d(3, 4, 3)
        self.emb = torch.nn.Embedding(11, 7)


MODULES = ["q", "value", "conv", "point", "line", "emb"]
CONFIGS = {
    "plain": {},
    "alpha": {"lora_alpha": 7},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "lora_alpha": 8,
        "rank_pattern": {"q": 2, "conv": 5},
        "alpha_pattern": {"value": 3, "^conv": 2, "emb": 6},
    },
    "all": {"lora_alpha": 5, "modules_to_save": ["value"], "target_modules": ["q", "conv"]},
}


def run_of(folder, **config):
    """A run of a PEFT adapter: the model with the last checkpoint in it, and the folders PEFT wrote."""
    torch.manual_seed(0)
    net = Net()
    model = get_peft_model(net, LoraConfig(**{"r": 3, "target_modules": MODULES, **config}))
    for step in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder / f"checkpoint-{step}")
    return model


def deltas(model, name, modules=MODULES):
    """Every module's update as PEFT computes it."""
    return {m: getattr(model.base_model.model, m).get_delta_weight(name).detach() for m in modules}


def loaded(model, folder, steps=STEPS):
    for step in steps:
        model.load_adapter(folder / f"checkpoint-{step}", f"s{step}")
    return [f"s{step}" for step in steps]


def written(candidate, folder):
    """The candidate as a PEFT adapter folder."""
    folder.mkdir()
    save_file(candidate.weights(), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(candidate.recipe["adapter"]))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "alpha", "rslora", "patterns"])
def test_peft_reads_the_combination_of_its_own_updates(tmp_path, name):
    model = run_of(tmp_path / "run", **CONFIGS[name])
    names = loaded(model, tmp_path / "run")
    bank = CheckpointBank.open(tmp_path / "run")
    assert bank.steps == tuple(STEPS)
    parts = [deltas(model, n) for n in names]
    for case, (coef, rank) in enumerate([([0.1, 0.2, 0.3, 0.4], 3), ([2.5, -1.75, -1.0, 1.25], 4)]):
        lora = Lora(rank=rank)
        candidate = lora.apply(bank, lora.point(bank, np.array(coef)))
        model.load_adapter(written(candidate, tmp_path / f"ours{case}"), f"ours{case}")
        for m, found in deltas(model, f"ours{case}").items():
            exact = sum(c * part[m].double() for c, part in zip(coef, parts, strict=True)).flatten(1)
            U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            torch.testing.assert_close(found.flatten(1).double(), best, rtol=2e-4, atol=2e-5)
            lost = float(S[rank:].norm() / S.norm())
            assert lost <= candidate.recipe["error"]["max"] * (1 + 1e-5) + 1e-7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "alpha", "rslora", "patterns"])
def test_the_same_combination_as_pefts(tmp_path, name):
    """`add_weighted_adapter(combination_type="svd")`, for the layers it can do (no 1-d convolutions)."""
    modules = [m for m in MODULES if m != "line"]
    model = run_of(tmp_path / "run", target_modules=modules, **CONFIGS[name])
    names = loaded(model, tmp_path / "run")
    bank = CheckpointBank.open(tmp_path / "run")
    for case, (coef, rank) in enumerate([([0.1, 0.2, 0.3, 0.4], 3), ([0.0, 0.75, 0.0, 0.25], 5)]):
        lora = Lora(rank=rank)
        candidate = lora.apply(bank, lora.point(bank, np.array(coef)))
        model.load_adapter(written(candidate, tmp_path / f"ours{case}"), f"ours{case}")
        model.add_weighted_adapter(names, coef, f"theirs{case}", combination_type="svd", svd_rank=rank)
        ours, theirs = (deltas(model, f"{who}{case}", modules) for who in ("ours", "theirs"))
        # peft 0.21 keeps `use_rslora` in the new adapter but sets lora_alpha = r: sqrt(r) times too large
        excess = rank**0.5 if name == "rslora" else 1.0
        for m in modules:
            assert theirs[m].abs().max() > 0.1
            torch.testing.assert_close(ours[m], theirs[m] / excess, rtol=2e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_kept_rank_takes_a_checkpoints_place(tmp_path):
    model = run_of(tmp_path / "run", **CONFIGS["patterns"])
    (name,) = loaded(model, tmp_path / "run", STEPS[1:2])
    bank, lora = CheckpointBank.open(tmp_path / "run"), Lora()
    candidate = lora.apply(bank, lora.point(bank, np.array([0.0, 1.0, 0.0, 0.0])))
    assert candidate.recipe["adapter"] == json.loads((tmp_path / "run/checkpoint-2000/adapter_config.json").read_text())
    model.load_adapter(written(candidate, tmp_path / "one"), "one")
    for m, found in deltas(model, "one").items():
        assert torch.equal(found, deltas(model, name)[m])


@pytest.mark.filterwarnings("ignore")
def test_modules_saved_in_full_travel_along(tmp_path):
    model = run_of(tmp_path / "run", **CONFIGS["all"])
    names = loaded(model, tmp_path / "run")
    bank, lora = CheckpointBank.open(tmp_path / "run"), Lora(rank=12)
    coef = [1.5, -0.75, -0.5, 0.75]
    candidate = lora.apply(bank, lora.point(bank, np.array(coef)))
    model.load_adapter(written(candidate, tmp_path / "ours"), "ours")
    saved = model.base_model.model.value.modules_to_save
    wanted = sum(c * saved[n].weight for c, n in zip(coef, names, strict=True))
    torch.testing.assert_close(saved["ours"].weight, wanted, rtol=1e-5, atol=1e-5)
    exact = sum(c * deltas(model, n, ["q"])["q"] for c, n in zip(coef, names, strict=True))
    torch.testing.assert_close(deltas(model, "ours", ["q"])["q"], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_kohya_files_as_diffusers_writes_them(tmp_path):
    """The same run in kohya's names gives the same updates: alpha lies in tensors there."""
    run_of(tmp_path / "run", lora_alpha=6, target_modules=["q", "conv"])
    folder = tmp_path / "kohya"
    folder.mkdir()
    peft = Lora(rank=12)
    bank = CheckpointBank.open(tmp_path / "run")
    for step in STEPS:
        state = load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors")
        state = convert_state_dict_to_kohya({k.replace("base_model.model.", "unet."): v for k, v in state.items()})
        alphas = {name: torch.tensor(6.0) for name in state if name.endswith(".alpha")}
        assert len(alphas) == 2
        save_file({**state, **alphas}, folder / f"style-step{step:08d}.safetensors")
    coef = np.array([2.5, -1.75, -1.0, 1.25])
    other = CheckpointBank.open(folder)
    candidates = [peft.apply(b, peft.point(b, coef)) for b in (bank, other)]
    updates = []
    for candidate in candidates:
        weights = {name: t.double() for name, t in candidate.weights().items()}
        down = sorted(name for name in weights if "lora_A" in name or "lora_down" in name)
        up = sorted(name for name in weights if "lora_B" in name or "lora_up" in name)
        updates.append([weights[b].flatten(1) @ weights[a].flatten(1) for a, b in zip(down, up, strict=True)])
    for a, b in zip(*updates, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_products_against_torchs_svd():
    rng = np.random.default_rng(0)
    for K, r, out, inner, rank in ((3, 4, 40, 30, 6), (10, 4, 20, 30, 8), (5, 8, 16, 100, 16)):
        A_K, B_K = rng.standard_normal((K, r, inner)), rng.standard_normal((K, out, r))
        coef_K, scale_K = rng.uniform(-6, 6, K), rng.uniform(0.1, 2, K)
        formed = torch.from_numpy(np.einsum("k,kor,kri->oi", coef_K * scale_K, B_K, A_K))
        U, S, Vh = torch.linalg.svd(formed, full_matrices=False)
        A, B, error = combine_products(A_K, B_K, coef_K, scale_K, rank)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        np.testing.assert_allclose(B @ A, best, atol=1e-11 * float(S[0]))
        assert error == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-13)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_settings_in_the_header(tmp_path):
    """What diffusers' `save_lora_weights` leaves: PEFT's names without its config, settings in the header."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.training_utils import _collate_lora_metadata

    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=4,
        attention_head_dim=2,
    )
    unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"]))
    parts = []
    for step in (100, 200):
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora" in name:
                    parameter += 0.3 * torch.randn_like(parameter)
        state = get_peft_model_state_dict(unet)
        parts.append({name: tensor.clone() for name, tensor in state.items()})
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path / f"checkpoint-{step}", unet_lora_layers=state, **_collate_lora_metadata({"unet": unet})
        )
    bank, lora = CheckpointBank.open(tmp_path), Lora(rank=4)
    candidate = lora.apply(bank, lora.point(bank, np.array([1.75, -0.75])))
    assert candidate.recipe["adapter"]["unet.lora_alpha"] == 4
    weights = candidate.weights()
    for name in parts[0]:
        if "lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            wanted = 2.5 * (1.75 * parts[0][partner] @ parts[0][name] - 0.75 * parts[1][partner] @ parts[1][name])
            found = weights[f"unet.{partner}"] @ weights[f"unet.{name}"]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
