"""One checkpoint to another architecture's folder, one piece at a time: the model is never in memory as a whole."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lcsc.bank import CheckpointBank, Layout, Selection
from lcsc.bank.extents import Source, read_source
from lcsc.bank.shard_index import open_regular, read_range
from lcsc.bank.storage import as_tensor
from lcsc.core.errors import BankError, ConfigError, NonFiniteError
from lcsc.core.files import new_directory, writing
from lcsc.core.space import Point
from lcsc.export.folder import (
    NOT_SETTINGS,
    RECIPE_KEY,
    USE_MIXED,
    USE_SHARED,
    Model,
    bank_config,
    make_metadata,
    model_config,
    plain_text,
)
from lcsc.export.oneshot import check_target
from lcsc.export.stream import ModelWriter, Spec, parse_size, plan_files
from lcsc.models.causal_lm import CAUSAL_LMS
from lcsc.operators.surgery import Plan, Transforms, told

#: files beside the weights that belong to the model whatever its architecture: tokenizer and generation settings
COMPANIONS = re.compile(
    r"tokenizer.*\.(json|model)|(special_tokens_map|added_tokens|vocab|generation_config)\.json|merges\.txt|vocab\.txt"
    r"|spiece\.model|chat_template\.jinja"
)
#: largest of them that is copied, in bytes
MAX_COMPANION = 64 << 20


@dataclass(frozen=True)
class Transformed:
    """What was made: its folder, the bytes of its weight files, the recipe in their headers, and what was copied."""

    path: Path
    nbytes: int
    recipe: Mapping[str, Any]
    companions: tuple[str, ...]


def transform_model(
    bank: CheckpointBank,
    operator: Transforms,
    to: Path,
    *,
    point: Point | None = None,
    said: Mapping[str, Any] = MappingProxyType({}),
    max_shard_size: str = "5GB",
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Transformed:
    """Write what `operator` makes of one checkpoint to the new folder `to`.

    Every tensor keeps its dtype, also those that are remade. What is copied keeps its bits.

    Args:
        bank: opened with `storage="streamed"`.
        operator: see `lcsc.operators.surgery.Transforms`.
        to: a path that does not exist, outside the bank's folder.
        point: of the operator's space, as a search found it; None takes the settings alone.
        said: plain values for the recipe, such as the score of the search.
        max_shard_size: size above which several files and an index are written.
        command: the line that asked for it, for the model card.
        progress: called with bytes written and bytes in all.

    Raises:
        ConfigError: settings that do not fit the model, or a disk without room; nothing is written.
        BankError: a model that the operator refuses, or numbers that are not finite; nothing is left behind.
        OutputExistsError: `to` exists.
    """
    max_shard_bytes = parse_size(max_shard_size)
    plan = operator.plan(bank, point)
    if plan.row != bank.num_checkpoints - 1:
        bank = CheckpointBank.open(bank.path, **_only(bank, plan.row))
        plan = (plan.settled or operator).plan(bank, point)  # type: ignore[attr-defined]
    plan = replace(plan, recipe={**plan.recipe, **told(operator, point, plan), **said})
    model = planned_model(bank, plan)
    check_target(bank, to, sum(spec.nbytes for spec in model.specs))
    files = plan_files(model.specs, model.stem, max_shard_bytes)
    parent = bank.parent(plan.row)
    with writing(to), new_directory(to) as folder:
        longest = [dict(piece.longest) for piece in plan.pieces]
        rough = make_metadata(_recipe(bank, plan, model, parent, longest), model, plan.ties(bank))
        writer = ModelWriter(folder, files, Layout(()), {}, rough)  # tensors are written whole
        try:
            facts = _pour(bank, plan, model, writer, progress)
            metadata = make_metadata(_recipe(bank, plan, model, parent, facts), model, plan.ties(bank))
            writer.finish(metadata)
        finally:
            writer.close()
        recipe = json.loads(metadata[RECIPE_KEY])
        assert model.config is not None, "a model that an operator knows has a configuration"
        (folder / model.config_name).write_bytes(model.config)
        companions = _companions(bank, plan, folder)
        for name, text in plan.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(transform_card(to.name, recipe, model.library, command), encoding="utf-8")
    return Transformed(to, writer.nbytes, recipe, companions)


def _only(bank: CheckpointBank, row: int) -> dict[str, Any]:
    """How to open a bank again with one of its steps, for dtypes and constants that are that checkpoint's own."""
    how = {key: bank.config[key] for key in ("component", "weights", "dtype", "storage", "device")}
    return {**how, "select": Selection(bank.steps[row], bank.steps[row])}


def planned_model(bank: CheckpointBank, plan: Plan) -> Model:
    """Tensors and configuration of the new model: the checkpoint's, but for what the plan changes."""
    model, gone = Model.of(bank, "same"), plan.gone
    dtypes = kinds_of(bank) | {spec.name: spec.dtype for spec in model.specs}
    for tag, (other, _) in plan.others.items():
        dtypes |= {f"{tag}:{name}": dtype for name, dtype in kinds_of(other).items()}
    specs = [spec for spec in model.specs if spec.name not in gone and not plan.whole]
    for piece in plan.pieces:
        kinds = {dtypes[name] for name in piece.reads}
        for name, shape in piece.writes.items():
            own = dtypes.get(piece.likes.get(name, name))
            if own is None and len(kinds) > 1:
                raise BankError(f"`{name}` is made of tensors of {sorted(kinds)}; save the model in one dtype first.")
            specs.append(Spec(name, own or min(kinds), tuple(shape)))
    if plan.whole:
        text = json.dumps({"architectures": [plan.arch["class"]], **plan.arch["config"]}, indent=2, ensure_ascii=False)
        return replace(model, specs=tuple(specs), config=(text + "\n").encode())
    if plan.arch["config"].get("per_layer_config") and plan.arch["class"] not in CAUSAL_LMS:
        raise ConfigError(
            f"layers of different heads cannot be written for a `{plan.arch['class']}`, which lcsc does not run and "
            "transformers would not open. Leave `operator.repeat_heads=false` out."
        )
    before, after = (bank.arch or {})["config"], plan.arch["config"]
    kept = {key: value for key, value in (model_config(bank) or {}).items() if key in after or key not in before}
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    ours = "_class_name" in after and "_class_name" not in before  # a class of lcsc's for one of transformers
    text = json.dumps(dict(after) if ours else {**kept, **changed}, indent=2, ensure_ascii=False) + "\n"
    config, library = text.encode() if before != after else model.config, "lcsc" if ours else model.library
    return replace(model, specs=tuple(specs), library=library, config=config)


def _recipe(
    bank: CheckpointBank, plan: Plan, model: Model, parent: Mapping[str, Any], facts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that is needed to make the model again, as plain JSON values."""
    return {
        **plan.recipe,
        "pieces": facts,
        "kind": bank.kind,
        "rate": bank.rate,
        "dtype": "same",
        "bank": bank_config(bank),
        "parents": [dict(parent)],
        "config_sha256": sha256(model.config or b"").hexdigest(),
        "lcsc_version": importlib.metadata.version("lcsc"),
    }


def kinds_of(bank: CheckpointBank) -> dict[str, str]:
    """Dtype of each combined tensor, tied names beside their twins."""
    return bank.dtypes | {name: bank.dtypes[twin] for name, twin in bank.layout.ties.items()}


def _sources(bank: CheckpointBank, row: int) -> dict[str, Source]:
    """Where each tensor lies, tied names beside their twins."""
    table = dict(bank.rows[row].table)
    return table | {name: table[twin] for name, twin in bank.layout.ties.items() if name not in table}


def _pour(
    bank: CheckpointBank,
    plan: Plan,
    model: Model,
    writer: ModelWriter,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Write all tensors; returns the facts of the pieces."""
    total, done = sum(spec.nbytes for spec in model.specs), 0
    facts: list[dict[str, Any]] = []
    for name, tensor in remade(bank, plan, model, facts):
        writer.put_raw(name, bits_of(tensor))
        done += tensor.nbytes
        if progress:
            progress(done, total)
    return facts


def remade(bank: CheckpointBank, plan: Plan, model: Model, facts: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new model in their dtypes, one piece after the other; `facts` is filled on the way."""
    row, sources = bank.rows[plan.row], _sources(bank, plan.row)
    others = {tag: (other.rows[k], _sources(other, k)) for tag, (other, k) in plan.others.items()}
    made_of_pieces = {name for piece in plan.pieces for name in piece.writes}

    def read(name: str) -> Tensor:
        tag, _, inner = name.partition(":")
        at, table, key = (*others[tag], inner) if tag in others else (row, sources, name)
        return as_tensor(read_source(at.files, table[key], at.base), table[key].dtype)

    for spec in model.specs:
        if spec.name in made_of_pieces:
            continue
        tensor = read(spec.name)
        if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"`{spec.name}` of `{row.path}` holds NaN or Inf. Take another checkpoint.")
        yield spec.name, tensor
    dtypes = {spec.name: spec.dtype for spec in model.specs}
    for piece in plan.pieces:
        tensors, fact = piece.made({name: read(name) for name in piece.reads})
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"`{name}` becomes too large for {dtypes[name]}. Save the model as float32 first.")
            assert (tuple(tensor.shape), tensor.dtype) == (tuple(piece.writes[name]), getattr(torch, dtypes[name]))
            yield name, tensor
        facts.append(fact)


def bits_of(tensor: Tensor) -> Any:
    """A tensor's raw bits as numpy has them."""
    tensor = tensor.contiguous()
    by_size = {1: torch.uint8, 2: torch.int16}
    return (tensor.view(by_size[tensor.itemsize]) if tensor.itemsize in by_size else tensor).numpy()


def _companions(bank: CheckpointBank, plan: Plan, folder: Path) -> tuple[str, ...]:
    """Copy the models' other files, such as the tokenizer's; returns their names."""
    own = {"": bank.rows[-1].files[0].parent} if bank.path.is_dir() else {}
    names = []
    for below, source in (plan.folders or own).items():
        for path in sorted(source.iterdir()) if source.is_dir() else []:
            if not COMPANIONS.fullmatch(path.name) or path.name in plan.files or not path.is_file():
                continue
            with open_regular(path) as (fd, size):
                if size > MAX_COMPANION:
                    raise BankError(f"`{path}` has {size} bytes; at most {MAX_COMPANION} are copied. Move it away.")
                (folder / below).mkdir(exist_ok=True)
                (folder / below / path.name).write_bytes(read_range(fd, 0, size, path))
            names.append(f"{below}/{path.name}" if below else path.name)
    return tuple(names)


def transform_card(name: str, recipe: Mapping[str, Any], library: str, command: str) -> str:
    """README.md: what was made of what, and the score of the search that chose it, where there was one."""
    return "\n".join(_card_lines(name, recipe, library, command))


def _card_lines(name: str, recipe: Mapping[str, Any], library: str, command: str) -> Iterator[str]:
    (parent,) = recipe["parents"]
    yield from ("---", f"library_name: {library}", "tags:", "- lcsc", f"- {recipe['operator']}", "---")
    yield from (f"# {plain_text(name)}: one checkpoint after `{recipe['operator']}` by lcsc", "")
    yield from (_scored(recipe), "", *_use(recipe))
    yield from ("| setting | value |", "|---|---|")
    yield from (f"| {key} | {plain_text(value)} |" for key, value in recipe.items() if key not in NOT_SETTINGS)
    files = ", ".join(f"`{plain_text(file)}`" for file in parent["files"])
    yield from ("", f"Made of {files}, step {parent['step']}, content `{parent['content'][:16]}`.", "")
    for tag, other in recipe.get("sources", {}).items():
        what = f"The {plain_text(tag).replace('_', ' ')} is of `{plain_text(other['path'])}`"
        yield from (f"{what}, step {other['step']}, content `{other['content'][:16]}`.", "")
    yield from ("## How it was made", "", f"    {command or 'lcsc.export.transform.transform_model(...)'}", "")
    yield f"lcsc {recipe['lcsc_version']}, Python {platform.python_version()}, torch {torch.__version__}. The weight"
    yield from ("files carry the full recipe in their headers.", "")


def _scored(recipe: Mapping[str, Any]) -> str:
    """What is known of how good it is."""
    if "score" not in recipe:
        return "Nothing was trained or scored. Tensors keep their dtypes."
    value, se = recipe["score"]["value"], recipe["score"]["se"]
    error = "" if se is None else f" ± {se:.4g}"
    return (
        f"Chosen by the search `{plain_text(recipe['run_id'])}`, where it scored {value:.6g}{error} with float32 "
        "weights. Tensors keep the checkpoint's dtypes here."
    )


def _use(recipe: Mapping[str, Any]) -> list[str]:
    """How to load it, where that is not the library's usual way."""
    if recipe.get("share", "none") != "none":
        return ["## Use", "", USE_SHARED, ""]
    return ["## Use", "", USE_MIXED, ""] if isinstance(recipe.get("stored_kv_heads"), list) else []
