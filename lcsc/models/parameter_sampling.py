"""Weights from a trained `ParameterDiT`. N = networks, P = flat weights, S = updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import EvaluationError
from lcsc.models.parameter_dit import NUM_TIMES, ParameterDiT
from lcsc.recycling.neurons import aligning, hidden_layers, undone

#: asks for the metric of weights, float (N, P) -> (N,)
Measure = Callable[[Tensor], Tensor]


def scheduler(num_steps: int) -> object:
    """diffusers' DDIM on the schedule of training (linear, 1e-4 to 0.02), set to `num_steps`."""
    from diffusers import DDIMScheduler  # takes seconds to import

    ddim = DDIMScheduler(
        NUM_TIMES, 1e-4, 0.02, "linear", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    ddim.set_timesteps(num_steps)
    return ddim


def alphas_bar() -> Tensor:
    """Share of the signal's variance at each step of the diffusion in training, float64, shape (NUM_TIMES,)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TIMES, dtype=torch.float64), 0)


@torch.no_grad()
def propose(
    net: ParameterDiT, theta_NP: Tensor, now_N: Tensor, goal_N: Tensor, noise_NP: Tensor, num_steps: int = 10
) -> Tensor:
    """One update: weights that should have the metric `goal_N`, in shape and dtype of `theta_NP`.

    Args:
        net: trained.
        theta_NP: where to start.
        now_N, goal_N: the metric there, and the wanted one.
        noise_NP: unit normal.
        num_steps: of deterministic DDIM (eta = 0).
    """
    ddim, dtype = scheduler(num_steps), theta_NP.dtype
    places_NP = order_of(net, theta_NP)
    start_NP = theta_NP.gather(1, places_NP) * net.scale
    x_NP = noise_NP.to(dtype)
    for t in ddim.timesteps:  # type: ignore[attr-defined]
        guess_NP = net(x_NP, torch.full_like(now_N, float(t)), goal_N, now_N, start_NP)
        x_NP = ddim.step(guess_NP, t, x_NP).prev_sample  # type: ignore[attr-defined]
    back_NP = torch.from_numpy(undone(places_NP.cpu().numpy())).to(theta_NP.device)
    # the last guess is where DDIM ends; diffusers stops short of it where the steps do not divide the schedule
    return (guess_NP.to(dtype) / net.scale).gather(1, back_NP)


def order_of(net: ParameterDiT, theta_NP: Tensor) -> Tensor:
    """Places of the weights in the order that the network reads them, int64, shape (N, P)."""
    num, size = theta_NP.shape
    layers = hidden_layers(net.shapes) if net.align else ()
    if not layers:
        return torch.arange(size, device=theta_NP.device).expand(num, size)
    places_NP = aligning(layers, theta_NP.double().cpu().numpy(), net.reference.double().cpu().numpy())
    return torch.from_numpy(places_NP).to(theta_NP.device)


def updated(
    net: ParameterDiT,
    theta_NP: Tensor,
    now_N: Tensor,
    goals_SN: Sequence[Tensor],
    noise_SNP: np.ndarray,
    num_steps: int = 10,
    measure: Measure | None = None,
) -> list[Tensor]:
    """Recursive prompting: the weights after each of S updates.

    Args:
        net: trained.
        theta_NP, now_N: weights and their metric.
        goals_SN: prompts of each update.
        noise_SNP: unit normal noise of each.
        num_steps: of DDIM in each.
        measure: gives the metric that the next update is told; without one it is told that the goal was reached.

    Raises:
        EvaluationError: an update is not finite.
    """
    out = []
    for goal_N, noise_NP in zip(goals_SN, noise_SNP, strict=True):
        theta_NP = propose(net, theta_NP, now_N, goal_N, torch.from_numpy(noise_NP).to(theta_NP), num_steps)
        if not torch.isfinite(theta_NP).all():
            raise EvaluationError("the generated weights hold NaN or Inf; ask for a metric inside the range seen.")
        out.append(theta_NP)
        now_N = goal_N if measure is None else measure(theta_NP)
    return out


def exact(net: ParameterDiT) -> ParameterDiT:
    """A copy in float64 on the CPU, whose weights, rounded to float32, are the same for any number of threads."""
    return copy.deepcopy(net).to("cpu", torch.float64).eval()
