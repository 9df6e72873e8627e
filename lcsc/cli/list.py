"""`lcsc list`: the parts, with their sources."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lcsc.core import registry
from lcsc.core.errors import ConfigError, did_you_mean


def main(words: Sequence[str]) -> None:
    """`[KIND ...]`: all kinds when none is named; singular and plural both work."""
    plural = {f"{kind}s": kind for kind in registry.ROOMS}
    kinds = [plural.get(word, word) for word in words] or list(registry.ROOMS)
    for kind in kinds:
        if kind not in registry.ROOMS:
            raise ConfigError(f"no kind of part named `{kind}`.{did_you_mean(kind, [*registry.ROOMS, *plural])}")
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=160)
    for kind in kinds:
        table = Table(title=f"{kind}s", title_justify="left", expand=False)
        for column in ("name", "what it is", "settings", "source"):
            table.add_column(column)
        for name, part in registry.discover(kind).items():
            settings = ", ".join(field for field, _, _ in part.fields())
            table.add_row(*map(escape, (name, part.summary, settings, part.source)))
        console.print(table)
