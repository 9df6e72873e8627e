"""Networks compiled by torch.compile: which backends there are, and what a compiled network says when it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lcsc.core.errors import ConfigError


def check_compile(backend: str) -> None:
    """Refuse a `compile` that torch.compile has no backend for.

    Raises:
        ConfigError: naming those it has.
    """
    if backend == "no":
        return
    known = torch.compiler.list_backends(None)
    if backend not in known:
        raise ConfigError(f"`compile` is `{backend}`; it is `no` or a backend of torch.compile: {', '.join(known)}.")


class Compiled(nn.Module):
    """A network as torch.compile runs it, with the same parameters; each size of batch is compiled by itself.

    So a batch's result does not depend on which sizes came before it, as it would where a size is a variable.

    Args:
        net: the network; whatever is written into its parameters counts.
        backend: of torch.compile.
    """

    def __init__(self, net: nn.Module, backend: str) -> None:
        super().__init__()
        self._backend = backend
        self._plain = (net,)  # in a tuple, or its parameters would have a second name
        self._fast: Callable[..., Any] = torch.compile(net.forward, backend=backend, dynamic=False)

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype."""
        dtype: torch.dtype = self._plain[0].dtype  # type: ignore[assignment]
        return dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns.

        Raises:
            ConfigError: the backend cannot compile here, as where there is no compiler.
        """
        from torch._dynamo.exc import TorchDynamoException  # costs seconds to import where nothing is compiled

        with warnings.catch_warnings():  # of diffusers' cached version test, and of torch's own look at gradients
            for told in ("Dynamo detected a call to a `functools.lru_cache`", r"The \.grad attribute of a Tensor"):
                warnings.filterwarnings("ignore", message=told)
            try:
                return self._fast(*args, **kwargs)
            except TorchDynamoException as error:
                reason = " ".join(str(error).strip().splitlines()[:2])
                raise ConfigError(
                    f"`compile` is `{self._backend}`, which cannot compile `{type(self._plain[0]).__name__}` here "
                    f"({reason}); set `compile=no`, or give it what it lacks."
                ) from error
