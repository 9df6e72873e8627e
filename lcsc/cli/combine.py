"""`lcsc combine`: models from a bank without a search, out of core, several in one pass."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.bank.content import duplicates_note
from lcsc.bank.lora_modules import copied_at
from lcsc.cli.passes import passing
from lcsc.cli.settings import need, parse_words, read_selection
from lcsc.cli.sizes import size_text
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.export.folder import lora_text
from lcsc.export.oneshot import SCHEDULES, Output, Written, combine_bank, given, scheduled

#: largest file of coefficients that is read, in bytes
MAX_COEF = 64 << 20
#: most models of one pass
MAX_OUTPUTS = 256
#: what models are written as; dcp is torch.distributed.checkpoint
FORMATS = ("safetensors", "dcp")
#: size above which several safetensors files are written
MAX_SHARD_SIZE = "5GB"
DEFAULTS = {
    **dict.fromkeys(("bank", "schedule", "halflife", "sigma_rel", "tracked", "window", "coef", "to")),
    **dict.fromkeys(("start", "stop", "last", "component", "weights", "rank", "max_shard_size")),
    "every": "1",
    "dtype": "float32",
    "format": FORMATS[0],
}


def main(words: Sequence[str]) -> None:
    """`bank=PATH schedule=... to=OUT` with the schedule's setting; several of its values make several models.

    With `format=dcp` the processes that torchrun starts make a model together, and the first of them speaks.
    """
    settings = parse_words(words, DEFAULTS)
    _check_format(settings)
    if settings["format"] != "dcp":
        _run(settings, words)
        return
    from lcsc.export.dcp import torchrun_group

    with torchrun_group() as speaks, contextlib.ExitStack() as stack:
        if not speaks:
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        _run(settings, words)


def _run(settings: Mapping[str, str | None], words: Sequence[str]) -> None:
    to, began = Path(need(settings, "to")), time.perf_counter()
    schedule = _schedule(settings)
    values = None if schedule == "coefficients" else _values(settings, schedule)
    text = settings["tracked"]
    tracked = None if text is None else [value for _, value in read_numbers(text, "tracked")]
    rank = _rank(settings["rank"])
    bank = CheckpointBank.open(
        Path(need(settings, "bank")),
        select=read_selection(settings),
        component=settings["component"],
        weights=settings["weights"],
        storage="streamed",
    )
    _say_bank(bank, rank)
    if values is None:
        outputs = given(bank, read_coefficients(need(settings, "coef"), bank))
    else:
        outputs = scheduled(bank, schedule, values or [(str(bank.num_checkpoints), bank.num_checkpoints)], tracked)
    for output in outputs:
        _say_output(output)
    dtype = need(settings, "dtype")
    if settings["format"] == "dcp":
        from lcsc.export.dcp import combine_dcp

        with passing("combine", "numbers") as progress:
            done = combine_dcp(bank, outputs, to, dtype=dtype, progress=progress)
    else:
        with passing("combine") as progress:
            done = combine_bank(
                bank,
                outputs,
                to,
                dtype=dtype,
                max_shard_size=settings["max_shard_size"] or MAX_SHARD_SIZE,
                rank=rank,
                command=shlex.join(["lcsc", "combine", *words]),
                progress=progress,
            )
    _say_written(done, to, time.perf_counter() - began, dtype, rank)


def _check_format(settings: Mapping[str, str | None]) -> None:
    """Raise ConfigError for no format, or one without a setting that is given."""
    format = need(settings, "format")
    if format not in FORMATS:
        raise ConfigError(f"no format named `{format}`.{did_you_mean(format, FORMATS)}")
    for key in ("max_shard_size", "rank") if format == "dcp" else ():
        if settings[key] is not None:
            raise ConfigError(f"`{key}` means nothing with format=dcp, which writes a file a process. Leave it out.")


def _schedule(settings: Mapping[str, str | None]) -> str:
    """The schedule, after checking that no setting of another schedule is given."""
    schedule = need(settings, "schedule")
    if schedule not in SCHEDULES:
        raise ConfigError(f"no schedule named `{schedule}`.{did_you_mean(schedule, SCHEDULES)}")
    own = SCHEDULES[schedule]
    foreign = set(SCHEDULES.values()) - {own} | ({"tracked"} if schedule != "power_ema" else set())
    for key in sorted(foreign):
        if settings[key] is not None:
            raise ConfigError(f"`{key}` means nothing with schedule={schedule}, which takes `{own}`. Leave it out.")
    return schedule


def _rank(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise ConfigError(f"`rank` is `{text}`; it must be a whole number.")
    return None if text is None else int(text)


def _values(settings: Mapping[str, str | None], schedule: str) -> list[tuple[str, float]]:
    """The values of the schedule's setting; none for a window that was left out, which means all checkpoints."""
    key = SCHEDULES[schedule]
    if settings[key] is None and key == "window":
        return []
    values = read_numbers(need(settings, key), key)
    if len({value for _, value in values}) < len(values):
        raise ConfigError(f"`{key}` is `{settings[key]}`, which holds a value twice. Give each once.")
    return values


def read_numbers(text: str, key: str) -> list[tuple[str, float]]:
    """Numbers from `1,2,3`; `0.05,0.10,...,0.25` stands for the arithmetic sequence from its first two numbers.

    Returns:
        Each number as written (or as the sequence gives it) and as a float.

    Raises:
        ConfigError: no numbers, or an end that the sequence does not reach.
    """
    found: list[Decimal] = []
    words = [word.strip() for word in text.split(",")]
    for i, word in enumerate(words):
        if word != "...":
            found.append(_decimal(word, key, text))
            continue
        if i + 1 == len(words) or len(found) < 2 or "..." in words[i - 2 : i]:
            raise ConfigError(f"`{key}` is `{text}`; `...` needs two numbers before it and the last one after it.")
        step, end = found[-1] - found[-2], _decimal(words[i + 1], key, text)
        count = (end - found[-1]) / step if step else Decimal(0)
        if count != int(count) or not 1 <= count <= MAX_OUTPUTS:
            raise ConfigError(
                f"`{key}` is `{text}`; steps of {step} from {found[-1]} do not reach {end} in 1 to {MAX_OUTPUTS} steps."
            )
        found += [found[-1] + step * j for j in range(1, int(count))]
    if len(found) > MAX_OUTPUTS:
        raise ConfigError(f"`{key}` has {len(found)} values; one pass makes at most {MAX_OUTPUTS} models.")
    return [(format(number, "f"), float(number)) for number in found]


def _decimal(word: str, key: str, text: str) -> Decimal:
    try:
        number = Decimal(word)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or abs(number.adjusted()) > 18:
        raise ConfigError(f"`{key}` is `{text}`; write numbers such as 0.05,0.1 or 0.05,0.10,...,0.25.")
    return number


# --------------------------------------------------------------------------------------------------- coefficients


def read_coefficients(text: str, bank: CheckpointBank) -> dict[str, list[float]]:
    """Coefficients by label, in row order, from numbers (`0.2,0.3,0.5`), a JSON file or a CSV file.

    JSON: a list, `{"coef": [...]}` (with `steps`, which must be the bank's), or `{label: [...], ...}`.
    CSV: a header with `step` (and `rate` where the bank has several) and one column for each output.

    Raises:
        ConfigError: not readable, or for other checkpoints than the bank's.
    """
    if not re.search(r"\.(json|csv)$", text, re.IGNORECASE):
        return {"coefficients": [value for _, value in read_numbers(text, "coef")]}
    path = Path(text)
    try:
        if not path.is_file() or path.stat().st_size > MAX_COEF:
            raise ConfigError(f"`coef` is `{text}`, which is no file of at most {MAX_COEF} bytes.")
        content = path.read_text(encoding="utf-8-sig")
        return _from_json(content, bank) if path.suffix.lower() == ".json" else _from_csv(content, bank)
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{error} The coefficients came from `{text}`.") from error
        raise ConfigError(
            f"`{text}` does not hold coefficients: {type(error).__name__}: {error}. Write a JSON list of numbers, or a "
            "CSV table with the columns step and coef."
        ) from error


def _from_json(content: str, bank: CheckpointBank) -> dict[str, list[float]]:
    value: Any = json.loads(content)
    if isinstance(value, dict) and "coef" in value:
        if "steps" in value and list(value["steps"]) != list(bank.steps):
            raise ConfigError(f"the steps are {value['steps']}, but the bank's are {list(bank.steps)}.")
        value = value["coef"]
    columns = value if isinstance(value, dict) else {"coefficients": value}
    return {_label(name): [_number(item) for item in numbers] for name, numbers in columns.items()}


def _from_csv(content: str, bank: CheckpointBank) -> dict[str, list[float]]:
    rows = list(csv.DictReader(content.splitlines()))
    names = [] if not rows else [name for name in rows[0] if name not in ("step", "rate")]
    if not names or "step" not in rows[0]:
        raise ConfigError("the table needs a header with `step` and one column for each output.")
    rates = bank.rates if "rate" in rows[0] else ()
    wanted = list(zip(bank.steps, rates or [None] * bank.num_checkpoints, strict=True))
    found = {(int(row["step"]), row["rate"] if rates else None): row for row in rows}
    if len(found) != len(rows) or set(found) != set(wanted):
        odd = sorted({key[0] for key in set(found) ^ set(wanted)})
        raise ConfigError(
            f"the table has {len(rows)} rows for {len(wanted)} checkpoints and differs from the bank at steps "
            f"{odd[:10]}. Give each step once, or choose the steps with start, stop, last."
        )
    return {_label(name): [_number(float(found[key][name])) for key in wanted] for name in names}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"`{value}` is no finite number.")
    return float(value)


def _label(name: str) -> str:
    """A column's name as the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_.=+-]{1,100}", name) or name.startswith("."):
        raise ConfigError(f"`{name}` cannot name a folder; use letters, digits and `_.=+-`.")
    return name


# ----------------------------------------------------------------------------------------------------------- words


def _say_bank(bank: CheckpointBank, rank: int | None) -> None:
    first, last = min(bank.steps), max(bank.steps)
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    print(
        f"bank: {bank.path} ({bank.num_checkpoints} checkpoints, {steps}, {bank.kind_text}, "
        f"{bank.layout.num_parameters:,} parameters)"
    )
    for note in bank.notes:
        if said := copied_at(bank, rank) if note == bank.copied else note:
            print(f"note: {said}")


def _say_output(output: Output) -> None:
    size = np.abs(output.coef_K)
    print(f"{output.label}: sum|c| {size.sum():.3g}, max|c| {size.max():.3g}", flush=True)
    if output.warning:
        print(f"warning: {output.warning}", flush=True)


def _say_written(done: Sequence[Written], to: Path, seconds: float, dtype: str, rank: int | None) -> None:
    lost = [written.rounding for written in done if written.rounding is not None]
    for written in done:
        if written.lost is not None:
            print(lora_text(rank, written.lost))
    if lost:
        what = "the checkpoints' own dtypes" if dtype == "same" else dtype
        share = f"{min(lost):.2%}" if len(lost) == 1 else f"{min(lost):.2%} to {max(lost):.2%}"
        print(f"rounded to {what}: this costs {share} of the distance from the last checkpoint")
    parents = [parent for written in done for parent in written.recipe["parents"]]
    for note in duplicates_note(parent for parent in parents if "content" in parent):
        print(f"note: {note}")
    nbytes = sum(written.nbytes for written in done)
    what = "model" if len(done) == 1 else f"{len(done)} models"
    print(f"{what}: {to} ({size_text(nbytes)}, {dtype}, {seconds:.1f} s)", flush=True)
