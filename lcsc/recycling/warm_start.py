"""Encoders and decoders that begin as trained models: where each tensor of the new one comes from.

Rothe, Narayan and Severyn, arXiv:1907.12461. D = width, L = layers of the new model, V = tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc.core.digests import value_digest
from lcsc.core.errors import BankError
from lcsc.core.seeds import SeedRange
from lcsc.recycling.families import Family, Shape
from lcsc.recycling.vocabulary import Rows

#: what a tensor may be: as it was, between two checkpoints, rows of another vocabulary, drawn, zero, or another's
WAYS = ("copied", "mixed", "overlap", "random", "zero", "shared")
SHARES = ("none", "embeddings", "all")
CROSS = ("random", "copy", "zero")
EMBEDDINGS = ("copy", "random", "overlap", "pieces")
#: those that make rows for another vocabulary
RENEWED = EMBEDDINGS[2:]


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a side begins as.

    Args:
        tag: what it is called where tensors are read (`lcsc.operators.surgery.Plan`); empty for the plan's own.
        names: name in its files of each tensor that it has, by the family's name.
    """

    tag: str
    names: Mapping[str, str]

    def read(self, name: str) -> str:
        """What a piece reads."""
        return f"{self.tag}:{self.names[name]}" if self.tag else self.names[name]


def find_origin(family: Family, sizes: Mapping[str, int], shapes: Mapping[str, Shape], tag: str, path: Any) -> Origin:
    """The tensors of a checkpoint that a side may take.

    Raises:
        BankError: one of the base model is missing or has another shape than its configuration says.
    """
    wanted = dict(family.base)
    for place in range(sizes["layers"]):
        wanted |= {family.in_layer(place, name): axes for name, axes in family.layer.items()}
    names = {}
    for name, axes in {**wanted, **family.head, **POOLER}.items():
        key = next((key for key in family.keys_in(name) if key in shapes), None)
        if key is None and name in wanted:
            raise BankError(f"`{path}` has no `{family.full(name)}`. Weights and config.json must be one save.")
        if key is not None and shapes[key] != (shape := family.shape(axes, sizes)):
            raise BankError(
                f"`{key}` of `{path}` has shape {shapes[key]}, and its configuration gives {shape}. Weights and "
                "config.json must be one save."
            )
        if key is not None:
            names[name] = key
    return Origin(tag, names)


#: of an encoder as transformers builds it; a decoder does not read it
POOLER = {"pooler.dense.weight": "DD", "pooler.dense.bias": "D"}


@dataclass(frozen=True)
class Side:
    """An encoder or a decoder to be.

    Args:
        stem: what its tensors' names begin with in the new model, such as `encoder.`; empty for a decoder alone.
        family: of its tensors.
        sizes: of the new side.
        layers: for each of its L layers the origin's; the numbers do not matter where there is none.
        origin: None for a random side.
        other: a second origin that it lies between; None where there is none.
        mix: share of the second in each layer and, at the end, in everything else, L + 1 numbers in [0, 1].
        embeddings: one of `EMBEDDINGS`, of all tensors with a row a token.
        rows: which of the origin's rows those of another vocabulary are made of, for `RENEWED`.
        std: standard deviation of what is drawn.
        pad: token whose row of drawn embeddings is zero; None for none.
    """

    stem: str
    family: Family
    sizes: Mapping[str, int]
    layers: tuple[int, ...]
    origin: Origin | None
    other: Origin | None = None
    mix: tuple[float, ...] = ()
    embeddings: str = "copy"
    rows: Rows | None = None
    std: float = 0.02
    pad: int | None = None

    def name(self, name: str) -> str:
        """In the new model: encoders are base models, decoders have a head."""
        return f"{self.stem}{name if self.stem == 'encoder.' else self.family.full(name)}"


@dataclass(frozen=True)
class Target:
    """A tensor of the new model.

    Args:
        name: there.
        shape: there.
        how: one of `WAYS`.
        reads: what it is made of; for a shared one the name of the tensor that it is, which is not written again.
        make: gives it from what was read, in any dtype.
    """

    name: str
    shape: Shape
    how: str
    reads: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor]

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def side_targets(side: Side, seeds: SeedRange, *, head: bool, pooler: bool, cross: str | None) -> Iterator[Target]:
    """All tensors of a side.

    Args:
        side: the encoder or the decoder.
        seeds: of what is drawn; a tensor is drawn from its own name, whatever else there is.
        head: whether it has a language model's head.
        pooler: whether it has the pooler of an encoder.
        cross: how attention to the encoder begins, one of `CROSS`; None without it.
    """
    family, L = side.family, len(side.layers)
    outer = {**family.base, **(family.head if head else {}), **(POOLER if pooler else {})}
    for name, axes in outer.items():
        yield _target(side, seeds, name, name, axes, L)
    for place, source in enumerate(side.layers):
        for name, axes in family.layer.items():
            yield _target(side, seeds, family.in_layer(place, name), family.in_layer(source, name), axes, place)
        for name, axes in family.cross.items() if cross is not None else ():
            yield _cross_target(side, seeds, name, axes, place, cross or "")


def _target(side: Side, seeds: SeedRange, name: str, source: str, axes: str, place: int) -> Target:
    """A tensor of the base model or the head; `source` is its name in the origin."""
    own, shape = side.name(name), side.family.shape(axes, side.sizes)
    fresh = _drawn(own, shape, axes, side.std, seeds, side.pad if name == side.family.words else None)
    by_token = axes.startswith("V")
    origin, other = side.origin, side.other
    if origin is None or source not in origin.names or (by_token and side.embeddings == "random"):
        return Target(own, shape, "random", (), lambda _: fresh())
    reads: tuple[str, ...] = (origin.read(source),)
    make: Callable[[Sequence[Tensor]], Tensor] = _first
    how, weight = "copied", side.mix[place] if other is not None else 0.0
    if other is not None and weight > 0:
        how, reads, make = "mixed", (*reads, other.read(source)), functools.partial(_between, weight)
    if by_token and side.embeddings in RENEWED:
        assert side.rows is not None
        how, make = "overlap", functools.partial(_rows, side.rows, fresh, make)
    return Target(own, shape, how, reads, make)


def _cross_target(side: Side, seeds: SeedRange, name: str, axes: str, place: int, start: str) -> Target:
    """A tensor of a layer's attention to the encoder."""
    own, shape = side.name(side.family.in_layer(place, name)), side.family.shape(axes, side.sizes)
    if start == "zero" and ("output.dense" in name or "c_proj" in name):
        return Target(own, shape, "zero", (), lambda _: torch.zeros(shape))
    if start == "copy" and side.origin is not None:
        twin, part = _self_attention(name)
        found = _target(side, seeds, own, side.family.in_layer(side.layers[place], twin), axes, place)
        D = side.sizes["D"]
        cut = {"q": slice(0, D), "kv": slice(D, 3 * D), "": slice(None)}[part]
        return replace(found, name=own, shape=shape, make=lambda tensors: found.make(tensors)[..., cut])
    fresh = _drawn(own, shape, axes, side.std, seeds, None)
    return Target(own, shape, "random", (), lambda _: fresh())


def _self_attention(name: str) -> tuple[str, str]:
    """The tensor of a layer's self-attention that one of its attention to the encoder is like, and which part of it."""
    if name.startswith("ln_cross_attn"):
        return name.replace("ln_cross_attn", "ln_1"), ""
    if ".q_attn." in name:
        return name.replace("crossattention.q_attn", "attn.c_attn"), "q"
    if ".c_attn." in name:
        return name.replace("crossattention.c_attn", "attn.c_attn"), "kv"
    return name.replace("crossattention.c_proj", "attn.c_proj").replace("crossattention", "attention"), ""


def projection(width: int, to: int, std: float, seeds: SeedRange) -> Iterator[Target]:
    """What transformers puts between an encoder and a decoder of other widths."""
    for kind, shape in (("weight", (to, width)), ("bias", (to,))):
        name = f"enc_to_dec_proj.{kind}"
        fresh = _drawn(name, shape, "DD" if kind == "weight" else "D", std, seeds, None)
        yield Target(name, shape, "random", (), functools.partial(_ignoring, fresh))


def shared(targets: Sequence[Target], encoder: Side, decoder: Side, share: str) -> list[Target]:
    """All targets, those of the decoder that are the encoder's as `shared`.

    Where only the decoder has an origin, a shared tensor begins as the decoder's.
    """
    names = {decoder.name(decoder.family.words): encoder.name(encoder.family.words)} if share == "embeddings" else {}
    if share == "all":
        base = [*encoder.family.base]
        base += [encoder.family.in_layer(i, name) for i in range(len(encoder.layers)) for name in encoder.family.layer]
        names = {decoder.name(name): encoder.name(name) for name in base}
    by_name = {target.name: target for target in targets}
    out = []
    twins = {twin: name for name, twin in names.items()}
    for target in targets:
        if target.name in names:
            out.append(replace(target, how="shared", reads=(names[target.name],)))
        elif target.how == "random" and target.name in twins:
            out.append(replace(by_name[twins[target.name]], name=target.name))
        else:
            out.append(target)
    return out


def totals(targets: Sequence[Target]) -> dict[str, int]:
    """Parameters by way, and in all; shared ones count once, where they are."""
    counts = {way: sum(target.numel for target in targets if target.how == way) for way in WAYS}
    return {"parameters": sum(counts.values()) - counts["shared"], **counts}


# ---------------------------------------------------------------------------------------------------------- numbers


def _first(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _ignoring(fresh: Callable[[], Tensor], _: Sequence[Tensor]) -> Tensor:
    return fresh()


def _between(weight: float, tensors: Sequence[Tensor]) -> Tensor:
    """(1 - w) a + w b, summed in float64; 0 and 1 keep the bits of one of them."""
    a, b = tensors
    if weight == 1:
        return b
    return ((1 - weight) * a.double() + weight * b.double()).to(a.dtype)


def _rows(
    rows: Rows, fresh: Callable[[], Tensor], make: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]
) -> Tensor:
    """Drawn rows, but for the tokens that were there before, and the means of those that spell another one."""
    old = make(tensors)
    out = fresh().to(old.dtype)
    new_M, piece_M = (torch.from_numpy(ids) for ids in rows.spelled)
    if len(new_M):
        sums = torch.zeros(out.shape, dtype=torch.float64).index_add_(0, new_M, old[piece_M].double())
        counts = torch.bincount(new_M, minlength=len(out)).reshape(-1, *(1,) * (out.ndim - 1))
        found = new_M.unique()
        out[found] = (sums[found] / counts[found]).to(out.dtype)
    new_N, old_N = (torch.from_numpy(ids) for ids in rows.same)
    out[new_N] = old[old_N]
    return out


def _drawn(name: str, shape: Shape, axes: str, std: float, seeds: SeedRange, pad: int | None) -> Callable[[], Tensor]:
    """How transformers begins a tensor: norms 1, biases 0, all else N(0, std^2) with a row of zeros for padding."""

    def fresh() -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
        draws = seeds.generator(int(value_digest(name)[:15], 16)).standard_normal(shape, dtype=np.float32)
        out = torch.from_numpy(draws * np.float32(std))
        if pad is not None and 0 <= pad < len(out):
            out[pad] = 0
        return out

    return fresh
