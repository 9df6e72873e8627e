"""Linear combination with coefficients of its own for each layer group. K = checkpoints, P = parameters, G = groups."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Box, Natural, Point, SearchSpace
from lcsc.kernels import Groups
from lcsc.operators.base import Baseline, Candidate, Distances
from lcsc.operators.linear import Axes, Linear, axes_of, gram_matrices, need_arch, settle, whitened_axes

REST = "rest"
TIME = r"(^|\.)(time_embedding|time_proj|time_embed|time_text_embed|timestep_embedder|t_embedder|adaln_single)\."
#: of a UNet, by the names of diffusers or of OpenAI's guided-diffusion; patterns are searched for anywhere in a name
UNET = (
    ("down", r"(^|\.)(down_blocks|input_blocks)\."),
    ("mid", r"(^|\.)(mid_block|middle_block)\."),
    ("up", r"(^|\.)(up_blocks|output_blocks)\."),
    ("time", TIME),
)
#: stacks of like blocks (DiT and other transformers), in the order in which they are passed through
STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
THIRDS = ("early", "middle", "late")

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Partition:
    """Which tensors belong to which layer group; every tensor to exactly one.

    Args:
        names: of the G groups.
        sizes: parameters of each.
        segments: first tensor of each run of neighbouring tensors, and the group of the run.
        columns: the same as columns of a flat row.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    segments: tuple[tuple[str, int], ...]
    columns: Groups

    @property
    def recipe(self) -> dict[str, Any]:
        """Plain JSON values that place every column; see `lcsc.export.folder.recipe_groups`."""
        return {"names": list(self.names), "sizes": list(self.sizes), "segments": [list(s) for s in self.segments]}


def auto_pairs(names: Sequence[str]) -> Pairs:
    """Groups by the names of known architectures, as patterns: a UNet's parts, or a transformer's thirds by depth.

    Empty when the names are of neither.
    """
    if sum(any(re.search(pattern, name) for name in names) for _, pattern in UNET[:3]) >= 2:
        return tuple(pair for pair in UNET if any(re.search(pair[1], name) for name in names))
    found = (re.search(rf"(?:^|\.)({'|'.join(STACKS)})\.(\d+)\.", name) for name in names)
    depths = sorted({(STACKS.index(match[1]), int(match[2])) for match in found if match})
    if len(depths) < 2:
        return ()
    pairs = []
    for third, part in zip(THIRDS, np.array_split(np.array(depths), 3), strict=True):
        blocks = "|".join(rf"{STACKS[stack]}\.{number}" for stack, number in part)
        if blocks:
            pairs.append((third, rf"(^|\.)({blocks})\."))
    return (*pairs, *(("time", TIME) for _ in [0] if any(re.search(TIME, name) for name in names)))


@functools.lru_cache(maxsize=4)
def partition(bank: CheckpointBank, groups: str | Pairs) -> Partition:
    """Put every tensor of the bank into the first group whose pattern occurs in its name, else into `rest`.

    Raises:
        ConfigError: a group without parameters, or one group for everything.
    """
    entries = bank.layout.entries
    names = [entry.name for entry in entries]
    pairs = auto_pairs(names) if isinstance(groups, str) else groups
    label_N = [next((group for group, pattern in pairs if re.search(pattern, name)), REST) for name in names]
    labels = [group for group, _ in pairs] + [REST for _ in [0] if REST in label_N and REST not in dict(pairs)]
    if isinstance(groups, str):  # a part of a known architecture may be absent, or belong to another
        labels = [group for group in labels if group in label_N]
    if empty := [group for group in labels if group not in label_N]:
        raise ConfigError(
            f"layer group `{empty[0]}` has no parameters: `{dict(pairs)[empty[0]]}` occurs in none of the "
            f"{len(names)} names (such as `{names[0]}`) that no earlier group takes. Mend `operator.groups`."
        )
    if len(labels) < 2:
        raise ConfigError(
            f"`operator.groups` makes one group of all parameters of `{bank.path}` (such as `{names[0]}`); it takes "
            "at least 2. Name groups by regular expressions over these names, or use operator=linear."
        )
    index_N = [labels.index(label) for label in label_N]
    first = [n for n in range(len(names)) if n == 0 or index_N[n] != index_N[n - 1]]
    starts = (*(entries[n].start for n in first), bank.layout.num_parameters)
    ids = tuple(index_N[n] for n in first)
    sizes = [0] * len(labels)
    for entry, index in zip(entries, index_N, strict=True):
        sizes[index] += entry.stop - entry.start
    segments = tuple((names[n], index_N[n]) for n in first)
    return Partition(tuple(labels), tuple(sizes), segments, Groups(starts, ids, len(labels)))


@functools.lru_cache(maxsize=4)
def group_axes(bank: CheckpointBank, columns: Groups, whitening: float) -> tuple[Axes | None, ...]:
    """Whitened axes of each group's own columns; None where all checkpoints agree. One pass over the bank."""
    return tuple(axes_of(gram_KK, whitening) for gram_KK in gram_matrices(bank, columns))


@register("operator", "linear_grouped", source="LCSC, arXiv:2404.02241, with coefficients for each layer group; lcsc")
@dataclass(frozen=True)
class LinearGrouped:
    """theta = sum_k coef_gk theta_k in every layer group g: coefficients that all groups share, and deviations.

    Args:
        groups: `auto` (a UNet's down, mid, up and time embedding, a transformer's thirds by depth, and the rest), or
            group names with regular expressions: a parameter belongs to the first whose pattern occurs in its name,
            else to the group `rest`. A mapping, or a list of pairs.
        whitening: as in the linear operator; deviations are whitened in their own group's columns.
    """

    groups: Any = "auto"
    whitening: float = 0.5

    def __post_init__(self) -> None:
        _ = self._linear  # checks `whitening`
        # as pairs, because the order counts and two configurations are compared as JSON objects, which have none
        object.__setattr__(self, "groups", _checked(self.groups))

    @property
    def _linear(self) -> Linear:
        return Linear(self.whitening)

    def partition(self, bank: CheckpointBank) -> Partition:
        """Which tensors belong to which group; see `partition`."""
        return partition(bank, self.groups)

    def _axes(self, bank: CheckpointBank) -> dict[str, tuple[int, Axes]]:
        """Index and axes of every group that is not the same in all checkpoints, by the name of its box."""
        parts = self.partition(bank)
        all_axes = group_axes(bank, parts.columns, self.whitening)
        return {
            f"z_{name}": (g, axes) for g, (name, axes) in enumerate(zip(parts.names, all_axes, strict=True)) if axes
        }

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """The linear operator's box `z`, and for each group a box `z_<group>` of deviations, of level 1.

        A group that is the same in all checkpoints has no box.
        """
        shared, unit = self._linear.space(bank).boxes[0], whitened_axes(bank, self.whitening).unit
        boxes = [shared]
        for name, (_, axes) in self._axes(bank).items():
            natural = Natural(np.zeros(bank.num_checkpoints), axes.axes_KZ, axes.inverse_ZK, total=0.0)
            lengths = tuple((axes.steps_Z / unit).tolist())  # in the unit of the shared box
            boxes.append(Box(name, shared.size, lengths=lengths, natural=natural, level=1))
        return SearchSpace(tuple(boxes))

    def notes(self, bank: CheckpointBank) -> list[str]:
        """The groups with their sizes, and which of them cannot be varied."""
        parts = self.partition(bank)
        sizes = ", ".join(f"{name} {size:,}" for name, size in zip(parts.names, parts.sizes, strict=True))
        idle = [name for name in parts.names if f"z_{name}" not in self._axes(bank)]
        more = [f"layer group `{name}` is the same in all checkpoints; it has no coefficients to vary" for name in idle]
        return [f"layer groups (parameters): {sizes}", *more]

    def coefficients(self, bank: CheckpointBank, point: Point) -> np.ndarray:
        """Coefficients of each group, float64, shape (G, K); each row sums to one to rounding."""
        shared_K = whitened_axes(bank, self.whitening).coefficients(np.asarray(point["z"], dtype=np.float64))
        coef_GK = np.tile(shared_K, (len(self.partition(bank).names), 1))
        for name, (g, axes) in self._axes(bank).items():
            coef_GK[g] += axes.axes_KZ @ np.asarray(point[name], dtype=np.float64)
        return settle(coef_GK)

    def pull_back(self, bank: CheckpointBank, point: Point, grad_P: Tensor) -> dict[str, np.ndarray]:
        """Derivatives of all boxes from one pass over the bank (see `lcsc.kernels.project`)."""
        return self._pull(bank, bank.project(grad_P, groups=self.partition(bank).columns).double().cpu().numpy())

    def _pull(self, bank: CheckpointBank, grad_GK: np.ndarray) -> dict[str, np.ndarray]:
        """Derivatives of all boxes from those of the groups' coefficients, shape (G, K)."""
        shared = {"z": whitened_axes(bank, self.whitening).axes_KZ.T @ grad_GK.sum(0)}
        return shared | {name: axes.axes_KZ.T @ grad_GK[g] for name, (g, axes) in self._axes(bank).items()}

    def distances(self, bank: CheckpointBank) -> Distances:
        """Distances of weights by the groups' coefficients; one pass over the bank."""
        return Distances(gram_matrices(bank, self.partition(bank).columns), functools.partial(self._pull, bank))

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The combined network, all groups in one pass; written straight into the buffer it is asked to fill."""
        coef_GK, arch, parts = self.coefficients(bank, point), need_arch(bank), self.partition(bank)

        def write(theta_P: Tensor) -> None:
            bank.combine(torch.from_numpy(coef_GK), groups=parts.columns, out=theta_P)

        recipe = {"operator": "linear_grouped", "steps": list(bank.steps), "groups": parts.recipe}
        return Candidate(arch, bank.layout, write, {**recipe, "coef": coef_GK.tolist()}, bank.constants)

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """The linear operator's, which deviate nowhere."""
        zeros = {name: np.zeros(bank.num_checkpoints - 1) for name in self._axes(bank)}
        return [
            Baseline(baseline.family, baseline.label, {**baseline.point, **zeros})
            for baseline in self._linear.baselines(bank)
        ]


def _checked(groups: Any) -> str | Pairs:
    """`auto`, or pairs of name and pattern that are sound.

    Raises:
        ConfigError: anything else.
    """
    if groups == "auto":
        return "auto"
    pairs = list(groups.items()) if isinstance(groups, Mapping) else groups
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
        raise ConfigError(
            f"`operator.groups` is `{groups}`; it must be `auto`, or names with regular expressions, such as "
            r"{attn: 'attentions\.'}."
        )
    for pair in pairs:
        texts = [] if isinstance(pair, str) or not isinstance(pair, Sequence) else pair
        if len(texts) != 2 or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"`operator.groups` holds `{pair}`; each group is a name and a regular expression.")
        try:
            re.compile(pair[1])
        except re.error as error:
            raise ConfigError(
                f"layer group `{pair[0]}` has the pattern `{pair[1]}`, which is no regular expression: {error}."
            ) from error
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"`operator.groups` names `{twice[0]}` twice. Join its patterns with `|`.")
    return tuple((name, pattern) for name, pattern in pairs)
