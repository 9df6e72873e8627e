"""A run's checkpoints as one matrix. K = checkpoints, P = flat parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcsc.bank.layout import Layout, is_combined
from lcsc.bank.scan import CheckpointFile, Header, find_checkpoints
from lcsc.core.digests import file_sha256, value_digest
from lcsc.core.errors import BankError, ConfigError, NonFiniteError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Selection:
    """Which steps of a run to use: those in [start, stop], every n-th counted from the last, the last n of them.

    None means no limit.
    """

    start: int | None = None
    stop: int | None = None
    every: int = 1
    last: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.last is not None and self.last < 1):
            raise ConfigError(f"`every` is {self.every} and `last` is {self.last}; both must be at least 1.")

    def pick(self, files: list[CheckpointFile]) -> list[CheckpointFile]:
        """The selected checkpoints, in step order; raises BankError when none is left."""
        lower = -1 if self.start is None else self.start
        kept = [f for f in files if f.step >= lower and (self.stop is None or f.step <= self.stop)]
        kept = kept[::-1][:: self.every][: self.last][::-1]
        if not kept:
            raise BankError(
                f"no checkpoint left: {len(files)} steps from {files[0].step} to {files[-1].step}, "
                f"and {self} keeps none. Widen `bank.start` and `bank.stop`."
            )
        return kept


class CheckpointBank:
    """Checkpoints of one architecture, read as rows of one matrix.

    Opening reads headers only and checks that every checkpoint has the same tensors; the numbers are read
    by `matrix()`. Files are never modified.
    """

    def __init__(self, path: Path, select: Selection, component: str | None, dtype: str) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"`bank.dtype` is `{dtype}`; it must be one of {', '.join(_DTYPES)}.")
        self.path = path
        #: what was asked for, as plain values
        self.config = {"path": str(path), "component": component, **dataclasses.asdict(select), "dtype": dtype}
        self.dtype = _DTYPES[dtype]
        files = select.pick(find_checkpoints(path, component))
        self.files = tuple(files)
        self._headers = [file.headers() for file in files]
        for file, headers in zip(files[1:], self._headers[1:], strict=True):
            _check_same(files[0], self._headers[0], file, headers)
        _check_arch(self.files)
        combined = {
            name: header.shape
            for name, header in self._headers[0].items()
            if is_combined(name, _FLOATS.get(header.dtype, torch.int64))
        }
        self.layout = Layout.of(combined)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        select: Selection | None = None,
        component: str | None = None,
        dtype: str = "float32",
    ) -> CheckpointBank:
        """Open the checkpoints under `path`.

        Args:
            path: folder of `checkpoint-<step>/` folders (diffusers layout, sharded or not) or of `*<step>.safetensors`.
            select: which steps; None means all.
            component: sub-folder of each checkpoint that holds the network, such as `unet`; None finds it.
            dtype: how the rows are stored in memory: float32, bfloat16 or float16.

        Raises:
            BankError: nothing found, damaged files, or checkpoints that do not fit together.
        """
        return cls(Path(path), select or Selection(), component, dtype)

    @property
    def steps(self) -> tuple[int, ...]:
        """Training step of each row, increasing."""
        return tuple(file.step for file in self.files)

    @property
    def arch(self) -> Mapping[str, Any] | None:
        """`{"class": ..., "config": {...}}` of the network, None when the files do not say."""
        return self.files[0].arch

    @property
    def num_checkpoints(self) -> int:
        """K."""
        return len(self.files)

    @functools.cached_property
    def parents(self) -> tuple[Mapping[str, Any], ...]:
        """Step, path below the bank's folder and SHA-256 of every file of every checkpoint."""
        return tuple(
            {
                "step": file.step,
                "files": {str(part.relative_to(self.path)): file_sha256(part) for part in file.files},
            }
            for file in self.files
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over steps, names and contents of all files."""
        return value_digest([dict(parent) for parent in self.parents])

    def matrix(self) -> Tensor:
        """W_KP, resident, shape (K, P); float32 unless the bank was opened with another dtype.

        Raises:
            NonFiniteError: a checkpoint holds NaN or Inf (file, tensor and count are named).
        """
        return self._matrix

    @functools.cached_property
    def _matrix(self) -> Tensor:
        W_KP = torch.empty(self.num_checkpoints, self.layout.num_parameters, dtype=self.dtype)
        names = {entry.name for entry in self.layout.entries}
        for row_P, file, headers in zip(W_KP, self.files, self._headers, strict=True):
            views = self.layout.views(row_P)
            for name, tensor in _tensors(file, headers, names):
                views[name].copy_(tensor)
            if not torch.isfinite(row_P).all():
                self._raise_nonfinite(row_P, headers)
        return W_KP

    def _raise_nonfinite(self, row_P: Tensor, headers: Mapping[str, Header]) -> None:
        bad = {name: int((~torch.isfinite(view)).sum()) for name, view in self.layout.views(row_P).items()}
        name, count = next((name, count) for name, count in bad.items() if count)
        raise NonFiniteError(
            f"`{headers[name].file}` holds {count} NaN or Inf in `{name}`, {sum(bad.values())} in all its tensors. "
            "A bank holds finite numbers only; leave the step out with `bank.start`, `bank.stop` or `bank.every`."
        )

    @functools.cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that are not combined (integers, batch-norm statistics), copied from the last checkpoint."""
        headers = self._headers[-1]
        names = set(headers) - {entry.name for entry in self.layout.entries}
        return dict(_tensors(self.files[-1], headers, names))


def _tensors(file: CheckpointFile, headers: Mapping[str, Header], names: set[str]) -> list[tuple[str, Tensor]]:
    found = []
    for part in file.files:
        try:
            with safe_open(part, framework="pt") as handle:
                found += [(name, handle.get_tensor(name)) for name in sorted(names) if headers[name].file == part]
        except SafetensorError as error:
            raise BankError(
                f"`{part}` changed while it was read: {error}. Leave the bank alone during a search."
            ) from error
    return found


def _check_same(first: CheckpointFile, a: Mapping[str, Header], other: CheckpointFile, b: Mapping[str, Header]) -> None:
    """Raise BankError with the first ten differences between two checkpoints' names and shapes."""
    rows = [f"`{name}` is only in step {first.step}" for name in sorted(set(a) - set(b))]
    rows += [f"`{name}` is only in step {other.step}" for name in sorted(set(b) - set(a))]
    rows += [
        f"`{name}` is {a[name].shape} vs {b[name].shape}"
        for name in sorted(set(a) & set(b))
        if a[name].shape != b[name].shape
    ]
    if rows:
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise BankError(
            f"checkpoints `{first.path}` and `{other.path}` differ: {'; '.join(rows[:10])}{more}. "
            "A bank holds one architecture; choose its steps with `bank.start` and `bank.stop`."
        )


def _check_arch(files: tuple[CheckpointFile, ...]) -> None:
    for file in files[1:]:
        if file.arch != files[0].arch:
            raise BankError(
                f"`{files[0].path / 'config.json'}` and `{file.path / 'config.json'}` describe different networks. "
                "A bank holds one architecture; choose its steps with `bank.start` and `bank.stop`."
            )
