"""A Python function as an objective."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcsc.core.digests import file_sha256, value_digest
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.models.flat import LiveModel
from lcsc.objectives.base import Score, spending
from lcsc.objectives.shared import KeptLive, check_weights, choose_device
from lcsc.operators.base import Candidate


@register("objective", "function", source="lcsc")
@dataclass(frozen=True)
class Function:
    """A number from a Python function: `objective.function=package.module:name`.

    It is called as `name(model, seed=..., purpose=..., images=...)` and returns a number, or a number and its standard
    error. `model` is the candidate's network (`torch.nn.Module`, evaluation mode, float32, on `device`, no gradients);
    it is used again for the next candidate and must be left as it is. Adapters (operator `lora`) are no networks: their
    tensors are given instead (`dict[str, Tensor]`, CPU, fresh copies). `purpose` is a `lcsc.core.seeds.Purpose` and
    `images` a range: what is random must follow from (seed, purpose, image), and report data should not be search data.
    Torch's global generator is seeded alike for every candidate. The function has the rights of whoever runs lcsc.

    Args:
        function: `module:name`; modules in the current directory are found too.
        label: name of the number; None takes the function's.
        higher_is_better: the search minimises the negative, whose name starts with `neg_`.
        nfe: network calls an image that the function makes; only counted.
        device: torch device; `auto` takes the GPU where there is one.
    """

    function: str
    label: str | None = None
    higher_is_better: bool = False
    nfe: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        check_nfe(self.nfe)
        self.__dict__["_kept"] = KeptLive()
        _ = self._called  # a name that is wrong shows up here, before anything is done

    @property
    def name(self) -> str:
        """The label, with `neg_` where higher is better."""
        return number_name(self.label or self.function.rpartition(":")[2], self.higher_is_better)

    @property
    def min_images(self) -> int:
        """1: what the images are is the function's business."""
        return 1

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`; the standard error is the function's, if it gives one."""
        device = choose_device(self.device)
        model = self._model(candidate, device)
        with spending(len(images) * self.nfe):
            result = self._result(model, seed, purpose, images, device)
            parts = result if isinstance(result, tuple) else (result,)
            try:
                numbers = [float(part) for part in parts]
            except Exception:  # the user's object may raise anything, and whole numbers have no limit
                numbers = []
            value, se = checked_numbers(numbers, f"function `{self.function}` returned `{_brief(result)}`")
        return Score(-value if self.higher_is_better else value, len(images), self.nfe, se if full else None)

    def floor(self) -> None:
        """None: nothing is known about the number."""
        return

    def circumstances(self) -> dict[str, Any]:
        """The function and a digest of the file it stands in."""
        try:
            source = inspect.getsourcefile(inspect.unwrap(self._called))
        except TypeError:  # a builtin or an object: it has no file
            source = None
        digest = file_sha256(source) if source and os.path.isfile(source) else value_digest(self.function)
        return {
            "metric": self.name,
            "detector": self.function,
            "detector_digest": digest,
            "nfe": self.nfe,
            "higher_is_better": self.higher_is_better,
        }

    def _result(self, model: Any, seed: int, purpose: Purpose, images: range, device: torch.device) -> Any:
        """What the function returns; raises EvaluationError for whatever it raises."""
        start = int(SeedRange(seed, purpose).generator(images.start).integers(2**63))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(start)
            try:
                return self._called(model, seed=seed, purpose=purpose, images=images)
            except (Exception, SystemExit) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())
                where = f"{os.path.basename(last.filename)}:{last.lineno}"
                raise EvaluationError(
                    f"function `{self.function}` raised {type(error).__name__} at {where}: {text}"
                ) from error

    @functools.cached_property
    def _called(self) -> Callable[..., Any]:
        module_name, colon, name = self.function.partition(":")
        if not (module_name and colon and name):
            raise ConfigError(f"`objective.function` is `{self.function}`; write `package.module:name`.")
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # `lcsc` on the command line, unlike `python -m lcsc`, does not look here
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise ConfigError(
                f"`objective.function` is `{self.function}`, but importing `{module_name}` failed with "
                f"{type(error).__name__}: {' '.join(str(error).split())}. Install it, or start lcsc in its folder."
            ) from error
        try:
            found = functools.reduce(getattr, name.split("."), module)
        except AttributeError as error:
            raise ConfigError(
                f"`objective.function` is `{self.function}`, but `{module_name}` has no `{name}`."
            ) from error
        if not callable(found):
            raise ConfigError(f"`objective.function` is `{self.function}`, a {type(found).__name__} and no function.")
        return found  # type: ignore[no-any-return]

    def _model(self, candidate: Candidate, device: torch.device) -> nn.Module | dict[str, Tensor]:
        """The candidate's network, kept while candidates share it; its tensors where no architecture is known."""
        if candidate.arch is None:  # an adapter, which is no network without its base
            weights = candidate.weights()
            check_weights(weights[entry.name] for entry in candidate.layout.entries)
            return weights
        live: LiveModel = self.__dict__["_kept"].filled(candidate, device)
        return live.net.eval().requires_grad_(False)


def _brief(result: Any) -> str:
    """A result in at most 80 characters."""
    try:
        return str(result)[:80]
    except Exception:  # a text of a whole number above 4,300 digits, or of the user's object
        return f"a {type(result).__name__}"


def check_nfe(nfe: int) -> None:
    """Raise ConfigError for a number of network calls that is none."""
    if nfe < 0:
        raise ConfigError(f"`objective.nfe` is {nfe}; it must be 0 or above.")


def number_name(label: str, higher_is_better: bool) -> str:
    """Name of the number that is minimised: where higher is better it is the negative, and its name says so."""
    return f"neg_{label}" if higher_is_better else label


def checked_numbers(numbers: list[float], what: str) -> tuple[float, float | None]:
    """A score and its standard error, None without one; raises EvaluationError unless they are that and finite."""
    if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)) or any(se < 0 for se in numbers[1:]):
        raise EvaluationError(f"{what}; wanted is one finite number, or a number and its standard error.")
    return numbers[0], numbers[1] if len(numbers) == 2 else None
