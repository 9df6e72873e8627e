"""Networks by class name: build, load, save in the layout of diffusers.

A checkpoint's config.json is data from elsewhere: of all it says, only the name of a class from `NETWORKS`
is looked up, and its values go to that class's constructor. Weights are read from safetensors only.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lcsc.core.errors import BankError, ConfigError, did_you_mean

#: class name -> module it comes from; nothing else is ever built or loaded.
NETWORKS: dict[str, str] = {
    "GaussianDenoiser": "lcsc.models.gaussian",
    "UNet2DModel": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "UVit2DModel": "diffusers",
    "Transformer2DModel": "diffusers",
    "DiTTransformer2DModel": "diffusers",
    "PixArtTransformer2DModel": "diffusers",
    "SD3Transformer2DModel": "diffusers",
    "FluxTransformer2DModel": "diffusers",
}


def library_of(arch: Mapping[str, Any]) -> str:
    """The library that opens a network: configurations of transformers name the kind of model, diffusers' the class."""
    return "transformers" if "model_type" in arch["config"] else "diffusers"


def config_text(arch: Mapping[str, Any]) -> str:
    """config.json of a network, as its library writes it."""
    own = library_of(arch) == "diffusers"
    config = {"_class_name": arch["class"], **arch["config"]} if own else dict(arch["config"])
    return json.dumps(config, indent=2) + "\n"


#: stem of the weight file that a library's `from_pretrained` looks for
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def network_class(name: str) -> Any:
    """The class called `name`; raises `ConfigError` for a name outside `NETWORKS`."""
    if name not in NETWORKS:
        raise ConfigError(f"no network class named `{name}`.{did_you_mean(name, NETWORKS)}")
    with _quiet(name):
        return getattr(importlib.import_module(NETWORKS[name]), name)


def build_network(arch: Mapping[str, Any] | None) -> nn.Module:
    """A freshly initialised network from `{"class": "UNet2DModel", "config": {...}}`.

    Args:
        arch: class name and constructor arguments; keys with a leading underscore (diffusers' notes) are skipped. None
            for tensors that are no network.

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
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key in config:
        if key not in known:
            raise ConfigError(f"network `{name}` has no argument `{key}`.{did_you_mean(key, known)}")
    try:
        with _quiet(name):
            return cls(**config)
    except (ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise ConfigError(f"network `{name}` cannot be built from `arch.config`: {_one_line(error)}") from error


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
        name = str(config["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise BankError(f"`{path}` is no diffusers configuration: {_one_line(error)}.") from error
    cls = network_class(name)
    if config.get("quantization_config") is not None:  # would start the quantizer that the file names
        raise BankError(
            f"`{path}` describes quantized weights; lcsc combines plain ones. Save the network unquantized."
        )
    try:
        with _quiet(name):
            net, info = cls.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers and safetensors raise anything from OSError to RuntimeError here
        raise BankError(f"cannot load `{name}` from `{folder}`: {_one_line(error)}") from error
    wrong = {kind: sorted(map(str, keys))[:10] for kind, keys in info.items() if keys}
    if wrong:
        raise BankError(
            f"weights in `{folder}` do not fit `{name}`: {wrong}. config.json and weights must be one save."
        )
    return net


def save_network(net: nn.Module, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write config.json and safetensors shards of at most `max_shard_size` into `folder`, as diffusers does.

    Not atomic by itself: wrap it in `lcsc.core.files.new_directory`.

    Raises:
        ConfigError: `net` is not an instance of a class in `NETWORKS`.
    """
    name = type(net).__name__
    cls = network_class(name)
    if not isinstance(net, cls):
        raise ConfigError(f"network `{name}` is not {NETWORKS[name]}.{name}; only those can be saved and loaded again.")
    with _quiet(name):
        cls.save_pretrained(net, str(folder), safe_serialization=True, max_shard_size=max_shard_size)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence diffusers' log below errors and its bars; what matters of it is raised by us.

    A network of our own does without diffusers, which takes seconds to import.
    """
    if NETWORKS[name] != "diffusers":
        yield
        return
    from diffusers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
