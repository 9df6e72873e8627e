"""Weights that a generator writes when it is asked for a metric. P = flat weights, S = updates, K = checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Point, SearchSpace
from lcsc.models.parameter_sampling import updated
from lcsc.models.weight_generator import WeightGenerator, open_generator
from lcsc.models.weight_runs import METRICS_FILE
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, Plan, candidate, flat_row, row_of

#: whose weights: the generator's, or of what it has to be compared with. The order is that of the box `start` behind K
PROPOSALS = ("generated", "nearest", "mean", "noisy", "sgd", "adam")
#: training checkpoints in a mean, and the noise on one, in standard deviations of all its weights
MEAN_OF, NOISES = 5, (0.05, 0.1)
#: streams of the search purpose
DIFFUSION, POST = 11, 12
#: digits that distances are told in: their last bits depend on the machine
DIGITS = 6
#: most noise seeds and most noise that are searched
MAX_SEEDS, MAX_NOISE = 8, 0.1
#: steps of a sampler where nothing else is said, and the fewest and most that are searched
SAMPLER_STEPS, FEWEST, MOST = 10, 1, 50
#: bound of a coefficient, beyond what searches try: nevergrad takes bounds of all boxes or of none
MAX_COEF = 10.0


@register(
    "operator", "generate_weights", source="G.pt, arXiv:2209.12892; baselines and distance after arXiv:2506.07998"
)
@dataclass(frozen=True)
class GenerateWeights:
    """A generator (`ParameterDiT`) sees a checkpoint and its metric, and writes the weights of a wanted one.

    What is left null is searched; without a search it is the first checkpoint, one update of ten sampler steps that
    asks for the best metric that the generator has seen, and no noise. Candidates are scored by their measured metric,
    whatever was asked for.

    Baselines of every search: the training checkpoint whose metric is nearest to the best one seen, the mean of five of
    them from different runs (hidden units matched), the first with noise, and what SGD and Adam reach from the first
    checkpoint in the time of one update, where the trainer knew the data. The recipe tells the distance to the nearest
    training checkpoint once hidden units are matched.

    Args:
        generator: its folder; null is `generator` inside the bank's.
        proposal: `generated`, or one of the baselines: `nearest`, `mean`, `noisy`, `sgd`, `adam`.
        start_step: checkpoint to start from.
        start_metric: its metric; null is what the trainer measured of the run that it held out, and for other
            checkpoints what the bank's `metrics.json` says.
        goals: what each update asks for, in the metric's unit, one number or a list of one an update.
        max_updates: most updates of a search; the metric that the next update is told is what the last one asked for.
        reach: how far beyond the best metric seen a search may ask, as a share of the range seen; such prompts are told
            as extrapolation.
        sampler_steps: of deterministic DDIM in each update. Null searches 1 to 50 of them on a log scale.
        post_noise: standard deviation of noise on the result, in those of its weights.
        noise_seed: of the diffusion. Null searches it only where samples of two noises are at least `min_diversity`
            times as far apart as the ends of two runs, as measured when the generator was trained; else it is 0.
        min_diversity: see there.
        combine: further steps of the bank, or `all`, that a combination may add to what is generated: LCSC with the
            generated weights as one checkpoint more. The weights are (1 - sum c) generated + sum c_k checkpoint_k.
    """

    generator: str | None = None
    proposal: str = "generated"
    start_step: int | None = None
    start_metric: float | None = None
    goals: Any = None
    max_updates: int = 3
    reach: float = 0.1
    sampler_steps: int | None = SAMPLER_STEPS
    post_noise: float | None = None
    noise_seed: int | None = None
    min_diversity: float = 0.05
    combine: Any = None

    def __post_init__(self) -> None:
        if self.proposal not in PROPOSALS:
            raise ConfigError(f"`operator.proposal` is `{self.proposal}`.{did_you_mean(self.proposal, PROPOSALS)}")
        for name in ("max_updates", "sampler_steps"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ConfigError(f"`operator.{name}` is {count}; it must be at least 1.")
        for name in ("reach", "post_noise", "noise_seed", "min_diversity"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ConfigError(f"`operator.{name}` is {value}; it must be at least 0 and finite.")
        if self.goals is not None:
            listed = isinstance(self.goals, Sequence) and not isinstance(self.goals, str)
            numbers = list(self.goals) if listed else [self.goals]
            if not numbers or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
                raise ConfigError(f"`operator.goals` is `{self.goals}`; give a number, or a list of one an update.")
            self.__dict__["goals"] = tuple(float(x) for x in numbers)
        if self.combine not in (None, "all"):
            steps = list(self.combine) if isinstance(self.combine, Sequence) else []
            if not steps or not all(type(step) is int for step in steps):
                raise ConfigError(f"`operator.combine` is `{self.combine}`; give `all`, or a list of steps.")
            self.__dict__["combine"] = tuple(steps)

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Whatever of start, goals, noise and seed is not fixed; zeros are the defaults."""
        made = self._opened(bank)
        boxes = [Box("start", 1, 0.0, 1.0 if self.start_step is not None else float(bank.num_checkpoints), scale=0.2)]
        if self.goals is None:
            boxes.append(Box("goals", self.max_updates, -self.reach or -1e-9, 1.0, scale=0.1))
            if self.max_updates > 1:
                boxes.append(Box("updates", 1, 0.0, float(self.max_updates), scale=0.5))
        if self.sampler_steps is None:
            ends = (math.log2(count / SAMPLER_STEPS) for count in (FEWEST, MOST))
            boxes.append(Box("sampler_steps", 1, *ends, scale=0.5))
        if self.post_noise is None:
            boxes.append(Box("post_noise", 1, 0.0, MAX_NOISE, scale=0.01))
        if self.noise_seed is None and made.noise_matters >= self.min_diversity:
            boxes.append(Box("noise_seed", 1, 0.0, float(MAX_SEEDS), scale=1.0))
        if self.combine is not None:  # a refinement: idle at zero
            boxes.append(Box("coef", len(self._combined(bank)), -MAX_COEF, MAX_COEF, scale=0.1, level=1))
        space = SearchSpace(tuple(boxes))
        self.plan(bank, space.to_point(np.zeros(space.size)))  # refuses settings that do not fit
        return space

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """The generator's first try, and what it has to be compared with; see the class."""
        space, made = self.space(bank), self._opened(bank)
        rows = []
        if self.proposal == "generated":  # else the same point is one of those below
            rows.append(Baseline("one_update", "one update, best seen", space.to_point(np.zeros(space.size))))
        labels = {  # short enough for pictures
            "nearest": "best checkpoint seen",
            "mean": f"mean of {MEAN_OF} seen",
            **{kind: self._rival_label(made, kind) for kind in ("sgd", "adam") if kind in made.rivals},
        }
        for kind, label in labels.items():
            point = space.to_point(np.zeros(space.size))
            point["start"][:] = self._beyond(bank) + PROPOSALS.index(kind) - 0.5
            rows.append(Baseline(kind, label, point))
        for sigma in NOISES if self.post_noise is None else ():
            point = space.to_point(np.zeros(space.size))
            point["start"][:] = self._beyond(bank) + PROPOSALS.index("noisy") - 0.5
            point["post_noise"][:] = sigma
            rows.append(Baseline("noisy", f"best seen, noise {sigma:g}", point))
        return rows

    def notes(self, bank: CheckpointBank) -> list[str]:
        """What the generator has seen, and whether its noise matters."""
        net, told = self._opened(bank).net, self._opened(bank)
        lines = [f"the generator has seen {net.metric} from {net.best:.4g} to {net.worst:.4g}"]
        if self.noise_seed is None and told.noise_matters < self.min_diversity:
            lines.append(
                f"its noise moves samples by {told.noise_matters:.2g} of the distance between two runs' ends, so the "
                "seed is not searched"
            )
        return lines

    def other_checkpoints(self, bank: CheckpointBank) -> Mapping[str, str]:
        """The generator's digest."""
        return {"generator": self._opened(bank).digest}

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The generated network."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """The weights, and how they came about; see `lcsc.operators.surgery`."""
        made, arch = self._opened(bank), need_arch(bank)
        if bank.layout.shapes != made.net.shapes:
            raise ConfigError(
                f"the generator in `{self._folder(bank)}` writes tensors {sorted(made.net.shapes)[:6]}, and the bank "
                f"`{bank.path}` holds {sorted(bank.layout.shapes)[:6]}, or their shapes differ; a generator is for one "
                "architecture."
            )
        row, proposal = self._start(bank, point)
        now = self._metric_at(bank, row, made)
        goals, noise, seed, count = self._goals(made, point), self._noise(point), self._seed(point), self._steps(point)
        start_P = flat_row(bank, row).double()
        theta_P = self._proposed(made, proposal, start_P, now, goals, seed, count)
        coef = [] if point is None or "coef" not in point else np.asarray(point["coef"], np.float64).tolist()
        theta_P = theta_P * (1 - sum(coef))
        for c, other_P in zip(coef, self._others(bank) if any(coef) else (), strict=False):
            theta_P = theta_P + c * other_P
        if noise:
            drawn_P = SeedRange(seed, Purpose.SEARCH).generator(0, POST).standard_normal(len(theta_P))
            theta_P = theta_P + noise * float(theta_P.std()) * torch.from_numpy(drawn_P)
        theta_P = theta_P.float()
        run, step, distance = made.nearest(theta_P)
        low, high = made.net.low, made.net.high
        recipe: dict[str, Any] = {
            "operator": "generate_weights",
            "steps": [bank.steps[row]],
            "proposal": proposal,
            "prompted_metric": made.net.metric,
            "start_metric": now,
            "goals": list(goals) if proposal == "generated" else [made.net.best],
            "extrapolation": proposal == "generated" and not all(low <= goal <= high for goal in goals),
            "sampler_steps": count,
            "post_noise": noise,
            "noise_seed": seed,
            "nearest": {"run": run, "step": step, "distance": _rounded(distance)},
            "moved": _rounded(float((theta_P.double() - start_P).norm())),
            "generator_digest": made.digest,
            **({"combined": dict(zip(map(str, self._combined(bank)), coef, strict=True))} if any(coef) else {}),
        }
        settled = replace(
            self,
            generator=str(self._folder(bank)),
            proposal=proposal,
            start_step=bank.steps[row],
            start_metric=now,
            combine=None if self.combine is None else self._combined(bank),
        )
        return Plan(row, arch, (_piece(bank, theta_P),), recipe, settled=settled)

    # ------------------------------------------------------------------------------------------------- details

    def _folder(self, bank: CheckpointBank) -> Path:
        return Path(self.generator) if self.generator is not None else Path(bank.path) / "generator"

    def _opened(self, bank: CheckpointBank) -> WeightGenerator:
        return open_generator(self._folder(bank))

    def _beyond(self, bank: CheckpointBank) -> int:
        """Where the box `start` ends; baselines lie behind."""
        return 1 if self.start_step is not None else bank.num_checkpoints

    def _start(self, bank: CheckpointBank, point: Point | None) -> tuple[int, str]:
        """The bank's row to start from, and whose weights are proposed."""
        row = 0 if self.start_step is None else row_of(bank, self.start_step, "start_step")
        if point is None or "start" not in point:
            return row, self.proposal
        x, end = float(np.asarray(point["start"]).reshape(-1)[0]), self._beyond(bank)
        if x > end:  # no search goes there
            return row, PROPOSALS[min(int(x) - end + 1, len(PROPOSALS) - 1)]
        return (row if self.start_step is not None else min(int(x), end - 1)), self.proposal

    def _combined(self, bank: CheckpointBank) -> tuple[int, ...]:
        """Steps that a combination may add."""
        return bank.steps if self.combine == "all" else tuple(self.combine)

    def _others(self, bank: CheckpointBank) -> list[Tensor]:
        """Their weights, float64, shape (P,) each; from the bank's place where it was opened with fewer steps."""
        steps = self._combined(bank)
        whole = bank if set(steps) <= set(bank.steps) else CheckpointBank.open(bank.path, storage="streamed")
        return [flat_row(whole, row_of(whole, step, "combine")).double() for step in steps]

    def _metric_at(self, bank: CheckpointBank, row: int, made: WeightGenerator) -> float:
        if self.start_metric is not None:
            return self.start_metric
        if (known := made.known_metric(bank.parent(row)["content"])) is not None:
            return known
        file = Path(bank.path) / METRICS_FILE
        try:
            return float(json.loads(file.read_text(encoding="utf-8"))[made.net.metric][str(bank.steps[row])])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the {made.net.metric} of step {bank.steps[row]} is not known: `{file}` does not tell it ({error!r}). "
                "Write {metric: {step: number}} there, or give it with operator.start_metric."
            ) from error

    def _goals(self, made: WeightGenerator, point: Point | None) -> tuple[float, ...]:
        """What each update asks for."""
        if self.goals is not None:
            return self.goals  # type: ignore[no-any-return]
        net = made.net
        if point is None or "goals" not in point:
            return (net.best,)
        count = 1 if "updates" not in point else _whole(point["updates"], self.max_updates) + 1
        shares = np.asarray(point["goals"], np.float64).reshape(-1)[: min(count, self.max_updates)]
        return tuple(float(net.best + x * (net.worst - net.best)) for x in shares)

    def _noise(self, point: Point | None) -> float:
        if self.post_noise is not None:
            return self.post_noise
        return (
            0.0 if point is None or "post_noise" not in point else float(np.asarray(point["post_noise"]).reshape(-1)[0])
        )

    def _steps(self, point: Point | None) -> int:
        """Sampler steps of an update."""
        if self.sampler_steps is not None:
            return self.sampler_steps
        x = 0.0 if point is None or "sampler_steps" not in point else float(np.asarray(point["sampler_steps"])[0])
        return min(max(round(SAMPLER_STEPS * 2**x), FEWEST), MOST)

    def _seed(self, point: Point | None) -> int:
        if self.noise_seed is not None:
            return self.noise_seed
        return 0 if point is None or "noise_seed" not in point else _whole(point["noise_seed"], MAX_SEEDS)

    def _proposed(
        self,
        made: WeightGenerator,
        proposal: str,
        start_P: Tensor,
        now: float,
        goals: tuple[float, ...],
        seed: int,
        count: int,
    ) -> Tensor:
        """Weights, float64, shape (P,)."""
        if proposal in ("sgd", "adam"):
            if proposal not in made.rivals:
                raise ConfigError(
                    f"`operator.proposal` is `{proposal}`, and the generator's trainer did not know the data. Take "
                    f"another one of {', '.join(PROPOSALS)}."
                )
            return made.rivals[proposal].double()
        if proposal != "generated":
            return made.copied(made.net.best, MEAN_OF if proposal == "mean" else 1)
        shape = (len(goals), 1, len(start_P))
        noise_S1P = SeedRange(seed, Purpose.SEARCH).generator(0, DIFFUSION).standard_normal(shape)
        wanted = [torch.tensor([goal], dtype=torch.float64) for goal in goals]
        now_1 = torch.tensor([now], dtype=torch.float64)
        return updated(made.net, start_P[None], now_1, wanted, noise_S1P, count)[-1][0]

    @staticmethod
    def _rival_label(made: WeightGenerator, kind: str) -> str:
        told = made.measured["time"]["optimizers"][kind]
        return f"{told['steps']} {kind.upper() if kind == 'sgd' else kind.title()} steps, same time"


def _whole(x: np.ndarray, count: int) -> int:
    """The whole number that a float in [0, count] stands for, 0 to count - 1."""
    return min(int(np.asarray(x).reshape(-1)[0]), count - 1)


def _rounded(distance: float) -> float:
    return float(f"{distance:.{DIGITS}g}")


def _piece(bank: CheckpointBank, theta_P: Tensor) -> Piece:
    """All tensors at once."""
    layout = bank.layout
    names = tuple(entry.name for entry in layout.entries)

    def make(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        views = layout.views(theta_P)
        return {name: views[name].to(tensors[name].dtype) for name in names}, {}

    return Piece(names, {name: layout.shapes[name] for name in names}, make, {})
