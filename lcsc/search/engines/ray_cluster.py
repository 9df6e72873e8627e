"""A Ray cluster that is joined, or started for one search and stopped behind it."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from lcsc.core.errors import ConfigError

#: For a Ray of our own: no statistics to its makers, nor for a dashboard that is not there.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
#: Seconds that a small errand on another node may take: a process has to start for it.
ERRAND = 60.0
#: Times that Ray is started, where it gives up because the machine is busy: it waits for itself no longer than 30 s.
STARTS = 3


class Cluster:
    """The Ray that is worked with.

    Args:
        ray: the module.
        address: `auto` or host:port of a cluster to join, None for one of our own; a Ray that this process uses
            already is used, and left as it is.
        num_cpus: processors that one of our own shall offer at least, whatever the machine has.

    Raises:
        ConfigError: it cannot be joined or started.
    """

    def __init__(self, ray: Any, address: str | None, num_cpus: int) -> None:
        self.ray, self._print = ray, None
        self._temp: str | None = None
        self._joined = not ray.is_initialized()
        if not self._joined:
            used = ray.get_runtime_context().gcs_address
            if address not in (None, "auto", used):
                raise ConfigError(
                    f"`engine.address` is `{address}`, and this process uses the Ray at `{used}` already. Leave out "
                    "`engine.address`, or call `ray.shutdown()` before."
                )
            return
        where = self._start(num_cpus) if address is None else {"address": address}
        for _ in range(STARTS):
            reason = self._join(where)
            if reason is None:
                return
            if "timed out" not in reason:
                break
        self.leave()
        how = "start here" if address is None else f"be joined at `{address}`"
        raise ConfigError(
            f"Ray cannot {how}: {reason} Set `engine.address` to null, `auto` or the host:port that `ray start --head` "
            "printed."
        )

    @property
    def own(self) -> bool:
        """Whether it ends with this search."""
        return self._temp is not None

    def room(self, need: Mapping[str, float]) -> tuple[int, dict[str, float]]:
        """Workers that the nodes have room for, were they idle, and the most of each resource that a node has."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(int(min(has.get(key, 0) // n for key, n in need.items() if n)) for has in nodes)
        return room, {key: max((has.get(key, 0) for has in nodes), default=0) for key in need}

    def errand(self, node: str, work: Callable[[Any], Any], argument: Any) -> Any:
        """What `work` gives on a node; None where the node is gone or slow."""
        there = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        task = self.ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        try:
            return self.ray.get(task.remote(argument), timeout=ERRAND)
        except self.ray.exceptions.RayError:
            return None

    def leave(self) -> None:
        """Disconnect; stop Ray if it is ours."""
        if self._joined:
            self.ray.shutdown()
        if self._print is not None:
            self.ray._private.worker.print_to_stdstream = self._print
        if self._temp is not None:
            kill_children(self._temp)
            shutil.rmtree(self._temp, ignore_errors=True)

    def _join(self, where: dict[str, Any]) -> str | None:
        """Why it did not work, or None."""
        before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
        reason = None
        if self.own:
            os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in before})
        try:
            self.ray.init(logging_level="ERROR", log_to_driver=False, **where)
        except Exception as error:  # Ray raises what it likes
            reason = " ".join(str(error).split())[:500]
        for key in ENVIRONMENT.keys() - before.keys():
            os.environ.pop(key, None)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own
        if reason is not None:
            self.ray.shutdown()
            if self._temp is not None:
                kill_children(self._temp)
            return reason
        # a thread of Ray's prints to standard output that workers died; what matters of that is said by us
        module = self.ray._private.worker
        self._print = getattr(module, "print_to_stdstream", None)
        module.print_to_stdstream = lambda *args, **kwargs: None
        return None

    def _start(self, num_cpus: int) -> dict[str, Any]:
        if "RAY_AUTH_MODE" not in os.environ:  # Ray wants a token, and would write one into the home directory
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # sockets lie below, and a socket's path has at most 107 bytes
        root = tempfile.gettempdir() if len(tempfile.gettempdir()) < 30 else "/tmp"
        self._temp = tempfile.mkdtemp(prefix="lcsc-ray-", dir=root)
        return {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(num_cpus, os.cpu_count() or 1),
            "_temp_dir": self._temp,
        }


def kill_children(temp: str) -> None:
    """End what was started in a folder and did not end by itself, as after a start that took too long."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(temp in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=ERRAND)
    if found:
        with warnings.catch_warnings():  # Ray forgets processes that it started in vain, and Python complains
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def last_words(path: str) -> str:
    """What a process wrote when it crashed; empty where it was killed."""
    file = Path(path)
    text = file.read_text() if file.is_file() else ""
    file.unlink(missing_ok=True)
    return text.strip().partition("\n")[0]
