"""A trained generator of weights as a folder, with what it learned from. M = training checkpoints, P = flat weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcsc.core.digests import file_sha256, value_digest
from lcsc.core.errors import BankError
from lcsc.core.files import write_json
from lcsc.models.network import load_network, save_network
from lcsc.models.parameter_dit import ParameterDiT
from lcsc.models.parameter_sampling import exact
from lcsc.models.weight_runs import WeightRuns
from lcsc.recycling.neurons import aligning, hidden_layers, matched_distances

SEEN, RIVALS, MEASURED = "seen.safetensors", "rivals.safetensors", "measured.json"


@dataclass(frozen=True, eq=False)
class WeightGenerator:
    """What a generator is, what it has seen, and what was measured when its training ended.

    Args:
        net: float64, on the CPU.
        theta_MP: training checkpoints, float32.
        metric_M: their metric.
        places: run and step of each.
        rivals: weights, float32 (P,), that optimizers reach from the bank's first checkpoint in the time of one update.
        measured: plain values: how much the noise matters, and how long an update takes.
        digest: of all of it.
    """

    net: ParameterDiT
    theta_MP: Tensor
    metric_M: Tensor
    places: tuple[tuple[str, int], ...]
    rivals: Mapping[str, Tensor]
    measured: Mapping[str, Any]
    digest: str

    def known_metric(self, content: str) -> float | None:
        """The metric of a checkpoint of the run that the trainer held out, by its content's digest; None for others."""
        return dict(self.measured.get("held_out") or {}).get(content)

    @property
    def noise_matters(self) -> float:
        """Distance between samples of two noises over that between the ends of two runs; 0 where not measured."""
        told = self.measured.get("diversity") or {}
        return float(told["noise"] / told["runs"]) if told.get("runs") else 0.0

    def nearest(self, theta_P: Tensor) -> tuple[str, int, float]:
        """Run and step of the training checkpoint that is nearest once hidden units are matched, and its distance."""
        seen_MP = self.theta_MP.double().numpy()
        distance_M = matched_distances(hidden_layers(self.net.shapes), theta_P.double().numpy(), seen_MP)
        m = int(distance_M.argmin())
        return (*self.places[m], float(distance_M[m]))

    def copied(self, goal: float, count: int = 1) -> Tensor:
        """The mean of the `count` training checkpoints nearest to a metric, of different runs, matched to the first.

        float64, shape (P,).
        """
        rows, runs = [], set()
        for m in torch.argsort((self.metric_M - goal).abs(), stable=True).tolist():
            if self.places[m][0] not in runs:
                runs.add(self.places[m][0])
                rows.append(m)
            if len(rows) == count:
                break
        theta_MP, layers = self.theta_MP[rows].double().numpy(), hidden_layers(self.net.shapes)
        if layers:
            theta_MP = np.take_along_axis(theta_MP, aligning(layers, theta_MP, theta_MP[0]), 1)
        return torch.from_numpy(theta_MP).mean(0)


def write_generator(
    folder: Path, net: ParameterDiT, runs: WeightRuns, rivals: Mapping[str, Tensor], measured: Mapping[str, Any]
) -> None:
    """Fill an empty folder."""
    save_network(net, folder)
    seen = {
        "theta": runs.theta_RKP.flatten(0, 1).contiguous(),
        "metric": runs.metric(net.metric).flatten().contiguous(),
    }
    save_file({**seen, "steps": torch.from_numpy(runs.steps_RK.copy())}, folder / SEEN)
    save_file({name: theta_P.contiguous() for name, theta_P in rivals.items()}, folder / RIVALS)
    write_json(folder / MEASURED, {**measured, "runs": list(runs.names)})


def open_generator(folder: Path) -> WeightGenerator:
    """The generator in a folder.

    Raises:
        BankError: a file is missing or damaged.
    """
    folder = Path(folder)
    try:
        stamp = tuple((folder / name).stat().st_mtime_ns for name in ("config.json", SEEN, MEASURED))
    except OSError as error:
        raise BankError(
            f"`{folder}` holds no generator of weights: {error}. Train one with `lcsc train experiment=gpt_digits`, or "
            "give its folder with operator.generator=DIR."
        ) from error
    return _open(folder, stamp)


@functools.lru_cache(maxsize=2)
def _open(folder: Path, stamp: tuple[int, ...]) -> WeightGenerator:
    net = load_network(folder)
    if not isinstance(net, ParameterDiT):
        raise BankError(f"`{folder}` holds a `{type(net).__name__}`; a generator of weights is a `ParameterDiT`.")
    try:
        seen, measured = load_file(folder / SEEN), json.loads((folder / MEASURED).read_text(encoding="utf-8"))
        rivals = load_file(folder / RIVALS)
        steps_RK = seen["steps"].numpy()
        places = tuple((run, int(k)) for run, row in zip(measured["runs"], steps_RK, strict=True) for k in row)
    except Exception as error:  # safetensors raises its own kinds
        raise BankError(f"`{folder}` is a damaged generator of weights: {error}. Train it again.") from error
    files = sorted(file for file in folder.iterdir() if file.is_file())
    digest = value_digest({file.name: file_sha256(file) for file in files})
    return WeightGenerator(exact(net), seen["theta"], seen["metric"], places, rivals, measured, digest)
