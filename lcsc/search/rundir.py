"""The run directory: made once, found again by its configuration, never shared by two configurations."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcsc.core.differences import differences
from lcsc.core.digests import canonical_json
from lcsc.core.errors import RunError
from lcsc.core.files import write_json

SCHEMA = 1


@dataclass(frozen=True)
class RunDir:
    """A folder with its immutable `run.json`."""

    path: Path
    info: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the search wrote its summary."""
        return (self.path / "summary.json").is_file()

    @classmethod
    def load(cls, path: Path) -> RunDir:
        """Read an existing run directory; raises RunError when it is none."""
        try:
            info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(
                f"`{path}` is no run directory: it has no run.json. Give the folder that `lcsc search` printed."
            ) from error
        except (ValueError, OSError) as error:
            raise RunError(f"`{path / 'run.json'}` cannot be read: {error}.") from error
        if info.get("schema") != SCHEMA:
            raise RunError(
                f"`{path}` has schema {info.get('schema')}; this lcsc reads {SCHEMA}. Use the lcsc that made it."
            )
        return cls(path, info)


def open_run_dir(runs_dir: Path, explicit: Path | None, info: Mapping[str, Any]) -> tuple[RunDir, str]:
    """The run directory for a search: the one it began earlier, or a new one.

    Args:
        runs_dir: where new directories are made and old ones looked for.
        explicit: the directory the user named, None to find or make one.
        info: run.json of the search at hand; `config` and `fingerprints` decide what is the same search.

    Returns:
        The directory and what happened: "new", "resumed" or "finished".

    Raises:
        RunError: `explicit` belongs to another configuration (every differing field is named) or is no run directory.
    """
    if explicit is not None and explicit.exists():
        run = RunDir.load(explicit)
        rows = differences(run.info.get("config"), info["config"])
        rows += differences(run.info.get("fingerprints"), info["fingerprints"], "fingerprints")
        if rows:
            raise RunError(
                f"`{explicit}` was made with another configuration: {'; '.join(rows)}. "
                "Use the same settings to continue it, or leave out `run_dir` to start a new run."
            )
        return run, "finished" if run.finished else "resumed"
    if explicit is None:
        wanted = canonical_json(_identity(info))
        for path in sorted(runs_dir.glob("*/run.json"), reverse=True):
            try:
                run = RunDir.load(path.parent)
            except RunError:
                continue  # somebody else's folder is not our business
            if canonical_json(_identity(run.info)) == wanted:
                return run, "finished" if run.finished else "resumed"
    return _create(runs_dir, explicit, info), "new"


def _create(runs_dir: Path, explicit: Path | None, info: Mapping[str, Any]) -> RunDir:
    now = datetime.now(UTC)
    name = f"{info['name']}-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    path = explicit or runs_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()  # exclusive: two starts in one second never share a directory
    info = {"schema": SCHEMA, "run_id": path.name, "created_utc": f"{now:%Y-%m-%dT%H:%M:%SZ}", **info}
    write_json(path / "run.json", info)
    return RunDir(path, info)


def _identity(info: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": info.get("config"), "fingerprints": info.get("fingerprints")}
