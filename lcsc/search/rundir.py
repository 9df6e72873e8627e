"""The run directory: made once, found again by its configuration, never shared by two configurations."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcsc.core.differences import differences
from lcsc.core.digests import value_digest
from lcsc.core.errors import OutputExistsError, RunError
from lcsc.core.files import new_directory, write_json, writing
from lcsc.search.lock import LEASE, Lock

#: Raised when a run directory is written otherwise than before. 2: journal lines carry checksums.
SCHEMA = 2


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


def open_run_dir(
    runs_dir: Path, explicit: Path | None, info: Mapping[str, Any], note: Callable[[str], None]
) -> tuple[RunDir, str]:
    """The run directory for a search: the one it began earlier, or a new one.

    Args:
        runs_dir: where new directories are made and old ones looked for.
        explicit: the directory the user named, None to find or make one.
        info: run.json of the search at hand; `config` and `fingerprints` decide what is the same search.
        note: hears why a run of the same configuration was not continued.

    Returns:
        The directory and what happened: "new", "resumed" or "finished".

    Raises:
        RunError: `explicit` belongs to another configuration (every differing field is named) or is no run directory.
    """
    if explicit is not None:
        with contextlib.suppress(OutputExistsError):  # also where another start of the same line makes it just now
            return _create(explicit, info), "new"
        run = RunDir.load(explicit)
        rows = _differences(run.info, info)
        if rows:
            raise RunError(
                f"`{explicit}` was made with another configuration: {'; '.join(rows)}. "
                "Use the same settings to continue it, or leave out `run_dir` to start a new run."
            )
        return run, _state(run)
    with writing(runs_dir):
        runs_dir.mkdir(parents=True, exist_ok=True)
    key = value_digest([info["config"], info["fingerprints"]])[:16]
    with Lock(runs_dir / f".starting-{key}", str(runs_dir), note, patience=LEASE):  # of starts of one line one makes it
        found = _find(runs_dir, info, note)
        if found is not None:
            return found, _state(found)
        name = f"{info['name']}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        return _create(runs_dir / name, info), "new"


def _find(runs_dir: Path, info: Mapping[str, Any], note: Callable[[str], None]) -> RunDir | None:
    """The newest run of the same search."""
    for path in sorted(runs_dir.glob("[!.]*/run.json"), reverse=True):
        try:
            run = RunDir.load(path.parent)
        except RunError:
            continue  # somebody else's folder is not our business
        rows = _differences(run.info, info)
        if not rows:
            return run
        if all(row.startswith("`fingerprints.") for row in rows):
            note(f"not continuing `{run.path}`, its circumstances differ: {'; '.join(rows)}")
    return None


def _create(path: Path, info: Mapping[str, Any]) -> RunDir:
    """A run directory that is there with its run.json or not at all; raises OutputExistsError where one is."""
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    info = {"schema": SCHEMA, "run_id": path.name, "created_utc": now, **info}
    with writing(path), new_directory(path) as folder:
        write_json(folder / "run.json", info)
    return RunDir(path, info)


def _state(run: RunDir) -> str:
    return "finished" if run.finished else "resumed"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every field in which two searches differ; empty when they are the same."""
    rows = differences(old.get("config"), new["config"])
    return rows + differences(old.get("fingerprints"), new["fingerprints"], "fingerprints")
