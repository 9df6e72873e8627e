"""What the fault tests counted, as docs/how_it_is_tested.md; `make test-faults` runs the tests and then this.

    LCSC_FAULT_COUNTS=build/faults pytest -m faults && python benchmarks/faults.py build/faults

The counts go to benchmarks/results/faults.json, and the page is written from that file alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "how_it_is_tested.md"

HEAD = """# How it is tested

Written by `make test-faults` from what its tests counted (`benchmarks/results/faults.json`); not by hand. The same
tests run at smaller counts in `make test`. A row says what was done to a search and what came of it. The search is a
small one without networks, through the real loop, journal, lock and run directory (`tests/fault/small_search.py`);
samples, models and reports are real where a row names them.

| fault | done | outcome | test |
|---|---|---|---|
"""

#: name of a count -> what was done, the numbers said of it, what came of it, and the test that counted.
ROWS = {
    "kill_loop": (
        "kill -9 of the driver at random times, then the same line",
        "{kills} kills in {runs} runs, {acknowledged} acknowledged evaluations",
        "{lost} lost, {double} computed twice, {different} journals that differ from an unbroken run's",
        "test_kill_loop.py",
    ),
    "every_write": (
        "every write, fsync, rename and new folder made to fail once",
        "{calls} calls",
        "{sentences} ended in one sentence, the others are decoration; {continued} continued to the same bytes",
        "test_every_write.py",
    ),
    "every_late_write": (
        "the same in writing samples, model and summary after the last evaluation",
        "{calls} calls",
        "each left whole files or none, and continued to the same files; what safetensors writes is not among them",
        "test_every_write.py",
    ),
    "byte_flips": (
        "random bytes of the journal changed",
        "{flips} flips",
        "{noticed} noticed",
        "test_journal_damage.py",
    ),
    "truncations": (
        "the journal cut inside its last two records",
        "{cuts} cuts",
        "all continued to the same bytes",
        "test_journal_damage.py",
    ),
    "starts_plain": (
        "simultaneous starts of one line",
        "{starts} starts in {rounds} rounds",
        "{winners} winners, one a round; one run directory a round",
        "test_starts.py",
    ),
    "starts_no_flock": (
        "the same without the kernel's file locks",
        "{starts} starts in {rounds} rounds",
        "{winners} winners",
        "test_starts.py",
    ),
    "starts_stale": (
        "the same beside locks that killed processes left",
        "{starts} starts in {rounds} rounds",
        "{winners} winners",
        "test_starts.py",
    ),
    "disk_full": (
        "a file system that fills up",
        "{stages} stages",
        "each a sentence, then the same bytes",
        "test_disk_full.py",
    ),
    "disk_limit": (
        "a file that may not grow",
        "{stages} stages",
        "each a sentence, then the same bytes",
        "test_disk_full.py",
    ),
    "places": (
        "checkpoints and home marked read-only; names of unicode, spaces, quotes and newlines",
        "{searches} searches as {user}",
        "inputs unchanged; outside of the run only matplotlib's list of fonts, in the home",
        "test_places.py",
    ),
    "one_journal": (
        "the digits search, in batches, inline and by two workers of local, ray and slurm (submitit on this machine)",
        "{engines} runs of {records} records",
        "one journal, SHA-256 {digest}...; the same best candidate",
        "engines/test_one_journal.py",
    ),
}


def rows_of(counts: dict[str, dict[str, int | str]]) -> list[str]:
    """The lines of the table."""
    rows = []
    for name, (fault, done, outcome, test) in ROWS.items():
        if name in counts:
            shown = {key: num if isinstance(num, str) else f"{num:,}" for key, num in counts[name].items()}
            place = test if "/" in test else f"fault/{test}"
            rows.append(f"| {fault} | {done.format(**shown)} | {outcome.format(**shown)} | `tests/{place}` |")
    bad = [count for name, count in counts.items() if name.startswith("bad_results_")]
    if bad:
        trials, failed = sum(count["trials"] for count in bad), sum(count["failed"] for count in bad)
        done = f"{bad[0]['results']} results, {len(bad)} searchers, {trials:,} trials"
        outcome = f"{failed:,} failures with a reason, none the winner"
        rows.append(f"| a user's function returns nonsense | {done} | {outcome} | `tests/fault/test_bad_results.py` |")
    killed = [count for name, count in counts.items() if name.startswith("pipeline_")]
    if killed:
        strategies = sorted({count["strategy"] for count in killed})
        kills, tensors, different = (sum(count[key] for count in killed) for key in ("kills", "tensors", "different"))
        done = f"{kills:,} kills in {len(killed)} trainings of a pipeline ({', '.join(strategies)})"
        outcome = f"{different:,} of {tensors:,} tensors differ from one process that lost the same stages, or none"
        fault = "kill -9 of a pipeline's processes at random times, replaced while it trains"
        rows.append(f"| {fault} | {done} | {outcome} | `tests/fault/test_pipeline_kill.py` |")
    return rows


def page(results: dict) -> str:
    """The page that a results file makes."""
    made = results["circumstances"]
    when = "in part before commit" if results["older"] else "at commit"
    under = f"\nCounted on {made['machine']}, Python {made['python']}, {when} {made['commit'][:12]}.\n"
    return HEAD + "\n".join(rows_of(results["counts"])) + "\n" + under


def main() -> None:
    """Gather, print, write."""
    folder = Path(sys.argv[1])
    counts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not counts:
        sys.exit(f"`{folder}` holds no counts; run the tests with LCSC_FAULT_COUNTS={folder}")
    head = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True).stdout
    older = min(path.stat().st_mtime for path in folder.glob("*.json")) < float(head or 0)
    results = {"circumstances": circumstances(), "older": older, "counts": counts}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(page(results))
    print("\n".join(rows_of(counts)))


if __name__ == "__main__":
    main()
