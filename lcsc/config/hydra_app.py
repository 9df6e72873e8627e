"""Running a job under Hydra, with its errors turned into one sentence."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcsc.config.schema import store_parts
from lcsc.core import registry
from lcsc.core.errors import ConfigError, LcscError, did_you_mean
from lcsc.core.finite import need_finite

_CHECKOUT = Path(__file__).resolve().parents[2] / "conf"


def installed() -> bool:
    """Whether conf/ lies inside the package (a wheel) rather than beside it (a checkout)."""
    return find_spec("lcsc.conf") is not None


def experiments() -> list[str]:
    """Names of the experiments that ship with lcsc."""
    from importlib.resources import files

    folder = files("lcsc.conf") if installed() else _CHECKOUT
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.joinpath("experiment").iterdir() if f.name.endswith(".yaml")
    )


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The plain configuration of an override list, as `lcsc search` would compose it.

    Raises:
        ConfigError: an override names an unknown part, key or experiment, or has the wrong type.
    """
    store_parts()
    check_overrides(overrides)
    GlobalHydra.instance().clear()
    where = (
        initialize_config_module("lcsc.conf", version_base="1.3")
        if installed()
        else initialize_config_dir(str(_CHECKOUT), version_base="1.3")
    )
    with where:
        try:
            return to_plain(compose("config", overrides=list(overrides)))
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise explain(error, overrides) from error


def to_plain(cfg: Any) -> dict[str, Any]:
    """Resolved plain values; a mandatory value that is absent, or a number that is not finite, is a ConfigError."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    need_finite(plain)
    return plain  # type: ignore[return-value]


def run_job(verb: str, overrides: Sequence[str], job: Callable[[dict[str, Any]], None]) -> None:
    """Compose and run `job`, once or for every combination of a multirun (`-m`).

    Raises:
        LcscError: the user's mistakes, each as one sentence.
    """
    store_parts()
    check_overrides(_settings(overrides))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing; the command line prints
    sys.argv = [f"lcsc {verb}", *overrides]
    source = "pkg://lcsc.conf" if installed() else str(_CHECKOUT)
    errors: list[LcscError] = []
    count = itertools.count(1)

    def guarded(cfg: Any) -> None:
        """One job; its mistake is kept, so that the other jobs of a sweep still run."""
        next(count)
        try:
            job(to_plain(cfg))
        except LcscError as error:
            errors.append(error)

    try:
        hydra.main(version_base="1.3", config_path=source, config_name="config")(guarded)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise explain(error, overrides) from error
    num_jobs = next(count) - 1
    if errors and num_jobs > 1:
        raise ConfigError(f"{len(errors)} of {num_jobs} jobs failed; the first: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UnknownPart or ConfigError for an override that names no part or no experiment."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(
            f"override not understood: {_first_line(error)}. Write key=value; quote values with special characters."
        ) from error
    for override in parsed:
        values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        for value in values:
            if value is None and override.key_or_group in registry.ROOMS:
                raise ConfigError(
                    f"`{override.key_or_group}` is null, but a search needs one. Leave the setting out, or choose "
                    f"one of `lcsc list {override.key_or_group}s`."
                )
            name = str(value).strip("'\"")
            if override.key_or_group in registry.ROOMS and isinstance(value, str):
                registry.part(override.key_or_group, name)
            if override.key_or_group == "experiment" and isinstance(value, str) and "--config-dir" not in sys.argv:
                known = experiments()
                if name not in known:
                    raise ConfigError(f"no experiment named `{name}`.{did_you_mean(name, known)}")


def overridden(overrides: Sequence[str]) -> list[str]:
    """The settings that an override list gives, as they are spelled there: `sampler`, `sampler.num_steps`."""
    return [override.key_or_group for override in OverridesParser.create().parse_overrides(_settings(overrides))]


def _settings(words: Sequence[str]) -> list[str]:
    """The overrides among the words of a command line."""
    return [word for word in words if "=" in word and not word.startswith("-")]


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """One sentence for an error of Hydra or OmegaConf that `overrides` led to."""
    text = str(error)
    cause = str(error.__cause__ or "")
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        if "not in" in text + cause or "is not in struct" in text + cause:
            known = _known_keys(key, overrides)
            return ConfigError(f"no setting named `{key}`.{did_you_mean(key, known)}")
    if found := re.search(r"Could not find '([^']+)'", text):
        return ConfigError(f"no configuration `{found[1]}`. See `lcsc list` for parts.")
    full = re.search(r"full_key: (\S+)", text + "\n" + cause)
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        key = full[1] if full else found[1]
        return ConfigError(f"`{key}` is not set. Choose an experiment with `experiment=...` or set it.")
    if full and (found := re.search(r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a) (.+)", cause)):
        words = {"Integer": "a whole number", "Float": "a number"}
        return ConfigError(f"`{full[1]}` is `{found[1]}`; it must be {words.get(found[2], 'true or false')}.")
    where = f" at `{full[1]}`" if full else ""
    return ConfigError(f"configuration error{where}: {_first_line(error)}")


def _known_keys(key: str, overrides: Sequence[str]) -> list[str]:
    """Settings beside `key` in the configuration with the experiment and parts of `overrides`."""
    head, _, _ = key.rpartition(".")
    groups = ("experiment", "network", *registry.ROOMS)
    parsed = OverridesParser.create().parse_overrides(_settings(overrides))
    chosen = [o.input_line for o in parsed if o.key_or_group in groups and not o.is_sweep_override()]
    try:
        cfg: Any = compose_config([*chosen, "name=x", "bank.path=x"])
    except ConfigError:
        return []
    for word in head.split(".") if head else []:
        cfg = cfg.get(word) if isinstance(cfg, dict) else None
    if not isinstance(cfg, dict):
        return []
    return [f"{head}.{name}" if head else name for name in cfg]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
