"""What a model folder that `lcsc combine` writes consists of, beside the numbers. K = checkpoints.

The recipe travels in the header of every weight file, with a digest of itself; coefficients.csv and config.json follow
from it or are digested in it. README.md is for people and is not covered.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.lora_modules import FACTOR_SPACE, copied_at
from lcsc.bank.shard_index import open_regular, read_range, shown, strict_json
from lcsc.core.digests import canonical_json
from lcsc.core.errors import BankError
from lcsc.export.stream import Spec
from lcsc.kernels import Groups

RECIPE_KEY = "lcsc_recipe"
DIGEST_KEY = "lcsc_recipe_sha256"
CSV = "coefficients.csv"
#: how to load a network whose layers differ
USE_MIXED = """Layers keep different numbers of key/value heads, which the class of transformers refuses to build:

```python
from pathlib import Path

from lcsc.models.network import load_network

net = load_network(Path("path/to/this/folder"))
```"""
#: how to load an encoder-decoder whose sides share tensors
USE_SHARED = """Encoder and decoder share tensors, which transformers alone would draw anew:

```python
from lcsc.models.encoder_decoder import SharedEncoderDecoderModel

net = SharedEncoderDecoderModel.from_pretrained("path/to/this/folder").eval()
```"""
#: what a recipe holds that is no decision about the model
NOT_SETTINGS = (
    *(
        "operator",
        "settings",
        "pieces",
        "sources",
        "tensors",
        "kind",
        "rate",
        "dtype",
        "bank",
        "parents",
        "config_sha256",
        "lcsc_version",
        "point",
    ),
)
#: largest config.json that is copied, in bytes
MAX_CONFIG = 16 << 20
#: a config.json with one of these describes a network
_KEYS = {"_class_name", "architectures", "model_type"}


@dataclass(frozen=True)
class Model:
    """What all outputs of a bank share: tensors, file stem, library that loads them, and its configuration file."""

    specs: tuple[Spec, ...]
    stem: str
    library: str
    config: bytes | None
    config_name: str = "config.json"

    def dtypes(self, bank: CheckpointBank) -> set[str]:
        """Dtypes of the combined tensors."""
        names = {entry.name for entry in bank.layout.entries}
        return {spec.dtype for spec in self.specs if spec.name in names}

    @classmethod
    def of(cls, bank: CheckpointBank, dtype: str) -> Model:
        """Tensors and configuration of a model that is made of `bank`.

        Tied tensors are stored under each of their names, as the parents do, but for transformers models whose
        configuration says that the library ties them again.
        """
        config = model_config(bank)
        library = "pytorch"
        if config is not None:
            library = "diffusers" if "_class_name" in config else "transformers"
        entries = {entry.name: entry for entry in bank.layout.entries}
        kept = bank.dtypes if dtype == "same" else dict.fromkeys(entries, dtype)
        specs = [Spec(name, kept[name], entry.shape) for name, entry in entries.items()]
        if not (library == "transformers" and config and config.get("tie_word_embeddings") is True):
            specs += [Spec(name, kept[twin], entries[twin].shape) for name, twin in bank.layout.ties.items()]
        specs += [Spec(name, source.dtype, source.shape) for name, (_, source) in bank.constant_sources().items()]
        stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
        return cls(tuple(specs), stem, library, _config_bytes(bank, config, library, dtype))


def _config_path(bank: CheckpointBank) -> Path | None:
    last = bank.rows[-1]
    folders = dict.fromkeys((last.files[0].parent, last.path))
    return next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)


def model_config(bank: CheckpointBank) -> dict[str, Any] | None:
    """The parents' config.json, or what a packed bank carries of it; None when neither describes a network."""
    if (path := _config_path(bank)) is not None:
        try:
            config = strict_json(_config_text(path), path, objects=100_000, names=1_000_000)
        except BankError:
            config = {}  # no description of a network, or the bank would not have opened
        names = {config.get("_class_name"), *(config.get("architectures") or ())}
        if (bank.arch is None and _KEYS & set(config)) or (bank.arch is not None and bank.arch["class"] in names):
            return config
    if bank.arch is None:
        return None
    inner = dict(bank.arch["config"])
    return inner if _KEYS & set(inner) else {"_class_name": bank.arch["class"], **inner}


def _config_text(path: Path) -> bytes:
    with open_regular(path) as (fd, size):
        if size > MAX_CONFIG:
            raise BankError(f"`{path}` has {size} bytes; a configuration has at most {MAX_CONFIG}.")
        return read_range(fd, 0, size, path)


def _config_bytes(bank: CheckpointBank, config: Mapping[str, Any] | None, library: str, dtype: str) -> bytes | None:
    """config.json: the parent's bytes, but for the dtype in which transformers would load what we wrote."""
    if config is None:
        return None
    keys = [key for key in ("dtype", "torch_dtype") if config.get(key) not in (None, dtype)]
    if library == "transformers" and dtype != "same" and keys:
        config = {**config, **dict.fromkeys(keys, dtype)}
    elif (path := _config_path(bank)) is not None and (text := _config_text(path)) and json.loads(text) == config:
        return text
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------------------- recipe


def used_rows(bank: CheckpointBank, coef_K: np.ndarray) -> list[int]:
    """Rows that an output is made of: those with a coefficient, and the last one if tensors or scales are its own."""
    used = set(np.flatnonzero(coef_K).tolist())
    if bank.constant_sources() or bank.kind == "lora":
        used.add(bank.num_checkpoints - 1)
    return sorted(used)


def bank_config(bank: CheckpointBank) -> dict[str, Any]:
    """The bank's configuration with an absolute path, fixed ends and the step to which `delta` keeps differences."""
    path = str(Path(bank.config["path"]).absolute())
    more = {"anchor": bank.steps[bank.anchor]} if bank.storage == "delta" else {}
    return {**bank.config, "path": path, "start": min(bank.steps), "stop": max(bank.steps), **more}


def make_recipe(
    bank: CheckpointBank, model: Model, *, dtype: str, made: Mapping[str, Any], coef_K: np.ndarray, parents: list[Any]
) -> dict[str, Any]:
    """Everything that is needed to make the model again, as plain JSON values.

    Args:
        bank: what it is made of.
        model: what all outputs of the bank share.
        dtype: as asked for.
        made: how the coefficients came about (`schedule`, and what else is worth knowing).
        coef_K: float64.
        parents: origin of every row that is used.
    """
    return {
        "operator": "linear",
        **made,
        "steps": list(bank.steps),
        **({"rates": list(bank.rates)} if bank.rates else {}),
        "coef": coef_K.tolist(),
        **({"copied": copied} if (copied := copied_at(bank, made.get("rank"))) else {}),
        "kind": bank.kind,
        "rate": bank.rate,
        "dtype": dtype,
        "bank": bank_config(bank),
        "parents": parents,
        "config_sha256": None if model.config is None else sha256(model.config).hexdigest(),
        "lcsc_version": importlib.metadata.version("lcsc"),
    }


def make_metadata(recipe: Mapping[str, Any], model: Model, ties: Mapping[str, str]) -> dict[str, str]:
    """A weight file's header metadata; tied names that are not stored stand there beside their twins' names.

    That is how `safetensors.torch.save_model` writes them.
    """
    stored = {spec.name for spec in model.specs}
    return {name: twin for name, twin in sorted(ties.items()) if name not in stored} | recipe_header(recipe)


def recipe_header(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Metadata that carries a recipe, with a digest that notices every edit of it."""
    text = canonical_json(recipe)
    return {"format": "pt", RECIPE_KEY: text, DIGEST_KEY: sha256(text.encode()).hexdigest()}


def is_sound(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe from a stranger has the types that making a model again relies on."""
    if "settings" in recipe:
        return _is_sound_remade(recipe)
    steps, coef, parents = recipe.get("steps"), recipe.get("coef"), recipe.get("parents")
    if not (isinstance(steps, list) and steps and isinstance(coef, list) and isinstance(parents, list)):
        return False
    if isinstance(bank := recipe.get("bank"), dict) and bank.get("anchor", steps[0]) not in steps:
        return False
    rates = recipe.get("rates", [None] * len(steps))
    grouped = recipe.get("operator") == "linear_grouped"
    return (
        type(recipe.get("rank")) in (int, type(None))
        and recipe.get("space", "product") in ("product", FACTOR_SPACE)
        and (recipe.get("space") != FACTOR_SPACE or recipe.get("rank") is None)
        and recipe.get("dtype", "float32") in ("float32", "bfloat16", "float16", "same")
        and isinstance(rates, list)
        and len(steps) == len(rates)
        and all(type(step) is int for step in steps)
        and (not grouped or _sound_groups(recipe.get("groups"), len(coef)))
        and all(_sound_row(row, len(steps)) for row in (coef if grouped else [coef]))
        and all(rate is None or type(rate) is str for rate in rates)
        and all(map(_sound_parent, parents))
    )


def _is_sound_remade(recipe: Mapping[str, Any]) -> bool:
    """The same for a model that an operator made of one checkpoint, or few, by its settings and a point."""
    steps, settings, parents, point = (recipe.get(key) for key in ("steps", "settings", "parents", "point"))
    return (
        isinstance(steps, list)
        and bool(steps)
        and all(type(step) is int for step in steps)
        and isinstance(settings, dict)
        and settings.get("name") == recipe.get("operator")
        and isinstance(recipe.get("bank", {}), dict)
        and recipe.get("dtype", "float32") in ("float32", "same")
        and isinstance(parents, list)
        and bool(parents)
        and all(map(_sound_parent, parents))
        and isinstance(point, dict)
        and all(isinstance(floats, list) and _sound_row(floats, len(floats)) for floats in point.values())
    )


def _sound_parent(parent: Any) -> bool:
    return (
        isinstance(parent, dict)
        and type(parent.get("step")) is int
        and type(parent.get("rate")) in (str, type(None))
        and isinstance(parent.get("files"), dict)
    )


def _sound_row(coef: Any, count: int) -> bool:
    numbers = isinstance(coef, list) and len(coef) == count
    return numbers and all(type(c) in (int, float) and math.isfinite(c) for c in coef)


def _sound_groups(groups: Any, count: int) -> bool:
    """Names for `count` layer groups, and segments that take only those."""
    names, segments = (groups.get("names"), groups.get("segments")) if isinstance(groups, dict) else (None, None)
    return (
        isinstance(names, list)
        and isinstance(segments, list)
        and len(names) == count
        and all(type(name) is str for name in names)
        and all(isinstance(segment, list) and len(segment) == 2 for segment in segments)
        and all(type(name) is str and type(g) is int and 0 <= g < count for name, g in segments)
    )


def recipe_groups(recipe: Mapping[str, Any], layout: Layout) -> Groups:
    """The columns of each layer group of a sound recipe: those from a segment's first tensor to the next segment's.

    Recipes name tensors instead of patterns, so that making a model again runs no regular expression of a stranger.

    Raises:
        BankError: the segments are not tensors of this layout in its order, from the first on.
    """
    if recipe["operator"] != "linear_grouped":
        return Groups((0, layout.num_parameters), (0,), 1)
    segments, places = recipe["groups"]["segments"], {entry.name: n for n, entry in enumerate(layout.entries)}
    if unknown := [name for name, _ in segments if name not in places]:
        raise BankError(f"a layer group of the recipe begins at `{shown(unknown[0])}`, which the checkpoints lack.")
    at = [places[name] for name, _ in segments]
    if at[:1] != [0] or at != sorted(set(at)):
        raise BankError("the layer groups of the recipe do not cover the tensors in order. It was edited.")
    starts = (*(layout.entries[n].start for n in at), layout.num_parameters)
    return Groups(starts, tuple(g for _, g in segments), len(recipe["groups"]["names"]))


def coefficients_csv(recipe: Mapping[str, Any]) -> str:
    """The recipe's coefficients as a table that `coef=FILE.csv` reads; floats round-trip exactly."""
    rates = recipe.get("rates")
    if rates:
        rows = [f"{s},{r},{c!r}" for s, r, c in zip(recipe["steps"], rates, recipe["coef"], strict=True)]
        return "\n".join(["step,rate,coef", *rows, ""])
    return "\n".join(["step,coef", *(f"{s},{c!r}" for s, c in zip(recipe["steps"], recipe["coef"], strict=True)), ""])


# ---------------------------------------------------------------------------------------------------------- card


def model_card(name: str, recipe: Mapping[str, Any], library: str, command: str) -> str:
    """README.md: what was averaged and how; no scores, because nothing was scored."""
    schedule = dict(recipe["schedule"])
    tracked = schedule.pop("tracked", None)
    title = ", ".join([schedule.pop("name"), *(f"{key} {value:g}" for key, value in schedule.items())])
    if tracked:
        widths = ", ".join(f"{width:g}" for width in tracked.values())
        title += f", reconstructed from tracked EMAs of sigma_rel {widths} (arXiv:2312.02696, Sec. 3.2)"
    parents = {(parent["step"], parent.get("rate")): parent for parent in recipe["parents"]}
    rates = recipe.get("rates") or [None] * len(recipe["steps"])
    rows = []
    for step, rate, coef in zip(recipe["steps"], rates, recipe["coef"], strict=True):
        parent = parents.get((step, rate))
        files = ", ".join(f"`{plain_text(file)}`" for file in parent["files"]) if parent else "not used"
        digest = f"`{parent['content'][:16]}`" if parent else ""
        rows.append(
            f"| {step}{'' if rate is None else f', EMA {plain_text(rate)}'} | {coef:+.6g} | {files} | {digest} |"
        )
    lines = [
        "---",
        f"library_name: {library}",
        "tags:",
        "- lcsc",
        "- merge",
        "---",
        f"# {plain_text(name)}: {len(parents)} checkpoints combined by lcsc",
        "",
        f"Schedule: {title}. Nothing was scored.",
        *(["", f"Warning: {recipe['warning']}."] if recipe.get("warning") else []),
        *(["", f"{recipe['copied']}."] if recipe.get("copied") else []),
        *(["", lora_text(recipe["rank"], recipe["error"])] if recipe["operator"] == "lora" else []),
        "",
        "| step | coefficient | files | content |",
        "|---|---|---|---|",
        *rows,
        "",
        "## How it was made",
        "",
        f"    {command or 'lcsc.export.oneshot.combine_bank(...)'}",
        "",
        f"lcsc {recipe['lcsc_version']}, Python {platform.python_version()}, numpy {np.__version__}. The weight files",
        "carry the full recipe in their headers; `lcsc verify` of this folder makes the model again from the",
        "checkpoints and compares every number. This page is not covered by that check.",
        "",
    ]
    return "\n".join(lines)


def lora_text(rank: int | None, error: Mapping[str, Any]) -> str:
    """What became of LoRA adapters, as a sentence."""
    kept = "their own rank" if rank is None else f"rank {rank}"
    return (
        f"The updates were combined and recompressed to {kept}, which loses {error['mean']:.2%} of them on average and "
        f"{error['max']:.2%} at most (`{plain_text(error['max_module'])}`)."
    )


def plain_text(text: Any) -> str:
    """A name from a file, safe inside a Markdown table."""
    return "".join(c if c.isprintable() and c not in "`|<>" else "?" for c in str(text))
