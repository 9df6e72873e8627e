"""Weights to files that other libraries load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.export.folder import RECIPE_KEY, recipe_header
from lcsc.models.network import STEMS, config_text, library_of

#: `diffusers` is for the network's own library, of whichever of the two it is; `safetensors` has a plain name
FORMATS = ("diffusers", "safetensors")


def write_weights(
    weights: Mapping[str, Tensor],
    arch: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
    folder: Path,
    *,
    format: str = "diffusers",
    max_shard_size: str = "5GB",
) -> None:
    """Write config.json and safetensors files whose header carries the recipe.

    Args:
        weights: tensors by name.
        arch: `{"class", "config"}`; None writes no config.json.
        recipe: plain JSON values.
        folder: an existing, empty folder.
        format: `diffusers` (loads with `from_pretrained`, also of transformers) or `safetensors` (the same under the
            plain name).
        max_shard_size: size above which several files and an index are written, such as "5GB"; a bare number is bytes.

    Raises:
        ConfigError: no such format, or a size that is none.
    """
    if format not in FORMATS:
        raise ConfigError(f"no format named `{format}`.{did_you_mean(format, FORMATS)}")
    stem = "model" if format == "safetensors" else STEMS["diffusers" if arch is None else library_of(arch)]
    pattern = stem + "{suffix}.safetensors"
    size = int(max_shard_size) if max_shard_size.isdecimal() else max_shard_size
    try:
        plan = split_torch_state_dict_into_shards(dict(weights), filename_pattern=pattern, max_shard_size=size)
    except ValueError as error:
        raise ConfigError(f"`max_shard_size` is `{max_shard_size}`; write a size such as 500MB or 5GB.") from error
    if arch is not None:
        (folder / "config.json").write_text(config_text(arch), encoding="utf-8")
    header = recipe_header(recipe)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, folder / file, metadata=header)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder, by name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
    return tensors


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in the header of an exported folder's first safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"`{folder}` holds no safetensors file. Give a folder that `lcsc export` wrote.")
    with safe_open(files[0], framework="pt") as handle:
        text = (handle.metadata() or {}).get(RECIPE_KEY)
    if text is None:
        raise ConfigError(f"`{files[0]}` has no recipe in its header. Only models exported by lcsc carry one.")
    return json.loads(text)
