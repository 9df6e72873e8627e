"""Make exported models again from their recipes and compare every byte.

Covered: every number of the weight files, their headers with the recipe, the index, coefficients.csv, config.json and
the contents of the checkpoints that the models were made of. Not covered: README.md, which is for people. Nothing is
written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import ITEMSIZE, pread_into, raw_dtype, read_source
from lcsc.bank.stream import Pass, run_pass
from lcsc.core.digests import canonical_json
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.exported import (
    Exported,
    check_metadata,
    check_parents,
    check_tensors,
    difference,
    open_model,
    rows_by_step,
)
from lcsc.export.folder import recipe_groups
from lcsc.export.lora import adapter_of_recipe, check_rank
from lcsc.export.reopen import bank_settings, reopen
from lcsc.export.stream import FlatMap, Place, round_to
from lcsc.export.verify_remade import compare_remade
from lcsc.kernels import Groups, round_coef


@dataclass(frozen=True)
class Checked:
    """A model that is what its recipe says."""

    path: Path
    num_tensors: int
    nbytes: int
    num_parents: int
    bank: str


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
        kind = canonical_json(
            [model.recipe["operator"], "settings" in model.recipe, bank_settings(model.folder, model.recipe, bank)]
        )
        groups.setdefault(kind, []).append(model)
    checked: dict[Path, Checked] = {}
    for key, group in groups.items():
        opened = reopen(json.loads(key)[2])
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


# ------------------------------------------------------------------------------------------------------------ bank


def _coefficients(bank: CheckpointBank, model: Exported) -> np.ndarray:
    """The recipe's coefficients for the rows of the bank, float64, shape (G, K); 0 for rows that it does not name."""
    here, recipe = rows_by_step(bank, model), model.recipe
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
    if "settings" in models[0].recipe:
        for model in models:
            compare_remade(bank, model)
        return
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
        check_tensors(model, kinds, bank.layout.ties)
        twins = {name: twin for name, twin in bank.layout.ties.items() if name not in model.sources}
        check_metadata(model, twins)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_Reader(bank, model)) for model in models]
        for start, out_MC in _outputs(bank, coef_MGK, groups_M, progress):
            for reader, out_C in zip(readers, out_MC, strict=True):
                reader.compare(start, out_C)
    for model in models:
        check_parents(bank, model)  # first, because a changed parent explains a changed tensor
        if model.wrong:
            raise BankError(model.wrong)
        for name, (paths, source) in bank.constant_sources().items():
            wanted = read_source(paths, source, bank.rows[-1].base)
            if wanted.tobytes() != read_source(model.files, model.sources[name]).tobytes():
                raise BankError(difference(model, name))


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


def _compare_adapter(bank: CheckpointBank, model: Exported) -> None:
    """As `_compare`, for a LoRA adapter."""
    check_rank(model.recipe.get("rank"), bank.kind)
    adapter = adapter_of_recipe(bank, model.recipe, _coefficients(bank, model)[0])
    check_parents(bank, model)
    check_tensors(model, {spec.name: (spec.dtype, spec.shape) for spec in adapter.specs}, {})
    check_metadata(model, adapter.files.header)
    for name, bits in adapter.bits.items():
        if bits.tobytes() != read_source(model.files, model.sources[name]).tobytes():
            raise BankError(difference(model, name))


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
                self._model.wrong = difference(self._model, self._name_at(run.file, offset))
                return

    def _name_at(self, file: str, offset: int) -> str:
        """The tensor that holds a byte of a file; tied tensors have places of their own."""
        starts = [(at, name) for (part, at), name in self._names.items() if part == file and at <= offset]
        return max(starts)[1]
