"""Searches over LoRA adapters, from PEFT's folders to a verified export that PEFT loads."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lcsc as package
from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.export.folder import bank_config
from lcsc.export.lora import write_candidate
from lcsc.export.verify import verify
from lcsc.export.weights import read_recipe
from lcsc.operators.lora import FACTOR_SPACE, Lora

SCORER = '''
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

torch.manual_seed(0)
BASE = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))
MODEL = get_peft_model(BASE, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], modules_to_save=["2"]))
X, WANTED = torch.randn(30, 6), torch.randn(30, 2)


def loss(adapter, *, seed, purpose, images):
    """The loss of the base model with the adapter on it, as PEFT puts it there."""
    assert not set_peft_model_state_dict(MODEL, adapter).unexpected_keys
    return error()


def error():
    with torch.no_grad():
        return float((MODEL(X) - WANTED).square().mean())
'''
#: a sum of the settings' and the weights' bytes
SUMS = "cat {path}/adapter_config.json {path}/adapter_model.safetensors | cksum | cut -c 1-6"


@pytest.fixture
def scorer(here, monkeypatch):
    """Four adapters that PEFT saved, of a tiny model with one layer trained in full; the module that scores them."""
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "path", [*sys.path, str(here)])
    (here / "lora_scorer.py").write_text(SCORER)
    import lora_scorer

    for step in (10, 20, 30, 40):
        with torch.no_grad():
            for parameter in lora_scorer.MODEL.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
        lora_scorer.MODEL.save_pretrained(here / "bank" / f"checkpoint-{step}")
    yield lora_scorer
    del sys.modules["lora_scorer"]


def searched(objective, **operator):
    """A search of a few trials; its folder."""
    problem = package.Problem(
        CheckpointBank.open("bank"),
        build("operator", "lora", **operator),
        build("searcher", "cma"),
        objective,
        package.Budget(num_trials=3, num_images=4, num_images_select=4, num_images_report=4, num_finalists=1),
        seed=0,
    )
    return package.run_search(problem, name="x", quiet=True)


@pytest.mark.filterwarnings("ignore:.*adapter keys.*:UserWarning")
@pytest.mark.parametrize("operator", [{}, {"factors": True}], ids=["kept", "factors"])
def test_a_function_scores_adapters_and_the_export_is_verified(here, lcsc, scorer, operator):
    path = searched(build("objective", "function", function="lora_scorer:loss", device="cpu"), **operator)
    best = json.loads((path / "summary.json").read_text())["report"]["best"]["value"]
    config = json.loads((path / "best" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    scorer.MODEL.load_adapter(path / "best", "found")  # as a user loads it
    scorer.MODEL.set_adapter("found")
    assert scorer.error() == pytest.approx(best, rel=1e-6)
    card = (path / "best" / "README.md").read_text()
    assert "library_name: peft" in card
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in card
    code, out, err = lcsc("verify", str(path / "best"))
    assert code == 0, err
    assert "bit for bit from 4 checkpoints" in out
    file = path / "best" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is not what the recipe gives" in lcsc("verify", str(path / "best"))[2]


def test_a_command_gets_an_adapter_as_the_library_keeps_it(here, lcsc, scorer):
    path = searched(build("objective", "command", command=SUMS))
    code, _, err = lcsc("export", f"run={path}", "to=out", "trust=true")  # built again from the run's own configuration
    assert code == 0, err
    for folder in (path / "best", here / "out"):
        assert {file.name for file in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }
        code, _, err = lcsc("verify", str(folder))
        assert code == 0, err
    code, _, err = lcsc("export", f"run={path}", "to=other", "format=safetensors", "trust=true")
    assert code == 2
    assert "`format` is `safetensors` and `max_shard_size` is `5GB`, but an adapter is one file" in err
    assert not (here / "other").exists()


def test_objectives_that_need_a_network_say_so(here, scorer):
    bank, lora = CheckpointBank.open("bank"), Lora()
    candidate = lora.apply(bank, lora.baselines(bank)[0].point)
    loss = build("objective", "denoising_loss", model=build("model", "direct"), dataset=build("dataset", "digits"))
    with pytest.raises(ConfigError, match=r"an adapter is no network.*with objective=function or objective=command"):
        loss(candidate, seed=0, purpose=Purpose.SEARCH, images=range(2))


# ------------------------------------------------------------------------------------------------------- same bits


def kohya(folder, alpha):
    """Four files in kohya's names with a head that was trained in full."""
    folder.mkdir()
    for step in range(1, 5):
        rng = torch.Generator().manual_seed(step)
        state = {"head.weight": torch.randn(300, 40, generator=rng)}
        for m in "ab":
            state[f"lora_unet_{m}.lora_down.weight"] = torch.randn(2, 64, generator=rng)
            state[f"lora_unet_{m}.lora_up.weight"] = torch.randn(48, 2, generator=rng)
            if alpha is not None:
                state[f"lora_unet_{m}.alpha"] = torch.tensor(4, dtype=alpha)
        save_file(state, folder / f"style-step{step:08d}.safetensors")
    return folder


@pytest.mark.parametrize("alpha", [None, torch.float32, torch.int64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", [Lora(), Lora(rank=8), Lora(factors=True)], ids=["kept", "rank", "factors"])
def test_what_a_search_scores_is_what_verify_makes(tmp_path, operator, dtype, alpha):
    bank = CheckpointBank.open(kohya(tmp_path / "bank", alpha), dtype=dtype, storage="resident")
    candidate = operator.apply(bank, operator.point(bank, np.array([1.7, -1.1234567, 0.3, 0.1234567])))
    recipe = {**candidate.recipe, "bank": bank_config(bank), "parents": [dict(parent) for parent in bank.parents]}
    (tmp_path / "out").mkdir()
    write_candidate(tmp_path / "out", bank, recipe)
    written = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    weights = candidate.weights()
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    (checked,) = verify(tmp_path / "out")
    assert (checked.num_tensors, checked.num_parents) == (5 if alpha is None else 7, 4)


def test_alphas_made_for_another_rank_are_not_called_copied(here, lcsc):
    kohya(here / "bank", torch.int64)
    for file in (here / "bank").iterdir():
        save_file({**load_file(file), "head.count": torch.tensor(7)}, file)
    three = "3 tensors (such as `head.count`) are copied from step 4, not averaged"
    one = "1 tensor (`head.count`) is copied from step 4, not averaged"
    for words, said, other in (([], three, one), (["rank=3"], one, three)):
        to = f"out{len(words)}"
        code, out, err = lcsc("combine", "bank=bank", "schedule=uniform", f"to={to}", *words)
        assert code == 0, err
        assert read_recipe(here / to)["copied"] == said
        for text in (out, (here / to / "README.md").read_text()):
            assert said in text
            assert other not in text
        assert lcsc("verify", to)[0] == 0
    best = searched(build("objective", "command", command="cat {path}/* | cksum | cut -c 1-6"), rank=3) / "best"
    assert read_recipe(best)["copied"] == one
    assert f"\n{one}.\n" in (best / "README.md").read_text()


@pytest.mark.parametrize(
    "edit", [{"space": "some other space"}, {"space": FACTOR_SPACE, "rank": 2}], ids=["unknown", "rank of factors"]
)
def test_recipes_of_strangers_with_other_spaces(here, lcsc, edit):
    kohya(here / "bank", None)
    recipe = {"operator": "lora", "steps": [1], "coef": [1.0], "parents": [], "bank": {"path": "bank"}, **edit}
    (here / "out").mkdir()
    metadata = {"format": "pt", "lcsc_recipe": json.dumps(recipe)}
    save_file({"a": torch.zeros(5)}, here / "out" / "x.safetensors", metadata=metadata)
    code, _, err = lcsc("verify", "out")
    assert code == 2
    assert "is none that lcsc writes. It was edited." in err
