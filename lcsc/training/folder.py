"""The folder a trainer fills: whose it is, which checkpoints are there, what is still missing."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor, nn

from lcsc.bank.layout_read import read_arch
from lcsc.codec.chain import file_name
from lcsc.codec.settings import CodecSettings
from lcsc.core.differences import differences
from lcsc.core.digests import value_digest
from lcsc.core.errors import OutputExistsError, RunError
from lcsc.core.files import new_directory, write_bytes, write_json
from lcsc.core.registry import describe, plain
from lcsc.datasets.base import Dataset
from lcsc.datasets.content import images_digest
from lcsc.models.network import save_network
from lcsc.training.coded import CodedSaver

SCHEMA = 1


def make_config(
    trainer: Any, *, arch: Mapping[str, Any], model: Any, dataset: Dataset, images_NCHW: Tensor, seed: int
) -> dict[str, Any]:
    """Everything the bank's numbers depend on, as plain values."""
    return {
        "trainer": describe("trainer", trainer),
        "arch": plain(arch),
        "model": describe("model", model),
        "dataset": {"name": dataset.name, "num_images": len(images_NCHW), "digest": images_digest(images_NCHW)},
        "seed": int(seed),
    }


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"checkpoint-{step:06d}"


def needs_training(path: Path) -> bool:
    """Whether a bank is absent, or its training was interrupted."""
    return not path.exists() or (path / ".lock").exists()


@dataclasses.dataclass(frozen=True)
class BankFolder:
    """A bank in the making.

    Args:
        path: the folder.
        config: plain configuration; what `train.json` holds.
        steps: the steps that are saved, ascending.
        component: folder inside a checkpoint that holds the network; empty where the checkpoint itself does.
        codec: `no`, or how the checkpoints are coded (`lcsc.codec`): `lossless` or `lossy`.
    """

    path: Path
    config: dict[str, Any]
    steps: tuple[int, ...]
    component: str = "unet"
    codec: str = "no"

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the configuration."""
        return value_digest(self.config)

    @property
    def state_path(self) -> Path:
        """Where the state to continue from lies while the bank is unfinished."""
        return self.path / ".training" / "state.safetensors"

    @property
    def log_path(self) -> Path:
        """The loss curve, one JSON object a line."""
        return self.path / "train_log.jsonl"

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there; its folder appears complete or not at all."""
        if self.codec != "no":
            return (self.path / file_name(step)).is_file()
        return (self.path / checkpoint_name(step)).is_dir()

    @property
    def finished(self) -> bool:
        """Whether every checkpoint is there."""
        return (self.path / "train.json").is_file() and all(self.has(step) for step in self.steps)

    def check(self) -> None:
        """Refuse a folder that is not ours; reads only.

        Raises:
            OutputExistsError: something lies at `path` that no trainer wrote.
            RunError: the bank there was made with another configuration (field by field difference).
        """
        if not self.path.exists():
            return
        file = self.path / "train.json"
        if not file.is_file():
            if not self.path.is_dir() or any(not item.name.startswith(".") for item in self.path.iterdir()):
                raise OutputExistsError(
                    f"output `{self.path}` exists already and holds no train.json, so no trainer made it. "
                    "Nothing is overwritten; choose another path or remove it."
                )
            return
        try:
            old = json.loads(file.read_text())["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"`{file}` is not a trainer's configuration: {error!r}. Remove `{self.path}`.") from error
        lines = differences(old, self.config)
        if lines:
            raise RunError(
                f"the bank `{self.path}` was made with another configuration: {'; '.join(lines)}. "
                "A bank belongs to one configuration; choose another output path or remove the folder."
            )

    def create(self) -> None:
        """Write `train.json` where there is none and drop what a killed run left half-written."""
        for pattern in (".checkpoint-*.tmp", ".train*.tmp", ".training/.state*.tmp"):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.state_path.parent.mkdir(exist_ok=True)
        if not (self.path / "train.json").exists():
            write_json(self.path / "train.json", {"schema": SCHEMA, "config": self.config})

    def write_checkpoint(self, net: nn.Module, step: int, beside: Mapping[str, Any] | None = None) -> None:
        """Save the network under the name of `step`, atomically; nothing happens where it is there.

        Args:
            net: the network.
            step: optimizer steps behind it.
            beside: plain values for JSON files in the checkpoint's folder, by name; a coded checkpoint has none.
        """
        if self.has(step):
            return
        if self.codec != "no":
            self._saver(net).save(step, net)
        else:
            with new_directory(self.path / checkpoint_name(step)) as folder:
                save_network(net, folder / self.component)
                for name, values in (beside or {}).items():
                    write_json(folder / name, values)

    def _saver(self, net: nn.Module) -> CodedSaver:
        """What codes the checkpoints, which carry what config.json would say of the network."""
        if "_coded" not in self.__dict__:
            with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
                save_network(net, Path(folder))
                arch, _, _ = read_arch(Path(folder))
            self.__dict__["_coded"] = CodedSaver(self.path, CodecSettings(self.codec), arch)
        return self.__dict__["_coded"]

    @contextlib.contextmanager
    def open_log(self, step: int) -> Iterator[TextIO]:
        """The loss curve, cut back to `step`, open for appending."""
        text = self.log_path.read_text() if self.log_path.exists() else ""
        kept = [line for line in text.splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        write_bytes(self.log_path, "".join(line + "\n" for line in kept).encode())
        with open(self.log_path, "a") as log:
            yield log

    def close(self) -> None:
        """Drop the state and the lock file of a finished bank."""
        shutil.rmtree(self.state_path.parent, ignore_errors=True)
        (self.path / ".lock").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it even when the process is killed.

        Raises:
            RunError: another process trains into the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is training into `{self.path}`. Wait for it or choose another output path."
                ) from error
            yield
