"""The run directory: made once, found again by its configuration, never shared by two configurations."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcsc.core.differences import differences
from lcsc.core.digests import value_digest
from lcsc.core.errors import OutputExistsError, RunError
from lcsc.core.files import new_directory, write_json, writing
from lcsc.search.disk import need_room
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

    @property
    def parent(self) -> str | None:
        """Id of the run that this one was forked from."""
        return (self.info.get("parent") or {}).get("run_id")

    def discard(self) -> None:
        """Take the directory away, at once for all who look for it; call it as the one who writes the run."""
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        with contextlib.suppress(OSError):
            os.rename(self.path, aside)
            shutil.rmtree(aside, ignore_errors=True)

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
    runs_dir: Path,
    explicit: Path | None,
    info: Mapping[str, Any],
    note: Callable[[str], None],
    fork: bool = False,
    need: int = 0,
) -> tuple[RunDir, str]:
    """The run directory for a search: the one it began earlier, or a new one.

    Args:
        runs_dir: where new directories are made and old ones looked for.
        explicit: the directory the user named, None to find or make one.
        info: run.json of the search at hand; `config` and `fingerprints` decide what is the same search.
        note: hears why a run of the same configuration was not continued.
        fork: whether a run of another configuration, `explicit` or the newest of this name, becomes the parent of a
            new one in `runs_dir`, whose run.json has the section `parent`: `run_id`, `path` and `differences`.
        need: bytes that a new directory will take in the end.

    Returns:
        The directory and what happened: "new", "resumed" or "finished".

    Raises:
        RunError: `explicit` belongs to another configuration (every differing field is named) or is no run directory;
            there is nothing to fork.
        ConfigError: the disk has no room for a new one.
    """
    parent = None
    if explicit is not None:
        with contextlib.suppress(OutputExistsError):  # also where another start of the same line makes it just now
            if not fork:
                return _create(explicit, info, need), "new"
        parent = RunDir.load(explicit)
        rows = _differences(parent.info, info)
        if not rows:
            return parent, _state(parent)
        if not fork:
            raise RunError(
                f"`{explicit}` was made with another configuration: {'; '.join(rows)}. Use the same settings to "
                "continue it, leave out `run_dir` to start a new run, or add `fork=true` to start one that takes over "
                "the scores that hold for it too."
            )
    with writing(runs_dir):
        runs_dir.mkdir(parents=True, exist_ok=True)
    key = value_digest([info["config"], info["fingerprints"]])[:16]
    with Lock(runs_dir / f".starting-{key}", str(runs_dir), note, patience=LEASE):  # of starts of one line one makes it
        found = _find(runs_dir, info, note, parent)
        if found is not None:
            return found, _state(found)
        if fork:
            info = {**info, "parent": _parent_section(parent or _newest(runs_dir, info["name"]), info)}
        else:
            _say_near(runs_dir, info, note)
        name = f"{_folder_name(info['name'])}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        return _create(runs_dir / name, info, need), "new"


def _folder_name(name: str) -> str:
    """An experiment's name as the beginning of a folder's: one folder, seen by `ls`, with room for what follows."""
    one = name.replace("/", "-").replace("\0", "-").lstrip(".")
    return one.encode()[:180].decode(errors="ignore") or "run"


def _find(runs_dir: Path, info: Mapping[str, Any], note: Callable[[str], None], parent: RunDir | None) -> RunDir | None:
    """The newest run of the same search; with a parent, of its children."""
    for run in _runs(runs_dir):
        rows = _differences(run.info, info)
        if not rows and (parent is None or run.parent == parent.info["run_id"]):
            return run
        if rows and all(row.startswith("`fingerprints.") for row in rows):
            note(f"not continuing `{run.path}`, its circumstances differ: {'; '.join(rows)}")
    return None


def _runs(runs_dir: Path) -> Iterator[RunDir]:
    for path in sorted(runs_dir.glob("[!.]*/run.json"), reverse=True):
        with contextlib.suppress(RunError):  # somebody else's folder is not our business
            yield RunDir.load(path.parent)


def _newest(runs_dir: Path, name: str) -> RunDir:
    runs = [run for run in _runs(runs_dir) if run.info.get("name") == name]
    if not runs:
        raise RunError(
            f"`fork` is true, but `{runs_dir}` has no run named `{name}` to fork. Name one with `run_dir`, or leave "
            "`fork` out."
        )
    return max(runs, key=lambda run: (str(run.info.get("created_utc")), run.path.name))


def _say_near(runs_dir: Path, info: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Say once that there is a run whose scores hold for this one too."""
    for run in _runs(runs_dir):
        rows = _differences(run.info, info)
        if all(row.startswith("`search.") for row in rows):
            note(f"note: `{run.path}` differs in {'; '.join(rows)} alone; `fork=true` would take its scores over")
            return


def _parent_section(parent: RunDir, info: Mapping[str, Any]) -> dict[str, Any]:
    rows = _differences(parent.info, info)
    return {"run_id": parent.info["run_id"], "path": str(parent.path.resolve()), "differences": rows}


def _create(path: Path, info: Mapping[str, Any], need: int) -> RunDir:
    """A run directory that is there with its run.json or not at all; raises OutputExistsError where one is."""
    if not path.exists():
        need_room(path, need)
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
