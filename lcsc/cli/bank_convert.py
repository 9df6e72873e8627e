"""`lcsc bank convert`: pickled checkpoints to safetensors, in a process without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcsc.bank.convert import convert
from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError


def main(words: Sequence[str]) -> None:
    """`[from=]PATH to=DIR allow_code=true [code=DIR]`; `--allow-code` is another spelling of the consent."""
    words = ["allow_code=true" if word == "--allow-code" else word for word in words]
    defaults = {"from": None, "to": None, "allow_code": "false", "code": None}
    if words and words[0].partition("=")[0] not in defaults:  # a path may hold an equals sign
        words[0] = f"from={words[0]}"
    settings = parse_words(words, defaults)
    source, to = need(settings, "from"), Path(need(settings, "to"))
    if settings["allow_code"] not in ("true", "false"):
        raise ConfigError(f"`allow_code` is `{settings['allow_code']}`; it must be true or false.")
    outputs = convert(
        source,
        to,
        allow_code=settings["allow_code"] == "true",
        code=settings["code"],
        say=lambda line: print(line, flush=True),
    )
    print(f"{len(outputs)} files in `{to}`; see them with: lcsc bank scan {to}", flush=True)
