"""Real processes of one torch.distributed group, on the CPU."""

from __future__ import annotations

import multiprocessing
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def _rank(work, rank: int, world: int, meeting: str, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        work(rank, *args)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    dist.destroy_process_group()


def run_ranks(world: int, folder: Path, work, *args) -> None:
    """Call `work(rank, *args)` in `world` processes; all must end well."""
    context = multiprocessing.get_context("fork")  # torch is imported already; importing it again takes seconds
    meeting = str(folder / "meeting")
    processes = [context.Process(target=_rank, args=(work, rank, world, meeting, args)) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
