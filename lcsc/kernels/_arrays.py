"""What the CPU kernels need around their loops: addresses of rows, scratch memory, threads. numpy only."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

CHUNK = 4096  #: columns handled at a time where rows are fetched ahead
CACHE = "SC_LEVEL2_CACHE_SIZE"
CACHE_BYTES = os.sysconf(CACHE) if CACHE in getattr(os, "sysconf_names", {}) else 0
SUM_BYTES = max(2**17, CACHE_BYTES // 4)  #: the sums of a chunk: a share of the second-level cache
THREAD_BYTES = 2**22  #: less work than this is done by the calling thread alone


def default_threads() -> int:
    """OMP_NUM_THREADS where it is a positive number, else the processors this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lcsc-kernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def spread(work: Callable[[int, int], Any], units: int, nbytes: int, threads: int | None) -> list[Any]:
    """`work(start, stop)` for ranges that make up [0, units), on several threads if there are bytes enough."""
    threads = threads or default_threads()
    if threads == 1 or nbytes < THREAD_BYTES or units < 2:
        return [work(0, units)]
    parts = threads if nbytes < 8 * threads * THREAD_BYTES else 4 * threads  # more, so that a busy core does less
    cuts = sorted({units * part // parts for part in range(parts + 1)})
    return list(_pool(threads).map(work, cuts[:-1], cuts[1:]))


def addresses(name: str, array_NC: np.ndarray, itemsize: int) -> np.ndarray:
    """Where each row begins, int64, shape (N,).

    Raises:
        ValueError: not numbers of `itemsize` bytes that lie next to each other.
    """
    N, C = array_NC.shape
    if array_NC.dtype.itemsize != itemsize or (N and C > 1 and array_NC.strides[1] != itemsize):
        raise ValueError(
            f"the rows of `{name}` must be contiguous numbers of {itemsize} bytes; "
            f"got {array_NC.dtype} with strides {array_NC.strides}."
        )
    return int(array_NC.__array_interface__["data"][0]) + np.arange(N, dtype=np.int64) * array_NC.strides[0]


def chunk_columns(B: int, columns: int, itemsize: int) -> int:
    """How many columns to handle at a time; the results do not depend on it. Whole steps of 32."""
    most = max(512, SUM_BYTES // (8 * B) // 512 * 512)
    return min(most if itemsize > 2 and B < 4 else min(CHUNK, most), -(-columns // 32) * 32)


def sums(B: int, columns: int, itemsize: int) -> np.ndarray:
    """Scratch for the sums of a chunk, float64, shape (B, chunk), on cache-line boundaries."""
    chunk = chunk_columns(B, columns, itemsize)
    flat = np.empty(B * chunk + 8)
    start = -(int(flat.__array_interface__["data"][0]) // 8) % 8
    return flat[start : start + B * chunk].reshape(B, chunk)


def segments(starts_S: Any, groups_S: Any, P: int, G: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments as int64 arrays of shapes (S + 1,) and (S,); one segment of group 0 when None.

    Raises:
        ValueError: they do not fill [0, P) in order, or name a group that is not in [0, G).
    """
    starts = np.array([0, P] if starts_S is None else starts_S, np.int64)
    groups = np.array([0] if groups_S is None else groups_S, np.int64)
    if len(starts) != len(groups) + 1 or starts[0] != 0 or starts[-1] != P or np.any(np.diff(starts) < 0):
        raise ValueError(f"segments from {starts.tolist()[:9]} for {len(groups)} groups do not fill {P} columns.")
    if np.any((groups < 0) | (groups >= G)):
        raise ValueError(f"the groups {sorted(set(groups.tolist()))[:9]} of the segments are not all in [0, {G}).")
    return starts, groups
