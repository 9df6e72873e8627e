"""Which kind of transformers' models a checkpoint is, and one sentence for the kinds that cannot be used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lcsc.core.errors import BankError, did_you_mean


def known_kind(
    arch: Mapping[str, Any],
    path: Any,
    known: Collection[str],
    refused: Mapping[str, str],
    otherwise: str,
    what: str = "language model of transformers",
) -> str:
    """The `model_type` of a model's configuration, where it is one of those known.

    Args:
        arch: `{"class", "config"}`.
        path: of the model, for messages.
        known: the kinds that can be used.
        refused: kind -> why not, as what follows its name, for models that one might try.
        otherwise: what follows the name of any other kind.
        what: what is looked for, where the configuration names no kind.

    Raises:
        BankError: another kind, or none.
    """
    kind = arch["config"].get("model_type")
    if kind in known:
        return str(kind)
    said = f"`{path}` is a `{arch['class']}`"
    if kind is None:
        raise BankError(f"{said}, no {what}. Give one of: {', '.join(sorted(known))}.")
    raise BankError(f"{said}, and `{kind}` {refused.get(str(kind), otherwise)}.{did_you_mean(str(kind), known)}")
