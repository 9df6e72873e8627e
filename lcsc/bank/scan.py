"""Which files under a path are checkpoints, and what their headers say. Reads headers only."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lcsc.core.errors import BankError

PATTERNS = (
    "checkpoint-<step>/<component>/*.safetensors",
    "checkpoint-<step>/*.safetensors",
    "<name><step>.safetensors",
)


@dataclass(frozen=True)
class Header:
    """Where a tensor is and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class CheckpointFile:
    """One checkpoint: its step, its safetensors files (several when sharded) and its config.json."""

    step: int
    path: Path
    files: tuple[Path, ...]
    arch: Mapping[str, Any] | None

    def headers(self) -> dict[str, Header]:
        """Name -> header of every tensor, read from the files' headers.

        Raises:
            BankError: a file is truncated or no safetensors file, or two shards hold one name.
        """
        found: dict[str, Header] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                        if name in found:
                            raise BankError(
                                f"tensor `{name}` is in `{found[name].file}` and again in `{file}`. "
                                "A checkpoint holds each tensor once; remove the stale shard."
                            )
                        view = handle.get_slice(name)
                        found[name] = Header(file, tuple(view.get_shape()), view.get_dtype())
            except SafetensorError as error:
                raise BankError(
                    f"checkpoint file `{file}` ({file.stat().st_size} bytes) is not a whole safetensors file: {error}. "
                    "Copy it again, or leave its step out with `bank.start`, `bank.stop` or `bank.every`."
                ) from error
        if not found:
            raise BankError(f"checkpoint `{self.path}` holds no tensor. Remove it or save it again.")
        return found


def step_of(name: str) -> int | None:
    """The training step in a file or folder name: its last run of digits (`ema_0.9999_840000` -> 840000)."""
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else None


def _read_arch(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = {key: value for key, value in raw.items() if not key.startswith("_")}
        return {"class": raw["_class_name"], "config": config}
    except (ValueError, KeyError, AttributeError) as error:
        raise BankError(
            f"`{path}` is not a model configuration: {error!r}. It needs JSON with `_class_name`."
        ) from error


def _component(folder: Path, wanted: str | None) -> Path | None:
    """The folder with the weights inside a checkpoint folder, None when there is none."""
    if wanted is not None:
        return folder / wanted if any((folder / wanted).glob("*.safetensors")) else None
    if any(folder.glob("*.safetensors")):
        return folder
    inside = sorted(sub for sub in folder.iterdir() if sub.is_dir() and any(sub.glob("*.safetensors")))
    raw = [sub for sub in inside if not sub.name.endswith("_ema")]
    if len(raw) > 1:
        names = ", ".join(sub.name for sub in raw)
        raise BankError(f"`{folder}` holds several components: {names}. Choose one with `bank.component`.")
    return next(iter(raw or inside), None)


def find_checkpoints(path: Path, component: str | None = None) -> list[CheckpointFile]:
    """The checkpoints directly under `path`, sorted by step as a number.

    Where a folder holds raw weights (`unet`) beside their EMA (`unet_ema`), the raw ones are taken; name
    `component` to choose. Hidden folders and folders without a step or weights are passed over.

    Raises:
        BankError: nothing found (the patterns tried are named), several components, or two checkpoints of one step.
    """
    found: list[CheckpointFile] = []
    for entry in sorted(path.iterdir()) if path.is_dir() else []:
        step = step_of(entry.name if entry.is_dir() else entry.stem)
        if entry.name.startswith(".") or step is None:
            continue
        if entry.is_file() and entry.suffix == ".safetensors" and component is None:
            found.append(CheckpointFile(step, entry, (entry,), _read_arch(path)))
        elif entry.is_dir() and (folder := _component(entry, component)):
            files = tuple(sorted(folder.glob("*.safetensors")))
            found.append(CheckpointFile(step, folder, files, _read_arch(folder)))
    if not found:
        raise BankError(
            f"no checkpoint found under `{path}`. Tried {', '.join(PATTERNS)}. "
            "Give the folder that holds them with `bank.path`, or make one with `lcsc train`."
        )
    found.sort(key=lambda item: item.step)
    for first, second in itertools.pairwise(found):
        if first.step == second.step:
            raise BankError(
                f"step {first.step} stands twice: `{first.path}` and `{second.path}`. A bank holds one checkpoint "
                "a step; move one away."
            )
    return found
