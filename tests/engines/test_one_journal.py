"""The digits search, a real network and real images, on every engine: one journal, to the byte.

All compute with one thread: other numbers of threads add in other orders.
"""

from __future__ import annotations

import hashlib
import json

import pytest
from helpers_cli import TINY_TRAINING, start

SEARCH = [
    "search",
    "experiment=digits",
    *TINY_TRAINING,
    "bank.path=bank",
    "sampler.num_steps=2",
    "searcher=cma",
    "search.num_trials=8",
    "search.batch_size=4",
    "search.num_images=64",
    "search.num_finalists=2",
    "search.num_images_select=64",
    "search.num_images_report=128",
]
ENGINES = {
    "local": ["engine=local", "engine.num_workers=2"],
    "ray": ["engine=ray", "engine.num_workers=2"],
    "slurm": ["engine=slurm", "engine.cluster=local", "engine.num_workers=2"],
}


def run(cwd, *words):
    child = start(*SEARCH, *words, cwd=cwd, env={"OMP_NUM_THREADS": "1"})
    said, _ = child.communicate(timeout=900)
    assert child.returncode == 0, said


@pytest.mark.faults
def test_the_digits_search_is_the_same_on_every_engine(tmp_path, count):
    pytest.importorskip("ray")
    pytest.importorskip("submitit")
    run(tmp_path, "train_if_missing=true", "run_dir=inline")
    wanted = (tmp_path / "inline" / "journal.jsonl").read_bytes()
    records = [json.loads(line) for line in wanted.splitlines()]
    assert sum(record["kind"] == "trial" for record in records) == 8
    best = json.loads((tmp_path / "inline" / "summary.json").read_text())["coefficients"]
    for name, engine in ENGINES.items():
        run(tmp_path, *engine, f"run_dir={name}")
        assert (tmp_path / name / "journal.jsonl").read_bytes() == wanted
        assert json.loads((tmp_path / name / "summary.json").read_text())["coefficients"] == best
    count("one_journal", engines=1 + len(ENGINES), records=len(records), digest=hashlib.sha256(wanted).hexdigest()[:16])
