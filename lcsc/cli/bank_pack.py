"""`lcsc bank pack`: a bank as one file that opens in milliseconds, or as coded files that take less room."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc.bank import CheckpointBank
from lcsc.bank.pack import write_pack
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words, read_selection
from lcsc.core.errors import ConfigError

_SELECT: dict[str, str | None] = {"component": None, "weights": None}
_STEPS: dict[str, str | None] = {"start": None, "stop": None, "every": "1", "last": None}
#: settings of a codec, as `CodecSettings` has them
_CODEC: dict[str, type] = {
    "anchor_every": int,
    "bits_w": int,
    "bits_m": int,
    "bits_v": int,
    "tau": float,
    "beta": float,
    "coder": str,
    "joint": bool,
    "layers": dict,
}


def main(words: Sequence[str]) -> None:
    """`from=PATH to=FILE.safetensors [dtype=...]`, or `from=PATH to=FOLDER codec=lossless|lossy [settings]`.

    `run=RUN` with codec=lossy takes the bits, `tau` and `anchor_every` that a search with operator=compress found. Both
    take `component= weights= start= stop= every= last=`.
    """
    own: dict[str, str | None] = {"from": None, "to": None, "dtype": None, "codec": None, "optimizer": "false"}
    settings = parse_words(words, {**own, "run": None, **_SELECT, **_STEPS, **dict.fromkeys(_CODEC)})
    path, to = Path(need(settings, "from")), Path(need(settings, "to"))
    bank = CheckpointBank.open(
        path,
        select=read_selection(settings),
        component=settings["component"],
        weights=settings["weights"],
        storage="streamed",
    )
    for note in bank.notes:
        print(note)
    if settings["codec"] is not None:
        _code(bank, to, settings)
        return
    if given := [key for key in (*_CODEC, "optimizer", "run") if settings[key] not in (None, "false")]:
        raise ConfigError(
            f"`{given[0]}` is a setting of a codec, and there is none. Add codec=lossless or codec=lossy."
        )
    began = time.perf_counter()
    with passing("pack", unit="columns") as progress:
        dtype = write_pack(bank, to, settings["dtype"], progress)
    print(
        f"packed: {to} ({bank.num_checkpoints} checkpoints x {bank.layout.num_parameters:,} {dtype}, "
        f"{to.stat().st_size / 1e9:.3g} GB, {time.perf_counter() - began:.1f} s)"
    )


def _code(bank: CheckpointBank, to: Path, settings: Mapping[str, str | None]) -> None:
    from lcsc.bank.coded import coded_states, is_coded, write_coded
    from lcsc.bank.optimizer_file import states_of
    from lcsc.cli.searched_codec import searched_codec
    from lcsc.cli.sizes import size_text
    from lcsc.codec.settings import CodecSettings

    if settings["dtype"] is not None:
        raise ConfigError(f"`dtype` is `{settings['dtype']}`, and a codec keeps the dtypes of the files. Leave it out.")
    if settings["optimizer"] not in ("true", "false"):
        raise ConfigError(f"`optimizer` is `{settings['optimizer']}`; it must be true or false.")
    given = {key: _value(key, str(settings[key])) for key in _CODEC if settings[key] is not None}
    if settings["codec"] == "lossless" and (idle := [key for key in given if key not in ("anchor_every", "coder")]):
        raise ConfigError(
            f"`{idle[0]}` says what is lost, and codec=lossless loses nothing. Leave it out, or use codec=lossy."
        )
    how = CodecSettings(mode=str(settings["codec"]), **given)  # type: ignore[arg-type]
    if settings["run"] is not None:
        how, found = searched_codec(Path(settings["run"]), bank, how, given)
        print(f"of {settings['run']}: {found}")
    paths, shapes = [row.path for row in bank.rows], bank.layout.shapes
    state_of = None
    if settings["optimizer"] == "true" and is_coded(bank.path):
        of_step = coded_states(bank.path)
        state_of = lambda k: of_step(bank.steps[k])  # noqa: E731
    elif settings["optimizer"] == "true":
        state_of = lambda k: states_of(paths, shapes, k)  # noqa: E731
    began = time.perf_counter()
    with passing("pack", unit="checkpoints") as progress:
        write_coded(bank, to, how, progress, state_of)
    took, nbytes = time.perf_counter() - began, sum(file.stat().st_size for file in to.iterdir())
    by = "" if how.coder == "counts" else f" by coder {how.coder}"
    raw = bank.num_checkpoints * sum(s.nbytes for s in set(bank.rows[-1].table.values()))
    print(
        f"packed: {to} ({bank.num_checkpoints} checkpoints, codec {how.mode}{by}, {size_text(raw)} of weights in "
        f"{size_text(nbytes)}, {took:.1f} s)"
    )


def _value(key: str, text: str) -> Any:
    kind = _CODEC[key]
    if kind is dict:
        return _layers(text)
    if kind is bool and text not in ("true", "false"):
        raise ConfigError(f"`{key}` is `{text}`; it must be true or false.")
    try:
        return text == "true" if kind is bool else kind(text)
    except ValueError:
        said = "a whole number" if kind is int else "a number"
        raise ConfigError(f"`{key}` is `{text}`; it must be {said}.") from None


def _layers(text: str) -> dict[str, int]:
    """Bits by pattern of a tensor's name."""
    rows = [row.rpartition(":") for row in text.split(",")]
    if not all(pattern and bits.isdecimal() for pattern, _, bits in rows):
        raise ConfigError(
            f"`layers` is `{text}`; give patterns of names with their bits, such as layers='*embed*:6,*norm*:32'."
        )
    return {pattern: int(bits) for pattern, _, bits in rows}
