"""The part of combine.py that happens in memory: contenders in one process, in turn, round by round."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import spread

COLUMNS = 2**20


def measure_memory(path: Path, coef: np.ndarray, rounds: int) -> dict:
    """Seconds of one candidate by every contender, and the ratios that the README claims."""
    import torch

    from lcsc.bank import CheckpointBank

    torch.set_num_threads(max(1, torch.get_num_threads()))
    bank = CheckpointBank.open(path, storage="resident")
    half = CheckpointBank.open(path, storage="resident", dtype="bfloat16")
    delta = CheckpointBank.open(path, storage="delta")
    W_KP = bank.matrix()
    out_P, out_8P = torch.empty(W_KP.shape[1]), torch.empty(8, W_KP.shape[1])
    rng = np.random.default_rng(0)
    signed = rng.normal(0, 1, (8, len(coef)))
    signed += (1 - signed.sum(1, keepdims=True)) / len(coef)  # sum one by additive projection
    dense = torch.from_numpy(signed)
    groups = _groups(bank)
    work: dict[str, Callable[[], object]] = {
        **_reading(W_KP),
        "lcsc": lambda: bank.combine(dense[0], out=out_P),
        "lcsc_unchecked": lambda: _unchecked(dense[0], W_KP, out_P),
        "lcsc_bf16": lambda: half.combine(dense[0], out=out_P),
        "lcsc_delta": lambda: delta.combine(dense[0], out=out_P),
        "lcsc_8_candidates": lambda: bank.combine(dense, out=out_8P),
        "lcsc_groups": lambda: bank.combine(dense[: groups.num_groups], groups=groups, out=out_P),
        "lcsc_project": lambda: bank.project(out_P),
        **_peers(bank, dense[0]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            if number:  # the first round compiles and touches the memory
                seconds[name].append(time.perf_counter() - began)
    return _summary(seconds, W_KP.nbytes) | _errors(bank, half, delta, signed[0])


def _groups(bank: object) -> object:
    """Eight layer groups of neighbouring tensors."""
    from lcsc.kernels import Groups

    starts = [entry.start for entry in bank.layout.entries]
    ids = tuple(8 * k // len(starts) for k in range(len(starts)))
    return Groups((*starts, bank.layout.num_parameters), ids, 8)


def _unchecked(coef: object, W_KP: object, out_P: object) -> object:
    from lcsc.kernels import combine

    return combine(coef, W_KP, out_BP=out_P, check=False)


def _reading(W_KP: object) -> dict[str, Callable[[], object]]:
    """Loops that only read the matrix; the fastest is what the machine can do."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    flat = W_KP.view(-1)
    parts = flat.view(torch.int32).numpy()
    cuts = np.array_split(np.arange(0, len(parts), 2**16), torch.get_num_threads())
    pool = ThreadPoolExecutor(len(cuts))

    def best(starts: np.ndarray) -> int:
        return max(int(np.bitwise_or.reduce(parts[a : a + 2**16])) for a in starts)

    return {
        "read_numpy_or": lambda: list(pool.map(best, cuts)),
        "read_torch_sum": lambda: flat.sum(),
        "read_torch_max": lambda: flat.max(),
        "read_torch_mv": lambda: torch.mv(W_KP, torch.ones(W_KP.shape[1])),
    }


def _peers(bank: object, coef: object) -> dict[str, Callable[[], object]]:
    """What people use today, one candidate from checkpoints in memory."""
    import torch
    from diffusers.training_utils import EMAModel
    from torch.optim.swa_utils import AveragedModel

    W_KP = bank.matrix()
    states = [bank.layout.views(row_P) for row_P in W_KP]
    numbers = coef.tolist()

    def state_dicts() -> dict:
        return {name: sum(c * state[name] for c, state in zip(numbers, states, strict=True)) for name in states[0]}

    def in_place() -> object:
        total = W_KP[0] * numbers[0]
        for number, row_P in zip(numbers[1:], W_KP[1:], strict=True):
            total.add_(row_P, alpha=number)
        return total

    class Net(torch.nn.Module):
        def __init__(self, state: dict) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in state.values()])

    nets = [Net(state) for state in states]

    def swa() -> object:
        averaged = AveragedModel(copy.deepcopy(nets[0]), multi_avg_fn=_swa_step)
        for net in nets:
            averaged.update_parameters(net)
        return averaged

    def ema() -> object:
        model = EMAModel(nets[0].parameters(), decay=0.9, foreach=True)
        for net in nets[1:]:
            model.step(net.parameters())
        return model

    return {
        "torch_state_dicts": state_dicts,
        "torch_in_place": in_place,
        "torch_mv": lambda: torch.mv(W_KP.T, coef.float()),
        "swa_utils": swa,
        "diffusers_ema": ema,
    }


def _swa_step(averaged: list, current: list, count: int) -> None:
    import torch

    torch._foreach_lerp_(averaged, current, 1 / (int(count) + 1))


def _summary(seconds: dict[str, list[float]], nbytes: int) -> dict:
    def ratio(a: str, b: str) -> dict:
        return spread([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])

    reading = [min(values) for values in zip(*(v for k, v in seconds.items() if k.startswith("read_")), strict=True)]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "read_bandwidth_gb_per_s": spread([nbytes / 1e9 / value for value in reading]),
        "lcsc_of_read_bandwidth": spread([r / s for r, s in zip(reading, seconds["lcsc"], strict=True)]),
        "fp32_over_bf16": ratio("lcsc", "lcsc_bf16"),
        "fp32_over_delta": ratio("lcsc", "lcsc_delta"),
        "eight_over_one": ratio("lcsc_8_candidates", "lcsc"),
        "groups_over_one": ratio("lcsc_groups", "lcsc"),
        "checked_over_unchecked": ratio("lcsc", "lcsc_unchecked"),
        **{
            f"{name}_over_lcsc": ratio(name, "lcsc")
            for name in seconds
            if name.startswith(("torch", "swa", "diffusers"))
        },
    }


def _errors(bank: object, half: object, delta: object, coef: np.ndarray) -> dict:
    """Root mean square error of each storage as a share of the distance between candidate and last checkpoint."""
    import torch

    total = dict.fromkeys(("fp32", "bf16", "delta", "torch_mv"), 0.0)
    step = 0.0
    outs = {
        name: b.combine(torch.from_numpy(coef)).numpy() for name, b in zip(total, (bank, half, delta), strict=False)
    }
    W_KP = bank.matrix()
    outs["torch_mv"] = torch.mv(W_KP.T, torch.from_numpy(coef).float()).numpy()
    for start in range(0, W_KP.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        exact = coef @ W_KP[:, part].double().numpy()
        step += float(((exact - W_KP[-1, part].numpy()) ** 2).sum())
        for name, out in outs.items():
            total[name] += float(((out[part] - exact) ** 2).sum())
    return {"error_of_merge_step": {name: (value / step) ** 0.5 for name, value in total.items()}}
