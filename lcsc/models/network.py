"""Networks by class name: build, load, save in the layout of diffusers or transformers.

A checkpoint's config.json is data from elsewhere: of all it says, only the name of a class from `NETWORKS`
is looked up, and its values go to that class's constructor. Weights are read from safetensors only.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lcsc.core.errors import BankError, ConfigError, LcscError, MissingExtraError, did_you_mean
from lcsc.models import causal_lm
from lcsc.recycling.composite import SHARED, STOCK

#: class name -> module it comes from; nothing else is ever built or loaded.
NETWORKS: dict[str, str] = {
    "GaussianDenoiser": "lcsc.models.gaussian",
    "MixtureViT": "lcsc.models.vit_mixture",
    "ParameterDiT": "lcsc.models.parameter_dit",
    "SmallClassifier": "lcsc.models.small_classifier",
    "UNet2DModel": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "UVit2DModel": "diffusers",
    "Transformer2DModel": "diffusers",
    "DiTTransformer2DModel": "diffusers",
    "PixArtTransformer2DModel": "diffusers",
    "SD3Transformer2DModel": "diffusers",
    "FluxTransformer2DModel": "diffusers",
    **dict.fromkeys((*causal_lm.CAUSAL_LMS, *causal_lm.MASKED_LMS), "transformers"),
    STOCK[0]: "transformers",
    SHARED[0]: "lcsc.models.encoder_decoder",
}


def library_of(name: str) -> str:
    """The library whose class `name` is, or is made of."""
    return "transformers" if name == SHARED[0] else NETWORKS[name]


def network_class(name: str) -> Any:
    """The class called `name`; raises `ConfigError` for a name outside `NETWORKS`."""
    if name not in NETWORKS:
        raise ConfigError(f"no network class named `{name}`.{did_you_mean(name, NETWORKS)}")
    try:
        with _quiet(name):
            return getattr(importlib.import_module(NETWORKS[name]), name)
    except ImportError as error:
        raise MissingExtraError(
            f"network `{name}` needs {library_of(name)}. Install it with: pip install 'lcsc[lm]'"
        ) from error


def build_network(arch: Mapping[str, Any] | None) -> nn.Module:
    """A freshly initialised network from `{"class": "UNet2DModel", "config": {...}}`.

    Args:
        arch: class name and constructor arguments, of a class of transformers those of its configuration; keys with a
            leading underscore (the libraries' notes) are skipped. None for tensors that are no network.

    Raises:
        ConfigError: no or unknown class, unknown argument, or values that the class refuses.
    """
    if arch is None:
        raise ConfigError(
            "an adapter is no network, so lcsc cannot sample from it. Put it on its base model in code of your own and "
            "score it with objective=function or objective=command."
        )
    if "class" not in arch:
        raise ConfigError(f"`arch` has no `class`, only {sorted(arch)}. Name one of: {', '.join(sorted(NETWORKS))}.")
    name = str(arch["class"])
    cls = network_class(name)
    config = {key: value for key, value in (arch.get("config") or {}).items() if not key.startswith("_")}
    _refuse_quantized(config, f"network `{name}`", ConfigError)
    try:
        with _quiet(name):
            if library_of(name) == "transformers":
                return causal_lm.build_causal_lm(cls, config)
            _check_arguments(name, config, [key for key in inspect.signature(cls.__init__).parameters if key != "self"])
            return cls(**config)
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise what they like at values they do not
        raise ConfigError(f"network `{name}` cannot be built from `arch.config`: {_one_line(error)}") from error


def check_typed(arch: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that a class of transformers does not know and would keep without a word."""
    name = str(arch.get("class"))
    if name in NETWORKS and library_of(name) == "transformers":
        unknown, known = causal_lm.unknown_settings(network_class(name), arch.get("config") or {})
        _check_arguments(name, unknown, known)


def load_network(folder: Path) -> nn.Module:
    """The network saved in `folder` (config.json and safetensors, sharded or not), in eval mode, float32, on the CPU.

    Offline and silent.

    Raises:
        BankError: no or unreadable config.json or weights, quantized weights, or tensors that do not fit the class.
        ConfigError: config.json names a class outside `NETWORKS`.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise BankError(f"no `config.json` in `{folder}`; a network folder holds config.json and *.safetensors.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = str(config["_class_name"] if "_class_name" in config else config["architectures"][0])
    except (ValueError, LookupError, TypeError) as error:
        raise BankError(f"`{path}` is no configuration of diffusers or transformers: {_one_line(error)}.") from error
    cls = network_class(name)
    _refuse_quantized(config, f"`{path}`", BankError)
    try:
        with _quiet(name):
            if library_of(name) == "transformers":
                net, info = causal_lm.load_causal_lm(cls, folder, config)
            else:
                net, info = cls.from_pretrained(
                    str(folder),
                    local_files_only=True,
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    output_loading_info=True,
                )
    except Exception as error:  # the libraries and safetensors raise anything from OSError to RuntimeError here
        raise BankError(f"cannot load `{name}` from `{folder}`: {_one_line(error)}") from error
    wrong = {kind: sorted(map(str, keys))[:10] for kind, keys in info.items() if keys}
    if wrong:
        raise BankError(
            f"weights in `{folder}` do not fit `{name}`: {wrong}. config.json and weights must be one save."
        )
    return net


def saved_config(arch: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Library of a network and its config.json, for float32 weights."""
    if (settings := causal_lm.saved_settings(arch)) is not None:
        return "transformers", settings
    return "diffusers", {"_class_name": arch["class"], **arch["config"]}


def save_network(net: nn.Module, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write config.json and safetensors shards of at most `max_shard_size` into `folder`, as its library does.

    Not atomic by itself: wrap it in `lcsc.core.files.new_directory`.

    Raises:
        ConfigError: `net` is not an instance of a class in `NETWORKS`.
    """
    name = type(net).__name__
    cls = network_class(name)
    if not isinstance(net, cls):
        raise ConfigError(f"network `{name}` is not {NETWORKS[name]}.{name}; only those can be saved and loaded again.")
    with _quiet(name):
        if library_of(name) == "transformers":
            causal_lm.save_causal_lm(cls, net, folder, max_shard_size)
            return
        cls.save_pretrained(net, str(folder), safe_serialization=True, max_shard_size=max_shard_size)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a library's log below errors and its bars; what matters of it is raised by us.

    A network of our own does without both, which take seconds to import.
    """
    if (library := library_of(name)) not in ("diffusers", "transformers"):
        yield
        return
    with causal_lm.quiet(library):
        yield


def _check_arguments(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"network `{name}` has no argument `{key}`.{did_you_mean(key, known)}")


def _refuse_quantized(config: Mapping[str, Any], where: str, error: type[LcscError]) -> None:
    """The quantizer that a file names would be started."""
    if config.get("quantization_config") is not None:
        raise error(f"{where} describes quantized weights; lcsc combines plain ones. Save the network unquantized.")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
