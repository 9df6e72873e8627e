"""`lcsc combine`: real checkpoints in, models out that the libraries load, held to torch in float64."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys

import ema_pytorch
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from diffusers import UNet2DModel
from helpers_ranks import run_ranks
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lcsc.bank import CheckpointBank
from lcsc.cli.combine import read_numbers
from lcsc.core.errors import ConfigError

STEPS = (50, 100, 200, 400, 1000)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def bank(here, saved):
    """A copy of them."""
    return shutil.copytree(saved, here / "bank")


def nets(bank):
    return [UNet2DModel.from_pretrained(bank / f"checkpoint-{step}" / "unet") for step in STEPS]


def summed(models, coef_K):
    """sum_k coef_k theta_k by torch in float64."""
    rows = [model.state_dict() for model in models]
    return {name: sum(c * row[name].double() for c, row in zip(coef_K, rows, strict=True)) for name in rows[0]}


def equal(folder, wanted, atol=1e-7):
    """The folder loads in diffusers and holds the numbers."""
    found = UNet2DModel.from_pretrained(folder).state_dict()
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=2e-7, atol=atol, msg=name)


def ok(lcsc, *words):
    code, out, err = lcsc("combine", *words)
    assert code == 0, err
    return out


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refuse(lcsc, here, words, text):
    before = written(here)
    code, out, err = lcsc("combine", *words)
    assert code == 2, (out, err)
    assert err.startswith("lcsc: ")
    assert err.count("\n") == 1, err
    assert text in err
    assert written(here) == before


# ------------------------------------------------------------------------------------------------------- schedules


def test_uniform_is_torchs_average(here, lcsc, bank):
    out = ok(lcsc, f"bank={bank}", "schedule=uniform", "to=out")
    models = nets(bank)
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    wanted = {name: tensor.double() for name, tensor in average.module.state_dict().items()}
    equal(here / "out", wanted)
    assert "5 checkpoints, steps 50 to 1000, raw, 10,289 parameters" in out
    assert "uniform-window-5: sum|c| 1, max|c| 0.2" in out
    assert "model: out (" in out


def test_a_sweep_of_emas_is_torchs_recursion(here, lcsc, bank):
    """Steps 100, 200, ... so that one decay a checkpoint is one half-life."""
    for old, new in zip(STEPS, range(100, 600, 100), strict=True):
        (bank / f"checkpoint-{old}").rename(bank / f"step-{new}")
    out = ok(lcsc, f"bank={bank}", "schedule=ema", "halflife=100,200,...,400", "to=deep/out")
    models = [UNet2DModel.from_pretrained(bank / f"step-{step}" / "unet") for step in range(100, 600, 100)]
    for halflife in (100, 200, 300, 400):
        average = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(2 ** (-100 / halflife)))
        for model in models:
            average.update_parameters(model)
        wanted = {name: tensor.double() for name, tensor in average.module.state_dict().items()}
        equal(here / "deep" / "out" / f"ema-halflife-{halflife}", wanted, atol=1e-6)  # torch's recursion is in float32
    assert "4 models: deep/out" in out
    assert sorted(p.name for p in (here / "deep" / "out").iterdir()) == [f"ema-halflife-{h}00" for h in range(1, 5)]


def test_windows_and_power_functions(here, lcsc, bank):
    ok(lcsc, f"bank={bank}", "schedule=wsm", "window=2,4", "to=wsm")
    shares = 1 - np.sqrt(np.arange(5) / 4)
    equal(here / "wsm" / "wsm-window-4", summed(nets(bank), [0, *-np.diff(shares)]))
    ok(lcsc, f"bank={bank}", "schedule=power_ema", "sigma_rel=0.05,0.10,...,0.20", "to=power", "start=100", "stop=400")
    names = [f"power_ema-sigma_rel-{s}" for s in ("0.05", "0.10", "0.15", "0.20")]
    assert sorted(p.name for p in (here / "power").iterdir()) == names
    recipe = read_recipe(here / "power" / names[1])
    assert recipe["steps"] == [100, 200, 400]
    assert recipe["schedule"] == {"name": "power_ema", "sigma_rel": 0.1}
    gamma = np.log(1 - recipe["coef"][-1]) / np.log(0.5) - 1  # the last coefficient is 1 - (200/400)^(gamma+1)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.1**2)


def read_recipe(folder):
    with safe_open(next(iter(sorted(folder.glob("*.safetensors")))), framework="pt") as file:
        return json.loads(file.metadata()["lcsc_recipe"])


COEF = [0.5, -1.25, 0.0, 2.0, -0.25]


@pytest.mark.parametrize("form", ["words", "list", "recipe", "table", "columns", "labels"])
def test_coefficients_from_words_json_and_csv(here, lcsc, bank, form):
    rows = [f"{step},{c},{int(step == 400)}" for step, c in zip(STEPS, COEF, strict=True)][::-1]  # any order
    texts = {
        "words": None,
        "list": ("c.json", json.dumps(COEF)),
        "recipe": ("c.json", json.dumps({"steps": STEPS, "coef": COEF})),
        "table": ("c.csv", "\n".join(["step,coef", *(row.rsplit(",", 1)[0] for row in rows)])),
        "columns": ("c.csv", "\n".join(["step,mine,one", *rows])),
        "labels": ("c.json", json.dumps({"mine": COEF, "one": [0, 0, 0, 1, 0]})),
    }
    if texts[form]:
        (here / texts[form][0]).write_text(texts[form][1])
    coef = texts[form][0] if texts[form] else ",".join(map(str, COEF))
    ok(lcsc, f"bank={bank}", "schedule=coefficients", f"coef={coef}", "to=out")
    several = form in ("columns", "labels")
    equal(here / "out" / "mine" if several else here / "out", summed(nets(bank), COEF), atol=3e-7)
    if several:  # one checkpoint alone is that checkpoint, to the last bit
        one, parent = load_file(here / "out" / "one" / WEIGHTS), load_file(bank / "checkpoint-400" / "unet" / WEIGHTS)
        assert all(one[name].numpy().tobytes() == parent[name].numpy().tobytes() for name in parent)


def test_the_table_it_writes_makes_the_same_model(here, lcsc, bank):
    ok(lcsc, f"bank={bank}", "schedule=ema", "halflife=333", "to=a")
    table = list(csv.DictReader((here / "a" / "coefficients.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in table] == list(STEPS)
    assert [float(row["coef"]) for row in table] == read_recipe(here / "a")["coef"]
    ok(lcsc, f"bank={bank}", "schedule=coefficients", "coef=a/coefficients.csv", "to=b")
    a, b = load_file(here / "a" / WEIGHTS), load_file(here / "b" / WEIGHTS)
    assert all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------- tracked EMAs


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 3)
        self.b = torch.nn.Linear(3, 2)


def free_sum(sigma_rel):
    """Sum of the library's own coefficients for the run below."""
    module = ema_pytorch.post_hoc_ema
    gammas = [module.sigma_rel_to_gamma(width) for width in (0.05, 0.1, sigma_rel)]
    steps = torch.arange(20, 201, 20)
    known = torch.tensor(gammas[:2]).repeat(10)
    coef = module.solve_weights(steps.repeat_interleave(2), known, torch.tensor([200]), torch.tensor(gammas[2:]))
    return float(coef.sum())


def test_post_hoc_ema_is_the_one_of_the_library_that_tracked_it(here, lcsc):
    torch.manual_seed(0)
    net = Tiny()
    tracker = ema_pytorch.PostHocEMA(
        net,
        sigma_rels=(0.05, 0.1),
        update_every=1,
        checkpoint_every_num_steps=20,
        checkpoint_folder=str(here / "tracked"),
        checkpoint_dtype=torch.float32,
    )
    for _ in range(200):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        tracker.update()
    emas = ["bank=tracked", "weights=ema:*"]
    out = ok(lcsc, *emas, "tracked=0.05,0.1", "schedule=power_ema", "sigma_rel=0.07,0.1,0.2", "to=out")
    assert "warning: sigma_rel 0.2 lies outside the tracked 0.05 to 0.1: it is extrapolated with sum|c|" in out
    for sigma_rel in ("0.07", "0.1", "0.2"):
        wanted = tracker.synthesize_ema_model(sigma_rel=float(sigma_rel)).ema_model.state_dict()
        folder = here / "out" / f"power_ema-sigma_rel-{sigma_rel}"
        off = abs(free_sum(float(sigma_rel)) - 1)  # theirs sum to one only nearly
        assert off < 0.02
        found = {name.removeprefix("ema_model."): t for name, t in load_file(folder / "model.safetensors").items()}
        for name, tensor in wanted.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=(1e-6 + off) * float(tensor.abs().max()), msg=name
            )
        recipe = read_recipe(folder)
        assert sum(recipe["coef"]) == pytest.approx(1, abs=1e-12)
        assert recipe["schedule"]["tracked"] == {"0": 0.05, "1": 0.1}
        assert ("warning" in recipe) == (sigma_rel == "0.2")
        assert lcsc("verify", str(folder))[0] == 0
    power = [*emas, "schedule=power_ema", "sigma_rel=0.07", "to=x"]
    refuse(lcsc, here, power, "the EMAs 0, 1 have no relative widths")
    refuse(lcsc, here, [*power, "tracked=0.05"], "`tracked` has 1 widths for the 2 EMAs 0, 1")
    refuse(lcsc, here, [*emas, "schedule=uniform", "to=x"], "schedule=uniform averages the checkpoints of one run")


# ------------------------------------------------------------------------------------------------------------ LoRA


@pytest.fixture
def adapters(here):
    """Three PEFT adapters of rank 2 on a tiny network, as peft saves them; returns their updates by module."""
    import peft  # late, because it takes seconds

    updates = []
    for step in (10, 20, 30):
        torch.manual_seed(step)
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["a", "b"], init_lora_weights=False)
        model = peft.get_peft_model(Tiny(), config)
        model.save_pretrained(here / "bank" / f"checkpoint-{step}")
        updates.append(deltas(model))
    return updates


@torch.no_grad()
def deltas(model):
    """The update of each module, by peft's own arithmetic."""
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in "ab"}
    return {name: layer.get_delta_weight("default").clone() for name, layer in layers.items()}


def applied(folder):
    """The updates of a folder, as peft reads them."""
    import peft

    return deltas(peft.PeftModel.from_pretrained(Tiny(), folder))


def test_lora_updates_are_combined_and_not_their_factors(here, lcsc, adapters):
    coef = [1.5, -2.0, 1.5]
    words = ["bank=bank", "schedule=coefficients", "coef=1.5,-2,1.5"]
    out = ok(lcsc, *words, "to=full", "rank=6")
    assert "recompressed to rank 6, which loses 0.00% of them on average" in out
    wanted = {n: sum(c * u[n].double() for c, u in zip(coef, adapters, strict=True)) for n in "ab"}
    for name, update in applied(here / "full").items():
        torch.testing.assert_close(update.double(), wanted[name], rtol=1e-5, atol=1e-6)
    ok(lcsc, *words, "to=own")
    for name, update in applied(here / "own").items():  # the best of rank 2: Eckart-Young
        left = torch.linalg.svdvals(wanted[name])[2:].norm()
        assert (update.double() - wanted[name]).norm() == pytest.approx(left.item(), rel=1e-4, abs=1e-6)
    ok(lcsc, "bank=bank", "schedule=uniform", "window=1,2", "to=sweep", "dtype=bfloat16")
    one = load_file(here / "sweep" / "uniform-window-1" / "adapter_model.safetensors")
    for name, tensor in load_file(here / "bank" / "checkpoint-30" / "adapter_model.safetensors").items():
        assert torch.equal(one[name], tensor.bfloat16())
    for folder in ("full", "own", "sweep"):
        assert lcsc("verify", folder)[0] == 0
    path = here / "own" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert "`own/adapter_model.safetensors`: `" in lcsc("verify", "own")[2]
    (here / "full" / "adapter_config.json").write_text("{}")
    assert "`full/adapter_config.json` is not the one that was written" in lcsc("verify", "full")[2]
    refuse(lcsc, here, [*words, "to=x", "rank=0"], "`rank` is 0; it must lie between 1 and")


# --------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_from_float32_and_its_price_is_said(here, lcsc, bank, dtype):
    ok(lcsc, f"bank={bank}", "schedule=uniform", "to=full")
    out = ok(lcsc, f"bank={bank}", "schedule=uniform", "to=half", f"dtype={dtype}")
    full, half = load_file(here / "full" / WEIGHTS), load_file(here / "half" / WEIGHTS)
    assert all(torch.equal(half[name], tensor.to(getattr(torch, dtype))) for name, tensor in full.items())
    last = nets(bank)[-1].state_dict()
    lost = sum(((half[n].double() - full[n].double()) ** 2).sum() for n in full) ** 0.5
    moved = sum(((full[n].double() - last[n].double()) ** 2).sum() for n in full) ** 0.5
    assert f"rounded to {dtype}: this costs {lost / moved:.2%} of the distance from the last checkpoint" in out


def test_the_parents_own_dtypes(here, lcsc):
    """float32, bfloat16, float16 and float64 side by side; and tensors that are copied from the last checkpoint."""
    (here / "bank").mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for step in (1, 2, 3):
        row = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in ("a", "b", "c", "d")}
        kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        row = {name: t.to(kind) for (name, t), kind in zip(row.items(), kinds, strict=True)}
        row |= {"bn.running_var": torch.full((2,), float(step)), "bn.num_batches_tracked": torch.tensor(step)}
        row["mask"] = torch.tensor([True, False, step == 3])
        save_file(row, here / "bank" / f"net-{step}.safetensors")
        rows.append(row)
    out = ok(lcsc, "bank=bank", "schedule=coefficients", "coef=2,-1.5,0.5", "to=out", "dtype=same")
    said = "3 tensors (such as `bn.running_var`) are copied from step 3, not averaged"
    assert out.splitlines().count(f"note: {said}") == 1
    assert f"\n{said}.\n" in (here / "out" / "README.md").read_text()
    with safe_open(here / "out" / "model.safetensors", "np") as handle:
        assert json.loads(handle.metadata()["lcsc_recipe"])["copied"] == said
    assert said in lcsc("bank", "scan", "bank")[1]
    found = load_file(here / "out" / "model.safetensors")
    for name in "abcd":
        wanted = sum(c * row[name].double() for c, row in zip((2, -1.5, 0.5), rows, strict=True)).float()
        assert found[name].dtype == rows[0][name].dtype
        torch.testing.assert_close(found[name], wanted.to(rows[0][name].dtype), rtol=0, atol=1e-6, msg=name)
    for name in ("bn.running_var", "bn.num_batches_tracked", "mask"):
        assert found[name].dtype == rows[2][name].dtype
        assert torch.equal(found[name], rows[2][name])
    assert not (here / "out" / "config.json").exists()
    assert lcsc("verify", "out")[0] == 0


def test_checkpoints_that_are_the_same_are_said(here, lcsc):
    (here / "bank").mkdir()
    for step in (1, 2, 3, 4):
        save_file({"w": torch.full((5,), float(step % 3))}, here / "bank" / f"net-{step}.safetensors")
    twins = "note: duplicates, steps with the same bits: 1 = 4"
    out = ok(lcsc, "bank=bank", "schedule=uniform", "window=2,4", "to=both")
    assert out.splitlines().count(twins) == 1
    assert "copied" not in out
    assert "duplicates" not in ok(lcsc, "bank=bank", "schedule=uniform", "window=3", "to=three")
    assert lcsc("bank", "pack", "from=bank", "to=packed.safetensors")[0] == 0
    assert twins in ok(lcsc, "bank=packed.safetensors", "schedule=uniform", "to=packed")


def test_shards_load_in_diffusers(here, lcsc, bank):
    ok(lcsc, f"bank={bank}", "schedule=uniform", "to=out", "max_shard_size=20KB")
    assert [p.name for p in sorted((here / "out").glob("*.safetensors"))] == [
        f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    equal(here / "out", summed(nets(bank), [0.2] * 5))


def gpt2(folder, steps, **how):
    """Tied embeddings, as transformers and plain torch save them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    models = []
    for step in steps:
        torch.manual_seed(step)
        model = GPT2LMHeadModel(config)
        if how.get("binary"):
            path = folder / f"checkpoint-{step}"
            path.mkdir(parents=True)
            torch.save(model.state_dict(), path / "pytorch_model.bin")
            model.config.save_pretrained(path)
            if "config" in how:
                text = json.loads((path / "config.json").read_text()) | how["config"]
                (path / "config.json").write_text(json.dumps(text))
        else:
            model.save_pretrained(folder / f"checkpoint-{step}")
        models.append(model)
    return models


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_load_it_tied(here, lcsc, binary, dtype, capsys):
    models = gpt2(here / "bank", (10, 20), binary=binary)
    capsys.readouterr()
    ok(lcsc, "bank=bank", "schedule=uniform", "to=out", "max_shard_size=1KB", f"dtype={dtype}")
    loaded = type(models[0]).from_pretrained(here / "out")
    assert loaded.dtype == getattr(torch, dtype)  # config.json says what was written
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    wanted = summed(models, [0.5, 0.5])
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), rtol=1e-6, atol=1e-7, msg=name)
    names = [name for file in (here / "out").glob("*.safetensors") for name in load_file(file)]
    assert ("lm_head.weight" in names) + ("transformer.wte.weight" in names) == 1
    config = json.loads((here / "out" / "config.json").read_text())
    parent = json.loads((here / "bank" / "checkpoint-20" / "config.json").read_text())
    assert config == parent | ({"dtype": dtype} if "dtype" in parent else {})
    assert (here / "out" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_ties_that_the_library_would_not_make_again_are_stored_twice(here, lcsc, capsys):
    models = gpt2(here / "bank", (10, 20), binary=True, config={"tie_word_embeddings": False})
    capsys.readouterr()
    ok(lcsc, "bank=bank", "schedule=uniform", "to=out")
    loaded = type(models[0]).from_pretrained(here / "out")
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    wanted = summed(models, [0.5, 0.5])["lm_head.weight"].float()
    for tensor in (loaded.lm_head.weight, loaded.transformer.wte.weight):
        torch.testing.assert_close(tensor.detach(), wanted, rtol=1e-6, atol=1e-7)
    assert lcsc("verify", "out")[0] == 0


def test_recipe_card_and_configuration(here, lcsc, bank):
    ok(lcsc, f"bank={bank}", "schedule=ema", "halflife=300", "to=out", "every=2")
    recipe = read_recipe(here / "out")
    assert recipe["steps"] == [50, 200, 1000]
    assert recipe["schedule"] == {"name": "ema", "halflife": 300.0}
    assert recipe["bank"]["path"] == str(bank)
    assert (recipe["kind"], recipe["rate"], recipe["dtype"]) == ("raw", None, "float32")
    parents = CheckpointBank.open(bank).parents
    assert recipe["parents"] == [dict(parent) for parent in parents if parent["step"] in recipe["steps"]]
    unet = bank / "checkpoint-1000" / "unet"
    assert (here / "out" / "config.json").read_bytes() == (unet / "config.json").read_bytes()
    card = ModelCard.load(here / "out" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.tags == ["lcsc", "merge"]
    for word in ("halflife 300", f"lcsc combine bank={bank}", recipe["parents"][0]["content"][:16], "not covered"):
        assert word in card.text


def test_a_packed_bank_makes_the_same_model(here, lcsc, bank):
    code, _, err = lcsc("bank", "pack", f"from={bank}", "to=pack.safetensors")
    assert code == 0, err
    ok(lcsc, f"bank={bank}", "schedule=ema", "halflife=300", "to=a")
    ok(lcsc, "bank=pack.safetensors", "schedule=ema", "halflife=300", "to=b")  # beside the pack is not inside the bank
    a, b = load_file(here / "a" / WEIGHTS), load_file(here / "b" / WEIGHTS)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_recipe(here / "a")["parents"] == read_recipe(here / "b")["parents"]
    assert json.loads((here / "b" / "config.json").read_text())["_class_name"] == "UNet2DModel"
    equal(here / "b", {name: tensor.double() for name, tensor in a.items()})
    assert lcsc("verify", "b")[0] == 0
    assert lcsc("verify", "a", "bank=pack.safetensors")[0] == 0  # the same contents in another file


def test_a_rounded_pack_is_not_what_a_model_was_made_of(here, lcsc, bank):
    ok(lcsc, f"bank={bank}", "schedule=uniform", "to=whole")
    assert lcsc("bank", "pack", f"from={bank}", "to=half.safetensors", "dtype=bfloat16")[0] == 0
    code, _, err = lcsc("verify", "whole", "bank=half.safetensors")
    assert code == 2
    assert "rounded to bfloat16 and `whole` was made of it as it was saved" in err
    assert "changed since" not in err
    ok(lcsc, "bank=half.safetensors", "schedule=uniform", "to=rounded")
    assert lcsc("verify", "rounded")[0] == 0
    assert (
        "as it was saved and `rounded` was made of it rounded to bfloat16"
        in lcsc("verify", "rounded", f"bank={bank}")[2]
    )
    code, _, err = lcsc("bank", "pack", f"from={bank}", f"to={bank}/more.safetensors")
    assert code == 2
    assert "inside the bank" in err


# -------------------------------------------------------------------------------------------------------- one pass


SMALL = """
import json, resource, sys
def rchar():
    return int(open("/proc/self/io").readline().split()[1])
from lcsc.cli.main import main
before = rchar()
code = main(sys.argv[1:])
print(json.dumps({"code": code, "read": rchar() - before, "torch": "torch" in sys.modules, "rss":
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def child(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-c", SMALL, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs the kernel's count of bytes read")
def test_twelve_outputs_read_the_files_once_without_torch_and_in_little_memory(here):
    (here / "bank").mkdir()
    size = 2_000_000
    for step in range(1, 9):
        save_file({"w": torch.full((size,), float(step))}, here / "bank" / f"net{step:03d}.safetensors")
    nbytes = 8 * size * 4
    one = child("combine", "bank=bank", "schedule=ema", "halflife=3", "to=one", cwd=here)
    halflives = "halflife=1,2,...,12"
    twelve = child("combine", "bank=bank", "schedule=ema", halflives, "to=twelve", "dtype=float16", cwd=here)
    assert one["code"] == twelve["code"] == 0
    assert not one["torch"]
    assert not twelve["torch"]
    assert one["read"] < 1.1 * nbytes + 30e6  # the rest is Python's own modules
    assert abs(twelve["read"] - one["read"]) < 0.05 * nbytes
    age = 2.0 ** -((8 - np.arange(1, 9)) / 5.0)
    coef_K = age * np.concatenate([[1], [1 - 2 ** (-1 / 5.0)] * 7])
    found = load_file(here / "twelve" / "ema-halflife-5" / "model.safetensors")["w"]
    assert found[0].item() == found[-1].item() == np.float16(np.float32(coef_K @ np.arange(1, 9)))


# --------------------------------------------------------------------------------------------------------- mistakes


BASE = ["bank=bank", "to=out"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["bank=bank"], "`to` is not set"),
        (BASE, "`schedule` is not set"),
        ([*BASE, "schedule=emma"], "no schedule named `emma`. Did you mean `ema`?"),
        ([*BASE, "schedule=ema"], "`halflife` is not set"),
        ([*BASE, "schedule=uniform", "halflife=3"], "`halflife` means nothing with schedule=uniform, which takes"),
        ([*BASE, "schedule=ema", "halflife=3", "tracked=0.1"], "`tracked` means nothing with schedule=ema"),
        ([*BASE, "schedule=power_ema", "sigma_rel=0.1", "tracked=0.1"], "`tracked` means nothing here"),
        ([*BASE, "schedule=coefficients", "window=3"], "`window` means nothing with schedule=coefficients"),
        ([*BASE, "schedule=ema", "halflife=3,x"], "`halflife` is `3,x`; write numbers such as"),
        ([*BASE, "schedule=ema", "halflife=0"], "`halflife` is 0.0; it must be above 0"),
        ([*BASE, "schedule=ema", "halflife=1e400"], "`halflife` is `1e400`"),
        ([*BASE, "schedule=ema", "halflife=3,3.0"], "holds a value twice"),
        ([*BASE, "schedule=power_ema", "sigma_rel=0.3"], "`sigma_rel` is 0.3; it must lie between 0 and 0.289"),
        ([*BASE, "schedule=uniform", "window=6"], "`window` is 6; it must lie between 1 and 5"),
        ([*BASE, "schedule=uniform", "window=2.5"], "`window` is 2.5; it counts checkpoints"),
        ([*BASE, "schedule=uniform", "dtype=int8"], "`dtype` is `int8`; it must be one of float32, bfloat16"),
        ([*BASE, "schedule=uniform", "max_shard_size=5XB"], "`max_shard_size` is `5XB`; write a size"),
        ([*BASE, "schedule=uniform", "rank=4"], "`rank` means nothing here"),
        ([*BASE, "schedule=uniform", "rank=four"], "`rank` is `four`"),
        ([*BASE, "schedule=uniform", "last=x"], "`last` is `x`; it must be a whole number"),
        ([*BASE, "schedule=uniform", "start=5000"], "no checkpoint left"),
        ([*BASE, "schedule=uniform", "shards=3"], "no setting named `shards`"),
        (
            [*BASE, "schedule=coefficients", "coef=0.5,0.5"],
            "`coef` has 2 coefficients for 5 checkpoints (steps 50 to 1000)",
        ),
        ([*BASE, "schedule=coefficients", "coef=1,1,1,1,1"], "sum to 5; they must be finite with sum 1"),
        ([*BASE, "schedule=coefficients", "coef=none.json"], "`none.json`, which is no file"),
        ([*BASE, "schedule=coefficients", "coef=bad.json"], "`bad.json` does not hold coefficients: JSONDecodeError"),
        ([*BASE, "schedule=coefficients", "coef=text.json"], "`a` is no finite number. The coefficients came from"),
        ([*BASE, "schedule=coefficients", "coef=steps.json"], "the steps are [1, 2], but the bank's are [50,"),
        (
            [*BASE, "schedule=coefficients", "coef=other.csv"],
            "has 2 rows for 5 checkpoints and differs from the bank at",
        ),
        ([*BASE, "schedule=coefficients", "coef=up.json"], "`../up` cannot name a folder"),
        (["bank=bank", "to=there", "schedule=uniform"], "output `there` exists already"),
        (["bank=bank", "to=bank/ema-100", "schedule=uniform"], "`to` is `bank/ema-100`, inside the bank"),
        (["bank=nowhere", "to=out", "schedule=uniform"], "nowhere"),
        ([*BASE, "schedule=uniform", "weights=ema"], "no `ema` weights"),
    ],
)
def test_mistakes_on_the_line(here, lcsc, bank, words, text):
    (here / "there").mkdir()
    (here / "bad.json").write_text("[1, 2")
    (here / "text.json").write_text('["a", 1, 2, 3, 4]')
    (here / "steps.json").write_text('{"steps": [1, 2], "coef": [0.5, 0.5]}')
    (here / "other.csv").write_text("step,coef\n50,0.5\n60,0.5\n")
    (here / "up.json").write_text('{"../up": [1, 0, 0, 0, 0]}')
    refuse(lcsc, here, words, text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3", ["3"]),
        ("0.05,0.10,...,0.25", ["0.05", "0.10", "0.15", "0.20", "0.25"]),
        ("1000, 2000, ..., 4000", ["1000", "2000", "3000", "4000"]),
        ("5,4,...,1", ["5", "4", "3", "2", "1"]),
        ("1,2,...,4,10", ["1", "2", "3", "4", "10"]),
        ("1,2,...,3", ["1", "2", "3"]),
        ("1e3,2e3", ["1000", "2000"]),
    ],
)
def test_numbers_and_ranges(text, wanted):
    found = read_numbers(text, "halflife")
    assert [name for name, _ in found] == wanted
    assert [value for _, value in found] == [float(name) for name in wanted]


@pytest.mark.parametrize(
    "text", ["1,2,...", "...,3", "1,...,3", "1,2,...,...,5", "1,2,...,4.5", "1,2,...,2", "1,1,...,5", "2,1,...,5", ""]
)
def test_ranges_that_are_none(text):
    with pytest.raises(ConfigError, match="`halflife` is"):
        read_numbers(text, "halflife")


def test_range_of_too_many_models():
    with pytest.raises(ConfigError, match="in 1 to 256 steps"):
        read_numbers("1,2,...,1000000000", "window")
    with pytest.raises(ConfigError, match="at most 256 models"):
        read_numbers(",".join(map(str, range(300))), "window")


@pytest.mark.parametrize("halflife", ["300", "100,200"])
def test_a_bad_checkpoint_leaves_nothing_behind(here, lcsc, bank, halflife):
    path = bank / "checkpoint-200" / "unet" / WEIGHTS
    tensors = load_file(path)
    tensors["conv_out.weight"].view(-1)[:3] = float("nan")
    save_file(tensors, path)
    words = [f"bank={bank}", "schedule=ema", f"halflife={halflife}", "to=out"]
    refuse(lcsc, here, words, "holds 3 NaN or Inf in `conv_out.weight`")
    assert not (here / "out").exists()
    # the rest can be used
    ok(lcsc, f"bank={bank}", "schedule=uniform", "to=out", "start=400")
    equal(here / "out", summed(nets(bank)[3:], [0.5, 0.5]))


def test_overflow_in_half_precision_leaves_nothing_behind(here, lcsc):
    (here / "bank").mkdir()
    for step, value in ((1, 40000.0), (2, 10000.0)):
        save_file({"w": torch.full((3,), value), "v": torch.zeros(2)}, here / "bank" / f"m{step}.safetensors")
    words = ["bank=bank", "schedule=coefficients", "coef=3,-2", "dtype=float16", "to=out"]
    refuse(lcsc, here, words, "`w` reaches 100000, too large for float16. Write it with dtype=float32")


def test_a_disk_without_room_is_noticed_before_anything_is_written(here, lcsc):
    """Checkpoints of 4 TB each that take no room, because they are holes."""
    (here / "bank").mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    for step in (1, 2):
        with open(here / "bank" / f"m{step}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 4 * 10**12)
    refuse(lcsc, here, ["bank=bank", "schedule=uniform", "to=out"], "`out` needs 4000000000000 bytes and its disk has")


def test_inputs_are_not_touched(here, lcsc, bank):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in bank.rglob("*") if p.is_file()}
    ok(lcsc, f"bank={bank}", "schedule=ema", "halflife=100,200", "to=out")
    assert lcsc("verify", "out")[0] == 0
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in bank.rglob("*") if p.is_file()} == before
    names = [name.split("/")[-1] for name in written(here / "out")]
    assert sorted(set(names)) == sorted(
        {"README.md", "coefficients.csv", "config.json", WEIGHTS, "ema-halflife-100", "ema-halflife-200"}
    )
    assert not [name for name in written(here) if name.endswith(".tmp")]
    assert all(itertools.starmap(lambda _, text: text, before.values()))


# ------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_format_dcp(here, lcsc, bank):
    out = ok(lcsc, f"bank={bank}", "schedule=uniform", "window=3,5", "to=out", "format=dcp")
    ok(lcsc, f"bank={bank}", "schedule=uniform", "window=3,5", "to=plain")
    for name in ("uniform-window-3", "uniform-window-5"):
        wanted = load_file(here / "plain" / name / WEIGHTS)
        found = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
        torch.distributed.checkpoint.load(found, checkpoint_id=here / "out" / name, no_dist=True)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
        files = (".metadata", "__0_0.distcp", "coefficients.csv", "config.json", "recipe.json")
        assert sorted(path.name for path in (here / "out" / name).iterdir()) == sorted(files)
        assert (here / "out" / name / "config.json").read_bytes() == (
            here / "plain" / name / "config.json"
        ).read_bytes()
        schedule = json.loads((here / "out" / name / "recipe.json").read_text())["schedule"]
        assert schedule == {"name": "uniform", "window": int(name[-1])}
    assert "2 models: out (" in out
    before = [f"bank={bank}", "schedule=uniform", "to=more"]
    refuse(lcsc, here, [*before, "format=dpc"], "no format named `dpc`. Did you mean `dcp`?")
    refuse(lcsc, here, [*before, "format=dcp", "max_shard_size=5GB"], "`max_shard_size` means nothing with format=dcp")
    refuse(lcsc, here, [*before, "format=dcp", "rank=2"], "`rank` means nothing with format=dcp")


def test_processes_that_do_not_find_each_other(here, lcsc, bank, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [f"bank={bank}", "schedule=uniform", "to=out", "format=dcp"]
    refuse(lcsc, here, words, "WORLD_SIZE is `2`, but the processes do not find each other: Error initializing")


def combine_in_rank(rank, bank, to):
    from lcsc.cli.main import main

    with open(to.parent / f"said{rank}", "w") as file, contextlib.redirect_stdout(file):
        assert main(["combine", f"bank={bank}", "schedule=uniform", f"to={to}", "format=dcp"]) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_processes_make_one_folder_and_one_speaks(here, lcsc, bank):
    ok(lcsc, f"bank={bank}", "schedule=uniform", "to=plain")
    run_ranks(2, here, combine_in_rank, bank, here / "out")
    said = [(here / f"said{rank}").read_text() for rank in range(2)]
    assert [line.partition(":")[0] for line in said[0].splitlines()] == ["bank", "uniform-window-5", "model"]
    assert said[1] == ""
    assert len(list((here / "out").glob("*.distcp"))) == 2
    wanted = load_file(here / "plain" / WEIGHTS)
    found = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    torch.distributed.checkpoint.load(found, checkpoint_id=here / "out", no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
