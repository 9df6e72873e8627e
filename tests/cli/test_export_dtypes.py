"""A search's winner written in the dtypes of its checkpoint: bfloat16 in, bfloat16 out, verified, and scored again."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_text import CONFIG, language_bank
from safetensors import safe_open
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.export.model import export_in_dtypes

ARCH = {"class": "LlamaForCausalLM", "config": {**CONFIG, "num_key_value_heads": 4}}
SEARCH = [
    *("operator=gqa", "objective=language_modeling", "dataset=text", "searcher=random", "name=small"),
    *("bank.path=bank", "objective.block_length=32", "search.num_trials=3", "search.num_images=8", "run_dir=run"),
    *("search.num_finalists=2", "search.num_images_select=8", "search.num_images_report=8"),
]


def test_the_winner_keeps_the_checkpoints_dtype(here, lcsc):
    language_bank(here / "bank", ARCH, dtype=torch.bfloat16)
    code, _, err = lcsc("search", *SEARCH)
    assert code == 0, err
    code, out, err = lcsc("export", "run=run", "to=plain")
    assert code == 0, err
    code, out, err = lcsc("export", "run=run", "to=out", "dtype=same")
    assert code == 0, err
    assert "from the run's, which had float32 weights)" in out

    (plain,), (file,) = ((here / name).glob("*.safetensors") for name in ("plain", "out"))
    exact, kept = load_file(plain), load_file(file)
    assert {t.dtype for t in exact.values()} == {torch.float32}
    assert set(kept) == set(exact)
    for name, tensor in kept.items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name

    with safe_open(file, framework="pt") as handle:
        recipe = json.loads(handle.metadata()["lcsc_recipe"])
    records = [json.loads(line) for line in (here / "run" / "journal.jsonl").read_text().splitlines()]
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    assert recipe["score"]["value"] == best["value"]
    operator = build("operator", "gqa")
    point = {name: torch.tensor(floats).double().numpy() for name, floats in recipe["point"].items()}
    assert operator.plan(CheckpointBank.open(here / "bank"), point).recipe["num_kv_heads"] == recipe["num_kv_heads"]
    card = (here / "out" / "README.md").read_text()
    assert f"where it scored {best['value']:.6g} ± " in card
    code, out, err = lcsc("verify", "out")
    assert code == 0, err

    for words, sentence in [
        (["dtype=half"], "`dtype` is `half`; it must be float32"),
        (["dtype=same", "format=safetensors"], "`dtype` is `same` and `format` is `safetensors`"),
    ]:
        code, _, err = lcsc("export", "run=run", "to=no", *words)
        assert code == 2
        assert sentence in err
        assert not (here / "no").exists()


def test_a_combination_has_no_such_form(tmp_path):
    linear = build("operator", "linear")
    nothing = dict.fromkeys(("bank", "objective", "seed", "point", "expected", "info"))
    with pytest.raises(ConfigError, match="the winner combines checkpoints"):
        export_in_dtypes(operator=linear, to=tmp_path / "out", **nothing)
    assert not (tmp_path / "out").exists()
