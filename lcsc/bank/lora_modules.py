"""A LoRA bank module by module, and the adapter that its checkpoints combine to. K = checkpoints, M = modules.

Searches, `lcsc combine` and `lcsc verify` all get their adapters here, so that they get the same bits. Imports no torch
where the bank is streamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc.bank.extents import read_source
from lcsc.bank.lora import LoraPair, adapter_settings, combine_products, lora_pairs, lora_scale
from lcsc.bank.rows import Row, to_float32
from lcsc.bank.shape import copied_text
from lcsc.core.errors import BankError, NonFiniteError

if TYPE_CHECKING:
    from lcsc.bank.bank import CheckpointBank

FACTOR_SPACE = "factor space: not the combination of the updates"
#: the header entry in which diffusers keeps an adapter's settings
SETTINGS_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class AdapterFiles:
    """How the library that wrote the checkpoints keeps an adapter.

    Args:
        library: peft or diffusers.
        stem: name of the weight file.
        config: adapter_config.json, None where there is none.
        header: what the weight file's header says besides its format.
    """

    library: str
    stem: str
    config: bytes | None
    header: Mapping[str, str]


class Modules:
    """A LoRA bank, module by module.

    Args:
        bank: opened; its rows are read when they are first used.

    Raises:
        BankError: no LoRA, or factors that do not fit together.
    """

    def __init__(self, bank: CheckpointBank) -> None:
        self.bank = bank
        places = {entry.name: entry for entry in bank.layout.entries}
        self._places = places | {name: places[twin] for name, twin in bank.layout.ties.items()}
        #: shape by name of all tensors that hold floats
        self.shapes = bank.layout.shapes
        constants = {name: source.shape for name, (_, source) in bank.constant_sources().items()}
        self.pairs = lora_pairs({**constants, **self.shapes})
        if not self.pairs:
            raise BankError(
                f"`{bank.path}` holds no LoRA factors, such as `lora_A` and `lora_B`. Use operator=linear for weights."
            )
        if integers := [name for pair in self.pairs for name in (pair.A, pair.B) if name not in self.shapes]:
            raise BankError(f"the LoRA factor `{integers[0]}` does not hold floats. Save the adapter unquantized.")
        factors = {name for pair in self.pairs for name in (pair.A, pair.B, pair.alpha)}
        #: names of float tensors that are no factors (modules trained in full): combined as weights
        self.rest = tuple(entry.name for entry in bank.layout.entries if entry.name not in factors)
        #: names of alphas that are no floats and so lie outside the layout
        self.integer_alphas = tuple(pair.alpha for pair in self.pairs if pair.alpha in constants)
        self._said = [adapter_settings(row.files) for row in bank.rows]
        #: what each checkpoint's products are multiplied with
        self.scale_MK = np.array([self._scales(pair) for pair in self.pairs])

    def rows(self, name: str) -> np.ndarray:
        """A tensor of all checkpoints, float32, shape (K, ...), as the bank holds it; not to be written to.

        Raises:
            NonFiniteError: a checkpoint holds NaN or Inf.
            BankError: the bank is stored as differences.
        """
        if self.bank.storage == "streamed":
            return np.stack([_read(row, name) for row in self.bank.rows])
        place = self._places[name]
        part_KC = self.bank.matrix()[:, place.start : place.stop]
        return part_KC.float().cpu().numpy().reshape(-1, *place.shape)  # type: ignore[no-any-return]

    def rank(self, pair: LoraPair) -> int:
        """A module's rank."""
        return self.shapes[pair.A][0]

    def settings(self, rank: int | None) -> Mapping[str, Any] | None:
        """The last checkpoint's settings (PEFT's or diffusers'), made true for another rank, whose scale is 1."""
        last = self._said[-1]
        if last is None or rank is None:
            return last
        changed = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        return {key: changed.get(key.rpartition(".")[2], value) for key, value in last.items()}

    def files(self, rank: int | None) -> AdapterFiles:
        """File names and settings of an adapter of `rank`; PEFT keeps its settings in a file, diffusers in a header."""
        settings = self.settings(rank)
        if (self.bank.rows[-1].files[0].parent / "adapter_config.json").is_file():
            config = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
            return AdapterFiles("peft", "adapter_model", config, {})
        header = {} if settings is None else {SETTINGS_KEY: json.dumps(settings, indent=2, sort_keys=True)}
        return AdapterFiles("diffusers", "pytorch_lora_weights", None, header)

    def _scales(self, pair: LoraPair) -> list[float]:
        alphas: list[float | None] = [None] * self.bank.num_checkpoints
        if pair.alpha in self.integer_alphas:
            alphas = [float(read_source(row.files, row.table[pair.alpha], row.base)) for row in self.bank.rows]
        elif pair.alpha is not None:
            alphas = [float(alpha) for alpha in self.rows(pair.alpha).reshape(-1)]
        return [lora_scale(pair, self.rank(pair), a, said) for a, said in zip(alphas, self._said, strict=True)]


def _read(row: Row, name: str) -> np.ndarray:
    """A tensor of one checkpoint, float32 and finite."""
    source = row.table[name]
    value = to_float32(read_source(row.files, source, row.base), source.dtype)
    if not np.isfinite(value).all():
        raise NonFiniteError(
            f"`{row.files[source.pieces[0].part]}` holds {int((~np.isfinite(value)).sum())} NaN or Inf in "
            f"`{name}`. Leave step {row.step} out with `start`, `stop` or `every`."
        )
    return value.reshape(source.shape)


def combine_modules(
    modules: Modules, coef_K: np.ndarray, rank: int | None = None, *, factors: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The combination of the checkpoints' updates, or of their factors.

    Args:
        modules: of a bank.
        coef_K: coefficients, float64.
        rank: rank of every module, with scale 1; None keeps each module's rank and the last checkpoint's scale.
        factors: combine A and B on their own, which is something else (`lcsc.bank.lora`); keeps the rank.

    Returns:
        All float tensors by name (float64 or float32, to be rounded to float32), and what a recipe says of them: the
        space, and for updates the rank and what the truncation to it lost, as shares of the updates' norms.
    """
    return _factors(modules, coef_K) if factors else _updates(modules, coef_K, rank)


def _factors(modules: Modules, coef_K: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All tensors combined on their own, alpha copied from the last checkpoint."""
    import torch

    bank = modules.bank
    views = bank.layout.views(bank.combine(torch.from_numpy(coef_K)).cpu())
    found = {name: view.numpy() for name, view in views.items()}
    found |= {pair.alpha: modules.rows(pair.alpha)[-1] for pair in modules.pairs if pair.alpha in found}
    return found, {"space": FACTOR_SPACE}


def _updates(modules: Modules, coef_K: np.ndarray, rank: int | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The combined updates as factors of `rank`, and what that lost."""
    used = np.flatnonzero(coef_K)
    alone = int(used[0]) if rank is None and len(used) == 1 and coef_K[used[0]] == 1 else None
    found: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}
    for pair, scale_K in zip(modules.pairs, modules.scale_MK, strict=True):
        kept, wanted = (scale_K[-1], modules.rank(pair)) if rank is None else (1.0, rank)
        A_K, B_K = list(modules.rows(pair.A)), list(modules.rows(pair.B))
        if alone is not None and scale_K[alone] == kept:  # the checkpoint itself, bit for bit
            found[pair.A], found[pair.B], errors[pair.module] = A_K[alone], B_K[alone], 0.0
        else:
            found[pair.A], found[pair.B], errors[pair.module] = combine_products(
                A_K, B_K, coef_K, scale_K, wanted, scale=kept
            )
        if pair.alpha in modules.shapes:
            alpha_K = modules.rows(pair.alpha)
            found[pair.alpha] = alpha_K[-1] if rank is None else np.full_like(alpha_K[-1], rank)
    for name in modules.rest:
        found[name] = _combined(modules.rows(name), coef_K)
    for name, twin in modules.bank.layout.ties.items():
        found.setdefault(name, found[twin])  # those of the rest; tied factors do not stay tied
    worst = max(errors, key=lambda module: errors[module])
    lost = {"max": errors[worst], "max_module": worst, "mean": float(np.mean(list(errors.values())))}
    return found, {"space": "product", "rank": rank, "error": lost}


def copied_at(bank: CheckpointBank, rank: int | None) -> str | None:
    """As `bank.copied`, of what is made at `rank`: LoRA alphas that are no floats are not copied at another rank."""
    if rank is None or bank.kind != "lora":
        return bank.copied
    constants = {name: source.shape for name, (_, source) in bank.constant_sources().items()}
    made = {pair.alpha for pair in lora_pairs({**constants, **bank.layout.shapes})}
    return copied_text([name for name in sorted(constants) if name not in made], bank.steps[-1])


def _combined(W_K: np.ndarray, coef_K: np.ndarray) -> np.ndarray:
    """Weights combined as the linear operator does it, shape (...)."""
    from lcsc.kernels._numba import combine_rows

    out_1P = np.empty((1, W_K[0].size), np.float32)
    combine_rows(coef_K[None], np.ascontiguousarray(W_K.reshape(len(W_K), -1)), out_1P, dtype="float32")
    return out_1P.reshape(W_K.shape[1:])
