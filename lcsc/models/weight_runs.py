"""Many training runs of one architecture, to learn from. R = runs, K = checkpoints of a run, P = flat weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError, did_you_mean

#: beside the runs: `{run: {metric: [one number a checkpoint]}}`
METRICS_FILE = "metrics.json"


@dataclass(frozen=True, eq=False)
class WeightRuns:
    """Runs whose checkpoints go together.

    Args:
        shapes: shape of each tensor by name, in the order of the flat row (sorted).
        names: of the runs.
        steps_RK: training steps, int64.
        theta_RKP: weights, float32.
        metrics: shape (R, K) each, float32, by name; lower need not be better.
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: tuple[str, ...]
    steps_RK: np.ndarray
    theta_RKP: Tensor
    metrics: Mapping[str, Tensor]

    def metric(self, name: str) -> Tensor:
        """One metric, shape (R, K); raises ConfigError for a name that the runs do not have."""
        if name not in self.metrics:
            raise ConfigError(f"the runs have no metric `{name}`.{did_you_mean(name, self.metrics)}")
        return self.metrics[name]

    def part(self, runs: slice) -> WeightRuns:
        """Some of the runs."""
        some = {name: numbers[runs] for name, numbers in self.metrics.items()}
        return replace(
            self, names=self.names[runs], steps_RK=self.steps_RK[runs], theta_RKP=self.theta_RKP[runs], metrics=some
        )


def read_runs(folder: Path) -> WeightRuns:
    """Every run in a folder: each a folder of checkpoints or a packed bank that `CheckpointBank` opens.

    `metrics.json` beside them holds the metrics of each run's checkpoints in the order of their steps.

    Raises:
        BankError: no runs, runs of several architectures or lengths, or metrics that are missing or not finite.
    """
    folder = Path(folder)
    file = folder / METRICS_FILE
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(run, dict) and run for run in told.values()):
            raise ValueError("a run has no metrics")
    except (OSError, ValueError, AttributeError) as error:
        raise BankError(f"`{file}` cannot be read: {error}. It holds {{run: {{metric: [numbers]}}}}.") from error
    banks, names = [], []
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".safetensors")
        if path.name.startswith(".") or name not in told:
            continue
        banks.append(CheckpointBank.open(path, storage="resident"))
        names.append(name)
    if not banks:
        raise BankError(f"`{folder}` holds none of the {len(told)} runs that `{file}` tells of. Put them beside it.")
    shapes, K = banks[0].layout.shapes, banks[0].num_checkpoints
    for bank in banks:
        if bank.layout.shapes != shapes or bank.num_checkpoints != K:
            raise BankError(
                f"`{bank.path}` holds {bank.num_checkpoints} checkpoints and `{banks[0].path}` {K}, or their tensors "
                "differ; runs to learn from have one architecture and equally many checkpoints. Move it away."
            )
    metrics = _metrics(told, names, K, file)
    theta_RKP = torch.stack([bank.matrix().float() for bank in banks])
    return WeightRuns(shapes, tuple(names), np.array([bank.steps for bank in banks]), theta_RKP, metrics)


def _finite(x: object) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _metrics(told: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], K: int, file: Path) -> dict:
    found = {}
    for metric in told[names[0]]:
        rows = [told[name].get(metric) for name in names]
        if not all(isinstance(row, list) and len(row) == K and all(map(_finite, row)) for row in rows):
            raise BankError(f"`{file}` does not hold {K} finite numbers of `{metric}` for every run. Complete it.")
        found[metric] = torch.tensor(rows, dtype=torch.float32)
    return found
