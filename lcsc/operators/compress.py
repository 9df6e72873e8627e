"""How many bits each part of a model is worth: one checkpoint as a lossy codec gives it back. G = groups of tensors."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from lcsc.bank import CheckpointBank
from lcsc.bank.coded import tensors_of
from lcsc.bank.lora import refuse_lora
from lcsc.bank.storage import as_tensor
from lcsc.codec.arrays import State, Tensors
from lcsc.codec.checkpoint import encode
from lcsc.codec.settings import SMALLEST, CodecSettings
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import register
from lcsc.core.space import Box, Choices, Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.gqa import fill
from lcsc.operators.linear import need_arch
from lcsc.operators.surgery import Piece, Plan, candidate, row_of

#: bits of a weight's difference that a group chooses among
WIDTHS = (2, 3, 4, 5, 6, 8)
#: checkpoints from anchor to anchor that a search chooses among
INTERVALS = (2, 3, 5, 10)
#: largest threshold that is searched
TAU = 2.5


@register("operator", "compress", source="lcsc; codec of arXiv:2506.12000 and arXiv:2406.11257")
@dataclass(frozen=True)
class Compress:
    """A checkpoint decoded from a lossy chain (`lcsc.codec`): which bits go where is searched, what is null too.

    The tensors are cut, in the order of their names, into groups of about as many numbers. The checkpoint is the last
    of a chain that begins with an anchor `anchor_every - 1` checkpoints before it, all coded alike. The recipe tells
    `file_bytes`, what a checkpoint of such a chain takes, anchor included, and a record also `encode_seconds`: the
    processor's time that coding it took, as it was measured. Without a search all groups have `mean_bits` (4 where it
    is null), and null `tau` and `anchor_every` are 0 and 5, or as far back as the bank goes.

    Args:
        num_groups: G.
        mean_bits: mean over the groups of the bits that a search may spend; null lets it choose freely.
        tau: differences up to `tau` times their median size in a tensor are dropped.
        anchor_every: checkpoints from anchor to anchor.
        step: training step of the checkpoint; null is the last.
    """

    num_groups: int = 8
    mean_bits: float | None = None
    tau: float | None = 0.0
    anchor_every: int | None = 5
    step: int | None = None

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ConfigError(f"`operator.num_groups` is {self.num_groups}; it must be at least 1.")
        if self.mean_bits is not None and not WIDTHS[0] <= self.mean_bits <= WIDTHS[-1]:
            raise ConfigError(
                f"`operator.mean_bits` is {self.mean_bits}; it must lie between {WIDTHS[0]} and {WIDTHS[-1]}."
            )
        if self.anchor_every is not None and self.anchor_every < 2:
            raise ConfigError(
                f"`operator.anchor_every` is {self.anchor_every}; it must be at least 2, because an anchor loses "
                "nothing."
            )
        if self.tau is not None and not 0 <= self.tau <= TAU:
            raise ConfigError(f"`operator.tau` is {self.tau}; it must lie between 0 and {TAU}.")

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Bits of each group, and threshold and interval where they are null."""
        G, num = len(self.groups(bank)), len(WIDTHS)
        choices = None
        if self.mean_bits is not None:
            floats = tuple(1 + (place + 0.5) / num for place in range(num))
            choices = Choices(floats, WIDTHS, int(self.mean_bits * G), "bits")
        boxes = [Box("bits", G, 0.0, 1.0, scale=0.25, choices=choices)]
        if self.tau is None:
            boxes.append(Box("tau", 1, 0.0, TAU, scale=0.5))
        if self.anchor_every is None:
            boxes.append(Box("anchor", 1, 0.0, 1.0, scale=0.25))
        return SearchSpace(tuple(boxes))

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """The same bits everywhere, as far as the mean allows."""
        space, rows = self.space(bank), []
        for place, width in enumerate(WIDTHS):
            if self.mean_bits is None or width <= self.mean_bits:
                point = space.to_point(np.zeros(space.size))
                point["bits"][:] = (self.mean_bits is not None) + (place + 0.5) / len(WIDTHS)
                if self.anchor_every is None:
                    point["anchor"][:] = 0.7
                rows.append(Baseline("uniform", f"{width} bits everywhere", point))
        return rows

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The checkpoint as it is read back."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """See `lcsc.operators.surgery`; the chain is coded at once, because each tensor's bytes tell of the others."""
        groups, arch, row = self.groups(bank), need_arch(bank), row_of(bank, self.step)
        bits, tau, every = self._choice(point, len(groups), row)
        if row + 1 < every:
            raise BankError(
                f"step {bank.steps[row]} of `{bank.path}` has {row} checkpoints before it, and a chain of "
                f"`operator.anchor_every` {every} needs {every - 1}. Take a later step, or a smaller number."
            )
        made, sizes, took = self._coded(bank, row, self.codec(groups, bits, tau, every))
        total, seconds = ((costs[0] + (every - 1) * costs[-1]) / every for costs in (sizes, took))
        raw = sum(entry.stop - entry.start for entry in bank.layout.entries) * 4
        pieces = tuple(_piece(name, made[name], bank) for group in groups for name in group)
        recipe = {
            "operator": "compress",
            "steps": list(bank.steps[row + 1 - every : row + 1]),
            "bits": list(bits),
            "tau": tau,
            "anchor_every": every,
            "file_bytes": round(total),
            "ratio": raw / total,
        }
        settled, measured = replace(self, step=bank.steps[row]), {"encode_seconds": seconds}
        return Plan(row, arch, pieces, recipe, settled=settled, measured=measured)

    # ------------------------------------------------------------------------------------------------- details

    def groups(self, bank: CheckpointBank) -> list[tuple[str, ...]]:
        """Names of the tensors that are quantised, in groups of about as many numbers.

        Raises:
            BankError: no such tensors.
        """
        refuse_lora(bank.layout.shapes, bank.path)
        dtypes = bank.dtypes
        sizes = {e.name: e.stop - e.start for e in bank.layout.entries if dtypes[e.name] == "float32"}
        sizes = {name: size for name, size in sizes.items() if size >= SMALLEST}
        if not sizes:
            raise BankError(
                f"`{bank.path}` holds no tensor in float32 of {SMALLEST} numbers; smaller ones lose nothing."
            )
        ends = np.cumsum(list(sizes.values()))
        middle = ends - np.array(list(sizes.values())) / 2
        which = np.minimum(middle * self.num_groups // ends[-1], self.num_groups - 1).astype(int)
        found: dict[int, list[str]] = {}
        for name, group in zip(sizes, which.tolist(), strict=True):
            found.setdefault(group, []).append(name)
        return [tuple(names) for names in found.values()]

    def codec(self, groups: Sequence[Sequence[str]], bits: Sequence[int], tau: float, every: int) -> CodecSettings:
        """How the chain is coded with so many bits for each of the `groups`; the numbers are those of a record."""
        layers = {_exactly(name): width for group, width in zip(groups, bits, strict=True) for name in group}
        return CodecSettings("lossy", anchor_every=every, layers=layers, tau=tau)

    def _choice(self, point: Point | None, G: int, row: int) -> tuple[tuple[int, ...], float, int]:
        """Bits of the groups, threshold and interval at a point, or as set; a searched chain begins in the bank."""
        num, longest = len(WIDTHS), max((n for n in INTERVALS if n <= row + 1), default=INTERVALS[0])
        if point is None:
            width = max(w for w in WIDTHS if w <= (self.mean_bits or 4))
            return (width,) * G, self.tau or 0.0, self.anchor_every or min(longest, INTERVALS[2])
        x_G = np.asarray(point["bits"], np.float64)
        if self.mean_bits is not None and not (x_G > 1).all():
            bits = fill(x_G, WIDTHS, int(self.mean_bits * G))
        else:  # floats above 1 name the bits themselves, whatever they sum to; see `space`
            x_G = x_G - 1 if (x_G > 1).all() else x_G
            bits = tuple(WIDTHS[min(int(x * num), num - 1)] for x in x_G)
        tau = float(point["tau"][0]) if self.tau is None else self.tau
        place = 0 if self.anchor_every else min(int(point["anchor"][0] * len(INTERVALS)), len(INTERVALS) - 1)
        every = self.anchor_every or min(longest, INTERVALS[place])
        return bits, tau, every

    def _coded(self, bank: CheckpointBank, row: int, settings: CodecSettings) -> tuple[Tensors, list[int], list[float]]:
        """What the checkpoint is read back as, and the bytes of the chain's files and the seconds they took."""
        first = row + 1 - settings.anchor_every
        state, nbytes, seconds = _anchor(bank, first)
        sizes, took = [nbytes], [seconds]
        for k in range(first + 1, row + 1):
            state, nbytes, seconds = _timed(bank, k, state, settings)
            sizes.append(nbytes)
            took.append(seconds)
        return state.tensors, sizes, took


def _exactly(name: str) -> str:
    """A pattern that fits this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@functools.lru_cache(maxsize=64)
def _row(bank: CheckpointBank, k: int) -> Mapping[str, Any]:
    return tensors_of(bank.rows[k], [entry.name for entry in bank.layout.entries])


@functools.lru_cache(maxsize=16)
def _anchor(bank: CheckpointBank, k: int) -> tuple[State, int, float]:
    """Row k as an anchor, which depends on no setting, as `_timed` gives it."""
    settings = CodecSettings("lossy")
    _timed(bank, k, _timed(bank, k, None, settings)[0], settings)  # the first calls load kernels, which takes longer
    return _timed(bank, k, None, settings)


def _timed(bank: CheckpointBank, k: int, before: State | None, settings: CodecSettings) -> tuple[State, int, float]:
    """Row k coded against another: what it is read back as, its bytes, and the processor's seconds that it took."""
    tensors, began = _row(bank, k), time.thread_time()
    data, state = encode(tensors, before, settings, file=str(k), step=bank.steps[k], about={})
    return state, len(data), time.thread_time() - began


def _piece(name: str, made: Any, bank: CheckpointBank) -> Piece:
    def make(_: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {name: as_tensor(made.bits, made.dtype)}, {}

    return Piece((name,), {name: bank.layout.shapes[name]}, make, {})
