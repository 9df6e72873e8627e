"""The networks inside one file: a flat table of names is found in whatever a trainer put around it.

One file can hold raw weights and their EMA; each becomes a `Part`. Known wrappers: `state_dict` (Lightning), `model` /
`ema` / `opt` / `args` (DiT, SiT, lucidrains), `params` / `params_ema` (BasicSR), and inside one flat table the EMA
copies of LitEma (ldm/modules/ema.py of CompVis/latent-diffusion), ema-pytorch, `torch.optim.swa_utils.AveragedModel`
and any module whose names repeat those of the raw network under another prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcsc.bank.extents import Source, read_source
from lcsc.bank.names import parse, parse_component
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError

_RAW_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "model_state", "weights")
_EMA_KEYS = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema_params")
_STEP_KEYS = ("global_step", "step", "iteration", "iter", "train_steps", "num_steps", "global_steps", "steps")
#: counters beside an EMA copy that belong to no network
_COUNTERS = ("initted", "step", "decay", "num_updates", "n_averaged")
_DEPTH = 4
#: prefixes that are tried; a network has one or two, a hostile file has as many as it has names
_TRIES = 32


@dataclass(frozen=True)
class Part:
    """One network of a file.

    Args:
        table: tensor name -> place, under the names the network's own state dict has.
        kind: `ema`, or None where the file does not say.
        rate: EMA decay as a short decimal, None when the file does not say.
        component: name of the network where the file holds several, else None.
        filled: names of an EMA for which the file has raw tensors only, which stand in `table` in their place.
    """

    table: dict[str, Source]
    kind: str | None = None
    rate: str | None = None
    component: str | None = None
    filled: frozenset[str] = frozenset()


@dataclass
class Unwrapped:
    """What a file holds: networks, the training step it names, who wrote it, and what was passed over."""

    parts: list[Part] = field(default_factory=list)
    step: int | None = None
    writer: str | None = None
    passed: list[str] = field(default_factory=list)


def unwrap(value: Any, files: Sequence[Path]) -> Unwrapped:
    """The networks in the value of a torch file, or in the table of any other file.

    Args:
        value: nested dicts and lists with a `Source` for each tensor.
        files: the checkpoint's files; single numbers such as `global_step` are read from them.

    Raises:
        BankError: no named tensors, or EMA names that fit no or several raw names.
    """
    found = Unwrapped()
    if isinstance(value, Mapping):
        found.step = _step(value, files)
        found.writer = _writer(value)
        _collect(value, None, None, found, 0)
    if not found.parts:
        extra = f" Passed over: {', '.join(found.passed[:10])}." if found.passed else ""
        raise BankError(
            f"`{shown(files[0])}` holds no table of named tensors.{extra} Save a `state_dict()`, or leave the file out."
        )
    found.parts = [part for whole in found.parts for part in _split(whole, files, found)]
    return found


# ------------------------------------------------------------------------------------------------- containers


def _collect(value: Mapping[Any, Any], kind: str | None, component: str | None, found: Unwrapped, depth: int) -> None:
    """Add the networks under `value` to `found.parts`."""
    names = {key: item for key, item in value.items() if isinstance(key, str)}
    holders = {key: item for key, item in names.items() if isinstance(item, Mapping) and _has_tensors(item)}
    lists = [key for key, item in names.items() if isinstance(item, (list, tuple)) and _has_tensors(item)]
    state = [key for key in holders if parse(key).state or key == "opt"]
    holders = {key: item for key, item in holders.items() if key not in state}
    found.passed += [f"`{shown(key)}` (training state)" for key in state]
    for key in lists:
        found.passed.append(f"`{shown(key)}` ({'training state' if parse(key).state else 'tensors without names'})")
    tensors = {key: item for key, item in names.items() if isinstance(item, Source)}
    if "averaging_state" in holders and "current_model_state" in holders and "state_dict" in holders:
        # Lightning's WeightAveraging callback swaps them when it saves
        holders.pop("averaging_state")
        _collect(holders.pop("current_model_state"), kind, component, found, depth + 1)
        _collect(holders.pop("state_dict"), "ema", component, found, depth + 1)
    known = [key for key in holders if key in _RAW_KEYS or key in _EMA_KEYS]
    if known and depth < _DEPTH:
        for key in known:
            _collect(holders.pop(key), "ema" if key in _EMA_KEYS else kind, component, found, depth + 1)
    elif tensors and not (holders and all(source.numel == 1 for source in tensors.values())):
        found.parts.append(Part(tensors, kind, component=component))
        tensors = {}
    elif holders and depth < _DEPTH and (depth == 0 or len(holders) == 1):
        single = len(holders) == 1
        for key in list(holders):
            own, own_kind, _ = parse_component(key)
            _collect(holders.pop(key), own_kind or kind, component if single else own or key, found, depth + 1)
    found.passed += [f"`{shown(key)}`" for key in holders]
    found.passed += [f"`{shown(key)}`" for key in tensors if key not in _STEP_KEYS]


def _has_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Source):
        return True
    if depth > 6:
        return False
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(_has_tensors(item, depth + 1) for item in inside)


def _step(value: Mapping[Any, Any], files: Sequence[Path]) -> int | None:
    """The training step that the outermost dict names."""
    for key in _STEP_KEYS:
        item = value.get(key)
        if isinstance(item, Source) and item.numel == 1 and item.dtype.startswith(("int", "uint")):
            item = int(read_source(files, item).reshape(-1)[0])
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 53:
            return item
    return None


def _writer(value: Mapping[Any, Any]) -> str | None:
    if "pytorch-lightning_version" in value:
        return "Lightning"
    if {"model", "ema", "opt", "args"} <= value.keys():
        return "DiT/SiT"
    if {"step", "model", "opt", "ema"} <= value.keys():
        return "lucidrains"
    return None


# ------------------------------------------------------------------------------- raw and EMA in one flat table


def _split(part: Part, files: Sequence[Path], found: Unwrapped) -> list[Part]:
    """A flat table as one network, or as a raw one and its EMA."""
    table = part.table
    try:
        "".join(table).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which pickles can hold
        raise BankError(f"`{shown(files[0])}` holds a tensor name that is not text. Save it again.") from None
    if ema := {name[10:]: source for name, source in table.items() if name.startswith("ema_model.")}:
        rest = {name for name in table if not name.startswith(("ema_model.", "online_model."))}
        if rest <= set(_COUNTERS):
            return _ema_pytorch(part, ema, found)
    if "n_averaged" in table and all(name.startswith("module.") for name in table if name != "n_averaged"):
        found.passed.append("`n_averaged` (a counter)")
        return [Part({n[7:]: s for n, s in table.items() if n != "n_averaged"}, "ema", part.rate, part.component)]
    decays = [name for name, source in table.items() if name.endswith(".decay") and source.numel == 1]
    for prefix in [name[: -len("decay")] for name in decays[:_TRIES]]:
        dots = any("." in name[len(prefix) :] for name in table if name.startswith(prefix))
        if f"{prefix}num_updates" in table and not dots:
            return _lit_ema(part, prefix, files, found)
    return _repeated(part, found)


def _ema_pytorch(part: Part, ema: dict[str, Source], found: Unwrapped) -> list[Part]:
    """`ema_pytorch.EMA` and `KarrasEMA`: `ema_model.*`, the raw network as `online_model.*` unless it stands beside."""
    found.writer = found.writer or "ema-pytorch"
    found.passed += [f"`{name}` (a counter)" for name in _COUNTERS if name in part.table]
    parts = [Part(ema, "ema", part.rate, part.component)]
    online = {n.removeprefix("online_model."): s for n, s in part.table.items() if n.startswith("online_model.")}
    raw_beside = any(
        other is not part and other.kind is None and other.component == part.component for other in found.parts
    )
    if online and raw_beside:
        found.passed.append("`online_model` (the raw weights stand beside it)")
    elif online:
        parts.insert(0, Part(online, None, None, part.component))
    return parts


def _lit_ema(part: Part, prefix: str, files: Sequence[Path], found: Unwrapped) -> list[Part]:
    """LitEma keeps its copies in buffers whose names are the parameters' without dots."""
    table = part.table
    ema = {name[len(prefix) :]: source for name, source in table.items() if name.startswith(prefix)}
    decay = float(read_source(files, ema.pop("decay")).reshape(-1)[0])
    del ema["num_updates"]
    raw = {name: source for name, source in table.items() if not name.startswith(prefix)}
    root, names = undotted(list(raw), list(ema), files[0])
    renamed = {full: ema[short] for short, full in names.items()}
    # buffers have no EMA; that all files leave out the same ones is for `keys.check_filled` to check
    kept = frozenset(name for name in raw if name.startswith(root) and name not in renamed)
    found.writer = "LitEma"
    whole = {name: renamed.get(name, source) for name, source in raw.items() if name in renamed or name in kept}
    return [Part(raw, None, None, part.component), Part(whole, "ema", f"{decay:.6g}", part.component, kept)]


def undotted(raw: Sequence[str], ema: Sequence[str], file: Path) -> tuple[str, dict[str, str]]:
    """Which raw name each name without dots means.

    Args:
        raw: full names of the raw tensors.
        ema: names with the dots removed, relative to one of the raw network's modules.
        file: named in the errors.

    Returns:
        The module's prefix (`model.`, or empty), and EMA name -> full raw name, a bijection onto a part of `raw`.

    Raises:
        BankError: no module has all these names, or two raw names are the same without dots.
    """
    best: tuple[int, str] = (-1, "")
    for root in _roots(raw, max(ema, key=len, default="")):
        short: dict[str, list[str]] = {}
        for name in raw:
            if name.startswith(root):
                short.setdefault(name[len(root) :].replace(".", ""), []).append(name)
        hits = sum(name in short for name in ema)
        best = max(best, (hits, root), key=lambda pair: pair[0])
        if hits < len(ema):
            continue
        for name in ema:
            if len(short[name]) > 1:
                raise BankError(
                    f"`{shown(file)}`: the EMA tensor `{shown(name)}` has lost its dots and fits both "
                    f"`{shown(short[name][0])}` and `{shown(short[name][1])}`. Use the raw weights of another file."
                )
        return root, {name: short[name][0] for name in ema}
    known = {n[len(best[1]) :].replace(".", "") for n in raw}
    missing = [name for name in ema if name not in known]
    raise BankError(
        f"`{shown(file)}`: the EMA tensor `{shown(missing[0] if missing else ema[0])}` belongs to no raw tensor "
        f"({best[0]} of {len(ema)} do). The file is a mixture; save raw weights and EMA of one network."
    )


def _roots(raw: Sequence[str], probe: str) -> list[str]:
    """Prefixes behind which a raw name is `probe` but for its dots, short ones first."""
    found = {""}
    for name in raw:
        if name.replace(".", "").endswith(probe):
            cuts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
            found |= {name[:cut] for cut in cuts if name[cut:].replace(".", "") == probe}
    return sorted(found, key=lambda root: (root.count("."), root))[:_TRIES]


def _repeated(part: Part, found: Unwrapped) -> list[Part]:
    """A table in which a module named like an EMA repeats the names of another module: split it."""
    heads: dict[str, None] = {}
    for name in part.table:
        words = name.split(".")
        for count in range(1, min(3, len(words) - 1) + 1):
            if parse_component(words[count - 1])[1] == "ema":
                heads[".".join(words[:count]) + "."] = None
    for head in sorted(heads, key=len, reverse=True)[:_TRIES]:  # `ema.ema_model.` before `ema.`
        inside = {name[len(head) :]: source for name, source in part.table.items() if name.startswith(head)}
        top = head.split(".")[0] + "."
        outside = [name for name in part.table if not name.startswith(top)]
        roots = dict.fromkeys(
            name[: len(name) - len(tail)]
            for tail in list(inside)[:1]
            for name in outside
            if name == tail or name.endswith("." + tail)
        )
        for root in list(roots)[:_TRIES]:
            if {name[len(root) :] for name in outside if name.startswith(root)} == set(inside):
                dropped = [n for n in part.table if n.startswith(top) and not n.startswith(head)]
                found.passed += [f"`{shown(name)}` (beside the EMA)" for name in dropped]
                raw = {name: part.table[name] for name in outside}
                ema = {root + name: source for name, source in inside.items()}
                return [Part(raw, part.kind, None, part.component), Part(ema, "ema", part.rate, part.component)]
    return [part]
