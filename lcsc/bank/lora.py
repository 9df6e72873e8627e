"""Low-rank adapters (LoRA, arXiv:2106.09685): which tensors belong together, and how their updates are combined.

A LoRA checkpoint holds, for each adapted module, a down factor A and an up factor B; the network's weight is changed
by the update `scale * B @ A`. What a linear combination of checkpoints means is the combination of these updates,

    sum_k coef_k scale_k B_k A_k,

a matrix of rank up to K times the adapter's rank, which is recompressed to the rank wanted (`combine_products`). It is
not what one gets by combining all A and all B on their own ("factor space"): `(sum a_k B_k)(sum a_k A_k)` mixes factors
of different checkpoints and squares the coefficients. For neighbouring checkpoints with coefficients that are positive
and small the two are close, for signed coefficients they are not. Measured on 16 checkpoints of a rank-16 adapter of a
64 x 48 layer whose factors walk at random by half their length (tests/exact/test_lora.py; relative Frobenius norm of
the difference): uniform average 2.6 %, coefficients +3.3, -3.3, +3.3, ... that sum to one 70 %, four draws of
uniform coefficients in [-3.3, 3.3] 44 to 113 %: as much as the update itself.

Numpy and float64 throughout; nothing here imports torch. Shapes: A (r, in) or (r, in, kh, kw), B (out, r) or
(out, r, 1, 1), r = rank, K = checkpoints.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.core.errors import BankError, ConfigError

#: what the writers call A and B, and what may follow: PEFT (with or without the adapter's name; embeddings are bare
#: parameters), kohya, diffusers' two older spellings
_SIDES = (
    ("lora_A", "lora_B", r"(\.[^.]+)?\.weight"),
    ("lora_embedding_A", "lora_embedding_B", r"(\.[^.]+)?"),
    ("lora_down", "lora_up", r"\.weight"),
    ("lora.down", "lora.up", r"\.weight"),
    ("lora_linear_layer.down", "lora_linear_layer.up", r"\.weight"),
)
_DOWN = [(re.compile(rf"(.*)[._]({re.escape(a)})({tail})"), b) for a, b, tail in _SIDES]
_UP = [re.compile(rf"(.*)[._]({re.escape(b)})({tail})") for _, b, tail in _SIDES]
#: parts of names that mark adapters whose update is not `scale * B @ A`
_OTHERS = {
    "lora_magnitude_vector": "DoRA magnitudes",
    "dora_scale": "DoRA magnitudes",
    "lora_mid": "a LoCon middle factor",
    "hada_w": "LoHa factors",
    "lokr_w": "LoKr factors",
    "lora_B.bias": "LoRA biases",
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The tensors of one adapted module, by their names in the checkpoint.

    Args:
        module: name of the module, as far as the file tells it.
        A: down factor, shape (r, in, ...).
        B: up factor, shape (out, r, ...).
        alpha: scalar tensor with `scale = alpha / r`; None when the file has none for this module.
    """

    module: str
    A: str
    B: str
    alpha: str | None


def is_lora(names: Collection[str]) -> bool:
    """Whether any of the names is that of a LoRA factor."""
    return any(pattern.fullmatch(name) for name in names for pattern, _ in _DOWN)


def refuse_lora(names: Collection[str], path: Path) -> None:
    """Raise BankError when the tensors of the bank at `path` are LoRA factors; for those who combine weights."""
    if is_lora(names):
        raise BankError(
            f"`{path}` holds LoRA factors, and a combination of factors is not the combination of their updates. "
            "Use operator=lora, which combines the updates (operator.factors=true for the factors all the same)."
        )


def lora_pairs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[LoraPair, ...]:
    """The adapted modules of a checkpoint, sorted by name; empty when there are none.

    Args:
        shapes: shape by name of all its tensors. Names of PEFT, diffusers and kohya are understood.

    Raises:
        BankError: a factor without its partner, factors that do not fit, or another kind of adapter (DoRA, LoHa, ...).
    """
    for name in sorted(shapes):
        for mark, what in _OTHERS.items():
            if mark in name:
                raise BankError(
                    f"`{name}` belongs to {what}, and such an adapter is more than a product of two factors. "
                    "Only plain LoRA can be combined; merge each checkpoint into its base model and combine those."
                )
    pairs = []
    for name in shapes:
        for pattern, up in _DOWN:
            if match := pattern.fullmatch(name):
                partner = name[: match.start(2)] + up + match.group(3)
                alpha = f"{match.group(1)}.alpha"
                pairs.append(LoraPair(match.group(1), name, partner, alpha if alpha in shapes else None))
    partners = {pair.B for pair in pairs}
    for name in shapes:
        if name not in partners and any(pattern.fullmatch(name) for pattern in _UP):
            raise BankError(f"the LoRA factor `{name}` has no partner A in the checkpoint. Save the adapter again.")
    for pair in pairs:
        if pair.B not in shapes:
            raise BankError(f"the LoRA factor `{pair.A}` has no partner `{pair.B}`. Save the adapter again.")
        a, b = shapes[pair.A], shapes[pair.B]
        if len(a) < 2 or len(b) < 2 or a[0] != b[1] or math.prod(b[2:]) != 1:
            raise BankError(
                f"the LoRA factors `{pair.A}` {a} and `{pair.B}` {b} do not fit: A must be (r, in, ...) and B "
                "(out, r, 1, ...), without groups. Such an adapter cannot be combined."
            )
    return tuple(sorted(pairs, key=lambda pair: pair.module))


# ------------------------------------------------------------------------------------------------------- scales


def adapter_settings(files: Sequence[Path]) -> Mapping[str, Any] | None:
    """What a checkpoint says about its adapters besides the tensors; None when it says nothing.

    This is the adapter_config.json of PEFT beside the weights, or the `lora_adapter_metadata` that diffusers writes
    into the header, whose keys carry the component's name (`unet.r`).

    Raises:
        BankError: the text is no JSON object.
    """
    path = files[0].parent / "adapter_config.json"
    if path.is_file():
        return _json_object(path.read_text(encoding="utf-8", errors="replace"), path)
    if files[0].suffix == ".safetensors":
        from lcsc.bank.safetensors_file import read_safetensors

        text = read_safetensors(files[0])[1].get("lora_adapter_metadata")
        return None if text is None else _json_object(text, files[0])
    return None


def _json_object(text: str, path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BankError(f"the adapter's settings in `{path}` are no JSON object. Save the adapter again.")
    return value


def lora_scale(pair: LoraPair, rank: int, alpha: float | None, settings: Mapping[str, Any] | None) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Args:
        pair: the module.
        rank: r, from the shape of A.
        alpha: value of the alpha tensor, None when there is none.
        settings: see `adapter_settings`. Without alpha and settings the scale is 1, as diffusers has it.

    Raises:
        BankError: PEFT weights without their settings, or values that are no usable number.
    """
    root = alpha is None and settings is not None and bool(_setting(pair, settings, "use_rslora", False))
    if alpha is None and settings is not None:
        alpha = _by_pattern(pair, settings)
    if alpha is None and pair.module.startswith("base_model.model."):
        raise BankError(
            f"`{pair.A}` was written by PEFT, but no `adapter_config.json` with `lora_alpha` lies beside the weights. "
            "Copy it there; without it the size of the update is unknown."
        )
    scale = 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if root else rank)
    if not math.isfinite(scale) or scale == 0:
        raise BankError(f"the LoRA module `{pair.module}` has alpha {alpha}; it must be a finite number other than 0.")
    return scale


def _setting(pair: LoraPair, settings: Mapping[str, Any], key: str, default: Any) -> Any:
    """A setting for a module: of its component (`unet.r`) or of the whole adapter."""
    component = pair.module.partition(".")[0]
    return settings.get(f"{component}.{key}", settings.get(key, default))


def _by_pattern(pair: LoraPair, settings: Mapping[str, Any]) -> float | None:
    """`lora_alpha` of a module; `alpha_pattern` holds regular expressions for ends of names (peft, get_pattern_key)."""
    module = pair.module.removeprefix("base_model.model.")
    alpha = _setting(pair, settings, "lora_alpha", None)
    patterns = _setting(pair, settings, "alpha_pattern", None) or {}
    try:
        found = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
        return None if found is None else float(found)
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise BankError(f"the adapter's settings for `{pair.module}` cannot be used: {error}.") from error


# ----------------------------------------------------------------------------------------------------- products


def combine_products(
    A_K: Sequence[np.ndarray],
    B_K: Sequence[np.ndarray],
    coef_K: Sequence[float] | np.ndarray,
    scale_K: Sequence[float] | np.ndarray,
    rank: int,
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best factors of rank `rank` for `sum_k coef_k scale_k B_k A_k`, found without forming that matrix.

    The stacked factors are orthogonalised (QR) and the small core between them is decomposed (SVD); by Eckart and
    Young the truncation is optimal. It is exact to rounding when `rank` reaches the sum of the ranks, and the factors
    are filled with zeros where it exceeds the size of the matrix.

    Args:
        A_K: K down factors, (r_k, in) or (r_k, in, kh, kw); ranks may differ.
        B_K: K up factors, (out, r_k) or (out, r_k, 1, 1).
        coef_K: coefficients, any sign.
        scale_K: scales of the checkpoints' products, see `lora_scale`.
        rank: rank of the result, at least 1.
        scale: what a reader will multiply the result with.

    Returns:
        A and B, float64, balanced (`B^T B = A A^T`), in the dimensions of the inputs, and the relative Frobenius error
        of the truncation (0 for an update that vanishes).

    Raises:
        ConfigError: `rank` is below 1.
    """
    if rank < 1:
        raise ConfigError(f"the rank of a combined adapter is {rank}; it must be at least 1.")
    tail_A, tail_B = A_K[0].shape[1:], B_K[0].shape[2:]
    used = [k for k, coef in enumerate(coef_K) if coef != 0] or [0]
    A_SI = np.concatenate([A_K[k].reshape(len(A_K[k]), -1).astype(np.float64) for k in used])
    B_OS = np.concatenate(
        [
            B_K[k].reshape(len(B_K[k]), -1).astype(np.float64) * (float(coef_K[k]) * float(scale_K[k]) / scale)
            for k in used
        ],
        axis=1,
    )
    left, core_B = np.linalg.qr(B_OS)
    right, core_A = np.linalg.qr(A_SI.T)
    U, S, Vh = np.linalg.svd(core_B @ core_A.T, full_matrices=False)
    kept = min(rank, len(S))
    A = np.zeros((rank, A_SI.shape[1]))
    B = np.zeros((B_OS.shape[0], rank))
    root = np.sqrt(S[:kept])
    A[:kept] = root[:, None] * (Vh[:kept] @ right.T)
    B[:, :kept] = (left @ U[:, :kept]) * root
    whole = float(np.linalg.norm(S))
    error = float(np.linalg.norm(S[kept:])) / whole if whole > 0 else 0.0
    return A.reshape(rank, *tail_A), B.reshape(*B.shape, *tail_B), error


def product_gram(A_K: Sequence[np.ndarray], B_K: Sequence[np.ndarray], scale_K: np.ndarray) -> np.ndarray:
    """Inner products of the updates, `<B_i A_i, B_j A_j> = tr((B_i^T B_j)(A_j A_i^T))`, float64, shape (K, K).

    Args:
        A_K: K down factors of one rank.
        B_K: K up factors.
        scale_K: scales of the products.
    """
    K, r = len(A_K), A_K[0].shape[0]
    A = np.concatenate([a.reshape(r, -1) for a in A_K]).astype(np.float64)
    B = np.concatenate([b.reshape(len(b), -1) for b in B_K], axis=1).astype(np.float64)
    return ((B.T @ B) * (A @ A.T)).reshape(K, r, K, r).sum((1, 3)) * np.outer(scale_K, scale_K)
