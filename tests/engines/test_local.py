"""Evaluations in worker processes: real processes, real signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers_cli import TOY, start
from safetensors.torch import load_file, save_file

from lcsc.cli.train import train
from lcsc.config.hydra_app import compose_config
from lcsc.core.errors import ConfigError, LcscError
from lcsc.core.seeds import Purpose
from lcsc.search.budget import Budget
from lcsc.search.deaths import OomCounter
from lcsc.search.engines.base import Site
from lcsc.search.engines.local import THREADS, Local
from lcsc.search.frames import read_records
from lcsc.search.job import Job
from lcsc.search.packed_bank import share_bank
from lcsc.search.run import run_search
from lcsc.search.setup import build_problem, fingerprints, open_bank

#: Adapters need no network, so these workers start in a third of the time.
SCORER = """
import os, signal, sys, time

if os.environ.get("DIE"):
    sys.exit("no such library")


def score(model, *, seed, purpose, images):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return 1 + sum(float(tensor.double().square().sum()) for tensor in model.values())


def hang():
    os.system("sleep 1000 & setsid sleep 1001 & wait")


def leave():
    print("out of ideas", file=sys.stderr)
    os._exit(3)


FAULTS = [None, hang, os.abort, leave, lambda: os.kill(os.getpid(), signal.SIGSEGV)]
FAULTS.append(lambda: os.kill(os.getpid(), signal.SIGKILL))


def faulty(model, *, seed, purpose, images):
    if images.start:
        FAULTS[images.start]()
    return score(model, seed=seed, purpose=purpose, images=images)
"""

DRIVER = """
import json, sys
from pathlib import Path
from lcsc.search.engines.local import Local
from lcsc.search.run import run_search
from lcsc.search.setup import build_problem

config, engine = json.loads(sys.argv[1]), json.loads(sys.argv[2])
run_search(build_problem(config, trust=True), name="x", run_dir=Path("run"), engine=Local(**engine))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with three adapters, functions that score them, and a driver."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    torch.manual_seed(0)
    for step in (10, 20, 30):
        (folder := tmp_path / "bank" / f"checkpoint-{step}").mkdir(parents=True)
        tensors = {"0.lora_A.weight": torch.randn(1, 3), "0.lora_B.weight": torch.randn(2, 1)}
        save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (tmp_path / "scorers.py").write_text(SCORER)
    (tmp_path / "driver.py").write_text(DRIVER)
    yield tmp_path
    sys.modules.pop("scorers", None)
    assert left(tmp_path) == []


def left(folder):
    """What is alive in a folder ten seconds later at most, apart from this process."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.cwd() == str(folder):
                    found.append((process.pid, process.status(), process.cmdline()))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def workers():
    """Worker processes of this process, oldest first."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that was killed just now is a zombie
            if any("_local_child" in word for word in process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def configured(function="score", **search):
    """A search over the adapters, as plain values."""
    bank = {"path": "bank", "component": None, "weights": None, "start": None, "stop": None, "every": 1, "last": None}
    sizes = {"num_images": 1, "num_images_select": 1, "num_images_report": 1, "num_finalists": 2}
    return {
        "seed": 0,
        "bank": {**bank, "dtype": "float32", "storage": "auto", "device": "cpu"},
        "operator": {"name": "lora", "factors": True},
        "searcher": {"name": "random"},
        "objective": {"name": "function", "function": f"scorers:{function}", "device": "cpu"},
        "search": dataclasses.asdict(Budget(num_trials=12, **sizes, **search)),
    }


def searched(config, folder, engine=None):
    return run_search(build_problem(config, trust=True), name="x", run_dir=Path(folder), quiet=True, engine=engine)


def site(config, notes):
    problem = build_problem(config, trust=True)
    problem.bank.load()
    Path("run").mkdir()
    prints = json.loads(json.dumps(fingerprints(problem)))
    return Site(problem, config, prints, Path("run").resolve(), notes.append)


def job(number, fault=0):
    return Job("score", (0.1 * number, 0.2), Purpose.SEARCH, (fault, fault + 1), uid=f"{number:032x}")


def gathered(crew, number):
    """So many results of a crew, by the number of the job."""
    results = {}
    while len(results) < number:
        results |= {int(result.uid, 16): result for result in crew.collect()}
    return results


def killed_driver(config, engine, lines, **env):
    """Start a driver and kill it once its journal has so many lines."""
    words = [sys.executable, "driver.py", json.dumps(config), json.dumps(engine)]
    process = subprocess.Popen(words, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    journal = Path("run", "journal.jsonl")
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stdout.read().decode()
    process.stdout.close()


def uids(folder):
    return sorted(record["uid"] for record in read_records(Path(folder, "journal.jsonl"))[0] if "uid" in record)


@pytest.mark.faults
def test_a_killed_run_goes_on_with_fewer_workers_to_the_journal_of_one_process(here):
    config = configured(batch_size=4)
    killed_driver(config, {"num_workers": 2, "threads": 1}, 8, PAUSE="0.02")
    assert left(here) == []  # the workers went with their driver
    found = len(list(here.glob("run/work/results/*.json")))
    assert found  # evaluated, and most of it in the journal
    searched(config, "run", Local(num_workers=1, threads=1))
    searched(config, "whole")
    assert Path("run/journal.jsonl").read_bytes() == Path("whole/journal.jsonl").read_bytes()
    assert uids("run") == list(range(12))
    assert not Path("run/work").exists()
    assert workers() == []


@pytest.mark.faults
def test_a_slow_and_a_crashing_evaluation_cost_themselves_alone(here):
    notes = []
    with Local(num_workers=2, threads=1, timeout_seconds=1).start(site(configured("faulty"), notes)) as crew:
        assert crew.slots == 2
        for number, fault in enumerate([0, 1, 2, 0, 0]):
            crew.submit(job(number, fault))
        crew.submit(job(0))
        results = gathered(crew, 5)
        assert crew.slots == 2
    rows = {number: result.row for number, result in results.items()}
    assert [rows[number]["status"] for number in range(5)] == ["ok", "failed", "failed", "ok", "ok"]
    assert (rows[1]["cause"], rows[2]["cause"]) == ("timeout", "crashed")
    assert rows[1]["reason"] == "took longer than `engine.timeout_seconds`, 1 s, and was killed"
    assert rows[2]["reason"].startswith("the worker crashed with SIGABRT")
    assert results[1].seconds > 1
    (note,) = notes
    assert note.endswith("the worker crashed with SIGABRT; its evaluation is tried once more")
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1001"]]
    assert not Path("run/work").exists()


def test_an_evaluation_that_hangs_is_killed_though_nobody_set_a_limit(here, monkeypatch):
    monkeypatch.setattr("lcsc.search.patience.LEAST", 1.0)
    with Local(num_workers=1, threads=1).start(site(configured("faulty"), [])) as crew:
        for number, fault in enumerate([0, 0, 0, 0, 0, 1]):
            crew.submit(job(number, fault))
        results = gathered(crew, 6)
    assert [results[number].row["status"] for number in range(5)] == ["ok"] * 5
    assert (results[5].row["value"], results[5].row["cause"]) == (None, "timeout")
    assert results[5].row["reason"] == (
        "took longer than 1 s, 10 times what others of this run take or more, and was killed; "
        "`engine.timeout_seconds` sets another limit"
    )
    assert results[5].seconds > 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1001"]]


def test_settings_make_environments(monkeypatch):
    monkeypatch.setattr("lcsc.search.engines.local.visible_gpus", lambda: iter(()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [env["OMP_NUM_THREADS"] for env in Local().environments()] == ["1"] * 8
    assert [env[name] for env in Local(threads=3).environments() for name in THREADS] == ["3"] * 2 * len(THREADS)
    assert [env["MKL_NUM_THREADS"] for env in Local(num_workers=3).environments()] == ["2"] * 3
    assert [env["OMP_NUM_THREADS"] for env in Local(num_workers=9).environments()] == ["1"] * 9
    monkeypatch.setattr("lcsc.search.engines.local.visible_gpus", lambda: iter(["4", "7"]))
    assert [env["CUDA_VISIBLE_DEVICES"] for env in Local().environments()] == ["4", "7"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in Local(num_workers=3).environments()] == ["4", "7", "4"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in Local(devices=[1]).environments()] == ["1"]
    for wrong in ({"num_workers": 0}, {"threads": 0}, {"timeout_seconds": 0}, {"devices": []}):
        with pytest.raises(ConfigError, match=f"`engine.{next(iter(wrong))}` is"):
            Local(**wrong)


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("float64", "float32"), ("float32", "bfloat16")])
def test_a_shared_bank_is_the_bank(tmp_path, stored, dtype):
    (run := tmp_path / "run").mkdir()
    for step in (10, 20, 30, 40):
        torch.manual_seed(step)
        save_file({"a": torch.randn(5, 3, dtype=getattr(torch, stored))}, run / f"model-{step}.safetensors")
    selection = {"start": None, "stop": None, "every": 2, "last": None}
    how = {"dtype": dtype, "storage": "auto", "device": "cpu"}
    section = {"path": str(run), "component": None, "weights": None, **selection, **how}

    def opened(section):
        return open_bank({"bank": section})

    bank, notes, banks = opened(section), [], tmp_path / "banks"
    own, leave = share_bank(section, bank, banks, notes.append)
    found = opened(own)
    assert found.steps == bank.steps == (20, 40)
    assert found.digest == bank.digest
    assert torch.equal(found.matrix(), bank.matrix())
    assert share_bank(own, found, tmp_path / "absent", notes.append)[0] == own  # it can be mapped already
    other = opened({**section, "every": 1})
    owns, leave_other = share_bank(section, other, banks, notes.append)
    assert opened(owns).digest == other.digest != bank.digest
    assert notes == []
    assert len(list(banks.glob("*.safetensors"))) == 2
    leave()
    leave_other()
    assert not banks.exists()


# ------------------------------------------------------------------------------------------------- make test-faults


@pytest.mark.faults
def test_the_toy_gives_the_journal_of_inline(here):
    for folder, engine in (("one", ["engine=inline"]), ("two", ["engine=local", "engine.num_workers=2"])):
        words = ["search", *TOY, "search.batch_size=4", f"run_dir={folder}", *engine]
        words += ["engine.threads=1"] if folder == "two" else []
        process = start(*words, cwd=here, env={"OMP_NUM_THREADS": "1"})
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
    assert Path("one/journal.jsonl").read_bytes() == Path("two/journal.jsonl").read_bytes()


@pytest.mark.faults
def test_searches_and_sweeps_at_once_share_one_packed_bank(here):
    train(compose_config(TOY))
    for file in here.glob("banks/**/*.safetensors"):
        save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    common = [*TOY, "search.num_trials=8", "quiet=true", "engine=local", "engine.num_workers=2", "engine.threads=1"]
    lines = [["-m", *common, "seed=0,1"], [*common, "seed=2"]]
    processes = [start("search", *words, cwd=here, env={"OMP_NUM_THREADS": "1"}) for words in lines]
    seen, most = {}, 0
    while any(process.poll() is None for process in processes):
        found = list(here.glob("runs/.banks/lcsc-bank-*.safetensors"))
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                seen[path.stat().st_ino] = path
        most = max(most, len(found))
        time.sleep(0.01)
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0, out
    assert most == 1
    assert len(set(seen.values())) == 1
    assert not (here / "runs" / ".banks").exists()
    assert len(list(here.glob("runs/*/summary.json"))) == 3


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [1, 3])
def test_an_asynchronous_run_is_killed_twice_and_goes_on(here, num_workers):
    config = configured()
    killed_driver(config, {"num_workers": 3, "threads": 1}, 7, PAUSE="0.02")
    killed_driver(config, {"num_workers": 2, "threads": 1}, 11, PAUSE="0.02")
    searched(config, "run", Local(num_workers=num_workers, threads=1))
    assert uids("run") == list(range(12))
    before = Path("run/journal.jsonl").read_bytes()
    Path("run/summary.json").unlink()
    searched(config, "run")  # replayed, by one process
    assert Path("run/journal.jsonl").read_bytes() == before


@pytest.mark.faults
def test_each_worker_killed_in_turn_loses_nothing(here, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.3")
    notes = []
    with Local(num_workers=3, threads=1).start(site(configured("faulty"), notes)) as crew:
        for number in range(24):
            crew.submit(job(number))
        results, dead = {}, set()
        while len(results) < 24:
            results |= {int(result.uid, 16): result for result in crew.collect()}
            victims = [process for process in workers() if process.pid not in dead]
            # far enough apart that what one left is done: an evaluation that two workers die of has failed
            if len(dead) < 3 and victims and len(results) >= 3 + 7 * len(dead):
                victims[0].kill()
                dead.add(victims[0].pid)
        assert crew.slots == 3
    assert {number: result.row["status"] for number, result in results.items()} == dict.fromkeys(range(24), "ok")
    assert len(dead) == 3
    assert all("killed with SIGKILL; its evaluation is tried once more" in note for note in notes)


@pytest.mark.faults
def test_a_stopped_worker_and_other_ends(here):
    notes = []
    with Local(num_workers=1, threads=1, timeout_seconds=1.5).start(site(configured("faulty"), notes)) as crew:
        crew.submit(job(0))
        gathered(crew, 1)
        workers()[0].suspend()  # before it can begin
        crew.submit(job(1))
        assert gathered(crew, 1)[1].row["status"] == "ok"
        crew.submit(job(2, fault=1))
        crew.collect(timeout=0.5)
        workers()[0].suspend()  # amid its job
        assert gathered(crew, 1)[2].row["cause"] == "timeout"
        for number, fault in ((3, 3), (4, 4), (5, 5)):
            crew.submit(job(number, fault))
        rows = {number: result.row for number, result in gathered(crew, 3).items()}
    assert [rows[number]["cause"] for number in (3, 4, 5)] == ["crashed", "crashed", "killed"]
    assert rows[3]["reason"] == "the worker ended with exit code 3: out of ideas"
    assert rows[4]["reason"] == "the worker crashed with SIGSEGV"
    assert rows[5]["reason"] == "the worker was killed with SIGKILL"
    assert notes[0].endswith("no worker began it within 1.5 s; its evaluation is tried once more")


@pytest.mark.faults
def test_stopped_workers_go_with_their_driver(here):
    words = [sys.executable, "driver.py", json.dumps(configured()), json.dumps({"num_workers": 2, "threads": 1})]
    driver = psutil.Popen(words, env={**os.environ, "PAUSE": "1000"})
    while len(list(here.glob("run/work/local-*.log"))) < 2 or len(driver.children()) < 2:
        time.sleep(0.05)
    for worker in driver.children():
        while worker.num_threads() < 2:  # it listens
            time.sleep(0.05)
        worker.suspend()
    driver.kill()
    driver.wait()
    assert left(here) == []


@pytest.mark.faults
def test_two_deaths_for_lack_of_memory_take_one_worker_away(here, monkeypatch):
    monkeypatch.setattr(OomCounter, "rose", lambda self: True)
    notes = []
    with Local(num_workers=2, threads=1).start(site(configured("faulty"), notes)) as crew:
        for number, fault in enumerate([5, 0, 0, 5]):
            crew.submit(job(number, fault))
        rows = {number: result.row for number, result in gathered(crew, 4).items()}
        assert crew.slots == 1  # and never none
    assert [rows[number]["status"] for number in range(4)] == ["failed", "ok", "ok", "failed"]
    assert (rows[0]["cause"], rows[0]["reason"]) == ("oom", "the worker was killed by the system (out of memory)")
    said = "note: the system killed 2 workers for lack of memory; going on with 1"
    assert [note for note in notes if "lack of memory" in note] == [said]


@pytest.mark.faults
def test_workers_that_cannot_start_or_would_score_otherwise(here, monkeypatch):
    with monkeypatch.context() as patch:
        first = site(configured(), [])
        patch.setenv("DIE", "1")
        with Local(num_workers=2, threads=1).start(first) as crew, pytest.raises(LcscError, match="no such library"):
            gathered(crew, 1)
    (here / "scorers.py").write_text(SCORER + "\n# edited\n")
    with Local(num_workers=2, threads=1).start(first) as crew:
        crew.submit(job(0))
        with pytest.raises(LcscError, match="would score otherwise than the driver: `evaluator.detector_digest`"):
            gathered(crew, 1)


@pytest.mark.faults
def test_ctrl_c_in_the_terminal_leaves_nobody(here):
    words = [*TOY[:1], "search.num_trials=1000000", "search.num_images=64", "engine=local", "engine.num_workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lcsc", "search", *words], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not any(j.stat().st_size > 9000 for j in here.glob("runs/*/journal.jsonl")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "interrupted; the same line continues" in out
    assert "Traceback" not in out
    assert left(here) == []


@pytest.mark.faults
def test_three_workers_hold_one_bank(here):
    """A bank of 100 MB: what a worker has for itself does not grow by it."""
    from lcsc.models.gaussian import GaussianDenoiser
    from lcsc.models.network import save_network

    size = 1024
    for step in range(12):
        network = GaussianDenoiser(shape=[1, size, size])
        torch.nn.init.normal_(network.mean_CHW)
        save_network(network, here / "big" / f"checkpoint-{step}")
    (here / "scorers.py").write_text("def total(model, **circumstances):\n    return float(model.mean_CHW.sum())\n")
    config = configured()
    config["bank"]["path"] = "big"
    config["operator"], config["objective"]["function"] = {"name": "linear"}, "scorers:total"
    big, own = site(config, []), {}
    for num_workers in (1, 3):
        with Local(num_workers=num_workers, threads=1).start(big) as crew:
            seen, number = set(), 0
            while len(seen) < num_workers:  # all of them have read all rows
                crew.submit(dataclasses.replace(job(number), vector=(0.1,) * 11))
                seen |= {result.worker for result in crew.collect(timeout=0.1)}
                number += 1
            own[num_workers] = [process.memory_full_info().uss for process in workers()]
    bank_bytes = big.problem.bank.matrix().nbytes
    assert bank_bytes > 100e6
    assert max(own[3]) < own[1][0] - 0.8 * bank_bytes
