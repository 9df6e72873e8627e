"""`lcsc bank scan`: one table, the notes, exit code 2 naming file and key; names from files cannot steer a terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers_cli import start
from safetensors.torch import load_file, save_file

from lcsc.bank.stream import default_threads
from lcsc.cli.sizes import size_text

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(folder, change):
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cells(out):
    """The table's first row, and the heads."""
    lines = [line for line in out.splitlines() if line[:1] in "┃│"]
    return [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in lines]


def test_one_table(tiny_bank, lcsc):
    code, out, err = lcsc("bank", "scan", str(tiny_bank))
    assert (code, err) == (0, "")
    head, row, *more = cells(out)
    shown = dict(zip(head, row, strict=True))
    parameters = sum(t.numel() for t in load_file(tiny_bank / "checkpoint-50" / "unet" / WEIGHTS).values())
    assert {key: shown[key] for key in head[:10]} == {
        "weights": "unet raw",
        "layout": "diffusers components",
        "files": "5",
        "steps": "50 .. 1000",
        "gaps": "irregular",
        "dtypes": "float32",
        "parameters": f"{parameters:,}",
        "size": size_text(5 * 4 * parameters),
        "format": "safetensors",
        "finite": "yes",
    }
    peaks = [shown["peak memory"], *(line[-1] for line in more)]
    tensors = len(load_file(tiny_bank / "checkpoint-50" / "unet" / WEIGHTS))
    # the live network, blocks (a buffer more than threads), files and content sums
    beside = 4 * parameters + (default_threads() + 1) * 44 * parameters + 5 * (3000 + 17 * tensors)
    own = {"resident": 20 * parameters + beside, "delta": 14 * parameters + beside, "streamed": beside}
    assert peaks == [f"{name} {size_text(910_000_000 + size)} ({size_text(size)})" for name, size in own.items()]
    assert "peak memory is that of a search on the CPU" in out
    assert "it is an upper bound where no network is built" in out


def test_headers_only_and_choices(tiny_bank, lcsc):
    for folder in tiny_bank.iterdir():
        (folder / "unet_ema").mkdir()
        for file in (folder / "unet").iterdir():
            (folder / "unet_ema" / file.name).write_bytes(file.read_bytes())
    edit(tiny_bank / "checkpoint-50", lambda t: t["conv_in.bias"].fill_(float("nan")))
    code, out, err = lcsc("bank", "scan", str(tiny_bank), "numbers=false")
    assert (code, err) == (0, "")
    assert [row[0] for row in cells(out) if row[0]] == ["weights", "unet raw", "unet ema"]
    assert "not read" in out
    assert "a search takes: unet raw" in out
    code, out, err = lcsc("bank", "scan", f"path={tiny_bank}", "weights=ema")
    assert (code, err) == (0, "")
    assert "raw" not in out
    assert lcsc("bank", "scan", str(tiny_bank), "component=unet_ema")[0] == 0
    code, out, err = lcsc("bank", "scan", str(tiny_bank), "weights=raw")
    assert code == 2
    assert "not 1 of 5" in out
    assert err.startswith("lcsc: `")
    assert f"checkpoint-50/unet/{WEIGHTS}` holds 8 NaN or Inf in `conv_in.bias`" in err


def truncate(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder):
    torch.save(load_file(folder / "unet" / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    bias = load_file(folder / "unet" / WEIGHTS)["conv_in.weight"].numpy().tobytes()
    (folder / "unet" / WEIGHTS).unlink()
    raw = bytearray(path.read_bytes())
    raw[raw.index(bias)] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (truncate, [f"checkpoint-200/unet/{WEIGHTS}`"]),
        (flip, ["checkpoint-200/unet/diffusion_pytorch_model.bin`"]),
        (
            lambda f: edit(f, lambda t: t.pop("conv_in.bias")),
            ["checkpoint-200/unet/", "`conv_in.bias` is only in step"],
        ),
        (
            lambda f: edit(f, lambda t: t.update({"conv_in.bias": torch.zeros(5)})),
            ["checkpoint-200/unet/", "`conv_in.bias` is (8,) vs (5,)"],
        ),
        (
            lambda f: edit(f, lambda t: t["conv_out.weight"].view(-1)[:2].fill_(float("inf"))),
            [f"checkpoint-200/unet/{WEIGHTS}` holds 2 NaN or Inf in `conv_out.weight`"],
        ),
        (lambda f: f.rename(f.with_name("checkpoint-000400")), ["step 400 stands twice"]),
        (lambda f: (f / "unet" / "config.json").write_text("[" * 99999), ["checkpoint-200/unet/config.json`"]),
        (
            lambda f: os.mkfifo(f / "unet" / "model.safetensors"),
            ["checkpoint-200/unet/model.safetensors` is a named pipe"],
        ),
    ],
    ids=["truncated", "flipped", "key", "shape", "nan", "twice", "config", "pipe"],
)
def test_what_is_wrong_is_named_and_the_rest_is_shown(tiny_bank, here, lcsc, damage, texts):
    damage(tiny_bank / "checkpoint-200")
    code, out, err = lcsc("bank", "scan", "bank")
    assert code == 2
    assert err.startswith("lcsc: ")
    assert err.count("\n") == 1
    for text in texts:
        assert text in err
    assert "unet raw" in out, "the table comes first"


def test_every_problem_is_said(tiny_bank, lcsc):
    truncate(tiny_bank / "checkpoint-200")
    truncate(tiny_bank / "checkpoint-400")
    code, out, err = lcsc("bank", "scan", str(tiny_bank))
    assert code == 2
    assert "checkpoint-200" in err
    assert "also wrong: " in out
    assert "checkpoint-400" in out


def test_duplicates_and_gaps_are_said(tmp_path, lcsc):
    for step in (100, 200, 300, 500):
        save_file({"w": torch.full((4,), float(step % 200))}, tmp_path / f"m{step}.safetensors")
    code, out, err = lcsc("bank", "scan", str(tmp_path))
    assert (code, err) == (0, "")
    assert "every 100, not 300-500" in out
    assert "duplicates, steps with the same bits: 100 = 300 = 500" in out


def test_names_cannot_steer_the_terminal(tmp_path, lcsc):
    name = "m\x1b[31m[bold]:smile:5.safetensors"
    save_file({"w\x1b]0;title\x07": torch.full((4,), float("nan"))}, tmp_path / name)
    save_file({"w\x1b]0;title\x07": torch.zeros(4)}, tmp_path / "m\x1b[31m[bold]:smile:6.safetensors")
    (tmp_path / "note\x1b[2J[bold]").write_text("x")
    code, out, err = lcsc("bank", "scan", str(tmp_path))
    assert code == 2
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert "[bold]:smile:" in err


def test_a_file_whose_name_has_an_equals_sign(tmp_path, lcsc):
    torch.save({"state_dict": {"w": torch.zeros(3)}, "global_step": 8}, tmp_path / "epoch=1-step=8.ckpt")
    code, out, err = lcsc("bank", "scan", str(tmp_path / "epoch=1-step=8.ckpt"))
    assert (code, err) == (0, "")
    assert cells(out)[1][3] == "8"
    old = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert lcsc("bank", "scan", "epoch=1-step=8.ckpt")[0] == 0
    finally:
        os.chdir(old)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "`lcsc bank` needs one more word. Known: convert, pack, scan, unpack."),
        (["scna", "x"], "`scna` is no word for `lcsc bank`. Did you mean `scan`?"),
        (["scan"], "`path` is not set"),
        (["scan", "nowhere"], "no checkpoint found under `nowhere`. Tried checkpoint-<step>/<component>/"),
        (["scan", "nowhere", "numbers=no"], "`numbers` is `no`; it must be true"),
        (["scan", "nowhere", "wieghts=ema"], "no setting named `wieghts`. Did you mean `weights`?"),
    ],
)
def test_mistakes(here, lcsc, words, text):
    code, out, err = lcsc("bank", *words)
    assert (code, out) == (2, "")
    assert text in err


def test_unknown_weights(tiny_bank, lcsc):
    code, _, err = lcsc("bank", "scan", str(tiny_bank), "weights=emma")
    assert code == 2
    assert "`bank.weights` is `emma`; it must be raw, ema, ema:<rate> or lora." in err


def test_a_scan_of_safetensors_starts_no_torch(tiny_bank, tmp_path):
    """Importing torch costs seconds; the scan needs headers and numpy."""
    code = "import sys; from lcsc.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "bank", "scan", str(tiny_bank)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    process = start("bank", "scan", str(tiny_bank), cwd=tmp_path)
    assert "unet raw" in process.communicate()[0]
    assert process.returncode == 0


def test_a_needed_choice_is_said(tmp_path, lcsc):
    for step in (1, 2):
        for rate in ("0.9", "0.99"):
            save_file({"w": torch.full((4,), float(step))}, tmp_path / f"ema_{rate}_{step}.safetensors")
    code, out, err = lcsc("bank", "scan", str(tmp_path))
    assert (code, err) == (0, "")
    assert "a search needs a choice: the checkpoints hold several EMAs" in out
    assert "`bank.weights=ema:0.9`, `bank.weights=ema:0.99`" in out
