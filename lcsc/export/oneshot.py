"""Coefficients to model folders without a search: several outputs in one pass, out of core.

A model folder holds the weights (safetensors with the recipe in the header), config.json as in the parents,
coefficients.csv and a model card. M = outputs, K = checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.bank.extents import read_source
from lcsc.core.errors import ConfigError
from lcsc.core.files import free_bytes, new_directory, refuse_inside, writing
from lcsc.export.folder import (
    CSV,
    RECIPE_KEY,
    Model,
    coefficients_csv,
    make_metadata,
    make_recipe,
    model_card,
    used_rows,
)
from lcsc.export.lora import check_rank, combine_adapter, write_adapter
from lcsc.export.stream import ModelWriter, Spec, parse_size, plan_files
from lcsc.operators import posthoc, profiles

#: schedule -> the setting that makes its outputs, one each; `coef` gives the coefficients themselves
SCHEDULES = {"ema": "halflife", "power_ema": "sigma_rel", "uniform": "window", "wsm": "window", "coefficients": "coef"}
DTYPES = ("float32", "bfloat16", "float16", "same")


@dataclass(frozen=True)
class Output:
    """One model to make.

    Args:
        label: name of its folder where several are made.
        schedule: `{"name": ..., setting: value}`.
        coef_K: float64, one for each row of the bank.
        solved: condition number and residual of a post-hoc EMA, empty for others.
        warning: one sentence, None when all is well.
    """

    label: str
    schedule: Mapping[str, Any]
    coef_K: np.ndarray
    solved: Mapping[str, float] = field(default_factory=dict)
    warning: str | None = None


@dataclass(frozen=True)
class Written:
    """One model that was made.

    Args:
        output: what was asked for.
        path: its folder.
        nbytes: bytes of its weight files.
        recipe: what makes it again.
        rounding: rms rounding error over rms distance from the last checkpoint; None where nothing was rounded.
        lost: for LoRA adapters what their recompression lost, see `lcsc.bank.lora_modules.combine_modules`.
    """

    output: Output
    path: Path
    nbytes: int
    recipe: Mapping[str, Any]
    rounding: float | None = None
    lost: Mapping[str, Any] | None = None


def scheduled(
    bank: CheckpointBank,
    schedule: str,
    values: Sequence[tuple[str, float]],
    tracked: Sequence[float] | None = None,
) -> list[Output]:
    """Outputs of a schedule, one for each value of its setting.

    Args:
        bank: raw checkpoints, or EMAs of several rates (then `power_ema` reconstructs from the tracked ones).
        schedule: `ema`, `power_ema`, `uniform` or `wsm`.
        values: the setting's values as written (they name the folders) and as numbers.
        tracked: relative widths of the bank's EMAs, in the order of their rates; None where the rates are the widths.

    Raises:
        ConfigError: a value out of range, or a schedule that EMAs of several rates do not have.
    """
    key, steps, K = SCHEDULES[schedule], bank.steps, bank.num_checkpoints
    if bank.rates and schedule != "power_ema":
        raise ConfigError(
            f"schedule={schedule} averages the checkpoints of one run, and these are EMAs of several rates. "
            "Use schedule=power_ema or schedule=coefficients, or choose one rate with weights=ema:<rate>."
        )
    widths = tracked_widths(bank, tracked) if schedule == "power_ema" else {}
    outputs = []
    for text, value in values:
        setting: dict[str, Any] = {"name": schedule, key: value}
        label = f"{schedule}-{key}-{text}"
        if widths:
            found = posthoc.reconstruct(steps, [widths[rate] for rate in bank.rates], sigma_rel=value)
            setting["tracked"] = widths
            solved = {"condition": found.condition, "residual": found.residual}
            outputs.append(Output(label, setting, found.coef_K, solved, found.warning))
            continue
        if key == "window":
            setting[key] = window = _window(value)
            coef_K = (profiles.uniform if schedule == "uniform" else profiles.minus_sqrt)(K, window)
        else:
            coef_K = (profiles.ema if schedule == "ema" else profiles.power_ema)(steps, value)
        outputs.append(Output(label, setting, coef_K))
    return outputs


def _window(value: float) -> int:
    if value != int(value):
        raise ConfigError(f"`window` is {value}; it counts checkpoints, so it must be a whole number.")
    return int(value)


def given(bank: CheckpointBank, columns: Mapping[str, Sequence[float]]) -> list[Output]:
    """Outputs from coefficients by label.

    Raises:
        ConfigError: not one finite coefficient for each checkpoint, or a sum that is not one.
    """
    outputs = []
    for label, numbers in columns.items():
        coef_K = np.asarray(numbers, np.float64)
        if len(coef_K) != bank.num_checkpoints:
            raise ConfigError(
                f"`coef` has {len(coef_K)} coefficients for {bank.num_checkpoints} checkpoints (steps "
                f"{min(bank.steps)} to {max(bank.steps)}). Give one each, in the bank's order, or choose checkpoints "
                "with start, stop, every, last."
            )
        if not np.isfinite(coef_K).all() or not abs(coef_K.sum() - 1) < 1e-6:
            raise ConfigError(
                f"the coefficients of `{label}` sum to {coef_K.sum():.9g}; they must be finite with sum 1, or the "
                "weights would be scaled. Add the difference to one of them."
            )
        outputs.append(Output(label, {"name": "coefficients"}, coef_K))
    return outputs


def tracked_widths(bank: CheckpointBank, tracked: Sequence[float] | None = None) -> dict[str, float]:
    """EMA rate -> relative width where the bank holds several rates, else empty.

    Raises:
        ConfigError: the rates are no relative widths of power-function EMAs, or `tracked` does not fit them.
    """
    rates = sorted(set(bank.rates), key=_order)
    if not rates:
        if tracked is not None:
            raise ConfigError("`tracked` means nothing here: the bank does not hold EMAs of several rates.")
        return {}
    said = ", ".join(rates)
    if tracked is not None and len(tracked) != len(rates):
        raise ConfigError(f"`tracked` has {len(tracked)} widths for the {len(rates)} EMAs {said}. Give one each.")
    try:
        widths = dict(zip(rates, tracked or [float(rate) for rate in rates], strict=True))
    except ValueError:
        widths = dict.fromkeys(rates, 0.0)
    if not all(0 < width < 12**-0.5 for width in widths.values()):
        raise ConfigError(
            f"the EMAs {said} have no relative widths between 0 and 0.289, so their profiles are not known. Give the "
            "widths they were tracked with as tracked=0.05,0.1, or choose one EMA with weights=ema:<rate>."
        )
    return widths


def _order(rate: str) -> tuple[float, str]:
    try:
        return float(rate), rate
    except ValueError:
        return float("inf"), rate


def combine_bank(
    bank: CheckpointBank,
    outputs: Sequence[Output],
    to: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    rank: int | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Write every output in one pass over the bank; all folders appear at once, or none.

    Args:
        bank: opened with `storage="streamed"`.
        outputs: what to make; one fills `to` itself, several fill `to/<label>`.
        to: a path that does not exist, outside the bank's folder.
        dtype: of the combined tensors: float32, bfloat16, float16, or `same` as in the last checkpoint.
        max_shard_size: size above which several files and an index are written.
        rank: rank of combined LoRA adapters, None to keep theirs; for LoRA banks only.
        command: the line that asked for it, for the model card.
        progress: called with bytes read and bytes in all.

    Raises:
        ConfigError: wrong settings, or a disk without room; nothing is written.
        BankError: the files changed, or hold NaN or Inf; nothing is left behind.
        OutputExistsError: `to` exists.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"`dtype` is `{dtype}`; it must be one of {', '.join(DTYPES)}.")
    max_shard_bytes = parse_size(max_shard_size)
    check_rank(rank, bank.kind)
    if bank.kind == "lora":
        return _combine_adapters(bank, outputs, to, dtype=dtype, rank=rank, command=command)
    model = Model.of(bank, dtype)
    check_target(bank, to, len(outputs) * sum(spec.nbytes for spec in model.specs))
    files = plan_files(model.specs, model.stem, max_shard_bytes)
    with writing(to), new_directory(to) as temp:
        folders = folders_of(temp, outputs)
        done = _write_models(bank, outputs, folders, model, files, dtype=dtype, progress=progress)
        for written in done:
            _write_texts(written, model, to.name, command)
    return [dataclasses.replace(w, path=path) for w, path in zip(done, folders_of(to, outputs), strict=True)]


def _write_models(
    bank: CheckpointBank,
    outputs: Sequence[Output],
    folders: Sequence[Path],
    model: Model,
    files: Mapping[str, Sequence[Spec]],
    *,
    dtype: str,
    progress: Callable[[int, int], None] | None,
) -> list[Written]:
    """The weight files of all outputs, filled in one pass."""
    used = sorted({k for output in outputs for k in used_rows(bank, output.coef_K)})
    # a packed bank knows its origins; those of others are at hand after the pass
    parents = {k: bank.parent(k) for k in used} if bank.path.is_file() else {}
    rough = [_metadata(bank, model, output, dtype, parents) for output in outputs]
    with contextlib.ExitStack() as stack:
        writers = []
        for folder, metadata in zip(folders, rough, strict=True):
            folder.mkdir(exist_ok=True)
            writers.append(ModelWriter(folder, files, bank.layout, bank.layout.ties, metadata))
            stack.callback(writers[-1].close)
        half = any(dtype in ("bfloat16", "float16") for dtype in model.dtypes(bank))
        rounding = _pour(bank, outputs, writers, half=half, progress=progress)
        for name, (paths, source) in bank.constant_sources().items():
            bits = read_source(paths, source, bank.rows[-1].base)
            for writer in writers:
                writer.put_raw(name, bits)
        parents = parents or {k: bank.parent(k) for k in used}
        done = []
        for output, folder, writer, lost in zip(outputs, folders, writers, rounding, strict=True):
            metadata = _metadata(bank, model, output, dtype, parents)
            writer.finish(metadata)
            done.append(Written(output, folder, writer.nbytes, json.loads(metadata[RECIPE_KEY]), lost))
    return done


def _combine_adapters(
    bank: CheckpointBank, outputs: Sequence[Output], to: Path, *, dtype: str, rank: int | None, command: str
) -> list[Written]:
    """LoRA adapters: the combination of their updates, which fits in memory."""
    check_target(bank, to, 0)
    adapters = [combine_adapter(bank, output.coef_K, rank, dtype) for output in outputs]
    parents = {k: bank.parent(k) for output in outputs for k in used_rows(bank, output.coef_K)}
    done = []
    with writing(to), new_directory(to) as temp:
        rows = zip(outputs, adapters, folders_of(temp, outputs), folders_of(to, outputs), strict=True)
        for output, adapter, folder, path in rows:
            folder.mkdir(exist_ok=True)
            model, made = adapter.model, {"operator": "lora", **adapter.made}
            metadata = _metadata(bank, model, output, dtype, parents, made) | adapter.files.header
            nbytes = write_adapter(folder, adapter, model, metadata)
            written = Written(output, folder, nbytes, json.loads(metadata[RECIPE_KEY]), lost=adapter.made["error"])
            _write_texts(written, model, to.name, command)
            done.append(dataclasses.replace(written, path=path))
    return done


def folders_of(root: Path, outputs: Sequence[Output]) -> list[Path]:
    """The folder of each output: `root` itself where there is one."""
    return [root / output.label if len(outputs) > 1 else root for output in outputs]


def _write_texts(written: Written, model: Model, name: str, command: str) -> None:
    folder, recipe = written.path, written.recipe
    if model.config is not None:
        (folder / model.config_name).write_bytes(model.config)
    (folder / CSV).write_text(coefficients_csv(recipe), encoding="utf-8")
    (folder / "README.md").write_text(model_card(name, recipe, model.library, command), encoding="utf-8")


def _metadata(
    bank: CheckpointBank,
    model: Model,
    output: Output,
    dtype: str,
    parents: Mapping[int, Mapping[str, Any]],
    more: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The header's metadata; where a parent is not known yet, with something at least as long in its place."""
    origins = []
    for k in used_rows(bank, output.coef_K):
        row = bank.rows[k]
        # a digest has 64 characters, and paths below the bank are shorter than these
        origin = parents.get(k) or {
            "step": row.step,
            "files": {str(file): file.stat().st_size for file in row.files},
            "content": "0" * 64,
        }
        origins.append({**origin, "rate": bank.rates[k]} if bank.rates else dict(origin))
    made = made_of(output) | dict(more or {})
    recipe = make_recipe(bank, model, dtype=dtype, made=made, coef_K=output.coef_K, parents=origins)
    return make_metadata(recipe, model, bank.layout.ties)


def made_of(output: Output) -> dict[str, Any]:
    """How an output's coefficients came about, for its recipe."""
    made: dict[str, Any] = {"schedule": dict(output.schedule)}
    if output.solved:
        made["solved"] = dict(output.solved)
    if output.warning:
        made["warning"] = output.warning
    return made


def check_target(bank: CheckpointBank, to: Path, nbytes: int) -> None:
    """Raise ConfigError where models of `nbytes` cannot be written to `to`."""
    refuse_inside(bank.path, to)
    if (free := free_bytes(to)) < nbytes:
        raise ConfigError(f"`{to}` needs {nbytes} bytes and its disk has {free} free. Make room, or write elsewhere.")


def _pour(
    bank: CheckpointBank,
    outputs: Sequence[Output],
    writers: Sequence[ModelWriter],
    *,
    half: bool,
    progress: Callable[[int, int], None] | None,
) -> list[float | None]:
    """Stream all outputs into their files; for half precision also the rounding's rms over the merge step's."""
    coef_MK = np.stack([output.coef_K for output in outputs])
    if half:  # the last checkpoint rides along, to measure how far the merge moved
        coef_MK = np.concatenate([coef_MK, profiles.one_hot(bank.num_checkpoints, bank.num_checkpoints - 1)[None]])
    lost, moved = np.zeros(len(outputs)), np.zeros(len(outputs))
    for start, out_MC in bank.stream(coef_MK, progress=progress):
        for m, writer in enumerate(writers):
            lost[m] += writer.put(start, out_MC[m])
            if half:
                step_C = out_MC[m] - out_MC[-1]
                moved[m] += np.vdot(step_C, step_C)
    return [float(np.sqrt(a / b)) if half and b > 0 else None for a, b in zip(lost, moved, strict=True)]
