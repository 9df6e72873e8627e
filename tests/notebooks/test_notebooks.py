"""Every notebook of the checkout: executed against a run directory, and committed without outputs."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers_fake_run import make_fake_run
from PIL import Image

from lcsc.music.compose import compose
from lcsc.music.files import whole_abc

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_valid_and_has_no_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)


def execute(name, tmp_path, monkeypatch, **environment):
    """The outputs of a notebook's code cells."""
    from nbclient import NotebookClient

    settings = {
        "PYTHONPATH": str(ROOT),  # the kernel starts elsewhere
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONWARNINGS": "ignore",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    for key, value in {**settings, **environment}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # this environment's, whatever is first on the path
    client.execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # jupyter_client, zmq and tornado warn on their own account
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "running"])
def test_first_search_notebook_shows_the_run(tmp_path, monkeypatch, finished):
    run = make_fake_run(tmp_path / "run", finished=finished, num_trials=30, done=25, torn=not finished)
    before = {file: file.read_bytes() for file in run.iterdir()}
    outputs = execute("01_first_search.ipynb", tmp_path, monkeypatch, LCSC_RUN=str(run))

    text = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    wanted = (
        "lcsc 81.8 ± 1.8 · best baseline 204.9 ± 3.0 (EMA half-life 320 steps) · ratio 0.40 · floor 31.9 (real vs real)"
    )
    assert wanted in text if finished else "unfinished: 25 of 30 trials · best so far" in text
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).width == 1800
    assert any("best_so_far" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert {file: file.read_bytes() for file in run.iterdir()} == before  # read-only


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_coefficient_curves_notebook_compares_searchers(tmp_path, monkeypatch):
    for seed, (searcher, best) in enumerate([("gradient", 46.4), ("cma", 81.8)]):
        make_fake_run(tmp_path / "runs" / searcher, searcher=searcher, best=best, seed=seed, num_trials=5)
    outputs = execute("02_coefficient_curves.ipynb", tmp_path, monkeypatch, LCSC_RUNS=str(tmp_path / "runs"))

    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 3
    first = tables[0]  # sorted by score
    assert first.index("gradient, seed 0") < first.index("cma, seed 1")
    assert "46.4" in first
    assert "81.8" in first
    assert [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_coefficient_curves_are_of_one_bank_and_each_has_its_name(tmp_path, monkeypatch):
    """Banks of two experiments may have the same steps, and a searcher may have run twice on one."""
    make_fake_run(tmp_path / "another", name="digits_consistency", nfe=1)
    for folder in ("first", "second"):
        make_fake_run(tmp_path / folder, num_trials=5)
    make_fake_run(tmp_path / "third", searcher="gradient", num_trials=5)
    monkeypatch.setenv("LCSC_RUNS", str(tmp_path))
    notebook, space = nbformat.read(ROOT / "notebooks" / "02_coefficient_curves.ipynb", as_version=4), {}
    for cell in [cell for cell in notebook.cells if cell.cell_type == "code"][:2]:
        exec(cell.source, space)
    assert space["names"] == ["cma, seed 0, first", "cma, seed 0, second", "gradient, seed 0"]
    assert list(space["curves"]) == list(space["table"].index) == space["names"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_text_to_music_notebook_plays_and_shows_three_tunes(tmp_path, monkeypatch):
    """Where abcm2ps is missing; with it a score stands in place of each picture."""
    for number in range(1, 5):
        tune = compose(np.random.default_rng(number), number).abc
        (tmp_path / f"tune-{number}.abc").write_text(whole_abc(tune, "a jig", number))
    files = [{"files": [f"tune-{number}.abc"], "tries": number} for number in range(1, 5)]
    told = {"wish": {"text": "a jig in D"}, "model": "best", "tunes": files}
    (tmp_path / "tunes.json").write_text(json.dumps(told))
    outputs = execute("03_text_to_music.ipynb", tmp_path, monkeypatch, LCSC_TUNES=str(tmp_path), PATH="")
    text = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert text.count("no bar is wrong") == 3
    shown = [output.get("data", {}) for output in outputs]
    sounds = [data["text/html"] for data in shown if "<audio" in data.get("text/html", "")]
    assert len(sounds) == 3
    waves = [base64.b64decode(sound.split("base64,")[1].split('"')[0]) for sound in sounds]
    assert all(wave[:4] == b"RIFF" for wave in waves)
    assert all(len(wave) > 2 * 22050 * 10 for wave in waves)  # 16 bits, more than ten seconds
    pictures = [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in shown if "image/png" in data]
    assert len(pictures) == 3
