"""LoRA adapters as files. K = checkpoints.

Low-rank factors cannot be averaged like weights (lcsc/bank/lora.py says why and by how much), so an adapter is not
streamed: each module's factors are read from all checkpoints, combined as a product and recompressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.extents import read_source
from lcsc.bank.lora_modules import FACTOR_SPACE, AdapterFiles, Modules, combine_modules
from lcsc.core.errors import BankError, ConfigError, NonFiniteError
from lcsc.export.folder import Model, recipe_header
from lcsc.export.stream import ModelWriter, Spec, overflows, plan_files, round_to

#: no layer is wider
MAX_RANK = 2**17


@dataclass(frozen=True)
class Adapter:
    """A combined adapter.

    Args:
        specs: its tensors.
        bits: their raw bits by name.
        made: what the recipe says of it, see `lcsc.bank.lora_modules.combine_modules`.
        files: how the library that wrote the checkpoints keeps it.
    """

    specs: tuple[Spec, ...]
    bits: Mapping[str, np.ndarray]
    made: Mapping[str, Any]
    files: AdapterFiles

    @property
    def model(self) -> Model:
        """What of it is not numbers."""
        return Model(self.specs, self.files.stem, self.files.library, self.files.config, "adapter_config.json")


def combine_adapter(
    bank: CheckpointBank, coef_K: np.ndarray, rank: int | None, dtype: str, *, factors: bool = False
) -> Adapter:
    """The adapter whose update is the combination of the checkpoints' updates, at `rank`.

    Args:
        bank: a bank of LoRA checkpoints.
        coef_K: coefficients, float64.
        rank: rank of every module, with scale 1; None keeps each module's rank and the last checkpoint's scale.
        dtype: float32, bfloat16, float16, or `same` as in the last checkpoint.
        factors: combine the factors instead; they keep their rank.

    Raises:
        BankError: factors that do not fit, or settings that are missing.
        NonFiniteError: NaN or Inf in a checkpoint or in the result.
        ConfigError: `rank` is below 1.
    """
    modules = Modules(bank)
    found, made = combine_modules(modules, coef_K, rank, factors=factors)
    sources = bank.constant_sources()
    constants = {name: read_source(files, source, bank.rows[-1].base) for name, (files, source) in sources.items()}
    for name in modules.integer_alphas if rank is not None else ():
        constants[name] = np.full_like(constants[name], rank)
    kinds = {name: bank.dtypes[bank.layout.ties.get(name, name)] if dtype == "same" else dtype for name in found}
    specs = [Spec(name, kinds[name], np.shape(value)) for name, value in found.items()]
    specs += [Spec(name, sources[name][1].dtype, value.shape) for name, value in constants.items()]
    bits = {name: _bits(name, value, kinds[name]) for name, value in found.items()}
    return Adapter(tuple(specs), bits | constants, made, modules.files(rank))


def adapter_of_recipe(bank: CheckpointBank, recipe: Mapping[str, Any], coef_K: np.ndarray) -> Adapter:
    """The adapter that a recipe describes, with its coefficients for the rows of this bank; raises as above."""
    factors = recipe.get("space") == FACTOR_SPACE
    return combine_adapter(bank, coef_K, recipe.get("rank"), recipe.get("dtype", "float32"), factors=factors)


def write_candidate(folder: Path, bank: CheckpointBank, recipe: Mapping[str, Any]) -> None:
    """Write the adapter that a search found, with the recipe in its header, as `lcsc verify` will make it again."""
    with bank.on_cpu():
        adapter = adapter_of_recipe(bank, recipe, np.array(recipe["coef"], np.float64))
    write_adapter(folder, adapter, adapter.model, recipe_header(recipe) | adapter.files.header)
    if adapter.files.config is not None:
        (folder / adapter.model.config_name).write_bytes(adapter.files.config)


def _bits(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        flat = np.ascontiguousarray(value, np.float32).reshape(-1)
    bits = round_to(flat, dtype)
    if not np.isfinite(flat).all() or overflows(bits, dtype) is not None:
        raise NonFiniteError(f"`{name}` reaches {np.abs(value).max():.6g}, too large for {dtype}. Use dtype=float32.")
    return bits.reshape(np.shape(value))


def write_adapter(folder: Path, adapter: Adapter, model: Model, metadata: Mapping[str, str]) -> int:
    """Write the weight file; returns its bytes."""
    if not model.specs:
        raise BankError("the adapter holds no tensors.")
    writer = ModelWriter(folder, plan_files(model.specs, model.stem, 2**63), Layout(()), {}, metadata)
    try:
        for name, bits in adapter.bits.items():
            writer.put_raw(name, bits)
        writer.finish(metadata)
    finally:
        writer.close()
    return writer.nbytes


def check_rank(rank: int | None, kind: str) -> None:
    """Raise ConfigError for a rank that means nothing."""
    if rank is not None and kind != "lora":
        raise ConfigError("`rank` means nothing here: the bank holds no LoRA adapters. Leave it out.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"`rank` is {rank}; it must lie between 1 and {MAX_RANK}.")
