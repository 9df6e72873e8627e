"""A search on a coded bank, and what it found on the exact one: for benchmarks/codec.py."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from search_honesty import problem
from search_honesty import searched as search_of

from lcsc.bank import CheckpointBank
from lcsc.bank.coded import write_coded
from lcsc.codec.settings import CodecSettings
from lcsc.core.seeds import Purpose
from lcsc.search.evaluate import Evaluator

#: how the bank is coded that is searched; None is the bank itself
BANKS: dict[str, CodecSettings | None] = {
    "exact": None,
    "lossless": CodecSettings(),
    "4 bits": CodecSettings("lossy", bits_w=4),
    "2 bits": CodecSettings("lossy", bits_w=2),
    "4 bits, tau 1": CodecSettings("lossy", bits_w=4, tau=1.0),
}
#: of which a search is made; one without loss is the exact bank to the bit
SEARCHED = ("exact", "4 bits", "2 bits")


def words_of(path: Path, seed: int, trials: int, images: int) -> list[str]:
    """A descent along the denoising loss, which is cheap."""
    search = {"num_trials": trials, "num_images": 256, "num_finalists": 2, "num_images_select": 512}
    search["num_images_report"] = images
    return [
        *("experiment=digits", f"bank.path={path}", f"seed={seed}", "objective=denoising_loss", "searcher=gradient"),
        *(f"search.{key}={value}" for key, value in search.items()),
    ]


def packed(path: Path, name: str, seed: int, work: Path) -> tuple[Path, float]:
    """A bank coded as `BANKS` says, and the processor's seconds that it took; what is there is not coded again."""
    settings = BANKS[name]
    if settings is None:
        return path, 0.0
    place = work / f"codec-bank-{seed}-{name.replace(' ', '_').replace(',', '')}"
    began = time.process_time()
    if not place.exists():
        write_coded(CheckpointBank.open(path, storage="streamed"), place, settings)
    return place, time.process_time() - began


def opened(path: Path, name: str, seed: int, work: Path) -> dict:
    """Bytes of a bank's files, and the processor's seconds of coding and of opening it, the quicker of two times."""
    place, took = packed(path, name, seed, work)
    files = [file for file in place.rglob("*") if file.suffix in (".ckd", ".safetensors")]
    seconds = []
    for _ in range(2):
        began = time.process_time()
        bank = CheckpointBank.open(place)
        seconds.append(time.process_time() - began)
        del bank
    nbytes = sum(file.stat().st_size for file in files)
    return {"bytes": nbytes, "encode_seconds": took, "open_seconds": min(seconds)}


def searched(path: Path, name: str, seed: int, trials: int, images: int, work: Path) -> dict:
    """The winner on a coded bank: its score there, and that of its coefficients on the exact bank.

    `fid` is that of images of the exact candidate. `exact_value` of different banks share noise and images.
    """
    place, _ = packed(path, name, seed, work)
    evaluator, records = search_of(problem(words_of(place, seed, trials, images)))
    best = next(record for record in records if record["kind"] == "report" and record["who"] == "best")
    row = evaluator.score(np.array(best["vector"]), Purpose.REPORT, range(images), full=True)
    exact = evaluator_of(words_of(path, seed, trials, images))
    vector = exact.space.from_natural([np.array(row["coef"])])
    again = exact.score(vector, Purpose.REPORT, range(images), full=True)
    assert np.allclose(again["coef"], row["coef"], atol=1e-6)
    quality = evaluator_of(["experiment=digits", f"bank.path={path}", f"seed={seed}"])
    fid = quality.score(vector, Purpose.REPORT, range(min(1000, images)))["value"]
    return {
        "winner": best["label"],
        "own_value": row["value"],
        "exact_value": again["value"],
        "exact_se": again["se"],
        "fid": fid,
        "same_digest": evaluator.bank.digest == exact.bank.digest,
    }


def evaluator_of(words: list[str]) -> Evaluator:
    """What scores candidates of a search that is not run."""
    task = problem(words)
    return Evaluator(task.bank, task.operator, task.objective, task.operator.space(task.bank), task.seed)
