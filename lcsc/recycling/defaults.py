"""Configurations with all the defaults of their class, which is transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc.core.errors import BankError, not_installed

#: what a config.json says of itself and not of the model
_ABOUT = ("model_type", "architectures", "transformers_version")


def filled_config(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of its class.

    Args:
        kind: `model_type`.
        settings: of a config.json; what it says of itself is left out.

    Raises:
        BankError: settings that transformers refuses.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise not_installed("The defaults of a model's configuration", "transformers", "lm") from None
    own = {key: value for key, value in settings.items() if key not in _ABOUT}
    try:
        return AutoConfig.for_model(kind, **own).to_dict()  # type: ignore[no-any-return]
    except Exception as error:  # its checks have classes of their own
        said = " ".join(str(error).split())
        raise BankError(f"transformers refuses the configuration of a `{kind}`: {said} Correct config.json.") from None
