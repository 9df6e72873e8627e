"""A bank on which the best combination is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import Dataset, need_images
from lcsc.models.base import Model
from lcsc.models.network import build_network
from lcsc.training.folder import BankFolder, make_config


@register("trainer", "gaussian_toy", source="lcsc")
@dataclass(frozen=True)
class GaussianToy:
    """Writes checkpoints of a `GaussianDenoiser` around a straight path that stops short of the truth.

    Checkpoint k is (1 - t_k) start + t_k truth + scatter, t_k rising evenly from 0 to `reach` < 1, so every average
    stays short of the truth. The scatter is shifted such that one combination with sum 1, the shortest that continues
    the path to t = 1, hits the truth exactly (to float32); where num_checkpoints - 1 >= number of parameters, generic
    scatter alone would put it in their affine span. That combination gives Fréchet distance 0.

    Args:
        num_checkpoints: checkpoints to write.
        save_every: steps that their names are apart.
        reach: share of the path that the last checkpoint has covered.
        scatter: standard deviation of the scatter, relative to the true standard deviation of each pixel.
        start_mean: mean of every pixel at the start.
        start_std: standard deviation at the start, relative to the true one.
    """

    num_checkpoints: int = 12
    save_every: int = 25
    reach: float = 0.8
    scatter: float = 0.2
    start_mean: float = 0.0
    start_std: float = 2.0

    def __post_init__(self) -> None:
        if self.num_checkpoints < 2 or self.save_every < 1:
            raise ConfigError(
                f"`num_checkpoints` {self.num_checkpoints} must be at least 2, "
                f"`save_every` {self.save_every} at least 1."
            )
        if not 0 < self.reach < 1 or self.scatter < 0 or self.start_std <= 0:
            raise ConfigError(
                f"`reach` {self.reach} must lie in (0, 1), `scatter` {self.scatter} must not be negative, "
                f"`start_std` {self.start_std} must be above 0."
            )

    def train(
        self,
        *,
        arch: Mapping[str, Any],
        model: Model,
        dataset: Dataset,
        out: Path,
        seed: int,
        progress: bool | None = None,
    ) -> Path:
        """Write the bank `out`, or what is missing of it; see `lcsc.training.base.Trainer.train`."""
        if arch.get("class") != "GaussianDenoiser":
            raise ConfigError(
                f"trainer `gaussian_toy` makes `GaussianDenoiser` networks, not `{arch.get('class')}`. "
                "Choose that class or another trainer."
            )
        need_images(dataset, "this trainer")
        images_NCHW, out = dataset.images(), Path(out)
        net = build_network(arch)
        truth_2CHW = true_parameters(dataset)
        parameters = dict(net.named_parameters())
        mean_CHW, std_CHW = parameters["mean_CHW"], parameters["std_CHW"]
        if mean_CHW.shape != truth_2CHW.shape[1:]:
            raise ConfigError(
                f"the network's `shape` is {tuple(mean_CHW.shape)}, the images of dataset `{dataset.name}` have "
                f"{tuple(truth_2CHW.shape[1:])}. Give both the same."
            )
        config = make_config(self, arch=arch, model=model, dataset=dataset, images_NCHW=images_NCHW, seed=seed)
        steps = tuple(self.save_every * (k + 1) for k in range(self.num_checkpoints))
        folder = BankFolder(out, config, steps)
        folder.check()
        if folder.finished:
            return out
        theta_K2CHW, _ = self.checkpoints(truth_2CHW, seed)
        with folder.lock():
            folder.check()
            folder.create()
            for step, theta_2CHW in zip(steps, theta_K2CHW, strict=True):
                with torch.no_grad():
                    mean_CHW.copy_(theta_2CHW[0])
                    std_CHW.copy_(theta_2CHW[1])
                folder.write_checkpoint(net, step)
            folder.close()
        return out

    def checkpoints(self, truth_2CHW: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of all checkpoints, and the coefficients that give the truth.

        Args:
            truth_2CHW: true mean and standard deviation of every pixel.
            seed: of the scatter.

        Returns:
            theta_K2CHW and coef_K, float64; coef_K sums to 1 and coef_K @ theta = truth.
        """
        truth = truth_2CHW.double().numpy()
        t_K = np.linspace(0, self.reach, self.num_checkpoints)
        start = np.stack([np.full_like(truth[0], self.start_mean), self.start_std * truth[1]])
        rng = SeedRange(seed, Purpose.TRAIN).generator()
        scatter = self.scatter * truth[1] * rng.standard_normal((self.num_checkpoints, *truth.shape))
        shape = (-1, 1, 1, 1, 1)
        theta = (1 - t_K).reshape(shape) * start + t_K.reshape(shape) * truth + scatter
        # Shortest a with sum a = 1 and sum a t = 1; spreading the remainder along a costs the least scatter.
        coef_K = np.linalg.pinv(np.stack([np.ones_like(t_K), t_K])) @ np.ones(2)
        remainder = np.tensordot(coef_K, theta, 1) - truth
        theta -= coef_K.reshape(shape) * remainder / (coef_K @ coef_K)
        return torch.from_numpy(theta), torch.from_numpy(coef_K)


def true_parameters(dataset: Dataset) -> Tensor:
    """Mean and standard deviation of every pixel, shape (2, C, H, W), float64.

    The data set's own `mean_CHW` and `std_CHW` where it knows them, else the moments of its images.
    """
    if hasattr(dataset, "mean_CHW") and hasattr(dataset, "std_CHW"):
        return torch.stack([dataset.mean_CHW, dataset.std_CHW]).double()
    images = dataset.images().double()
    return torch.stack([images.mean(0), images.std(0, correction=1)])
