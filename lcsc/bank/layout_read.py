"""One set of weight files as tables of tensors, with what its folder says about the network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.crc import Stored
from lcsc.bank.extents import Source, Table
from lcsc.bank.layout_files import DCP, WeightSet
from lcsc.bank.names import parse
from lcsc.bank.shard_index import MAX_JSON, open_regular, plain_file, read_index, read_range, shown, strict_json
from lcsc.bank.unwrap import Part, Unwrapped, unwrap
from lcsc.bank.zip_check import Entry
from lcsc.core.errors import BankError

_LORA = re.compile(
    r"(?:^|[._])lora_(?:a|b|down|up|mid|embedding_a|embedding_b|magnitude_vector)(?:[._]|$)"
    r"|\.lora\.(?:down|up)\.|\.lora_linear_layer\.|hada_w\d_[ab]|lokr_w\d",
    re.IGNORECASE,
)
#: what diffusers' EMAModel.save_pretrained adds to the network's configuration
_EMA_CONFIG = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
_MAYBE_LORA = re.compile("lora|hada|lokr", re.IGNORECASE)
_SPLIT = re.compile(r"[._]")


class Pool:
    """Equal things as one object: ten thousand checkpoints of one network share one table and one configuration."""

    def __init__(self) -> None:
        self._tables: dict[int, list[dict[str, Source]]] = {}
        self._texts: dict[str, str] = {}
        self._archs: list[Mapping[str, Any]] = []
        self._places: dict[bytes, np.ndarray] = {}
        self._metadata: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}

    def table(self, table: dict[str, Source]) -> Table:
        """An equal table seen before, or this one."""
        same = self._tables.setdefault(hash(frozenset(table.items())), [])
        for other in same:
            if other == table:
                return other
        same.append(table)
        return table

    def stored(self, stored: Stored | None) -> Stored | None:
        """The same with places seen before; checksums differ from checkpoint to checkpoint."""
        if stored is None:
            return None
        return Stored(self._places.setdefault(stored.places.tobytes(), stored.places), stored.crcs)

    def metadata(self, metadata: Mapping[str, str]) -> Mapping[str, str]:
        """Equal metadata seen before, or the same with texts seen before."""
        key = tuple((self._text(name), self._text(text)) for name, text in sorted(metadata.items()))
        return self._metadata.setdefault(key, dict(key))

    def arch(self, arch: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """An equal description of a network seen before, or this one."""
        if arch is None:
            return None
        for other in self._archs:
            if other == arch:
                return other
        self._archs.append(arch)
        return arch

    def names(self, names: frozenset[str]) -> frozenset[str]:
        """An equal set seen before, or this one."""
        return self._names.setdefault(names, names)

    def _text(self, text: str) -> str:
        return self._texts.setdefault(text, text)


@dataclass
class Loaded:
    """What a set of files holds.

    Args:
        files: all files, in the order that the pieces of the tables count them.
        parts: networks; see `unwrap.Part`.
        format: safetensors, torch or dcp.
        step: training step that the files themselves name, None when they name none.
        writer: who wrote them, where their content shows it.
        metadata: texts of the safetensors header, and `adapter_config` (JSON) of a PEFT folder.
        passed: what was passed over inside.
        counts_epochs: whether a bare number in the name counts epochs (kohya).
        stored: checksums that the files have, see `crc.Stored`.
    """

    files: tuple[Path, ...]
    parts: list[Part]
    format: str
    step: int | None = None
    writer: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    counts_epochs: bool = False
    stored: Stored | None = None


def load_set(item: WeightSet, *, crc: bool = False) -> Loaded:
    """Read the headers of a set of files.

    Args:
        item: which files.
        crc: compare the checksums of torch files, which reads them whole.

    Raises:
        BankError: damaged or hostile files, a tensor in two shards, an index that does not fit its shards.
    """
    if item.suffix == DCP:
        return _load_dcp(item, crc)
    if item.suffix == ".pkl":
        raise BankError(
            f"`{shown(item.path)}` is a pickle of a whole network, which runs code when read. If you trust it, rewrite "
            f"it with `lcsc bank convert {shown(item.path)} to=OUT allow_code=true`."
        )
    files: tuple[Path, ...] = (item.path,)
    if item.index or len(item.files) > 1:  # names that stand in the checkpoint must not lead out of it
        files = tuple(plain_file(item.folder, name) for name in item.files)
    metadata: dict[str, str] = {}
    values: list[Any] = []
    stored: list[tuple[int, Entry]] = []
    for part, file in enumerate(files):
        if item.suffix == ".safetensors":
            from lcsc.bank.safetensors_file import PACK_KEY, read_safetensors

            table, own = read_safetensors(file, part)
            if PACK_KEY in own:
                raise BankError(
                    f"`{shown(file)}` is a whole bank that `lcsc bank pack` wrote, no checkpoint of one. Give the file "
                    "itself with `bank.path`, or move it away from the checkpoints."
                )
            metadata = {**own, **metadata}
            values.append(table)
        else:
            from lcsc.bank.torch_file import read_torch

            values.append(read_torch(file, part, crc=crc, stored=stored).value)
    value = values[0] if len(values) == 1 else _union(values, files)
    if item.index:
        _check_index(item, value, files)
    if item.suffix == ".safetensors" and not value:
        raise BankError(f"checkpoint `{shown(item.path)}` holds no tensor. Remove it or save it again.")
    found = unwrap(value, files)
    loaded = _loaded(item, files, found, metadata)
    loaded.stored = Stored.of(stored)
    return loaded


def _loaded(item: WeightSet, files: tuple[Path, ...], found: Unwrapped, metadata: dict[str, str]) -> Loaded:
    step = metadata.get("ss_steps", metadata.get("step", metadata.get("global_step")))
    inside = int(step) if step is not None and re.fullmatch(r"\d{1,15}", step) else found.step
    lora = any(is_lora(part.table) for part in found.parts)
    writer = found.writer
    if lora:
        writer = _lora_writer(item, found.parts[0].table)
        if writer == "PEFT" and (config := read_json(item.folder / "adapter_config.json")):
            metadata = {**metadata, "adapter_config": json.dumps(config, sort_keys=True)}
    elif "ss_steps" in metadata or "ss_network_module" in metadata or "ss_sd_model_name" in metadata:
        writer = "kohya"
    kohya = any(key.startswith("ss_") for key in metadata)
    format = "safetensors" if item.suffix == ".safetensors" else "torch"
    return Loaded(files, found.parts, format, inside, writer, metadata, found.passed, counts_epochs=kohya)


def _load_dcp(item: WeightSet, crc: bool) -> Loaded:
    from lcsc.bank.dcp_file import read_dcp

    stored: list[tuple[int, Entry]] = []
    tensors, files, values = read_dcp(item.folder, crc=crc, stored=stored)
    found = unwrap(nested(tensors, values), files)
    return Loaded(files, found.parts, "dcp", found.step, found.writer, {}, found.passed, stored=Stored.of(stored))


def nested(tensors: Mapping[str, Source], values: Mapping[str, Any]) -> dict[str, Any]:
    """The outermost dicts of a checkpoint whose names were joined by dots.

    `model.a.weight` beside `optim.state.a` or a bare `step` is `{"model": {"a.weight": ...}, "optim": ..., "step": 7}`.
    Where nothing shows that there were dicts, a first word may be the network's own, and names stay whole.
    """
    single = {name: item for name, item in {**tensors, **values}.items() if "." not in name}
    heads: dict[str, dict[str, Any]] = {}
    for name, item in {**tensors, **values}.items():
        head, dot, tail = name.partition(".")
        if dot:
            heads.setdefault(head, {})[tail] = item
    bare = any(not isinstance(item, Source) for item in single.values())
    if not bare and not any(parse(head).state for head in heads):
        return {**tensors, **values}
    return {**heads, **single}


def _union(values: Sequence[Any], files: Sequence[Path]) -> dict[str, Any]:
    """The tables of several shards as one."""
    whole: dict[str, Any] = {}
    home: dict[str, Path] = {}
    for value, file in zip(values, files, strict=True):
        if not isinstance(value, Mapping) or not all(isinstance(source, Source) for source in value.values()):
            raise BankError(f"`{shown(file)}` is a shard but no flat table of tensors. Save the checkpoint again.")
        for name, source in value.items():
            if name in whole:
                raise BankError(
                    f"tensor `{shown(name)}` is in `{shown(home[name])}` and again in `{shown(file)}`. "
                    "A checkpoint holds each tensor once; remove the stale shard."
                )
            whole[name], home[name] = source, file
    return whole


def _check_index(item: WeightSet, table: Any, files: Sequence[Path]) -> None:
    """Raise BankError unless the index lists exactly the tensors of the shards, each in its shard."""
    index = item.folder / str(item.index)
    listed = read_index(index)
    names = table.keys() if isinstance(table, Mapping) else set()
    if extra := sorted(set(listed) ^ set(names)):
        where = "only in the index" if extra[0] in listed else "in a shard but not in the index"
        raise BankError(f"`{shown(index)}` does not fit its shards: `{shown(extra[0])}` is {where}. Save it again.")
    for name, file in listed.items():
        lies = files[table[name].pieces[0].part].name
        if lies != file:
            raise BankError(
                f"`{shown(index)}` puts `{shown(name)}` into `{shown(file)}`, but it is in `{lies}`. Save it again."
            )


def is_lora(table: Mapping[str, Source]) -> bool:
    """Whether a table holds low-rank factors alone (a whole network with factors inside has `base_layer` names)."""
    names = "\n".join(table)
    found = _MAYBE_LORA.search(names) and any(_LORA.search(name) for name in table)
    return bool(found) and "base_layer" not in names and "model.diffusion_model." not in names


def _lora_writer(item: WeightSet, table: Mapping[str, Source]) -> str:
    if any(_LORA.search(name) and _SPLIT.split(name)[0] == "lora" for name in table):
        return "kohya LoRA"
    if (item.folder / "adapter_config.json").is_file() or any(name.startswith("base_model.model.") for name in table):
        return "PEFT"
    return "diffusers LoRA"


# ---------------------------------------------------------------------------------------------- configurations


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object beside the weights, None when there is none.

    Raises:
        BankError: no regular file, too large, or not a JSON object.
    """
    if not path.is_symlink() and not path.exists():
        return None
    with open_regular(path) as (fd, size):
        if size > MAX_JSON // 4:
            raise BankError(f"`{shown(path)}` has {size} bytes; a configuration has at most {MAX_JSON // 4}.")
        raw = read_range(fd, 0, size, path)
    return strict_json(raw, path, objects=100_000, names=500_000)


def read_arch(folder: Path) -> tuple[dict[str, Any] | None, str | None, str | None]:
    """`({"class", "config"}, library, EMA rate)` from a folder's config.json; nothing in it is ever run or built.

    diffusers names the class in `_class_name`, transformers in `architectures`. The counters that diffusers' EMAModel
    adds belong to no network and are left out; its `decay` is the EMA rate.
    """
    raw = read_json(folder / "config.json")
    if raw is None:
        return None, None, None
    config = {key: value for key, value in raw.items() if not key.startswith("_") and key != "transformers_version"}
    rate = None
    if {"decay", "optimization_step", "update_after_step"} <= config.keys():
        rate = f"{config['decay']:.6g}" if isinstance(config["decay"], float) else None
        config = {key: value for key, value in config.items() if key not in _EMA_CONFIG}
    if isinstance(raw.get("_class_name"), str):
        return {"class": raw["_class_name"], "config": config}, "diffusers", rate
    names = raw.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return {"class": names[0], "config": config}, "transformers", rate
    return None, "transformers" if "model_type" in raw else None, rate
