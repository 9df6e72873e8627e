"""Classes of transformers whose layers have different numbers of key/value heads.

transformers' configurations can say so (`per_layer_config`), and its cache and `generate` can work so, but the classes
whose heads lcsc regroups build every layer from one number and refuse. The attention of such a layer is of the same
class, made from the configuration of its layer; nothing else differs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lcsc.core.errors import ConfigError
from lcsc.recycling.attention import HEADS


def mixed_class(cls: Any, config: Mapping[str, Any]) -> Any:
    """`cls` itself, or where `config` has layers of different heads a subclass of its name that builds them.

    Raises:
        ConfigError: `per_layer_config` varies something else than the key/value heads.
    """
    rows = config.get("per_layer_config")
    if not rows or not isinstance(rows, Mapping):
        return cls
    others = sorted({str(key) for row in rows.values() for key in row} - {HEADS})
    if others:
        raise ConfigError(f"`per_layer_config` varies `{others[0]}` between layers; here only `{HEADS}` may differ.")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain = copy.deepcopy(config)
        plain.per_layer_config = None
        cls.__init__(self, plain, *args, **kwargs)
        for i, (layer, own) in enumerate(zip(self.model.layers, config.per_layer_config, strict=True)):
            if getattr(own, HEADS) != getattr(plain, HEADS):
                # of `plain`, whose choice of kernels transformers has already made
                settings = copy.copy(plain)
                setattr(settings, HEADS, getattr(own, HEADS))
                layer.self_attn = type(layer.self_attn)(settings, i)
        self.config = copy.copy(plain)
        self.config.per_layer_config = rows
        self.post_init()

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
