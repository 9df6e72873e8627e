"""Combinations as folders of `torch.distributed.checkpoint`, each process its range of the parameters."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lcsc.bank import CheckpointBank
from lcsc.core.errors import BankError, ConfigError, LcscError
from lcsc.core.files import new_directory, write_json, writing
from lcsc.export.dcp_plan import Planner, Writer, boxes_of
from lcsc.export.folder import CSV, Model, coefficients_csv, make_recipe, used_rows
from lcsc.export.oneshot import DTYPES, Output, Written, check_target, folders_of, made_of

RECIPE = "recipe.json"
_Result = TypeVar("_Result")
_Progress = Callable[[int, int], None]


def save_dcp(
    bank: CheckpointBank,
    coef: Sequence[float] | np.ndarray | Tensor,
    to: str | Path,
    *,
    dtype: str = "float32",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a combination as a new folder of `torch.distributed.checkpoint`.

    In a process group every process calls it and writes one file, its share of the parameters; without one this
    process writes all. Only plans are exchanged. `to` must be on a file system that all of them see. It appears when
    it is whole, with config.json as in the checkpoints, coefficients.csv and recipe.json, which names the checkpoints
    by their files; it has no digests of their contents, which nobody has read whole.

    Args:
        bank: the checkpoints; storage and device as for `BankPart`. With `streamed` 64 MiB of numbers are held at a
            time; with others their checkpoints' too.
        coef: shape (K,).
        to: a path that does not exist, outside the bank's folder.
        dtype: of the combined tensors: float32, bfloat16, float16, or `same` as in the last checkpoint.
        group: the processes; None takes all of them. Its backend must be able to send objects, as gloo and nccl do.

    Raises:
        ConfigError: wrong settings, or a folder that cannot be written.
        BankError: LoRA factors, or files that changed since they were opened.
        NonFiniteError: NaN or Inf in a checkpoint, or a number too large for `dtype`.
        EvaluationError: the combination is too large for float32.
        OutputExistsError: `to` exists. Each error is raised in every process.
    """
    coef_K = torch.as_tensor(coef, dtype=torch.float64).cpu().numpy()
    if coef_K.shape != (bank.num_checkpoints,) or not np.isfinite(coef_K).all():
        raise ConfigError(
            f"the coefficients have shape {coef_K.shape}; they must be finite, one for each of the bank's "
            f"{bank.num_checkpoints} checkpoints."
        )
    output = Output("coefficients", {"name": "coefficients"}, coef_K)
    combine_dcp(bank, [output], Path(to), dtype=dtype, group=group)


def combine_dcp(
    bank: CheckpointBank,
    outputs: Sequence[Output],
    to: Path,
    *,
    dtype: str = "float32",
    group: dist.ProcessGroup | None = None,
    progress: _Progress | None = None,
) -> list[Written]:
    """As `lcsc.export.oneshot.combine_bank`, but folders as `save_dcp` writes them, each in a pass of its own.

    Args:
        bank: as for `save_dcp`.
        outputs: what to make; one fills `to` itself, several fill `to/<label>`.
        to, dtype, group: as for `save_dcp`.
        progress: called with numbers made and numbers in all, of this process and one output.

    Raises:
        LcscError: as for `save_dcp`.
    """
    if bank.kind == "lora":
        raise BankError(
            f"`{bank.path}` holds LoRA adapters, which one small file takes. Combine them with `lcsc combine`, without "
            "format=dcp."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"`dtype` is `{dtype}`; it must be one of {', '.join(DTYPES)}.")
    model, (rank, world) = Model.of(bank, dtype), _place(group)
    nbytes = len(outputs) * sum(spec.nbytes for spec in model.specs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(to))
        _by_first(lambda: check_target(bank, to, nbytes), group)
        temp = _by_first(lambda: stack.enter_context(new_directory(to)), group)
        done = []
        for output, folder, path in zip(outputs, folders_of(temp, outputs), folders_of(to, outputs), strict=True):
            planner = Planner(bank, output.coef_K, boxes_of(bank, model, rank, world), progress)
            writer = Writer(folder, rank)
            with _plainly(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=world == 1)
            recipe, nbytes = _by_first(lambda o=output, f=folder: _finish(f, bank, model, o, dtype), group)
            done.append(Written(output, path, nbytes, recipe))
        _by_first(stack.close, group)
    return done


def _finish(
    folder: Path, bank: CheckpointBank, model: Model, output: Output, dtype: str
) -> tuple[Mapping[str, Any], int]:
    """Write what stands beside the numbers; returns the recipe and the bytes of the numbers' files."""
    parents, root = [], bank.path if bank.path.is_dir() else bank.path.parent
    for k in used_rows(bank, output.coef_K):
        row = bank.rows[k]
        files = {str(file.relative_to(root)): file.stat().st_size for file in row.files}
        parent = {"step": row.step, "files": files} if bank.origins is None else dict(bank.origins[k])
        parents.append({**parent, "rate": bank.rates[k]} if bank.rates else parent)
    recipe = make_recipe(bank, model, dtype=dtype, made=made_of(output), coef_K=output.coef_K, parents=parents)
    write_json(folder / RECIPE, recipe)
    (folder / CSV).write_text(coefficients_csv(recipe), encoding="utf-8")
    if model.config is not None:
        (folder / model.config_name).write_bytes(model.config)
    return recipe, sum(file.stat().st_size for file in folder.glob("*.distcp"))


# ------------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def torchrun_group() -> Iterator[bool]:
    """Inside, the processes that torchrun started are one group; yields whether this is the one that speaks.

    Raises:
        ConfigError: the environment speaks of several processes that do not find each other.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1" or dist.is_initialized():
        yield _place(None)[0] == 0
        return
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is `{world}`, but the processes do not find each other: {' '.join(str(error).split())[:200]} "
            "Start them with torchrun, or unset WORLD_SIZE."
        ) from error
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Number of this process in the group, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _by_first(work: Callable[[], _Result], group: dist.ProcessGroup | None) -> _Result:
    """What `work` gives in the first process, in all of them; its error is raised in all of them."""
    rank, world = _place(group)
    if world == 1:
        return work()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except (LcscError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, group=group, group_src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Raise the first of the errors that torch collected from the processes as what it is."""
    try:
        yield
    except CheckpointException as error:
        failures = [failed[0] for _, failed in sorted(error.failures.items())]
        if ours := [failure for failure in failures if isinstance(failure, LcscError | OSError)]:
            raise ours[0] from None
        raise
