"""LoRA adapters without a search: the combination of their updates, module by module. K = checkpoints.

Low-rank factors cannot be averaged like weights (lcsc/bank/lora.py says why and by how much), so an adapter is not
streamed: each module's factors are read from all checkpoints, combined as a product and recompressed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank, Layout
from lcsc.bank.extents import read_source
from lcsc.bank.lora import LoraPair, adapter_settings, combine_products, lora_pairs, lora_scale
from lcsc.bank.rows import to_float32
from lcsc.core.errors import BankError, ConfigError, NonFiniteError
from lcsc.export.folder import Model
from lcsc.export.stream import ModelWriter, Spec, overflows, plan_files, round_to

#: the header entry in which diffusers keeps an adapter's settings
SETTINGS_KEY = "lora_adapter_metadata"
#: no layer is wider
MAX_RANK = 2**17


@dataclass(frozen=True)
class Adapter:
    """A combined adapter.

    Args:
        specs: its tensors.
        bits: their raw bits by name.
        error: what the recompression lost, as shares of the updates' norms: `max`, `max_module`, `mean`.
        settings: PEFT's or diffusers' settings, made true for the rank; None where the checkpoints have none.
    """

    specs: tuple[Spec, ...]
    bits: Mapping[str, np.ndarray]
    error: Mapping[str, Any]
    settings: Mapping[str, Any] | None

    def model(self, bank: CheckpointBank) -> Model:
        """File stem and configuration file, as the library that wrote the checkpoints has them."""
        peft = has_config_file(bank)
        config = (json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n").encode() if peft else None
        stem = "adapter_model" if peft else "pytorch_lora_weights"
        return Model(self.specs, stem, "peft" if peft else "diffusers", config, "adapter_config.json")

    def extra(self, bank: CheckpointBank) -> dict[str, str]:
        """What the header holds besides the recipe."""
        if self.settings is None or has_config_file(bank):
            return {}
        return {SETTINGS_KEY: json.dumps(self.settings, indent=2, sort_keys=True)}


def has_config_file(bank: CheckpointBank) -> bool:
    """Whether the last checkpoint keeps its settings in a file of its own, as PEFT does."""
    return (bank.rows[-1].files[0].parent / "adapter_config.json").is_file()


def combine_adapter(bank: CheckpointBank, coef_K: np.ndarray, rank: int | None, dtype: str) -> Adapter:
    """The adapter whose update is the combination of the checkpoints' updates, at `rank`.

    Args:
        bank: a bank of LoRA checkpoints.
        coef_K: coefficients, float64.
        rank: rank of every module, with scale 1; None keeps each module's rank and the last checkpoint's scale.
        dtype: float32, bfloat16, float16, or `same` as in the last checkpoint.

    Raises:
        BankError: factors that do not fit, or settings that are missing.
        NonFiniteError: NaN or Inf in a checkpoint or in the result.
        ConfigError: `rank` is below 1.
    """
    reader = _Reader(bank)
    pairs = lora_pairs({**bank.layout.shapes, **{n: s.shape for n, (_, s) in bank.constant_sources().items()}})
    settings = [adapter_settings(row.files) for row in bank.rows]
    found: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}
    alone = int(np.flatnonzero(coef_K)[0]) if np.count_nonzero(coef_K) == 1 and coef_K.sum() == 1 else None
    for pair in pairs:
        scale_K = reader.scales(pair, settings)
        A_K, B_K = reader.rows(pair.A), reader.rows(pair.B)
        kept = scale_K[-1] if rank is None else 1.0
        if rank is None and alone is not None and scale_K[alone] == kept:  # the checkpoint itself, bit for bit
            found[pair.A], found[pair.B], errors[pair.module] = A_K[alone], B_K[alone], 0.0
        else:
            wanted = rank or len(A_K[0])
            found[pair.A], found[pair.B], errors[pair.module] = combine_products(
                A_K, B_K, coef_K, scale_K, wanted, scale=kept
            )
        if pair.alpha in bank.layout.shapes:
            found[pair.alpha] = reader.rows(pair.alpha)[-1] if rank is None else np.array(float(rank))
    for name in bank.layout.shapes:  # modules that were trained in full
        if name not in found:
            found[name] = sum(c * row for c, row in zip(coef_K, reader.rows(name), strict=True) if c)
    constants = {name: read_source(p, s, bank.rows[-1].base) for name, (p, s) in bank.constant_sources().items()}
    for pair in pairs if rank is not None else ():
        if pair.alpha in constants:
            constants[pair.alpha] = np.full_like(constants[pair.alpha], rank)
    kinds = {name: bank.dtypes[bank.layout.ties.get(name, name)] if dtype == "same" else dtype for name in found}
    specs = [Spec(name, kinds[name], value.shape) for name, value in found.items()]
    specs += [Spec(name, bank.constant_sources()[name][1].dtype, value.shape) for name, value in constants.items()]
    bits = {name: _bits(name, value, kinds[name]) for name, value in found.items()}
    worst = max(errors, key=lambda module: errors[module])
    lost = {"max": errors[worst], "max_module": worst, "mean": float(np.mean(list(errors.values())))}
    return Adapter(tuple(specs), bits | constants, lost, _settings(settings[-1], rank))


class _Reader:
    """One tensor of all checkpoints at a time."""

    def __init__(self, bank: CheckpointBank) -> None:
        self._bank = bank

    def rows(self, name: str) -> list[np.ndarray]:
        """The tensor in every checkpoint, float64."""
        found = []
        for row in self._bank.rows:
            source = row.table[name]
            raw = read_source(row.files, source, row.base)
            value = raw if source.dtype == "float64" else to_float32(raw, source.dtype).astype(np.float64)
            if not np.isfinite(value).all():
                raise NonFiniteError(
                    f"`{row.files[source.pieces[0].part]}` holds {int((~np.isfinite(value)).sum())} NaN or Inf in "
                    f"`{name}`. Leave step {row.step} out with `start`, `stop` or `every`."
                )
            found.append(value)
        return found

    def scales(self, pair: LoraPair, settings: list[Mapping[str, Any] | None]) -> list[float]:
        """What each checkpoint's product is multiplied with."""
        rank = self._bank.layout.shapes[pair.A][0]
        alphas: list[float | None] = [None] * self._bank.num_checkpoints
        if pair.alpha in self._bank.layout.shapes:
            alphas = [float(value) for value in self.rows(pair.alpha)]
        elif pair.alpha is not None:
            alphas = [float(read_source(row.files, row.table[pair.alpha], row.base)) for row in self._bank.rows]
        return [lora_scale(pair, rank, alpha, own) for alpha, own in zip(alphas, settings, strict=True)]


def _bits(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        flat = np.ascontiguousarray(value, np.float32).reshape(-1)
    bits = round_to(flat, dtype)
    if not np.isfinite(flat).all() or overflows(bits, dtype) is not None:
        raise NonFiniteError(f"`{name}` reaches {np.abs(value).max():.6g}, too large for {dtype}. Use dtype=float32.")
    return bits.reshape(value.shape)


def _settings(last: Mapping[str, Any] | None, rank: int | None) -> Mapping[str, Any] | None:
    """Settings that are true for another rank, whose scale is 1."""
    if last is None or rank is None:
        return last
    changed = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {key: changed.get(key.rpartition(".")[2], value) for key, value in last.items()}


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
