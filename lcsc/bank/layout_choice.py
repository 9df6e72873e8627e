"""Which of the groups under a path is combined, when the user does not say, or says it in one word."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lcsc.bank.layout_types import DENOISERS, Group
from lcsc.bank.names import parse_component
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError, ConfigError, did_you_mean


def choose(groups: Sequence[Group], component: str | None = None, weights: str | None = None) -> Group:
    """The group to combine.

    Without `component`: the only one, else the only denoiser (`layout_types.DENOISERS`), else the only one whose files
    change from step to step. Without `weights`: raw before EMA (every EMA of a run is a combination of its raw
    checkpoints, not the other way round), else the only kind.

    Args:
        groups: what `find_groups` returned.
        component: such as `unet`; `unet_ema` means the EMA of `unet`.
        weights: `raw`, `ema`, `ema:<rate>` or `lora`.

    Raises:
        BankError: no such group, or several and no rule to choose by; the choices are named.
        ConfigError: `weights` is none of these words.
    """
    notes: list[str] = []
    names = list(dict.fromkeys(group.component for group in groups))
    if component is not None and component not in names:
        plain, kind, rate = parse_component(component)
        if kind == "ema" and plain in names:
            component, weights = plain, weights or (f"ema:{rate}" if rate else "ema")
        else:
            known = [name for name in names if name]
            raise BankError(
                f"no component named `{shown(component)}` in these checkpoints.{did_you_mean(component, known)} "
                "Choose one with `bank.component`, or leave it out."
            )
    elif component is None and len(names) > 1:
        component = _component(groups, names, notes)
    else:
        component = names[0] if component is None else component
    group = _weights([group for group in groups if group.component == component], weights, notes)
    return replace(group, notes=(*notes, *group.notes))


def _component(groups: Sequence[Group], names: Sequence[str | None], notes: list[str]) -> str | None:
    known: list[str | None] = [name for name in names if name in DENOISERS]
    known = known or list(names)
    if len(known) > 1:
        known = [name for name in known if not all(constant(group) for group in groups if group.component == name)]
    if len(known) != 1:
        said = ", ".join(f"`bank.component={name}`" for name in names)
        raise BankError(f"the checkpoints hold several networks. Choose one: {said}.")
    others = ", ".join(f"`{shown(name)}`" for name in names if name != known[0])
    notes.append(f"`{known[0]}` is combined; left as they are: {others}")
    return known[0]


def _weights(groups: Sequence[Group], weights: str | None, notes: list[str]) -> Group:
    kinds = {group.kind for group in groups}
    word, _, rate = (weights or "").partition(":")
    if weights is not None and (word not in ("raw", "ema", "lora") or (rate and word != "ema")):
        raise ConfigError(f"`bank.weights` is `{shown(weights)}`; it must be raw, ema, ema:<rate> or lora.")
    if not word:
        if "raw" in kinds and "lora" in kinds:
            raise BankError(
                "the checkpoints hold whole networks and LoRA factors. Choose with `bank.weights=raw` or "
                "`bank.weights=lora`."
            )
        word = next(kind for kind in ("raw", "ema", "lora") if kind in kinds)
        if word == "raw" and "ema" in kinds:
            said = ", ".join(f"`bank.weights={_word(group)}`" for group in groups if group.kind == "ema")
            notes.append(
                f"raw weights are taken; the EMA beside them is a combination of them ({said} takes it instead)"
            )
    found = [group for group in groups if group.kind == word and (not rate or _same_rate(group.rate, rate))]
    if not found:
        said = ", ".join(f"`bank.weights={_word(group)}`" for group in groups)
        raise BankError(f"no `{shown(weights)}` weights in these checkpoints. There are: {said}.")
    if len(found) > 1:
        said = ", ".join(f"`bank.weights={_word(group)}`" for group in found)
        raise BankError(
            f"the checkpoints hold several EMAs, which are never mixed. Choose one: {said}; a post-hoc EMA takes them "
            "all with `bank.weights=ema:*`."
        )
    return found[0]


def _word(group: Group) -> str:
    return f"{group.kind}:{group.rate}" if group.rate else group.kind


def _same_rate(own: str | None, asked: str) -> bool:
    if own is None:
        return False
    try:
        return own == asked or float(own) == float(asked)
    except ValueError:
        return False


def constant(group: Group) -> bool:
    """Whether all steps of a group are the same bytes, file by file; reads until the first difference."""
    first, *others = group.checkpoints
    return bool(others) and all(_same(first.files, other.files) for other in reversed(others))


def _same(a: Iterable[Path], b: Iterable[Path]) -> bool:
    for one, two in itertools.zip_longest(a, b):
        if one is None or two is None:
            return False
        if one.samefile(two):
            continue
        if one.stat().st_size != two.stat().st_size:
            return False
        with open(one, "rb") as left, open(two, "rb") as right:
            while block := left.read(1 << 20):
                if block != right.read(1 << 20):
                    return False
    return True
