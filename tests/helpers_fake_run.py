"""Run directories made up for the tests of the report: plausible numbers, no search."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FLOOR = 31.9


def make_fake_run(
    folder: Path,
    *,
    name: str = "digits",
    finished: bool = True,
    num_trials: int = 120,
    done: int | None = None,
    num_checkpoints: int = 40,
    seed: int = 0,
    searcher: str = "cma",
    best: float = 81.8,
    nfe: int = 5,
    detector_digest: str = "5d41402abc4b2a76b9719d911017c592ae1f6a3b0d1f4b6a8c9e2d7f0a1b2c3d",
    num_images_report: int = 4000,
    command: str = "lcsc search experiment=digits",
    samples: bool = True,
    torn: bool = False,
    groups: tuple[str, ...] = (),
    descent: bool = False,
) -> Path:
    """Write a run directory.

    Args:
        folder: where; made here.
        name, searcher, seed, nfe, detector_digest, num_images_report, command: as run.json has them.
        finished: whether select and report records, summary.json and samples.npz are there.
        num_trials: trials planned; `done` of them are in the journal (all when None).
        num_checkpoints: K.
        best: the winner's score on the report seeds.
        samples: whether a finished run has samples.npz.
        torn: end the journal in half a line.
        groups: layer groups with coefficients of their own.
        descent: whether every trial has noise of its own, and a finished run says where the score is flat.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    steps = [25 * (k + 1) for k in range(num_checkpoints)]
    info = _info(folder.name, name, command, steps, nfe)
    info["config"] = _config(seed, searcher, nfe, num_trials, num_images_report)
    info["fingerprints"] = _fingerprints(nfe, detector_digest)
    records = _search_records(rng, steps, num_trials if done is None else done, best)
    if descent:
        records = [r | ({"block": r["uid"]} if r["kind"] == "trial" else {}) for r in records]
    if finished:
        records += _final_records(rng, records, best, num_images_report)
    if groups:
        records = [r | _in_groups(r, len(groups)) for r in records]
    records = [{"seq": seq, **record} for seq, record in enumerate(records)]
    timed = _write_records(folder, info, records, torn)
    if finished:
        summary = _summary(info, records, timed, groups) | {"geometry": _geometry(records, descent)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        if samples:
            np.savez_compressed(folder / "samples.npz", **_samples(rng))
    return folder


def framed(records: list[dict[str, Any] | str], before: bytes = b"") -> bytes:
    """The lines of a journal, each with its checksum and the digest of the line before, made without the package.

    A record may be given as the JSON it shall be, without end; `before` is the line that the first one follows.
    """
    lines, prev = b"", hashlib.sha256(before).hexdigest()[:16] if before else "0" * 16
    for record in records:
        text = record
        if not isinstance(record, str):
            record = {key: value for key, value in record.items() if key not in ("prev", "crc")}
            text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        body = f'{text[:-1]},"prev":"{prev}"'.encode()
        line = body + b',"crc":"%08x"}\n' % zlib.crc32(body)
        lines, prev = lines + line, hashlib.sha256(line).hexdigest()[:16]
    return lines


def read_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The complete records of one kind, read without the package."""
    lines = (folder / "journal.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    records = [{k: v for k, v in json.loads(line).items() if k not in ("prev", "crc")} for line in lines]
    return [record for record in records if record["kind"] == kind]


def _info(run_id: str, name: str, command: str, steps: list[int], nfe: int) -> dict[str, Any]:
    return {
        "schema": 2,
        "run_id": run_id,
        "name": name,
        "created_utc": "2026-11-23T18:00:00Z",
        "lcsc_version": "0.1.0",
        "command": command,
        "config": {},
        "fingerprints": {},
        "bank": {"steps": steps, "num_checkpoints": len(steps), "num_parameters": 300_000},
        "nfe": nfe,
        "metric": "fid_digits",
    }


def _config(seed: int, searcher: str, nfe: int, num_trials: int, num_images_report: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "bank": {"path": "runs/banks/digits"},
        "operator": {"name": "linear", "whitening": 1.0},
        "searcher": {"name": searcher},
        "sampler": {"name": "euler", "num_steps": nfe},
        "metric": {"name": "fid_digits"},
        "dataset": {"name": "digits"},
        "search": {
            "num_trials": num_trials,
            "num_images": 400,
            "num_finalists": 10,
            "num_images_select": 2000,
            "num_images_report": num_images_report,
        },
    }


def _fingerprints(nfe: int, detector_digest: str) -> dict[str, Any]:
    evaluator = {
        "metric": "fid_digits",
        "detector": "digits_cnn",
        "detector_digest": detector_digest,
        "nfe": nfe,
        "sampler": f"Euler(num_steps={nfe}, sigma_max=80.0)",
        "model": "EDM(sigma_data=0.5)",
        "dataset": "Digits()",
        "split_seed": 0,
    }
    versions = {"lcsc": "0.1.0", "torch": "2.13.0", "numpy": "2.3.5"}
    return {"bank": "9b" * 32, "evaluator": evaluator, "versions": versions}


def _write_records(
    folder: Path, info: dict[str, Any], records: list[dict[str, Any]], torn: bool
) -> list[dict[str, Any]]:
    """Write run.json, journal.jsonl and timing.jsonl; returns the rows of the last."""
    (folder / "run.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    (folder / "journal.jsonl").write_bytes(framed(records) + (b'{"coef": [0.1, 0.' if torn else b""))
    timed = [
        {"seq": r["seq"], "seconds": 0.25, "images": 400, "at": "2026-11-23T18:00:00Z"}
        for r in records
        if r["kind"] != "floor"
    ]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timed), encoding="utf-8")
    return timed


def _search_records(rng: np.random.Generator, steps: list[int], num_trials: int, best: float) -> list[dict[str, Any]]:
    K = len(steps)
    age = np.array(steps[-1]) - np.array(steps)
    records: list[dict[str, Any]] = [{"kind": "floor", "value": FLOOR}]

    def baseline(family: str, label: str, raw_K: np.ndarray, value: float) -> None:
        coef = (raw_K / raw_K.sum()).tolist()
        record = {"kind": "baseline", "family": family, "label": label, "coef": coef, "vector": [0.0] * (K - 1)}
        records.append({**record, "value": round(value, 4), "status": "ok", "reason": None})

    baseline("last", f"step {steps[-1]}", np.eye(K)[-1], 518.0)
    for k in range(0, K, 8):
        baseline("best_single", f"step {steps[k]}", np.eye(K)[k], 390.0 + 30 * abs(k - K // 2))
    for halflife in (20, 80, 320, 1280):
        value = 207.0 + 60 * abs(np.log(halflife / 320))
        baseline("ema", f"EMA half-life {halflife} steps", 0.5 ** (age / halflife), value)
    for sigma in (0.05, 0.12, 0.28):
        value = 213.0 + 700 * abs(sigma - 0.12)
        baseline("power_ema", f"power EMA sigma_rel {sigma:.3f}", (np.array(steps) / steps[-1]) ** (0.5 / sigma), value)
    for window in (2, 10, 40):
        raw_K = (np.arange(K) >= K - window).astype(float)
        baseline("uniform", f"mean of last {window}", raw_K, 229.0 + 4 * abs(window - 10))
        baseline(
            "wsm", f"minus-sqrt over last {window}", raw_K * np.sqrt(1 + np.arange(K)), 221.0 + 5 * abs(window - 10)
        )
    for uid in range(num_trials):
        coef_K = 0.5 ** (age / 320) + rng.normal(0, 0.3 * (1 + uid / num_trials), K)
        coef_K -= (coef_K.sum() - 1) / K
        typical = 0.95 * best + 150 * np.exp(-3.0 * uid / max(num_trials, 1))
        value = round(float(typical * np.exp(rng.exponential(0.18))), 4)
        failed = uid % 37 == 20
        record = {"kind": "trial", "uid": uid, "vector": [0.0] * (K - 1), "coef": coef_K.tolist()}
        reason = "14 of 400 images are not finite" if failed else None
        record |= {"value": None if failed else value, "status": "failed" if failed else "ok", "reason": reason}
        records.append(record)
    return records


def _final_records(
    rng: np.random.Generator, records: list[dict[str, Any]], best: float, num_images: int
) -> list[dict[str, Any]]:
    trials = sorted((r for r in records if r["kind"] == "trial" and r["status"] == "ok"), key=lambda r: r["value"])
    finals = [{"kind": "select", "label": f"trial {t['uid']}", "value": t["value"] * 1.02} for t in trials[:10]]
    tuned: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "baseline":
            old = tuned.setdefault(record["family"], record)
            if record["value"] < old["value"]:
                tuned[record["family"]] = record
    rows = [("best", f"trial {trials[1]['uid']}", best, trials[1]["coef"])]
    rows += [(family, r["label"], r["value"] * 0.99, r["coef"]) for family, r in tuned.items()]
    for who, label, value, coef in rows:
        others = {"kid_digits": {"value": value / 900, "se": 0.004}}
        row = {"kind": "report", "who": who, "label": label, "coef": coef, "value": round(value, 4)}
        finals.append({**row, "se": round(0.01 * value + 1, 4), "num_images": num_images, "others": others})
    return finals


def _in_groups(record: dict[str, Any], num_groups: int) -> dict[str, Any]:
    """Coefficients (G, K): a baseline's the same in all groups, others turned by one checkpoint from group to group."""
    if record.get("coef") is None:
        return {}
    moved = record["kind"] == "trial" or record.get("who") == "best"
    return {"coef": [np.roll(record["coef"], g if moved else 0).tolist() for g in range(num_groups)]}


def _geometry(records: list[dict[str, Any]], descent: bool) -> dict[str, Any]:
    """Shares that fall by a factor from direction to direction; the last three directions are flat."""
    reports = {r["who"]: np.atleast_2d(np.array(r["coef"])) for r in records if r["kind"] == "report"}
    D = reports["best"].shape[1] - 1
    points = {
        who: {"sum_abs": np.abs(coef).sum(1).max(), "max_abs": np.abs(coef).max(), "from_last": 0.5 * place,
              "from_last_relative": 0.1 * place}
        for place, (who, coef) in enumerate(reports.items())
    }  # fmt: skip
    share_D = 0.8 ** np.arange(D)
    share_D[-3:] *= 0.05
    share_D /= share_D.sum()
    along = 0.95 ** np.arange(D) / (0.95 ** np.arange(D)).sum()
    slope = {"num_gradients": 120, "num_directions": D, "num_carrying": 21, "num_flat": 3, "way_flat": along[-3:].sum(),
             "energy": share_D.tolist(), "along": along.tolist()}  # fmt: skip
    bank = {"last_to_mean": 5.0, "last_to_first": 12.5, "effective_rank": 7.25, "num_directions": D, "num_short": 3}
    way = {"length": 2.5, "effective_rank": 11.5, "along": along.tolist(), "outside": 0.0}
    section = {"points": points, "bank": bank | {"spread": share_D.tolist()}, "way": way}
    return section | ({"slope": slope} if descent else {})


def _summary(
    info: dict[str, Any], records: list[dict[str, Any]], timed: list[dict[str, Any]], groups: tuple[str, ...]
) -> dict[str, Any]:
    reports = {r["who"]: {key: r[key] for key in ("value", "se", "label")} for r in records if r["kind"] == "report"}
    winner = next(r for r in records if r["kind"] == "report")
    baselines = {who: row for who, row in reports.items() if who != "best"}
    rival = min(baselines, key=lambda who: baselines[who]["value"])
    ratio = reports["best"]["value"] / baselines[rival]["value"]
    steps, coef = info["bank"]["steps"], winner["coef"]
    named = [({"group": name}, coef_K) for name, coef_K in zip(groups, coef, strict=True)] if groups else [({}, coef)]
    coefficients = [n | {"step": s, "coef": c} for n, coef_K in named for s, c in zip(steps, coef_K, strict=True)]
    return {
        "experiment": info["name"],
        "operator": "linear",
        "searcher": info["config"]["searcher"]["name"],
        "num_trials": sum(r["kind"] == "trial" for r in records),
        "num_checkpoints": len(info["bank"]["steps"]),
        "num_coefficients": len(info["bank"]["steps"]) - 1,
        "nfe": info["nfe"],
        "metric": info["metric"],
        "detector": "digits_cnn",
        "images_sampled": sum(row["images"] for row in timed),
        "wall_seconds": sum(row["seconds"] for row in timed),
        "floor": FLOOR,
        "report": {"best": reports["best"], "baselines": baselines, "best_baseline": rival, "ratio": ratio},
        "coefficients": coefficients,
        "export": "best",
    }


def _samples(rng: np.random.Generator) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    real = (load_digits().images[:64, None] / 8 - 1).astype(np.float32)
    blur = (real + np.roll(real, 1, -1) + np.roll(real, 1, -2)) / 3
    noise = rng.normal(size=real.shape).astype(np.float32)
    mixes = {"real": real, "last": blur + 0.9 * noise, "ema": blur + 0.45 * noise, "best": real + 0.2 * noise}
    return {key: np.clip(images, -1, 1).astype(np.float32) for key, images in mixes.items()}
