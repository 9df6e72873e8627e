"""Many short trainings of one small classifier, all at once, with checkpoints where they teach most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.bank.pack import write_pack
from lcsc.core.errors import ConfigError, EvaluationError, did_you_mean
from lcsc.core.files import write_json
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import Dataset, need_images
from lcsc.datasets.split import split_three
from lcsc.models.many_classifiers import Many, losses_of
from lcsc.models.weight_runs import METRICS_FILE, WeightRuns

INITS = ("own", "shared")
SAVES = ("log", "uniform")
#: streams of the training purpose: initial weights, batches
INIT, BATCH = 0, 1


@dataclass(frozen=True)
class RunSettings:
    """How the runs are made.

    Args:
        num_runs: R, those held out included.
        num_held_out: of them, which nothing learns from; they are the last.
        num_steps: SGD steps of a run.
        num_saves: checkpoints of a run, the initial weights among them.
        saves: `log` spaces them evenly in the logarithm of the step, `uniform` in the step. A generator of weights
            learns to heed its prompt from the first, and only to reach the end from the second.
        learning_rate: of SGD without momentum.
        batch_size: images a step.
        init: `own` weights for each run, or `shared` by all.
    """

    num_runs: int
    num_held_out: int
    num_steps: int
    num_saves: int
    saves: str
    learning_rate: float
    batch_size: int
    init: str

    def __post_init__(self) -> None:
        for name, known in (("init", INITS), ("saves", SAVES)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"`trainer.{name}` is `{value}`.{did_you_mean(value, known)}")
        if not 1 <= self.num_held_out < self.num_runs:
            raise ConfigError(
                f"`trainer.num_held_out` is {self.num_held_out} of {self.num_runs} runs; hold out at least 1, and "
                "leave at least 1 to learn from."
            )
        if not 3 <= self.num_saves <= self.num_steps + 1:
            raise ConfigError(
                f"`trainer.num_saves` is {self.num_saves}; it must be at least 3 and at most `run_steps` + 1, "
                f"{self.num_steps + 1}."
            )

    def steps(self) -> np.ndarray:
        """Steps of the checkpoints, increasing from 0, int64, shape (K,)."""
        if self.saves == "uniform":
            return np.unique(np.linspace(0, self.num_steps, self.num_saves).round().astype(np.int64))
        late = np.geomspace(1, self.num_steps, self.num_saves - 1)
        ranks = np.arange(1, self.num_saves)  # early ones would share a step: each is at least one behind the last
        return np.concatenate([[0], np.maximum(late.round().astype(np.int64), ranks)])


@dataclass(frozen=True, eq=False)
class Parts:
    """What a classifier reads of a data set, as numbers of its first layer, to train on, to search and to report.

    Args:
        x, labels: shape (N, F) and (N,) of each part, in the order train, search, report.
    """

    x: tuple[Tensor, Tensor, Tensor]
    labels: tuple[Tensor, Tensor, Tensor]


def parts_of(dataset: Dataset, many: Many, split_seed: int = 0) -> Parts:
    """The three parts of a data set with labels; raises ConfigError where it has none."""
    need_images(dataset, "this trainer")
    labels_N = dataset.labels()
    if labels_N is None:
        raise ConfigError(f"data set `{dataset.name}` has no labels, and classifiers learn them. Choose another one.")
    rows = [torch.from_numpy(part) for part in split_three(len(labels_N), split_seed, labels_N.numpy())]
    x_NF = many.net.features(dataset.images())
    train, search, report = rows
    return Parts((x_NF[train], x_NF[search], x_NF[report]), (labels_N[train], labels_N[search], labels_N[report]))


def make_runs(settings: RunSettings, many: Many, parts: Parts, seed: int) -> WeightRuns:
    """Train all runs side by side; metrics are those of the search part.

    Raises:
        EvaluationError: a run diverged.
    """
    seeds, steps_K = SeedRange(seed, Purpose.TRAIN), settings.steps()
    num = 1 if settings.init == "shared" else settings.num_runs
    inits = [int(seeds.generator(r, INIT).integers(2**63)) for r in range(num)]
    theta_RP = many.drawn(settings.num_runs, inits)
    kept = [theta_RP.clone()]
    saved = set(steps_K.tolist())
    for step in range(1, settings.num_steps + 1):
        shape = (settings.num_runs, settings.batch_size)
        rows_RN = torch.from_numpy(seeds.generator(step, BATCH).integers(len(parts.x[0]), size=shape))
        theta_RP.requires_grad_(True)
        losses_RN = losses_of(many.logits(theta_RP, parts.x[0][rows_RN]), parts.labels[0][rows_RN])
        (grad_RP,) = torch.autograd.grad(losses_RN.mean(1).sum(), theta_RP)
        theta_RP = theta_RP.detach() - settings.learning_rate * grad_RP
        if step in saved:
            kept.append(theta_RP.clone())
    theta_RKP = torch.stack(kept, 1)
    if not torch.isfinite(theta_RKP).all():
        raise EvaluationError(
            f"a run with `run_learning_rate` {settings.learning_rate} diverged; take a lower learning rate."
        )
    metrics = many.metrics(theta_RKP.flatten(0, 1), parts.x[1], parts.labels[1])
    shape = (settings.num_runs, len(steps_K))
    names = tuple(f"run-{r:05d}" for r in range(settings.num_runs))
    return WeightRuns(
        many.layout.shapes,
        names,
        np.tile(steps_K, (settings.num_runs, 1)),
        theta_RKP,
        {name: numbers.reshape(shape) for name, numbers in metrics.items()},
    )


def write_runs(runs: WeightRuns, many: Many, arch: Mapping[str, Any], folder: Path) -> None:
    """Each run as a packed bank in the new folder, and `metrics.json`, written last: with it the folder is whole."""
    if (folder / METRICS_FILE).exists():
        return
    if folder.exists():
        shutil.rmtree(folder)  # of a run that was killed here
    folder.mkdir(parents=True)
    loose, config = folder / ".loose", {"_class_name": arch["class"], **many.net.settings}
    for r, name in enumerate(runs.names):
        loose.mkdir()
        (loose / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for step, theta_P in zip(runs.steps_RK[r], runs.theta_RKP[r], strict=True):
            tensors = {key: view.contiguous() for key, view in many.layout.views(theta_P).items()}
            save_file(tensors, loose / f"checkpoint-{step:06d}.safetensors")
        write_pack(CheckpointBank.open(loose), folder / f"{name}.safetensors")
        shutil.rmtree(loose)
    told = {
        name: {metric: numbers[r].tolist() for metric, numbers in runs.metrics.items()}
        for r, name in enumerate(runs.names)
    }
    write_json(folder / METRICS_FILE, told)
