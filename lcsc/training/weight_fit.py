"""Training a `ParameterDiT` on runs: draws, loss, average and loop. N = pairs, P = flat weights."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.seeds import SeedRange
from lcsc.models.parameter_dit import NUM_TIMES, SCALED_STD, ParameterDiT
from lcsc.models.parameter_sampling import alphas_bar, order_of
from lcsc.models.weight_runs import WeightRuns
from lcsc.recycling.neurons import hidden_layers, shuffled
from lcsc.training.folder import BankFolder
from lcsc.training.loop import LOG_EVERY, check_finite, deferred_interrupt
from lcsc.training.progress import reporter
from lcsc.training.state import Progressed, load_state, save_state

#: streams of the training purpose beside those of the runs: the pairs of a step, initial weights of the generator
PAIRS, NET = 7, 8
#: steps between states that an interrupted training goes on from
STATE_EVERY = 200
#: how the two checkpoints of a pair are drawn
PAIRINGS = ("spacing", "prompts")


@dataclass(frozen=True)
class FitSettings:
    """How a generator is trained.

    Args:
        num_steps: optimizer steps.
        batch_size: pairs of checkpoints a step.
        learning_rate: of AdamW at the start; it falls to 0 along a cosine, after `warmup` steps of rise.
        weight_decay: of AdamW.
        warmup: steps.
        max_grad_norm: larger gradients are scaled down to it.
        ema: largest rate of the average that is saved; in step s it is at most (1 + s) / (10 + s).
        permute: whether hidden units are brought into a random order in every pair.
        pairs: of `PAIRINGS`. `spacing` draws how far apart the two checkpoints are first, as the paper does. `prompts`
            draws them as they will be asked for: half of the starts are first checkpoints, and the later one is nearest
            to a metric drawn evenly from what the run reaches after the start.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: int
    max_grad_norm: float
    ema: float
    permute: bool
    pairs: str = "spacing"

    def __post_init__(self) -> None:
        if self.pairs not in PAIRINGS:
            raise ConfigError(f"`trainer.pairs` is `{self.pairs}`.{did_you_mean(self.pairs, PAIRINGS)}")
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`trainer.{name}` is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.learning_rate < math.inf or not self.max_grad_norm > 0:
            raise ConfigError(
                f"`trainer.learning_rate` is {self.learning_rate} and `max_grad_norm` {self.max_grad_norm}; both must "
                "be above 0."
            )
        if not 0 <= self.ema < 1 or self.warmup < 0 or not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"`trainer.ema`, `warmup` and `weight_decay` are {self.ema}, {self.warmup} and {self.weight_decay}; "
                "the first must lie in [0, 1), the others at or above 0."
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.learning_rate * step / self.warmup
        done = (step - self.warmup) / max(1, self.num_steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


class _Both(nn.Module):
    """The network that learns and its average, which one state holds."""

    def __init__(self, net: ParameterDiT) -> None:
        super().__init__()
        self.net, self.average = net, copy.deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the average."""
        for mean, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(now, 1 - rate)


def new_generator(runs: WeightRuns, sizes: dict[str, Any], metric: str, align: bool, seeds: SeedRange) -> ParameterDiT:
    """An untrained generator for the runs; with `align` the first run's last checkpoint is the reference.

    Raises:
        ConfigError: a metric that they do not have, sizes that do not fit, or `align` without hidden layers.
    """
    metric_RK = runs.metric(metric)
    if align and not hidden_layers(runs.shapes):
        raise ConfigError("`trainer.align` is true, and the weights have no hidden layers. Leave it out.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generator(0, NET).integers(2**63)))
        net = ParameterDiT(
            {name: list(shape) for name, shape in runs.shapes.items()},
            **sizes,
            metric=metric,
            align=align,
            scale=SCALED_STD / float(runs.theta_RKP.std()),
            center=float(metric_RK.mean()),
            spread=float(metric_RK.std()) or 1.0,
            low=float(metric_RK.min()),
            high=float(metric_RK.max()),
        )
    if align:
        net.reference.copy_(runs.theta_RKP[0, -1])
    return net


class Pairs:
    """Draws pairs of an earlier and a later checkpoint of one run (arXiv:2209.12892, Section 3.1).

    Unlike there both may be the same, so that a prompt for the present metric is answered by the present weights.
    """

    def __init__(self, runs: WeightRuns, net: ParameterDiT, settings: FitSettings, seeds: SeedRange) -> None:
        self._runs, self._net, self._settings, self._seeds = runs, net, settings, seeds
        self._metric_RK, self._layers = runs.metric(net.metric), hidden_layers(runs.shapes)
        self._theta_RKP = runs.theta_RKP * net.scale
        R, K, P = self._theta_RKP.shape
        self._order_RKP = None
        if net.align:  # the order that a checkpoint to start from has, which the later one shares
            self._order_RKP = order_of(net, runs.theta_RKP.flatten(0, 1)).reshape(R, K, P)

    def draw(self, step: int) -> dict[str, Tensor]:
        """`x`, `t`, `goal`, `now` and `theta` of `ParameterDiT.forward`, and `target`; a function of the step alone."""
        R, _, P = self._theta_RKP.shape
        N, rng = self._settings.batch_size, self._seeds.generator(step, PAIRS)
        run_N = rng.integers(R, size=N)
        early_N, late_N = self._prompted(run_N, rng) if self._settings.pairs == "prompts" else self._spaced(run_N, rng)
        theta_NP, target_NP = self._theta_RKP[run_N, early_N], self._theta_RKP[run_N, late_N]
        t_N = torch.from_numpy(rng.integers(NUM_TIMES, size=N))
        noise_NP = torch.from_numpy(rng.standard_normal((N, P), dtype=np.float32))
        order_NP = None
        if self._order_RKP is not None:
            order_NP = self._order_RKP[run_N, early_N]
        elif self._settings.permute and self._layers:
            order_NP = torch.from_numpy(shuffled(self._layers, N, P, rng))
        if order_NP is not None:
            theta_NP, target_NP = theta_NP.gather(1, order_NP), target_NP.gather(1, order_NP)
        return {
            "x": noised(target_NP, noise_NP, t_N),
            "t": t_N,
            "goal": self._metric_RK[run_N, late_N],
            "now": self._metric_RK[run_N, early_N],
            "theta": theta_NP,
            "target": target_NP,
        }

    def _spaced(self, run_N: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The spacing first, then the earlier checkpoint; ranks of both, int64, shape (N,)."""
        N, K = len(run_N), self._metric_RK.shape[1]
        apart_N = rng.integers(K, size=N)
        early_N = (rng.random(N) * (K - apart_N)).astype(np.int64)
        return early_N, early_N + apart_N

    def _prompted(self, run_N: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As `_spaced`: the earlier checkpoint, then the metric that the later one is nearest to."""
        N, K = len(run_N), self._metric_RK.shape[1]
        early_N = np.where(rng.random(N) < 0.5, 0, rng.integers(K, size=N))
        metric_NK, places_N = self._metric_RK[run_N].double().numpy(), np.arange(N)
        later_NK = np.arange(K) >= early_N[:, None]
        sign, now_N = -1 if self._net.rising else 1, metric_NK[places_N, early_N]
        best_N = metric_NK[places_N, np.where(later_NK, sign * metric_NK, np.inf).argmin(1)]
        goal_N = now_N + rng.random(N) * (best_N - now_N)
        return early_N, np.where(later_NK, np.abs(metric_NK - goal_N[:, None]), np.inf).argmin(1)


def noised(clean_NP: Tensor, noise_NP: Tensor, t_N: Tensor) -> Tensor:
    """sqrt(alpha_bar_t) clean + sqrt(1 - alpha_bar_t) noise (DDPM, arXiv:2006.11239, Eq. 4)."""
    kept_N1 = alphas_bar()[t_N][:, None]
    return kept_N1.sqrt().to(clean_NP) * clean_NP + (1 - kept_N1).sqrt().to(clean_NP) * noise_NP


def fit_generator(
    net: ParameterDiT,
    runs: WeightRuns,
    settings: FitSettings,
    seeds: SeedRange,
    folder: BankFolder | None = None,
    progress: bool | None = None,
    device: str = "cpu",
) -> ParameterDiT:
    """Train `net` on `runs` and return its average, on the CPU.

    With a folder the state is saved every `STATE_EVERY` steps and a training that was interrupted goes on there with
    the bits of an unbroken one.

    Raises:
        EvaluationError: the loss is not finite.
        KeyboardInterrupt: after the state was saved.
    """
    both, pairs = _Both(net).to(device), Pairs(runs, net, settings, seeds)
    optimizer = torch.optim.AdamW(both.net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    done = Progressed() if folder is None else load_state(folder.state_path, both, optimizer, folder.digest)
    both.net.train()
    show = reporter("learning to write weights", done.step, settings.num_steps, progress=progress)
    with deferred_interrupt() as interrupted, show as report:
        for step in range(done.step + 1, settings.num_steps + 1):
            loss = _step(both, optimizer, pairs, settings, step, device)
            check_finite(loss, step, settings.learning_rate)
            done.losses.append(loss)
            done.step = step
            report(step, loss)
            stop = interrupted()
            if folder is not None and (stop or step % STATE_EVERY == 0 or step == settings.num_steps):
                save_state(folder.state_path, both, optimizer, done, folder.digest)
            if stop and step < settings.num_steps:
                raise KeyboardInterrupt
    if folder is not None:
        _write_log(folder, done.losses)
    return both.average.to("cpu").eval()


def _step(
    both: _Both, optimizer: torch.optim.Optimizer, pairs: Pairs, settings: FitSettings, step: int, device: str
) -> float:
    drawn = {name: numbers.to(device) for name, numbers in pairs.draw(step).items()}
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    guess_NP = both.net(drawn["x"], drawn["t"], drawn["goal"], drawn["now"], drawn["theta"])
    loss = (guess_NP - drawn["target"]).square().mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(both.net.parameters(), settings.max_grad_norm)
    optimizer.step()
    both.follow(min(settings.ema, (1 + step) / (10 + step)))
    return float(loss.detach())


def _write_log(folder: BankFolder, losses: list[float]) -> None:
    """The loss curve: means over `LOG_EVERY` steps."""
    with folder.open_log(0) as log:
        for stop in range(LOG_EVERY, len(losses) + 1, LOG_EVERY):
            mean = sum(losses[stop - LOG_EVERY : stop]) / LOG_EVERY
            log.write(json.dumps({"step": stop, "loss": mean}) + "\n")
        log.flush()
        os.fsync(log.fileno())
