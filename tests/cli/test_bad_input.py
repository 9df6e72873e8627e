"""Every mistake: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers_cli import TOY
from safetensors.torch import load_file, save_file

from lcsc.cli.search import idle_settings
from lcsc.config.hydra_app import compose_config, overridden
from lcsc.config.schema import SEARCH_SECTIONS
from lcsc.search.setup import build_parts

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIGITS = ["experiment=digits", "search.num_trials=2", "quiet=true"]


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refuse(lcsc, here, words, text):
    """Run `words`; it must exit 2 with `text` in one line and leave the folder as it was."""
    before = written(here)
    code, out, err = lcsc(*words)
    assert code == 2, (code, out, err)
    assert err.startswith("lcsc: ")
    assert err.count("\n") == 1, err
    assert text in err
    assert "Traceback" not in err
    assert written(here) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["serach"], "no verb named `serach`. Did you mean `search`?"),
        (["search", *TOY, "searcher=cmma"], "no searcher named `cmma`. Did you mean `cma`?"),
        (["search", "-m", *TOY, "searcher=cma,cmma"], "no searcher named `cmma`. Did you mean `cma`?"),
        (["search", "experiment=digit"], "no experiment named `digit`. Did you mean `digits`?"),
        (
            ["search", *TOY, "search.num_trails=3"],
            "no setting named `search.num_trails`. Did you mean `search.num_trials`?",
        ),
        (["search", *TOY, "searcher.sigma=3"], "no setting named `searcher.sigma`. Did you mean `searcher.sigma0`?"),
        (["search", *TOY, "metric=null"], "`metric` is null, but a search needs one. Leave the setting out, or choose"),
        (["search", *TOY, "search.num_trials=many"], "`search.num_trials`"),
        (["search", *TOY, "search.num_trials=0"], "`search.num_trials` is 0; it must be at least 1"),
        (["search", *TOY, "seed=-1"], "`seed` is -1; it must lie in"),
        (["search", *TOY, "searcher.sigma0=inf"], "`searcher.sigma0` is inf; it must be a finite number"),
        (["search", *TOY, "search.guards={kid_pixels: nan}"], "`search.guards.kid_pixels` is nan; it must be a finite"),
        (["search", *TOY, "other_metrics=[{name: kid_pixels, degree: -inf}]"], "`other_metrics.0.degree` is -inf; it"),
        (["search", *TOY, "operator=linear_grouped", "operator.groups=[5]"], "`operator.groups` holds `5`; each group"),
        (["search", "seed=1"], "is not set"),
        (
            ["search", *DIGITS],
            "no checkpoint found under `banks/digits`. Tried checkpoint-<step>/<component>/*.safetensors",
        ),
        (["search", *TOY, "metric=fid"], "weights-inception-2015-12-05-6726825d.pth"),
        (["list", "samplars"], "no kind of part named `samplars`. Did you mean `samplers`?"),
        (["export", "run=nowhere", "to=out"], "`nowhere` is no run directory"),
        (["export", "run=nowhere"], "`to` is not set"),
        (["report", "run=a", "runs=b"], "either `run=DIR`"),
        (["report", "runs=nothing/*"], "no run directory matches `nothing/*`"),
        (["report", "rum=x"], "no setting named `rum`. Did you mean `run`?"),
        (["export", "run"], "`run` is not understood. Write key=value."),
    ],
)
def test_mistakes_on_the_line(here, lcsc, words, text):
    refuse(lcsc, here, words, text)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["search.guards={typo: 0.1}"], "`search.guards` names `typo`, which is none of the `other_metrics`"),
        (
            ["search.guards={fid_pixels: 0.1}", "other_metrics=[{name: fid_pixels}]"],
            "`search.guards` names `fid_pixels`, which is the score that finalists are ranked by",
        ),
        (
            ["search.num_images_report=3", "other_metrics=[{name: recall_pixels}]"],
            "`search.num_images_report` is 3: too few images for `recall_pixels` of `other_metrics`; it needs at",
        ),
        (
            ["search.num_images_select=3", "other_metrics=[{name: recall_pixels}]", "search.guards={recall_pixels: 0}"],
            "`search.num_images_select` is 3: too few images for `recall_pixels` of `other_metrics`",
        ),
        (["search.prefixes=[10,20]"], "`search.prefixes` begins with 10; a race needs at least 20 images"),
        (["search.num_images=1"], "`search.num_images` is 1: too few images"),
        (["searcher=ladder", "searcher.test_images=1"], "`searcher.test_images` is 1: too few images"),
        (["search.penalty=1", "search.prefixes=[40]"], "but a race compares scores without a penalty"),
        (
            ["searcher=nevergrad", "searcher.optimizer=CMAX"],
            "nevergrad has no optimizer `CMAX`. Did you mean `CMA` or ",
        ),
        (["searcher=hybrid", "metric=kid_pixels", "objective=command", "objective.command=true"], "has no derivative"),
        (["searcher=lbfgs", "searcher.num_blocks=3"], "`searcher.num_blocks` is 3, but counts for nothing with"),
        (["searcher=lbfgs", "searcher.block_trials=5"], "`searcher.block_trials` is 5, but counts for nothing with"),
        (
            ["searcher=gradient", "searcher.num_blocks=3"],
            "with `searcher.noise` fresh. Set `searcher.noise` to rotating",
        ),
    ],
)
def test_nothing_is_trained_for_a_search_that_cannot_be(here, lcsc, words, text):
    refuse(lcsc, here, ["search", *TOY, "quiet=true", *words], text)


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        (
            ["objective=command", "sampler.num_steps=99", "metric=kid_pixels", "dataset.seed=1"],
            ["note: objective `command` takes no `sampler`, no `metric`; what you set there counts for nothing"],
        ),
        (
            ["objective=command", "dataset.seed=1", "train_if_missing=false"],
            ["note: objective `command` takes no `dataset`; what you set there counts for nothing"],
        ),
        (
            ["objective=denoising_loss", "other_metrics=[]", "search.drop_level=0.1"],
            [
                "note: objective `denoising_loss` takes no `other_metrics`; what you set there counts for nothing",
                "note: `search.drop_level` counts for nothing without `search.prefixes` or `search.race_steps`",
            ],
        ),
        (["sampler.num_steps=9", "metric=kid_pixels", "search.drop_level=0.1", "search.prefixes=[32]"], []),
        (
            ["search.num_images_baselines=40", "search.prefixes=[32]"],
            ["note: `search.num_images_baselines` 40 counts for nothing with `search.prefixes` [32]"],
        ),
        (
            ["search.num_images_baselines=64"],
            ["note: `search.num_images_baselines` 64 counts for nothing unless it is below `search.num_images` 64"],
        ),
        (
            ["sampler.search_times=true", "sampler.num_steps=1"],
            ["note: `sampler.search_times` counts for nothing: only levels below the first are varied"],
        ),
        (["search.num_images_baselines=40", "sampler.search_times=true"], []),
        (
            ["search.num_images_baselines=40", "searcher=lcsc_evolution"],
            [
                "note: `search.num_images_baselines` 40 counts for nothing with searcher `lcsc_evolution`, which "
                "learns from the baselines' scores"
            ],
        ),
    ],
)
def test_settings_that_count_for_nothing_are_named(words, notes):
    words = [*TOY, *words, "bank.path=nowhere"]
    config = compose_config([*words, "objective.command=true"] if "objective=command" in words else words)
    parts = build_parts({key: config[key] for key in SEARCH_SECTIONS})
    assert idle_settings(config, overridden(words), parts) == notes


def edit(folder, change):
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncate, "is truncated: its tensors need"),
        (lambda f: edit(f, lambda t: t.pop("conv_in.bias")), "`conv_in.bias` is only in step 50"),
        (lambda f: edit(f, lambda t: t.update({"conv_in.bias": torch.zeros(5)})), "`conv_in.bias` is (8,) vs (5,)"),
        (lambda f: edit(f, lambda t: t["conv_in.bias"].fill_(float("nan"))), "holds 8 NaN or Inf in `conv_in.bias`"),
    ],
)
def test_damaged_banks(here, lcsc, tiny_bank, damage, text):
    damage(tiny_bank / "checkpoint-200")
    refuse(lcsc, here, ["search", *DIGITS, f"bank.path={tiny_bank}"], text)


def test_too_few_images(here, lcsc, tiny_bank):
    refuse(
        lcsc,
        here,
        ["search", *DIGITS, f"bank.path={tiny_bank}", "search.num_images=1"],
        "`search.num_images` is 1: too few images for `fid_digits`; it needs at least 2",
    )


def test_another_configuration_and_a_taken_output(here, lcsc):
    assert lcsc("search", *TOY, "run_dir=mine", "search.num_trials=3")[0] == 0
    refuse(lcsc, here, ["search", *TOY, "run_dir=mine", "search.num_trials=4"], "`search.num_trials`: 3 -> 4")
    (here / "out").mkdir()
    refuse(lcsc, here, ["export", "run=mine", "to=out"], "output `out` exists already")
    refuse(lcsc, here, ["export", "run=mine", "to=new", "format=onnx"], "no format named `onnx`")
    refuse(
        lcsc, here, ["export", "run=mine", "to=new", "max_shard_size=5XB"], "`max_shard_size` is `5XB`; write a size"
    )
    shutil.rmtree(here / "banks")
    refuse(lcsc, here, ["export", "run=mine", "to=new"], "no checkpoint found under `banks/toy_gaussian`")


def test_help_and_version_cost_nothing(lcsc):
    code, out, _ = lcsc("--help")
    assert code == 0
    assert "usage: lcsc VERB" in out
    assert lcsc("--version")[1].strip()
