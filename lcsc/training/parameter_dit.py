"""A generator of weights, the runs it learns from, and a run that it has not seen."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcsc.bank.content import chunk_sums, content_digest
from lcsc.bank.layout import Layout
from lcsc.core.errors import ConfigError
from lcsc.core.files import new_directory, write_json
from lcsc.core.registry import describe, plain, register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import Dataset
from lcsc.datasets.content import data_digest
from lcsc.models.many_classifiers import METRICS, Many
from lcsc.models.network import build_network
from lcsc.models.parameter_dit import check_sizes
from lcsc.models.weight_generator import write_generator
from lcsc.models.weight_runs import METRICS_FILE, WeightRuns, read_runs
from lcsc.training.folder import BankFolder
from lcsc.training.weight_fit import FitSettings, fit_generator, new_generator
from lcsc.training.weight_rivals import diversity, equal_time
from lcsc.training.weight_runs import Parts, RunSettings, make_runs, parts_of, write_runs

#: starts that the noise is measured with
NUM_STARTS = 8


@register("trainer", "parameter_dit", source="G.pt, arXiv:2209.12892")
@dataclass(frozen=True)
class ParameterDiTTrainer:
    """Trains many small classifiers (or takes runs that are there), and a generator of their weights on them.

    The folder holds `runs/` (a packed bank for each run, and their metrics), `generator/`, and as its own checkpoints
    the first run that was held out, with `metrics.json`: what a search with operator `generate_weights` starts from. A
    training that was interrupted goes on with the bits of an unbroken one; only what is measured in seconds differs.

    Args:
        runs: folder of runs to learn from (`lcsc.models.weight_runs.read_runs`); null makes them.
        metric: that the generator is prompted with, of the runs' `metrics.json`; `loss` or `error` where they are made.
        rising: whether a larger metric is better.
        num_runs, num_held_out, run_steps, num_saves, saves, run_learning_rate, run_batch_size, init: see
            `lcsc.training.weight_runs.RunSettings`.
        tokens, chunk, width, num_layers, num_heads, freqs, max_log2: see `lcsc.models.parameter_dit.ParameterDiT`.
        align: see there; hidden units get the order that is nearest to those of the first run's last checkpoint.
        permute, pairs, num_steps, batch_size, learning_rate, weight_decay, warmup, max_grad_norm, ema: see
            `lcsc.training.weight_fit.FitSettings`.
        sampler_steps: of DDIM, when noise and time are measured.
        device: that the generator is trained on.
    """

    runs: str | None = None
    metric: str = "loss"
    rising: bool = False
    num_runs: int = 300
    num_held_out: int = 20
    run_steps: int = 600
    num_saves: int = 24
    saves: str = "log"
    run_learning_rate: float = 0.5
    run_batch_size: int = 64
    init: str = "own"
    tokens: str = "chunks"
    chunk: int = 34
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    freqs: int = 64
    max_log2: float = 3.0
    align: bool = False
    permute: bool = False
    pairs: str = "spacing"
    num_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 50
    max_grad_norm: float = 0.75
    ema: float = 0.999
    sampler_steps: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        _ = self.fit_settings
        check_sizes(self.sizes)
        if self.sampler_steps < 1:
            raise ConfigError(f"`trainer.sampler_steps` is {self.sampler_steps}; it must be at least 1.")
        if self.runs is None:
            _ = self.run_settings
            if self.metric not in METRICS or self.rising:
                raise ConfigError(
                    f"`trainer.metric` is `{self.metric}` and `rising` {self.rising}; runs that are made here have "
                    f"{' and '.join(METRICS)}, which fall. Choose one of them, or name a folder with `trainer.runs`."
                )

    @property
    def run_settings(self) -> RunSettings:
        """How runs are made."""
        names = ("num_runs", "num_held_out", "num_saves", "saves", "init")
        own = {name: getattr(self, name) for name in names}
        return RunSettings(
            **own, num_steps=self.run_steps, learning_rate=self.run_learning_rate, batch_size=self.run_batch_size
        )

    @property
    def fit_settings(self) -> FitSettings:
        """How the generator is trained."""
        names = (
            "num_steps",
            "batch_size",
            "learning_rate",
            "weight_decay",
            "warmup",
            "max_grad_norm",
            "ema",
            "permute",
            "pairs",
        )
        return FitSettings(**{name: getattr(self, name) for name in names})

    @property
    def sizes(self) -> dict[str, Any]:
        """The generator's own settings."""
        names = ("tokens", "chunk", "width", "num_layers", "num_heads", "freqs", "max_log2")
        return {name: getattr(self, name) for name in names}

    def train(
        self,
        *,
        arch: Mapping[str, Any],
        model: object,
        dataset: Dataset,
        out: Path,
        seed: int,
        progress: bool | None = None,
    ) -> Path:
        """Fill the folder `out`, or continue; see `lcsc.training.base.Trainer.train`. `model` is not used."""
        out, many = Path(out), None if self.runs else Many(arch)
        parts = None if many is None else parts_of(dataset, many)
        config = {
            "trainer": describe("trainer", self),
            "arch": plain(arch),
            "dataset": {"name": dataset.name, "digest": data_digest(dataset)} if parts else None,
            "seed": int(seed),
        }
        given = None if self.runs is None else read_runs(Path(self.runs))
        if given is not None:
            self._check(given, arch)
        steps = tuple(self.run_settings.steps().tolist()) if given is None else tuple(map(int, given.steps_RK[-1]))
        folder = BankFolder(out, config, steps, component="")
        folder.check()
        if folder.finished:
            return out
        with folder.lock():
            folder.check()
            folder.create()
            runs = self._runs(given, many, parts, arch, out, seed)
            self._fit(runs, many, parts, folder, seed, progress)
            self._bank(runs, arch, folder)
            folder.close()
        return out

    def _check(self, given: WeightRuns, arch: Mapping[str, Any]) -> None:
        """Raise ConfigError for runs that cannot be learned from, or whose networks are not those of `arch`."""
        if not 1 <= self.num_held_out < len(given.names):
            raise ConfigError(
                f"`trainer.num_held_out` is {self.num_held_out} of {len(given.names)} runs; hold out at least 1, and "
                "leave at least 1 to learn from."
            )
        given.metric(self.metric)
        shapes = {name: tuple(tensor.shape) for name, tensor in build_network(arch).state_dict().items()}
        if shapes != dict(given.shapes):
            raise ConfigError(
                f"`trainer.runs` `{self.runs}` holds networks of the tensors {dict(given.shapes)}, and `network` "
                f"makes a `{arch.get('class')}` of {shapes}. Describe the runs' network with `network`."
            )

    def _runs(
        self, given: WeightRuns | None, many: Many | None, parts: Parts | None, arch: Any, out: Path, seed: int
    ) -> WeightRuns:
        """What is learned from and what is held out, read from files in either case."""
        if given is not None:
            return given
        assert many is not None, "runs are made of classifiers"
        assert parts is not None, "and of their data"
        place = out / "runs"
        if not (place / METRICS_FILE).exists():
            write_runs(make_runs(self.run_settings, many, parts, seed), many, arch, place)
        return read_runs(place)

    def _fit(
        self,
        runs: WeightRuns,
        many: Many | None,
        parts: Parts | None,
        folder: BankFolder,
        seed: int,
        progress: bool | None,
    ) -> None:
        """Train the generator, and measure it on held-out runs."""
        place = folder.path / "generator"
        if place.exists():
            return
        seeds = SeedRange(seed, Purpose.TRAIN)
        learned, held = runs.part(slice(0, -self.num_held_out)), runs.part(slice(-self.num_held_out, None))
        net = new_generator(learned, {**self.sizes, "rising": self.rising}, self.metric, self.align, seeds)
        net = fit_generator(net, learned, self.fit_settings, seeds, folder, progress, self.device)
        theta_NP, now_N = held.theta_RKP[:NUM_STARTS, 0], held.metric(self.metric)[:NUM_STARTS, 0]
        ends_NP = held.theta_RKP[:NUM_STARTS, -1]
        measured: dict[str, Any] = {"diversity": diversity(net, theta_NP, now_N, ends_NP, self.sampler_steps, seeds)}
        measured["held_out"] = self._contents(held)
        rivals = {}
        if many is not None and parts is not None:
            rivals, time = equal_time(net, many, parts, theta_NP[0], float(now_N[0]), self.sampler_steps, self.metric)
            measured["time"] = time
        for left in folder.path.glob(".generator.*.tmp"):
            shutil.rmtree(left)
        with new_directory(place) as new:
            write_generator(new, net, learned, rivals, measured)

    def _contents(self, held: WeightRuns) -> dict[str, float]:
        """Metric of each checkpoint of the first held-out run by the digest of its content, wherever it will lie."""
        found = {}
        for k, theta_P in enumerate(held.theta_RKP[0]):
            views = Layout.of(held.shapes).views(theta_P)
            sums = {name: ("float32", tuple(t.shape), chunk_sums(t.contiguous().numpy())) for name, t in views.items()}
            found[content_digest(sums)] = float(held.metric(self.metric)[0, k])
        return found

    def _bank(self, runs: WeightRuns, arch: Mapping[str, Any], folder: BankFolder) -> None:
        """The first run that was held out, as checkpoints of its own."""
        held, layout = runs.part(slice(-self.num_held_out, None)), Layout.of(runs.shapes)
        told = {
            name: {str(step): float(x) for step, x in zip(folder.steps, numbers[0], strict=True)}
            for name, numbers in held.metrics.items()
        }
        write_json(folder.path / METRICS_FILE, told)
        net = build_network(arch)
        for step, theta_P in zip(folder.steps, held.theta_RKP[0], strict=True):
            net.load_state_dict(layout.views(theta_P))
            folder.write_checkpoint(net, step)
