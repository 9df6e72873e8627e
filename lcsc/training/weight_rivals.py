"""What a generator's update is compared with: optimizers in equal time, and how much its noise matters.

P = flat weights, N = networks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.seeds import SeedRange
from lcsc.models.many_classifiers import Many, losses_of
from lcsc.models.parameter_dit import ParameterDiT
from lcsc.models.parameter_sampling import propose
from lcsc.training.weight_runs import Parts

#: learning rates that a rival chooses from by its metric on the search part
RATES = {"sgd": (0.1, 0.3, 1.0, 3.0), "adam": (0.01, 0.03, 0.1, 0.3)}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
#: stream of the training purpose
NOISE = 9


def descend(many: Many, parts: Parts, theta_P: Tensor, kind: str, rate: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Full-batch steps of an optimizer from `theta_P`: the last weights (P,), and those after each (num_steps, P)."""
    theta_1P = theta_P[None].clone().requires_grad_(True)
    optimizer, way = OPTIMIZERS[kind]([theta_1P], lr=rate), []
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses_of(many.logits(theta_1P, parts.x[0]), parts.labels[0][None]).mean().backward()  # type: ignore
        optimizer.step()
        way.append(theta_1P.detach()[0].clone())
    return way[-1], torch.stack(way)


def seconds_of(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def equal_time(
    net: ParameterDiT, many: Many, parts: Parts, theta_P: Tensor, now: float, num_steps: int, metric: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights that SGD and Adam reach in the time of one update, each with the learning rate that suits it best there.

    Args:
        net: float32.
        theta_P, now: where all begin, and the metric there.
        num_steps: of the sampler.
        metric: by which the learning rate is chosen, on the search part.

    Returns:
        Weights by name of the optimizer, and what was measured.
    """
    noise_1P, goal_1, now_1 = torch.zeros_like(theta_P)[None], torch.tensor([net.best]), torch.tensor([now])
    update = seconds_of(lambda: propose(net, theta_P[None], now_1, goal_1, noise_1P, num_steps))
    found, told = {}, {}
    for kind, rates in RATES.items():
        step = seconds_of(lambda kind=kind, rates=rates: descend(many, parts, theta_P, kind, rates[0], 20)) / 20
        count = max(1, round(update / step))
        ends = torch.stack([descend(many, parts, theta_P, kind, rate, count)[0] for rate in rates])
        scores = many.metrics(ends, parts.x[1], parts.labels[1])[metric].nan_to_num(float("inf"))
        best = int(scores.argmin())
        found[kind] = ends[best]
        told[kind] = {"steps": count, "rate": rates[best], "seconds_a_step": step}
    return found, {"seconds_an_update": update, "sampler_steps": num_steps, "optimizers": told}


def diversity(
    net: ParameterDiT, theta_NP: Tensor, now_N: Tensor, ends_NP: Tensor, num_steps: int, seeds: SeedRange
) -> dict[str, float]:
    """Mean distance between samples that differ in their noise alone, in their start alone, and between true ends.

    Args:
        theta_NP, now_N: first checkpoints of runs, and their metric.
        ends_NP: the last ones.
    """
    goal_N = torch.full_like(now_N, net.best)
    noise_NP = torch.from_numpy(seeds.normal(range(len(theta_NP)), theta_NP.shape[1:], NOISE))
    one_NP = theta_NP[:1].expand_as(theta_NP).contiguous()
    noises = propose(net, one_NP, now_N[:1].expand_as(now_N), goal_N, noise_NP, num_steps)
    starts = propose(net, theta_NP, now_N, goal_N, noise_NP[:1].expand_as(noise_NP), num_steps)
    return {"noise": _apart(noises), "starts": _apart(starts), "runs": _apart(ends_NP)}


def _apart(theta_NP: Tensor) -> float:
    """Mean distance of two rows; 0 for one row."""
    gaps = [float((a - b).norm()) for a, b in combinations(theta_NP, 2)]
    return float(np.mean(gaps)) if gaps else 0.0
