"""Make exported models again from their recipes and compare every byte.

Covered: every number of the weight files, their headers with the recipe, the index, coefficients.csv, config.json and
the contents of the checkpoints that were combined. Not covered: README.md, which is for people. Nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import ITEMSIZE, Source, pread_into, raw_dtype, read_source
from lcsc.bank.safetensors_file import read_safetensors
from lcsc.bank.shard_index import open_regular, plain_file, read_index, read_range, shown, strict_json
from lcsc.bank.stream import Pass, run_pass
from lcsc.core.digests import canonical_json, file_sha256
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.folder import CSV, DIGEST_KEY, RECIPE_KEY, coefficients_csv, is_sound, recipe_groups
from lcsc.export.lora import adapter_of_recipe, check_rank
from lcsc.export.reopen import bank_settings, reopen
from lcsc.export.stream import FlatMap, Place, round_to
from lcsc.kernels import Groups, round_coef

#: whose models can be made again from their recipes
OPERATORS = ("linear", "linear_grouped", "lora")
#: most lists and objects in a recipe
MAX_ITEMS = 1_000_000


@dataclass(frozen=True)
class Checked:
    """A model that is what its recipe says."""

    path: Path
    num_tensors: int
    nbytes: int
    num_parents: int
    bank: str


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


def verify(path: Path, bank: Path | None = None, progress: Callable[[int, int], None] | None = None) -> list[Checked]:
    """Check the model in `path`, or all models in its folders; those of one bank share one pass over it.

    Args:
        path: what `lcsc combine`, `lcsc export` or a search wrote.
        bank: where the checkpoints are now; None takes the path in the recipe.
        progress: called with bytes read and bytes in all.

    Raises:
        BankError: the first difference: file and tensor, or the checkpoint that changed since.
        ConfigError: no model there, or no bank to compare with.
    """
    models = [open_model(folder) for folder in model_folders(path)]
    groups: dict[str, list[Exported]] = {}
    for model in models:
        kind = canonical_json([model.recipe["operator"], bank_settings(model.folder, model.recipe, bank)])
        groups.setdefault(kind, []).append(model)
    checked: dict[Path, Checked] = {}
    for key, group in groups.items():
        opened = reopen(json.loads(key)[1])
        _compare(opened, group, progress)
        for model in group:
            nbytes = sum(file.stat().st_size for file in model.files)
            parents = len(model.recipe["parents"])
            checked[model.folder] = Checked(model.folder, len(model.sources), nbytes, parents, str(opened.path))
    return [checked[model.folder] for model in models]


def model_folders(path: Path) -> list[Path]:
    """`path` itself if it holds weight files, else the folders in it that do."""
    if any(path.glob("*.safetensors")):
        return [path]
    inside = sorted(path.iterdir()) if path.is_dir() else []
    inside = [f for f in inside if f.is_dir() and not f.name.startswith(".") and any(f.glob("*.safetensors"))]
    if (path / ".metadata").is_file():
        raise ConfigError(
            f"`{path}` is a folder of torch.distributed.checkpoint, which has no header that proves its recipe. "
            "Combine with format=safetensors what is to be verified."
        )
    if not inside:
        raise ConfigError(f"`{path}` holds no safetensors file. Give a folder that lcsc wrote.")
    return inside


# --------------------------------------------------------------------------------------------------------- folders


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
    if recipe.get("operator") not in OPERATORS:
        raise ConfigError(
            f"`{file}` was made by the operator `{shown(recipe.get('operator'))}`, which cannot be made again here; "
            f"{', '.join(OPERATORS)} can."
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
    if not table.is_file() or table.read_bytes() != coefficients_csv(model.recipe).encode():
        raise BankError(f"`{table}` is not what the recipe gives. Restore it.")


# ------------------------------------------------------------------------------------------------------------ bank


def _here(bank: CheckpointBank, model: Exported) -> dict[tuple[int, str | None], int]:
    """Step, and rate where the recipe combines several -> row of the bank."""
    rates = bank.rates if bank.rates and "rates" in model.recipe else [None] * bank.num_checkpoints
    return {key: k for k, key in enumerate(zip(bank.steps, rates, strict=True))}


def _coefficients(bank: CheckpointBank, model: Exported) -> np.ndarray:
    """The recipe's coefficients for the rows of the bank, float64, shape (G, K); 0 for rows that it does not name."""
    here, recipe = _here(bank, model), model.recipe
    coef_GS = np.array(recipe["coef"], np.float64).reshape(-1, len(recipe["steps"]))
    coef_GK = np.zeros((len(coef_GS), bank.num_checkpoints))
    rates = recipe.get("rates", [None] * len(recipe["steps"]))
    named = dict(zip(zip(recipe["steps"], rates, strict=True), coef_GS.T, strict=True))
    used = {(parent["step"], parent.get("rate")) for parent in recipe["parents"]}
    for key in [*used, *(key for key, coef_G in named.items() if coef_G.any())]:
        if key not in here:
            raise BankError(
                f"`{model.folder}` was made of step {key[0]}, which is not in `{bank.path}`. "
                "Restore it, or give the right checkpoints with bank=PATH."
            )
        coef_GK[:, here[key]] = named.get(key, 0.0)
    return coef_GK


# --------------------------------------------------------------------------------------------------------- compare


def _compare(bank: CheckpointBank, models: Sequence[Exported], progress: Callable[[int, int], None] | None) -> None:
    """Stream all models of a bank at once and compare; raises BankError for the first difference."""
    if models[0].recipe["operator"] == "lora":
        for model in models:
            _compare_adapter(bank, model)
        return
    coef_MGK = [_coefficients(bank, model) for model in models]
    groups_M = [recipe_groups(model.recipe, bank.layout) for model in models]
    for model in models:
        kinds = {name: (source.dtype, source.shape) for name, (_, source) in bank.constant_sources().items()}
        dtype = model.recipe.get("dtype", "float32")
        kept = bank.dtypes if dtype == "same" else dict.fromkeys(bank.layout.shapes, dtype)
        kinds |= {entry.name: (kept[entry.name], entry.shape) for entry in bank.layout.entries}
        _check_tensors(model, kinds, bank.layout.ties)
        twins = {name: twin for name, twin in bank.layout.ties.items() if name not in model.sources}
        _check_metadata(model, twins)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_Reader(bank, model)) for model in models]
        for start, out_MC in _outputs(bank, coef_MGK, groups_M, progress):
            for reader, out_C in zip(readers, out_MC, strict=True):
                reader.compare(start, out_C)
    for model in models:
        _check_parents(bank, model)  # first, because a changed parent explains a changed tensor
        if model.wrong:
            raise BankError(model.wrong)
        for name, (paths, source) in bank.constant_sources().items():
            wanted = read_source(paths, source, bank.rows[-1].base)
            if wanted.tobytes() != read_source(model.files, model.sources[name]).tobytes():
                raise BankError(_difference(model, name))


def _outputs(
    bank: CheckpointBank,
    coef_MGK: Sequence[np.ndarray],
    groups_M: Sequence[Groups],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """All models in one pass, `(start, out_MC)`: columns are cut wherever any model's layer groups are."""
    cuts = sorted({start for groups in groups_M for start in groups.starts})
    if len(cuts) == 2:
        return bank.stream(np.stack([coef_GK[0] for coef_GK in coef_MGK]), progress=progress)
    places_M = [np.searchsorted(groups.starts, cuts[:-1], side="right") - 1 for groups in groups_M]
    coef_MSK = np.stack(
        [coef[np.array(groups.groups)[at]] for coef, groups, at in zip(coef_MGK, groups_M, places_M, strict=True)]
    )
    ids = tuple(range(len(cuts) - 1))
    if bank.storage == "streamed":
        work = Pass(bank.rows, bank.layout, round_coef(coef_MSK), cuts, ids, bank.checksums)
        return run_pass(work, progress=progress)
    import torch  # rounded rows lie in memory already; so may their combinations

    theta_MP = bank.combine(torch.from_numpy(coef_MSK), groups=Groups(tuple(cuts), ids, len(ids)))
    return iter([(0, theta_MP.cpu().numpy())])


def _difference(model: Exported, name: str) -> str:
    return (
        f"`{model.file_of(name)}`: `{shown(name)}` is not what the recipe gives, and the checkpoints are unchanged. "
        "The file was edited or damaged; export the model again."
    )


def _compare_adapter(bank: CheckpointBank, model: Exported) -> None:
    """As `_compare`, for a LoRA adapter."""
    check_rank(model.recipe.get("rank"), bank.kind)
    adapter = adapter_of_recipe(bank, model.recipe, _coefficients(bank, model)[0])
    _check_parents(bank, model)
    _check_tensors(model, {spec.name: (spec.dtype, spec.shape) for spec in adapter.specs}, {})
    _check_metadata(model, adapter.files.header)
    for name, bits in adapter.bits.items():
        if bits.tobytes() != read_source(model.files, model.sources[name]).tobytes():
            raise BankError(_difference(model, name))


def _check_tensors(model: Exported, wanted: Mapping[str, tuple[str, tuple[int, ...]]], ties: Mapping[str, str]) -> None:
    """Names, shapes and dtypes are those that the recipe gives; tied names may be there or not."""
    found = {name: (source.dtype, source.shape) for name, source in model.sources.items()}
    optional = {name: wanted[twin] for name, twin in ties.items()}
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name) and (name in wanted or found[name] != optional.get(name)):
            where = model.file_of(name) if name in found else model.folder
            is_now, was = _text(found.get(name)), _text(wanted.get(name))
            raise BankError(f"`{where}`: `{shown(name)}` is {is_now}, but the recipe gives {was}. Export it again.")


def _check_metadata(model: Exported, more: Mapping[str, str]) -> None:
    """The header holds the recipe, its digest, the format and `more`; nothing else."""
    rest = {key: text for key, text in model.metadata.items() if key not in (RECIPE_KEY, DIGEST_KEY)}
    if rest != {"format": "pt", **more}:
        odd = sorted(set(rest.items()) ^ {("format", "pt"), *more.items()})
        raise BankError(f"the header of `{model.files[0]}` was edited: {shown(odd[0])} is not as it was written.")


def _text(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} of shape {kind[1]}"


def _check_parents(bank: CheckpointBank, model: Exported) -> None:
    here = _here(bank, model)
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


class _Reader:
    """Reads the bytes of one model that belong to flat positions, and remembers the first difference."""

    def __init__(self, bank: CheckpointBank, model: Exported) -> None:
        self._model = model
        places = {
            name: Place(str(source.pieces[0].part), source.pieces[0].offset, source.dtype)
            for name, source in model.sources.items()
        }
        self._map = FlatMap(bank.layout, places, bank.layout.ties)
        self._names = {(place.file, place.offset): name for name, place in places.items()}
        self._fds: list[int] = []

    def __enter__(self) -> _Reader:
        self._fds = [os.open(file, os.O_RDONLY) for file in self._model.files]
        return self

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def compare(self, start: int, out_C: np.ndarray) -> None:
        """Compare with what the stream gives for positions [start, start + C)."""
        if self._model.wrong:
            return
        for run in self._map.pieces(start, start + len(out_C)):
            wanted = round_to(out_C[run.start - start : run.stop - start], run.dtype)
            found = np.empty(len(wanted), raw_dtype(run.dtype))
            pread_into(self._fds[int(run.file)], found, run.offset, self._model.files[int(run.file)])
            wrong = wanted.view(f"u{found.itemsize}") != found.view(f"u{found.itemsize}")
            if wrong.any():
                offset = run.offset + int(wrong.argmax()) * ITEMSIZE[run.dtype]
                self._model.wrong = _difference(self._model, self._name_at(run.file, offset))
                return

    def _name_at(self, file: str, offset: int) -> str:
        """The tensor that holds a byte of a file; tied tensors have places of their own."""
        starts = [(at, name) for (part, at), name in self._names.items() if part == file and at <= offset]
        return max(starts)[1]
