"""Evaluations on a real Ray: the journal of one process, and nothing lost or counted twice when processes die."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import pytest
from helpers_ray import calls, enter, everything, ray_processes, site_of
from safetensors.torch import load_file, save_file

from lcsc.core import registry
from lcsc.core.errors import ConfigError, LcscError, MissingExtraError
from lcsc.core.seeds import Purpose
from lcsc.search.engines import ray as engine_file
from lcsc.search.engines.ray import Ray
from lcsc.search.engines.ray_cluster import Cluster
from lcsc.search.job import Job
from lcsc.search.run import run_search


@pytest.fixture(scope="module")
def local():
    """One Ray of our own for the module; crews find it in use, and leave it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        cluster = Cluster(ray, None, 2)
        children = psutil.Process().children(recursive=True)
        assert cluster.own
        assert len(ray_processes(cluster._temp)) >= 3
        yield cluster
        cluster.leave()
    assert not ray.is_initialized()
    assert not Path(cluster._temp).exists()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own folder with the toy's checkpoints and the faulty objective."""
    enter(tmp_path, monkeypatch)
    return tmp_path


def test_the_journal_is_that_of_one_process_although_a_worker_is_killed(local, here, capfd):
    problem = site_of(here).problem
    inline = run_search(problem, name="toy", run_dir=here / "inline", quiet=True)
    Path("calls").unlink()
    Path("once-0").touch()  # the first evaluation kills its process
    remote = run_search(problem, name="toy", run_dir=here / "ray", quiet=True, engine=Ray())
    assert not Path("once-0").exists()
    assert (inline / "journal.jsonl").read_bytes() == (remote / "journal.jsonl").read_bytes()
    assert json.loads((remote / "summary.json").read_text())["num_trials"] == 6
    pids = {pid for _, pid in calls()} - {os.getpid()}  # the export scores here
    assert 2 <= len(pids) <= 3
    assert capfd.readouterr().out == ""  # Ray would say there that a worker died


@pytest.mark.faults
def test_a_worker_without_the_banks_path_gets_the_bank_also_of_float64(local, here, monkeypatch):
    def elsewhere(site):
        return {**engine_file_order(site), "cwd": str(here / "not" / "here")}

    for file in Path("banks").rglob("*.safetensors"):
        save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    engine_file_order = engine_file.order
    site = site_of(here, "bank.every=2")
    size = site.problem.space().size
    monkeypatch.setattr(engine_file, "order", elsewhere)
    one = {0: Job("score", (0.1,) * size, Purpose.SEARCH, (0, 64)).named("run", "0")}
    with (
        pytest.raises(LcscError, match="no Ray worker can work: .*banks/toy_gaussian"),
        Ray(num_workers=1, bank="path").start(site) as crew,
    ):
        everything(crew, one)
    with Ray(num_workers=2).start(site) as crew:  # auto
        found = everything(crew, one)
        copies = {member.told["file"] for member in crew._members if member.told}
        assert len(copies) == 1
        (copy,) = copies
        assert str(copy).startswith(local._temp)
        assert copy.is_file()
    wanted = registry.build("engine", "inline").start(site)
    wanted.submit(one[0])
    assert found[0].row == wanted.collect()[0].row


def test_settings_and_a_missing_ray_are_said_in_a_sentence(here, monkeypatch):
    for wrong, said in [
        ({"num_workers": 0}, "`engine.num_workers` is 0; it must be at least 1"),
        ({"max_restarts": -2}, "`engine.max_restarts` is -2; it must be at least -1"),
        ({"timeout_seconds": 0.0}, "`engine.timeout_seconds` is 0.0; it must be above 0"),
        ({"bank": "shop"}, "`engine.bank` is `shop`; it must be one of auto, path, store"),
    ]:
        with pytest.raises(ConfigError, match=said):
            registry.build("engine", "ray", **wrong)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"install it with `pip install 'lcsc\[ray\]'`"):
        Ray().start(site_of(here))


def test_a_worker_that_fits_nowhere_is_refused(local, here):
    with pytest.raises(ConfigError, match="no node has room for a worker of 64 CPUs and 0 GPUs; the largest has"):
        Ray(cpus_per_worker=64).start(site_of(here))
