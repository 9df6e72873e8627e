"""A shell command as an objective."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from lcsc.core.digests import file_sha256, value_digest
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose
from lcsc.models.network import STEMS, config_text, library_of
from lcsc.objectives.base import Score, spending
from lcsc.objectives.function import check_nfe, checked_numbers, number_name
from lcsc.objectives.shared import check_weights
from lcsc.operators.base import Candidate

#: What a command may ask for, as `{path}` or as `$LCSC_PATH`.
PLACEHOLDER = re.compile(r"\{(path|seed|purpose|num_images|first_image)\}")
#: Bytes of output that are looked at, from its end.
TAIL = 65536


@register("objective", "command", source="lcsc")
@dataclass(frozen=True)
class Command:
    """A number from a shell command that gets the candidate's path: `objective.command="python score.py {path}"`.

    The candidate is written as a folder that diffusers loads (config.json and safetensors), an adapter as the library
    keeps it that wrote the checkpoints (PEFT: adapter_config.json and adapter_model.safetensors), in the folder for
    temporary files (`TMPDIR`), and deleted afterwards. The last line of the command's output must be one finite number,
    or a number and its standard error. It must print the same for the same candidate, seed, purpose and images, and is
    run by `/bin/sh` with the rights of whoever runs lcsc.

    Args:
        command: with `{path}`, `{seed}`, `{purpose}` (search, select, report, ...), `{num_images}` and `{first_image}`,
            each also in the environment: `LCSC_PATH`, `LCSC_SEED`, ... Other braces stay as they are.
        label: name of the number.
        higher_is_better: the search minimises the negative, whose name starts with `neg_`.
        timeout: seconds after which the command and its children are killed and the candidate counts as failed.
        nfe: network calls an image that the command makes; only counted.
    """

    command: str
    label: str = "command"
    higher_is_better: bool = False
    timeout: float = 3600.0
    nfe: int = 1

    def __post_init__(self) -> None:
        check_nfe(self.nfe)
        if not self.command.strip():
            raise ConfigError("`objective.command` is empty; give a command such as `python score.py {path}`.")
        if not self.timeout > 0:
            raise ConfigError(f"`objective.timeout` is {self.timeout}; it must be above 0 seconds.")
        if not self.label.strip():
            raise ConfigError("`objective.label` is empty; give the number a name.")

    @property
    def name(self) -> str:
        """The label, with `neg_` where higher is better."""
        return number_name(self.label, self.higher_is_better)

    @property
    def min_images(self) -> int:
        """1: what the images are is the command's business."""
        return 1

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`; the standard error is the command's, if it prints one."""
        with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
            model = Path(folder) / "model"
            model.mkdir()
            _write(candidate, model)
            values = {
                "path": str(model),
                "seed": str(seed),
                "purpose": purpose.name.lower(),
                "num_images": str(len(images)),
                "first_image": str(images.start),
            }
            with spending(len(images) * self.nfe):  # nobody knows how far a command came that failed
                line = self._run(values, Path(folder))
        try:
            numbers = [float(word) for word in line.split()]
        except ValueError:
            numbers = []
        with spending(len(images) * self.nfe):
            value, se = checked_numbers(numbers, f"command `{self.command}` printed `{line[:80]}` last")
        return Score(-value if self.higher_is_better else value, len(images), self.nfe, se if full else None)

    def floor(self) -> None:
        """None: nothing is known about the number."""
        return

    def circumstances(self) -> dict[str, Any]:
        """The command and a digest of it and of the files it names, so that an edited script is another evaluator."""
        return {
            "metric": self.name,
            "detector": "command",
            "detector_digest": value_digest({"command": self.command, "files": self._files}),
            "nfe": self.nfe,
            "higher_is_better": self.higher_is_better,
        }

    @functools.cached_property
    def _files(self) -> dict[str, str]:
        try:
            words = shlex.split(self.command)
        except ValueError:  # an open quote; the shell will say so
            words = []
        return {word: file_sha256(word) for word in sorted(set(words)) if os.path.isfile(word)}

    def _run(self, values: dict[str, str], folder: Path) -> str:
        """The last line that the command prints.

        Output goes to files, so that a background process that keeps it open cannot hold up the search.

        Raises:
            EvaluationError: it failed or took too long.
        """
        shell, env = fill_in(self.command, values), {f"LCSC_{key.upper()}": value for key, value in values.items()}
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            process = subprocess.Popen(
                shell,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **env},
                start_new_session=True,  # a group of its own, to be killed with its children
            )
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired as error:
                said = _last_line(folder / "err")
                raise EvaluationError(
                    f"command `{self.command}` took longer than `objective.timeout`, {self.timeout:g} s, and was killed"
                    f"{f'; it said: {said}' if said else '.'}"
                ) from error
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            raise EvaluationError(
                f"command `{self.command}` ended with {code}: {_last_line(folder / 'err') or 'it said nothing'}"
            )
        return _last_line(folder / "out")


def fill_in(command: str, values: dict[str, str]) -> str:
    """The command with its placeholders replaced, each quoted for the shell.

    Raises:
        ConfigError: a value needs quotes where the command already has some.
    """

    def value_of(found: re.Match[str]) -> str:
        value = values[found[1]]
        quoted = shlex.quote(value)
        if quoted != value and _inside_quotes(command[: found.start()]):
            raise ConfigError(
                f"`objective.command` has `{found[0]}` inside quotes, and the value `{value}` holds characters that a "
                f"shell would read there. Put `{found[0]}` outside the quotes, or set `TMPDIR` to a plainer path."
            )
        return quoted

    return PLACEHOLDER.sub(value_of, command)


def _inside_quotes(text: str) -> bool:
    """Whether a shell that has read `text` waits for a closing quote."""
    quote, escaped = "", False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"`":
            quote = char
    return bool(quote or escaped)


def _write(candidate: Candidate, folder: Path) -> None:
    """The candidate's tensors as safetensors, under the name and with the configuration that an export has."""
    arch, adapter = candidate.arch, candidate.adapter
    stem, name, config, header = "model", "config.json", None, {"format": "pt"}
    if adapter is not None:
        stem, name, config, header = adapter.stem, "adapter_config.json", adapter.config, header | {**adapter.header}
    elif arch is not None:
        stem, config = STEMS[library_of(arch)], config_text(arch).encode()
    weights = {key: tensor.contiguous() for key, tensor in candidate.weights().items()}
    check_weights(weights[entry.name] for entry in candidate.layout.entries)
    try:
        save_file(weights, folder / f"{stem}.safetensors", metadata=header)
        if config is not None:
            (folder / name).write_bytes(config)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the candidate cannot be written to `{folder}`: {error}. Set `TMPDIR` to a folder with room for a model."
        ) from error


def _last_line(path: Path) -> str:
    """The last line of a file that is not blank, without control characters; empty when there is none."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(char if char.isprintable() else "?" for char in line)[:300]
