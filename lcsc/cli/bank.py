"""`lcsc bank`: look at checkpoints, pack and unpack them, convert what runs code."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words
from lcsc.cli.sizes import size_text
from lcsc.core.errors import BankError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from lcsc.bank.survey import GroupRow, Survey

#: word after `bank` -> module and function that take the words behind it
SUBVERBS = {
    "scan": ("lcsc.cli.bank", "scan"),
    "pack": ("lcsc.cli.bank_pack", "main"),
    "unpack": ("lcsc.cli.bank_unpack", "main"),
    "convert": ("lcsc.cli.bank_convert", "main"),
}
_SETTINGS: dict[str, str | None] = {"path": None, "numbers": "true", "component": None, "weights": None}
_COLUMNS = (
    "weights",
    "layout",
    "files",
    "steps",
    "gaps",
    "dtypes",
    "parameters",
    "size",
    "format",
    "finite",
    "peak memory",
)


def main(words: Sequence[str]) -> None:
    """`scan PATH [numbers=false] [component=NAME] [weights=raw|ema|ema:RATE|lora]`, `pack ...`, `unpack ...` or
    `convert ...`.
    """
    if not words or words[0] not in SUBVERBS:
        said = f"`{words[0]}` is no word for `lcsc bank`." if words else "`lcsc bank` needs one more word."
        raise ConfigError(f"{said}{did_you_mean(words[0] if words else '', SUBVERBS)}")
    module, function = SUBVERBS[words[0]]
    getattr(importlib.import_module(module), function)(words[1:])


def scan(words: Sequence[str]) -> None:
    """Print what lies under a path; raises BankError for the first thing that is wrong with it."""
    from rich.console import Console

    from lcsc.bank.survey import survey

    words = list(words)
    if words and words[0].split("=")[0] not in _SETTINGS:  # a path may hold an equals sign
        words[0] = f"path={words[0]}"
    settings = parse_words(words, _SETTINGS)
    path, numbers = need(settings, "path"), need(settings, "numbers")
    if numbers not in ("true", "false"):
        raise ConfigError(f"`numbers` is `{numbers}`; it must be true (read all numbers) or false (headers only).")
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=200)
    with passing("scan") as progress:
        found = survey(
            path,
            read=numbers == "true",
            progress=progress,
            component=settings["component"],
            weights=settings["weights"],
        )
    console.print(_table(found))
    for note in _notes(found):
        console.print(_clean(note), highlight=False, soft_wrap=True)
    if found.problems:
        raise found.problems[0]


def _table(found: Survey) -> Table:
    from rich.table import Table

    table = Table(title=_clean(f"{found.path}"), title_justify="left")
    for column in _COLUMNS:
        right = column in ("files", "parameters", "size")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in found.groups:
        table.add_row(*map(_clean, _cells(row)))
    return table


def _cells(row: GroupRow) -> tuple[str, ...]:
    from lcsc.bank.memory import STORAGES, bank_bytes, search_peak
    from lcsc.bank.survey import gaps

    group, steps = row.group, row.group.steps
    total = max(1, sum(row.dtypes.values()))
    dtypes = ", ".join(
        dtype if count == total else f"{dtype} {100 * count / total:.3g} %" for dtype, count in row.dtypes.items()
    )
    peaks = (f"{s} {size_text(search_peak(row.extent, s))} ({size_text(bank_bytes(row.extent, s))})" for s in STORAGES)
    bad = sum(bool(file.bad) for file in row.files)
    finite = {None: "not read", True: "yes", False: f"not {bad} of {len(row.files)}"}[row.finite]
    return (
        group.label,
        group.layout,
        str(len(steps)),
        str(steps[0]) if len(steps) == 1 else f"{steps[0]} .. {steps[-1]}",
        str(gaps(steps)),
        dtypes,
        f"{row.extent.num_parameters:,}",
        size_text(row.nbytes),
        ", ".join(sorted({file.format for file in row.files})),
        finite,
        "\n".join(peaks),
    )


def _notes(found: Survey) -> Iterator[str]:
    """What the table has no room for: each sentence once, with the groups that it is about."""
    from lcsc.bank.content import duplicates_text
    from lcsc.bank.find import choose

    if found.groups:
        yield (
            "peak memory is that of a search on the CPU: libraries, bank (its part in brackets), network and export; "
            "to it come the activations of your batch (with derivatives most), your data and a large detector; it is "
            "an upper bound where no network is built (LoRA factors or plain tensors; objective=command or function)"
        )
    about: dict[str, list[str]] = {}
    for row in found.groups:
        for note in row.group.notes:
            about.setdefault(note, []).append(row.group.label)
        if row.constant:
            about.setdefault("the same bits in all steps", []).append(row.group.label)
        elif row.duplicates:
            about.setdefault(duplicates_text(row.duplicates), []).append(row.group.label)
    for note, labels in about.items():
        yield note if len(labels) == len(found.groups) else f"{', '.join(labels)}: {note}"
    if len(found.groups) > 1:
        try:
            yield f"a search takes: {choose([row.group for row in found.groups]).label}"
        except BankError as error:
            yield f"a search needs a choice: {error}"
    for problem in found.problems[1:]:
        yield f"also wrong: {problem}"


def _clean(text: str) -> Text:
    """Text from files as it is, no markup, control characters replaced; line feeds stay."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
