"""From a path to the sets of weights below it: which entries are steps, and what is passed over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lcsc.bank.layout_files import Listing, WeightSet, list_folder, passed_names, prefer
from lcsc.bank.layout_folder import Contents, Unit, dcp_set, is_second, read_contents
from lcsc.bank.names import Name, is_temporary, parse
from lcsc.bank.shard_index import regular_file, shown
from lcsc.core.errors import BankError

#: what an error says was looked for
PATTERNS = (
    "checkpoint-<step>/<component>/*.safetensors",
    "checkpoint-<step>/*.safetensors",
    "<name><step>.safetensors",
    "the same with .pt, .pth, .bin and .ckpt",
    "<step>/.metadata (torch.distributed.checkpoint)",
)
#: folders that are looked into below the given one, and how deep
_MAX_FOLDERS, _MAX_DEPTH = 1000, 4


@dataclass
class Found:
    """Sets of weights below a path, and what to tell the user.

    Args:
        root: the folder that holds the steps.
        units: sets of weights, not read yet.
        notes: sentences; a dict for its order.
        passed: reason -> first name and number of names that are passed over.
        broken: component and error of what cannot be read.
        visited: folders that were looked into on the search for a run.
    """

    root: Path
    units: list[Unit] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    passed: dict[str, tuple[str, int]] = field(default_factory=dict)
    broken: list[tuple[str | None, BankError]] = field(default_factory=list)
    visited: int = 0

    def pass_over(self, reason: str, names: Iterable[str]) -> None:
        """Count names that are not read."""
        for name in names:
            first, count = self.passed.get(reason, (shown(name, 60), 0))
            self.passed[reason] = (first, count + 1)

    def passed_notes(self) -> list[str]:
        """One sentence for each reason."""
        return [
            f"passed over ({reason}): {first}" + (f" and {count - 1} other{'s' * (count > 2)}" if count > 1 else "")
            for reason, (first, count) in self.passed.items()
        ]

    def take(self, folder: str, contents: Contents) -> None:
        """Add one checkpoint's folder."""
        prefix = f"{folder}/" if folder else ""
        self.units += contents.units
        self.broken += contents.broken
        self.notes.update(dict.fromkeys(contents.notes))
        self.pass_over("training state", (prefix + name for name in contents.states))
        self.pass_over("no weights", (prefix + name for name in contents.passed))


def walk(path: Path) -> Found:
    """The sets of weights of a folder of steps, of one checkpoint's folder, or of one file.

    Raises:
        BankError: nothing found, several runs, files and folders with steps side by side, or damaged sets of shards.
    """
    try:
        if not path.is_dir():
            return _file(path)
    except OSError as error:
        raise BankError(f"`{shown(path)}` cannot be looked at: {error.strerror}. Check the path.") from None
    found = Found(path)
    _folder(path, found, 0)
    if not found.units:
        raise found.broken[0][1] if found.broken else nothing(path, found)
    return found


def nothing(path: Path, found: Found | None = None) -> BankError:
    """The error for a path without checkpoints."""
    notes = [*found.notes, *found.passed_notes()] if found else []
    said = "".join(f" {note[0].upper()}{note[1:]}." for note in notes[:8])
    return BankError(
        f"no checkpoint found under `{shown(path)}`. Tried {', '.join(PATTERNS)}.{said} "
        "Give the folder that holds them with `bank.path`, or make one with `lcsc train`."
    )


def _file(path: Path) -> Found:
    if not path.exists() and not path.is_symlink():
        raise nothing(path)
    regular_file(path)
    sets = [s for s in list_folder(path.parent).sets if path.name in s.files or path.name == s.index]
    if not sets:
        raise nothing(path)
    name = parse(sets[0].stem)
    return Found(path.parent, [Unit(sets[0], name, "files", None, name.kind, name.rate)])


def _folder(path: Path, found: Found, depth: int) -> None:
    """Fill `found` from a folder."""
    listing = list_folder(path)
    own = parse(_own_name(path))
    if own.base and not own.marked:  # `run7` and `sd15` are no steps; `checkpoint-7` is
        own = replace(own, step=None)
    if listing.dcp and depth == 0:
        found.units.append(Unit(dcp_set(path), own, "dcp", None, own.kind, own.rate))
        return
    direct, notes, states = prefer(listing.sets)
    steps = _step_folders(path, listing)
    numbered = [item for item in direct if _numbered(item, direct, states)]
    if steps and numbered:
        raise BankError(
            f"`{shown(path)}` holds steps as files (`{shown(numbered[0].label)}`) and as folders "
            f"(`{shown(steps[0][0])}`). They may be two runs; move one of them away, or give one file or folder."
        )
    if depth == 0 and not steps and not numbered and _single(path, own, listing, direct, found):
        return
    if not steps and not direct:
        found.notes.update(dict.fromkeys(notes))
        _descend(path, listing, found, depth)
        return
    for folder, contents in steps:
        found.take(folder, contents)
    found.notes.update(dict.fromkeys(notes if not steps else ()))
    found.pass_over("training state", states)
    found.pass_over("no weights", passed_names(listing))
    used = {folder for folder, _ in steps}
    found.pass_over("no weights or no step", (f"{name}/" for name in listing.folders if name not in used))
    if steps:
        found.pass_over("no step in the name, beside folders that have one", (item.label for item in direct))
        return
    if depth == 0 or numbered:
        named = [(item, parse(item.stem)) for item in direct]
        found.units += [Unit(item, name, "files", None, name.kind, name.rate) for item, name in named]


def _own_name(path: Path) -> str:
    """A folder's name, also for `.`."""
    return path.absolute().name if path.name not in ("", "..") else path.resolve().name


def _numbered(item: WeightSet, direct: list[WeightSet], states: list[str]) -> bool:
    """Whether a file's name has a step or an epoch; `model_1` beside `model` is accelerate's second model."""
    if is_second(item, direct) and any(state.startswith("random_states") for state in states):
        return False
    name = parse(item.stem)
    return name.step is not None or name.epoch is not None


def _step_folders(path: Path, listing: Listing) -> list[tuple[str, Contents]]:
    """Folders whose name has a step and that hold weights."""
    found = []
    for folder in listing.folders:
        name = parse(folder)
        if (name.step is None and name.epoch is None) or name.state or folder.endswith("-state"):
            continue
        try:
            contents = read_contents(path / folder, name)
        except BankError as error:
            contents = Contents(broken=[(None, error)])
        if contents.units or contents.broken:
            found.append((folder, contents))
    return found


def _single(path: Path, own: Name, listing: Listing, direct: list[WeightSet], found: Found) -> bool:
    """Take the folder as one checkpoint, if its files or folders have the names of one."""
    contents = read_contents(path, own, listing)
    named = [unit for unit in contents.units if unit.hint != "folder" or unit.component is None]
    if not named and len(direct) != 1:
        return False
    if not contents.units or (len(direct) == 1 and parse(direct[0].stem).last):
        return False
    if len(contents.units) == 1 and direct:
        contents.units = [replace(contents.units[0], component=None)]
    found.take("", contents)
    return True


def _descend(path: Path, listing: Listing, found: Found, depth: int) -> None:
    """Look for one run in the folders below."""
    runs: list[tuple[str, Found]] = []
    unread: list[BankError] = []
    for folder in listing.folders if depth < _MAX_DEPTH else ():
        if found.visited >= _MAX_FOLDERS:
            break
        inner = Found(path / folder, visited=found.visited + 1)
        try:
            _folder(path / folder, inner, depth + 1)
        except BankError as error:
            unread.append(error)
        found.visited = inner.visited
        if inner.units or inner.broken:
            runs.append((folder, inner))
    if unread and not runs:
        raise unread[0]
    for why in unread:
        found.notes[f"passed over, it cannot be read: {why}"] = None
    if len(runs) > 1:
        names = ", ".join(f"`{shown(folder)}`" for folder, _ in runs[:10])
        raise BankError(f"`{shown(path)}` holds several runs: {names}. Give one of them with `bank.path`.")
    left = [name for name in listing.folders if not runs or name != runs[0][0]]
    if runs:
        folder, inner = runs[0]
        found.root, found.units, found.passed, found.broken = inner.root, inner.units, inner.passed, inner.broken
        found.notes = {f"found in `{shown(folder)}`": None, **found.notes, **inner.notes}
    found.pass_over("no weights", passed_names(listing))
    found.pass_over("no weights or no step", (f"{name}/" for name in left if not is_temporary(name)))
