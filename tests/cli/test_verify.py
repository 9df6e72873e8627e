"""`lcsc verify`: what was written is made again; any edit is found and named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcsc.bank import CheckpointBank
from lcsc.export.folder import bank_config
from lcsc.export.weights import write_weights
from lcsc.operators.linear import Linear

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def tiny_bank(here, saved):
    """A copy of them."""
    return shutil.copytree(saved, here / "bank")


@pytest.fixture
def plain(here):
    """Three checkpoints of a network of a few numbers, with a tensor that is copied and one that is tied."""
    (here / "bank").mkdir()
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        tied = torch.randn(3, 2, generator=generator)
        row = {"a": torch.randn(5, generator=generator), "b": tied, "z": tied, "n": torch.tensor(step)}
        torch.save(row, here / "bank" / f"model{step:06d}.pt")
    return here / "bank"


def make(lcsc, bank, *words):
    code, _, err = lcsc("combine", f"bank={bank}", *words)
    assert code == 0, err


def fails(lcsc, *words):
    """The one sentence of a verification that must fail."""
    code, out, err = lcsc("verify", *words)
    assert code == 2, out
    assert err.startswith("lcsc: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def passes(lcsc, *words):
    code, out, err = lcsc("verify", *words)
    assert code == 0, err
    return out


def test_one_model_and_several(here, lcsc, tiny_bank):
    make(lcsc, tiny_bank, "schedule=ema", "halflife=100,200", "to=sweep", "max_shard_size=20KB")
    make(lcsc, tiny_bank, "schedule=uniform", "to=one", "dtype=bfloat16")
    out = passes(lcsc, "sweep")
    for halflife in (100, 200):
        assert f"verified: sweep/ema-halflife-{halflife} (64 tensors" in out
    assert f"bit for bit from 5 checkpoints of {tiny_bank})" in passes(lcsc, "sweep/ema-halflife-200")
    assert "verified: one (64 tensors" in passes(lcsc, "one")


def test_every_byte_counts(here, lcsc, plain):
    """Bits are flipped all over every file but README.md: header, recipe, numbers, index, table."""
    make(lcsc, plain, "schedule=coefficients", "coef=2,-1.5,0.5", "to=out", "max_shard_size=24")
    files = [p for p in sorted((here / "out").iterdir()) if p.name != "README.md"]
    assert [p.suffix for p in files] == [".csv", *[".safetensors"] * 4, ".json"]
    tried = 0
    for file in files:
        whole = file.read_bytes()
        length = int.from_bytes(whole[:8], "little") + 8 if file.suffix == ".safetensors" else len(whole)
        places = {*range(0, length, 23), *range(length, len(whole)), 8, length - 1}
        for i in sorted(places):
            data = bytearray(whole)
            data[i] ^= 1 << (i % 7)
            file.write_bytes(data)
            said = fails(lcsc, "out")
            assert i < length or f"`{file.relative_to(here)}`: `" in said, (file, i, said)
            tried += 1
        file.write_bytes(whole)
    assert tried > 250
    passes(lcsc, "out")


def test_an_edited_number_names_file_and_tensor(here, lcsc, plain):
    make(lcsc, plain, "schedule=uniform", "to=out")
    path = here / "out" / "model.safetensors"
    whole = path.read_bytes()
    start = int.from_bytes(whole[:8], "little") + 8
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    assert set(tensors) == {"a", "b", "z", "n"}  # nothing ties plain tensors again, so both names are stored
    # int64 first, then float32 by name
    for name, offset in {"n": 0, "a": 8, "b": 8 + 20, "z": 8 + 20 + 24}.items():
        data = bytearray(whole)
        data[start + offset + 3] ^= 0x40
        path.write_bytes(data)
        edited = load_file(path)
        assert [key for key in tensors if not torch.equal(edited[key], tensors[key])] == [name]
        assert f"`out/model.safetensors`: `{name}` is not what the recipe gives" in fails(lcsc, "out")


@pytest.mark.parametrize("blank", [b"\n", b"\t", b"\r"])
def test_blanks_of_the_header_are_not_free(here, lcsc, plain, blank):
    """JSON allows other blanks than the spaces that fill the header; the library reads them."""
    make(lcsc, plain, "schedule=uniform", "to=out")
    path = here / "out" / "model.safetensors"
    whole = path.read_bytes()
    end = int.from_bytes(whole[:8], "little") + 8
    assert whole[end - 1 : end] == b" "
    path.write_bytes(whole[: end - 1] + blank + whole[end:])
    assert set(load_file(path)) == {"a", "b", "z", "n"}
    assert "the header of `out/model.safetensors` was edited" in fails(lcsc, "out")


def rewrite(path, change, metadata=None):
    """The library's own writer, with changed tensors or metadata."""
    from safetensors import safe_open

    tensors = load_file(path)
    change(tensors)
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    if metadata:
        metadata(found)
    save_file(tensors, path, metadata=found)


def edited_recipe(**new):
    def change(metadata):
        metadata["lcsc_recipe"] = json.dumps(json.loads(metadata["lcsc_recipe"]) | new)

    return change


@pytest.mark.parametrize(
    ("change", "metadata", "text"),
    [
        (lambda t: t.pop("a"), None, "`a` is absent, but the recipe gives float32 of shape (5,)"),
        (lambda t: t.update(c=torch.zeros(2)), None, "`c` is float32 of shape (2,), but the recipe gives absent"),
        (lambda t: t.update(a=t["a"].double()), None, "`a` is float64 of shape (5,), but the recipe gives float32"),
        (lambda t: t.update(b=t["b"].view(2, 3)), None, "`b` is float32 of shape (2, 3), but the recipe gives"),
        (
            lambda t: None,
            edited_recipe(coef=[1, 0, 0]),
            "the recipe in the header of `out/model.safetensors` was edited",
        ),
        (
            lambda t: None,
            lambda m: m.update(note="x"),
            "the header of `out/model.safetensors` was edited: ('note', 'x')",
        ),
        (lambda t: None, lambda m: m.pop("lcsc_recipe_sha256"), "was edited: its digest is another"),
        (lambda t: None, lambda m: m.pop("lcsc_recipe"), "has no recipe in its header"),
        (lambda t: t.pop("z"), None, "was edited: ('z', 'b')"),
    ],
)
def test_a_file_written_anew(here, lcsc, plain, change, metadata, text):
    make(lcsc, plain, "schedule=uniform", "to=out")
    rewrite(here / "out" / "model.safetensors", lambda t: None)
    passes(lcsc, "out")  # the same content in the library's own spelling is the same model
    rewrite(here / "out" / "model.safetensors", change, metadata)
    assert text in fails(lcsc, "out")


@pytest.mark.parametrize("name", ["config.json", "coefficients.csv"])
def test_texts_that_follow_from_the_recipe(here, lcsc, tiny_bank, name):
    make(lcsc, tiny_bank, "schedule=uniform", "to=out")
    path = here / "out" / name
    path.write_text(path.read_text() + " ")
    assert f"`out/{name}` is not" in fails(lcsc, "out")
    path.unlink()
    assert f"`out/{name}` is not" in fails(lcsc, "out")


def test_the_model_card_is_not_covered(here, lcsc, tiny_bank):
    make(lcsc, tiny_bank, "schedule=uniform", "to=out")
    (here / "out" / "README.md").write_text("mine")
    passes(lcsc, "out")


# ---------------------------------------------------------------------------------------------------------- parents


def test_a_parent_that_changed_is_named(here, lcsc, tiny_bank):
    make(lcsc, tiny_bank, "schedule=coefficients", "coef=0,0.5,0.25,0.25,0", "to=out")
    path = tiny_bank / "checkpoint-200" / "unet" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "the checkpoint of step 200, `" in fails(lcsc, "out")
    assert "changed since `out` was made of it" in fails(lcsc, "out")
    path.write_bytes(whole)
    passes(lcsc, "out")
    # checkpoints that were not used may change, go, or come
    shutil.rmtree(tiny_bank / "checkpoint-1000")
    shutil.rmtree(tiny_bank / "checkpoint-50")
    passes(lcsc, "out")
    shutil.copytree(tiny_bank / "checkpoint-200", tiny_bank / "checkpoint-300")
    passes(lcsc, "out")
    shutil.rmtree(tiny_bank / "checkpoint-400")
    assert "`out` was made of step 400, which is not in `" in fails(lcsc, "out")


def test_later_checkpoints_change_nothing(here, lcsc, tiny_bank):
    make(lcsc, tiny_bank, "schedule=uniform", "last=2", "to=out")
    shutil.copytree(tiny_bank / "checkpoint-50", tiny_bank / "checkpoint-2000")
    passes(lcsc, "out")


def test_a_parent_in_another_format_with_the_same_content(here, lcsc, plain):
    make(lcsc, plain, "schedule=uniform", "to=out")
    row = torch.load(plain / "model000002.pt", weights_only=True)
    torch.save(row, plain / "model000002.pt", pickle_protocol=4)
    passes(lcsc, "out")


def test_a_bank_that_moved(here, lcsc, tiny_bank):
    make(lcsc, tiny_bank, "schedule=uniform", "to=out")
    tiny_bank.rename(here / "elsewhere")
    assert str(tiny_bank) in fails(lcsc, "out")
    assert f"checkpoints of {'elsewhere'})" in passes(lcsc, "out", "bank=elsewhere")


def test_what_a_search_exports_is_verified_too(here, lcsc, tiny_bank):
    bank = CheckpointBank.open(tiny_bank)
    operator = Linear()
    candidate = operator.apply(bank, {"z": np.array([1.0, -2.0, 0.5, 3.0])})
    recipe = {**candidate.recipe, "parents": [dict(parent) for parent in bank.parents], "run_id": "r"}
    (here / "out").mkdir()
    write_weights(candidate.weights(), candidate.arch, recipe, here / "out", max_shard_size="20KB")
    assert "does not say where its checkpoints are. Add bank=PATH" in fails(lcsc, "out")
    passes(lcsc, "out", f"bank={tiny_bank}")
    file = sorted((here / "out").glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    assert f"`{file.relative_to(here)}`: `" in fails(lcsc, "out", f"bank={tiny_bank}")


# ------------------------------------------------------------------------------------------------ the recipe's steps


def row(step):
    """The one tensor of a checkpoint."""
    return {"w": torch.randn(200, generator=torch.Generator().manual_seed(step))}


@pytest.mark.parametrize("words", [["every=2"], ["last=3", "every=2"], ["start=1", "every=2"]])
def test_checkpoints_that_the_recipe_does_not_take_may_come_and_go(here, lcsc, words):
    (here / "bank").mkdir()
    for step in range(1, 6):
        save_file(row(step), here / "bank" / f"m{step}.safetensors")
    make(lcsc, "bank", "schedule=uniform", "to=out", *words)
    (here / "bank" / "m4.safetensors").unlink()
    assert "from 3 checkpoints" in passes(lcsc, "out")
    save_file({"w": torch.zeros(7)}, here / "bank" / "m2.safetensors")  # not even of the same network
    passes(lcsc, "out")
    (here / "bank" / "m3.safetensors").unlink()
    assert "was made of step 3, which is not in" in fails(lcsc, "out")
    for step in (1, 5):
        (here / "bank" / f"m{step}.safetensors").unlink()
    assert "the recipe takes steps [1, 3, 5], and there are only steps 2 to 2" in fails(lcsc, "out")


@pytest.mark.parametrize("change", [None, "old", "wrong", "lost"])
def test_an_export_of_a_delta_bank_after_more_checkpoints(here, lcsc, change):
    """Rows are differences to the middle one; with one more checkpoint there another one would be in the middle."""
    (here / "bank").mkdir()
    for step in (10, 20, 30, 40):
        save_file(row(step), here / "bank" / f"m{step}.safetensors")
    bank = CheckpointBank.open("bank", storage="delta")
    theta_P = bank.combine(torch.tensor([0.5, -1.0, 1.5, 0.0], dtype=torch.float64))
    recipe = {"operator": "linear", "steps": [10, 20, 30, 40], "coef": [0.5, -1.0, 1.5, 0.0]}
    recipe |= {"bank": bank_config(bank), "parents": [dict(bank.parent(k)) for k in range(2)]}
    assert recipe["bank"]["anchor"] == 30
    if change == "old":
        del recipe["bank"]["anchor"]
    elif change == "wrong":
        recipe["bank"]["anchor"] = 20
    elif change == "lost":
        recipe |= {"coef": [0.5, 0.5, 0.0, 0.0]}
        (here / "bank" / "m30.safetensors").unlink()
    (here / "out").mkdir()
    write_weights(bank.layout.views(theta_P), None, recipe, here / "out")
    for step in (25, 45):
        save_file(row(step), here / "bank" / f"m{step}.safetensors")
    if change == "wrong":
        assert "`w` is not what the recipe gives" in fails(lcsc, "out")
    elif change == "lost":
        assert "the recipe keeps differences to step 30, which is not in" in fails(lcsc, "out")
    else:
        passes(lcsc, "out")


# --------------------------------------------------------------------------------------------------------- mistakes


def test_folders_that_are_no_export(here, lcsc, tiny_bank):
    (here / "empty").mkdir()
    assert "`empty` holds no safetensors file" in fails(lcsc, "empty")
    assert "`nowhere` holds no safetensors file" in fails(lcsc, "nowhere")
    assert "no model is named" in fails(lcsc)
    assert "given twice" in fails(lcsc, "a", "b")
    assert "has no recipe in its header" in fails(lcsc, str(tiny_bank / "checkpoint-50" / "unet"))
    make(lcsc, tiny_bank, "schedule=uniform", "to=out")
    shutil.copy(tiny_bank / "checkpoint-50" / "unet" / WEIGHTS, here / "out" / "other.safetensors")
    assert "the headers of" in fails(lcsc, "out")


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"operator": "linear"},
        {"operator": "moe"},
        {"operator": "linear", "steps": [1], "coef": ["x"], "parents": []},
        {"operator": "linear", "steps": [1], "coef": [1.0], "parents": [{"step": []}]},
        {"operator": "linear", "steps": [1], "coef": [1.0], "parents": [7]},
        {"operator": "linear", "steps": [1], "coef": [1.0], "parents": [], "bank": {"path": 5}},
        {"operator": "linear", "steps": [1], "coef": [1.0], "parents": [], "bank": {"path": "bank", "start": "x"}},
        {"operator": "linear", "steps": [1], "coef": [1.0], "parents": [], "rates": [{}], "bank": {"path": "bank"}},
        {"operator": "linear", "steps": [7], "coef": [1.0], "parents": [], "bank": {"path": "bank"}},
        {"operator": "linear", "steps": [1], "coef": [1.0], "parents": [], "bank": {"path": "bank", "anchor": []}},
        {"operator": "linear", "steps": [1], "coef": [1.0], "dtype": [], "parents": [], "bank": {"path": "bank"}},
    ],
)
def test_recipes_of_strangers(here, lcsc, plain, recipe):
    (here / "out").mkdir()
    save_file({"a": torch.zeros(5)}, here / "out" / "x.safetensors", metadata={"lcsc_recipe": json.dumps(recipe)})
    fails(lcsc, "out")
    save_file({"a": torch.zeros(5)}, here / "out" / "x.safetensors", metadata={"lcsc_recipe": "[" * 100_000})
    fails(lcsc, "out")
