"""A model folder that carries its recipe, and what can be said of it without making it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import Source
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shard_index import open_regular, plain_file, read_index, read_range, shown, strict_json
from lcsc.core.digests import file_sha256
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.folder import CSV, DIGEST_KEY, RECIPE_KEY, coefficients_csv, is_sound

#: whose models can be made again from their recipes
OPERATORS = ("linear", "linear_grouped", "lora")
#: most lists and objects in a recipe
MAX_ITEMS = 1_000_000


@dataclass
class Exported:
    """A model folder: its recipe, and where each tensor's bytes are (`sources` counts parts as `files` does)."""

    folder: Path
    files: tuple[Path, ...]
    sources: Mapping[str, Source]
    metadata: Mapping[str, str]
    recipe: Mapping[str, Any]
    #: the first tensor found different, with the file it is in
    wrong: str | None = field(default=None, init=False)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.files[self.sources[name].pieces[0].part]


def open_model(folder: Path) -> Exported:
    """A model folder, after all checks that need no bank."""
    files = tuple(plain_file(folder, file.name) for file in sorted(folder.glob("*.safetensors")))
    sources: dict[str, Source] = {}
    metadata: dict[str, str] | None = None
    for part, file in enumerate(files):
        table, found = read_safetensors(file, part)
        _check_header(file)
        if metadata is not None and found != metadata:
            raise BankError(f"the headers of `{files[0]}` and `{file}` differ. One of them is from another model.")
        if twice := sorted(set(table) & set(sources)):
            raise BankError(f"`{file}` holds `{shown(twice[0])}`, which is in another file too. Remove the stale one.")
        metadata, sources = found, sources | table
    assert metadata is not None
    model = Exported(folder, files, sources, metadata, _read_recipe(files[0], metadata))
    _check_index(model)
    _check_texts(model)
    return model


def _check_header(file: Path) -> None:
    """The header's text is the one spelling that writers use, so that no byte of it is free."""
    with open_regular(file) as (fd, _):
        raw = read_range(fd, 8, int.from_bytes(read_range(fd, 0, 8, file), "little"), file)
    text = json.dumps(json.loads(raw), separators=(",", ":"), ensure_ascii=False).encode()
    if raw.rstrip(b" ") != text:
        raise BankError(f"the header of `{file}` was edited. Restore the file, or export the model again.")


def _read_recipe(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(RECIPE_KEY)
    if text is None:
        raise ConfigError(f"`{file}` has no recipe in its header. Only models exported by lcsc carry one.")
    recipe = strict_json(text.encode(), file, objects=MAX_ITEMS, names=4 * MAX_ITEMS)
    digest = metadata.get(DIGEST_KEY)
    if digest != sha256(text.encode()).hexdigest() and (digest is not None or "schedule" in recipe):
        raise BankError(f"the recipe in the header of `{file}` was edited: its digest is another.")
    if recipe.get("operator") not in OPERATORS and "settings" not in recipe:
        raise ConfigError(
            f"`{file}` was made by the operator `{shown(recipe.get('operator'))}`, and its recipe does not say with "
            f"which settings; only models of {', '.join(OPERATORS)} can be made again without them."
        )
    if not is_sound(recipe):
        raise BankError(f"the recipe of `{file}` is none that lcsc writes. It was edited.")
    return recipe


def _check_index(model: Exported) -> None:
    indices = list(model.folder.glob("*.safetensors.index.json"))
    if len(indices) != (len(model.files) > 1):
        raise BankError(f"`{model.folder}` holds {len(model.files)} weight files and {len(indices)} index files.")
    for path in indices:
        index, text = read_index(path), path.read_bytes()
        for name in sorted({*index, *model.sources}):
            if name not in index or name not in model.sources or index[name] != model.file_of(name).name:
                raise BankError(f"`{path}` places `{shown(name)}` wrongly. Export the model again.")
        total = sum(source.nbytes for source in model.sources.values())
        again = {"metadata": {"total_size": total}, "weight_map": index}
        if text != (json.dumps(again, indent=2) + "\n").encode():
            raise BankError(f"`{path}` was edited. Export the model again.")


def _check_texts(model: Exported) -> None:
    if "config_sha256" not in model.recipe:  # a search's export: config.json has no digest there
        return
    name = "adapter_config.json" if model.recipe["operator"] == "lora" else "config.json"
    config, wanted = model.folder / name, model.recipe["config_sha256"]
    if wanted is not None and (not config.is_file() or file_sha256(config) != wanted):
        raise BankError(f"`{config}` is not the one that was written: its digest is another. Restore it.")
    table = model.folder / CSV
    if "settings" in model.recipe:  # no combination
        return
    if not table.is_file() or table.read_bytes() != coefficients_csv(model.recipe).encode():
        raise BankError(f"`{table}` is not what the recipe gives. Restore it.")


def rows_by_step(bank: CheckpointBank, model: Exported) -> dict[tuple[int, str | None], int]:
    """Step, and rate where the recipe combines several -> row of the bank."""
    rates = bank.rates if bank.rates and "rates" in model.recipe else [None] * bank.num_checkpoints
    return {key: k for k, key in enumerate(zip(bank.steps, rates, strict=True))}


def difference(model: Exported, name: str) -> str:
    """That a tensor is another one, in a sentence."""
    """That a tensor is another one, in a sentence."""
    return (
        f"`{model.file_of(name)}`: `{shown(name)}` is not what the recipe gives, and the checkpoints are unchanged. "
        "The file was edited or damaged; export the model again."
    )


def check_tensors(model: Exported, wanted: Mapping[str, tuple[str, tuple[int, ...]]], ties: Mapping[str, str]) -> None:
    """Names, shapes and dtypes are those that the recipe gives; tied names may be there or not."""
    found = {name: (source.dtype, source.shape) for name, source in model.sources.items()}
    optional = {name: wanted[twin] for name, twin in ties.items()}
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name) and (name in wanted or found[name] != optional.get(name)):
            where = model.file_of(name) if name in found else model.folder
            is_now, was = _text(found.get(name)), _text(wanted.get(name))
            raise BankError(f"`{where}`: `{shown(name)}` is {is_now}, but the recipe gives {was}. Export it again.")


def check_metadata(model: Exported, more: Mapping[str, str]) -> None:
    """The header holds the recipe, its digest, the format and `more`; nothing else."""
    rest = {key: text for key, text in model.metadata.items() if key not in (RECIPE_KEY, DIGEST_KEY)}
    if rest != {"format": "pt", **more}:
        odd = sorted(set(rest.items()) ^ {("format", "pt"), *more.items()})
        raise BankError(f"the header of `{model.files[0]}` was edited: {shown(odd[0])} is not as it was written.")


def _text(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} of shape {kind[1]}"


def check_parents(bank: CheckpointBank, model: Exported) -> None:
    """Raise BankError where a checkpoint that the model was made of is another one by now."""
    """Raise BankError where a checkpoint that the model was made of is another one by now."""
    here = rows_by_step(bank, model)
    for recorded in model.recipe["parents"]:
        k = here[recorded["step"], recorded.get("rate")]
        if "content" in recorded:
            parent = bank.parent(k)
            if (kept := parent.get("rounded")) != (was := recorded.get("rounded")):
                raise BankError(
                    f"`{bank.path}` holds step {recorded['step']} {_rounded(kept)} and `{model.folder}` was made of it "
                    f"{_rounded(was)}. Give the checkpoints that it was made of with bank=PATH."
                )
            changed = parent["content"] != recorded["content"]
        else:  # older recipes: a SHA-256 of each file
            digests = sorted(map(str, dict(recorded.get("files") or {}).values()))
            changed = sorted(map(file_sha256, bank.rows[k].files)) != digests
        if changed:
            raise BankError(
                f"the checkpoint of step {recorded['step']}, `{bank.rows[k].path}`, "
                f"changed since `{model.folder}` was made of it. Restore it, or make the model again."
            )


def _rounded(dtypes: object) -> str:
    return "as it was saved" if dtypes is None else f"rounded to {shown(dtypes)}"
