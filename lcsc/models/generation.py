"""Generation by transformers with our settings alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def own_settings_aside(net: nn.Module) -> Iterator[None]:
    """Without what a network's folder says of beams, penalties or words to avoid: the draws are what was asked for."""
    from transformers import GenerationConfig

    own, net.generation_config = net.generation_config, GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        net.generation_config = own
