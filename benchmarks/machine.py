"""What a results file says about where its numbers come from."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lcsc", "torch", "numpy", "scipy", "diffusers", "transformers", "nevergrad", "scikit-learn")


def circumstances() -> dict[str, Any]:
    """Machine, versions and commit; the environment's `COMMIT` names it for a copy without its repository."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "lcsc", "conf"], cwd=ROOT, capture_output=True, text=True)
    return {
        "machine": f"{os.cpu_count()} cores, {cpu or platform.processor()}, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": os.environ.get("COMMIT") or commit + ("+changes" if dirty.stdout.strip() else ""),
        "gpu": _gpu(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def mean_se(values: list[float]) -> dict[str, float | None]:
    """Mean over seeds and its standard error, None of one seed."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": se}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
