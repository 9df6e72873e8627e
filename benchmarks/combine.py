"""How fast and how exactly checkpoints are combined: lcsc, plain torch, swa_utils, EMAModel, mergekit, sd-mecha.

    python benchmarks/combine.py --work scratch/ [--peers PYTHON] [--to benchmarks/results/combine.json]

20 checkpoints of a 56 M parameter UNet2DModel in float32 (a random walk, so that neighbours are near). Two parts:

memory  one process holds the bank; contenders take turns, round by round; ratios are taken within a round
disk    each contender is a whole process from files on disk to a merged file on disk; the files are put out of the
        page cache before each (cold) or read once before (warm)

`--peers` is a Python in which mergekit and sd-mecha are installed; without it they are left out. Needs 12 GB of memory
and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from combine_memory import measure_memory
from machine import circumstances, spread

HERE = Path(__file__).parent
UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": [160, 320, 320, 320],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
NUM_CHECKPOINTS, STEP = 20, 1000
LAUNCH = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_rss": usage.ru_maxrss * 1024}))
sys.exit(status != 0)
"""


def make_bank(folder: Path) -> list[Path]:
    """The checkpoints, written by diffusers; kept from an earlier call."""
    import torch
    from diffusers import UNet2DModel

    places = [folder / f"checkpoint-{STEP * (k + 1)}" / "unet" for k in range(NUM_CHECKPOINTS)]
    if not all((place / "config.json").exists() for place in places):
        torch.manual_seed(0)
        net = UNet2DModel(**UNET)
        for place in places:
            with torch.no_grad():
                for tensor in net.parameters():
                    tensor.add_(torch.randn_like(tensor), alpha=0.05 * float(tensor.std() if tensor.numel() > 1 else 1))
            net.save_pretrained(place)
    return [place / "diffusion_pytorch_model.safetensors" for place in places]


def forget(files: list[Path]) -> None:
    """Put files out of the page cache."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def run(command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Wall seconds, processor seconds and peak resident bytes of one process and its children."""
    # started by a small process: a child's peak begins at the memory of the process that forked it
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *map(str, command)], capture_output=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr.decode()[-3000:]}")
    return json.loads(done.stdout)


def contenders(bank: Path, spec: Path, out: Path, peers: str | None) -> dict[str, tuple[list[str], Path]]:
    """Name -> command and the file or folder it writes."""
    script, mine = str(HERE / "peers.py"), sys.executable
    coef, loop, mecha = out / "coef.json", out / "loop.safetensors", out / "mecha.safetensors"
    ours = [mine, "-m", "lcsc", "combine", f"bank={bank}", "schedule=coefficients", f"coef={coef}"]
    rows = {
        "read": ([mine, script, "read", "-", str(spec)], out / "none"),
        "lcsc": ([*ours, f"to={out / 'lcsc'}"], out / "lcsc"),
        "torch_loop": (
            [mine, script, "torch_loop", str(loop), str(spec)],
            loop,
        ),
    }
    if peers:
        rows["sd_mecha"] = (
            [peers, script, "sd_mecha", str(mecha), str(spec)],
            mecha,
        )
        rows["mergekit"] = ([peers, script, "mergekit", str(out / "mergekit"), str(spec)], out / "mergekit")
    return rows


def measure_disk(files: list[Path], coef: np.ndarray, work: Path, peers: str | None, rounds: int) -> dict:
    """Whole processes, cold and warm, in turn; then the error of every merged file."""
    out = work / "out"
    out.mkdir(exist_ok=True)
    spec = out / "spec.json"
    spec.write_text(json.dumps({"files": [str(file) for file in files], "coef": coef.tolist()}))
    (out / "coef.json").write_text(json.dumps(coef.tolist()))
    rows = contenders(work / "bank", spec, out, peers)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    found: dict[str, dict[str, list]] = {kind: {name: [] for name in rows} for kind in ("cold", "warm")}
    for kind in found:
        for number in range(rounds + (kind == "warm")):
            for name, (command, target) in rows.items():
                subprocess.run(["rm", "-rf", target], check=True)
                if kind == "cold":
                    forget(files)
                result = run(command, env)
                if kind == "cold" or number:  # the first warm round fills the cache
                    found[kind][name].append(result)
                print(kind, name, {key: round(value, 2) for key, value in result.items()}, flush=True)
    errors = {name: error(files, coef, target) for name, (_, target) in rows.items() if name != "read"}
    return {
        "rounds": found,
        "error_of_merge_step": errors,
        **{kind: summary(times) for kind, times in found.items()},
    }


def summary(times: dict[str, list[dict]]) -> dict:
    """Spread of seconds, peak memory, and the ratios to reading and to the fastest peer, taken round by round."""
    seconds = {name: [row["seconds"] for row in rows] for name, rows in times.items()}
    others = [name for name in seconds if name not in ("read", "lcsc", "torch_loop")]
    result: dict = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "cpu_seconds": {name: spread([row["cpu_seconds"] for row in rows]) for name, rows in times.items()},
        "peak_rss": {name: max(row["peak_rss"] for row in rows) for name, rows in times.items()},
        "lcsc_over_read": spread([a / b for a, b in zip(seconds["lcsc"], seconds["read"], strict=True)]),
        "loop_over_lcsc": spread([a / b for a, b in zip(seconds["torch_loop"], seconds["lcsc"], strict=True)]),
    }
    if others:
        fastest = [min(values) for values in zip(*(seconds[name] for name in others), strict=True)]
        result["fastest_peer_over_lcsc"] = spread([a / b for a, b in zip(fastest, seconds["lcsc"], strict=True)])
    return result


def error(files: list[Path], coef: np.ndarray, target: Path) -> float:
    """Root mean square error against the float64 sum, as a share of the merge's distance from the last checkpoint."""
    from safetensors import safe_open

    path = target if target.is_file() else next(target.glob("*.safetensors"))
    wrong = step = 0.0
    handles = [safe_open(file, framework="np") for file in files]
    with safe_open(path, framework="np") as merged:
        for name in handles[0].keys():  # noqa: SIM118 - safe_open is no mapping
            rows = [handle.get_tensor(name) for handle in handles]
            exact = sum(number * row.astype(np.float64) for number, row in zip(coef, rows, strict=True))
            wrong += float(((merged.get_tensor(name) - exact) ** 2).sum())
            step += float(((exact - rows[-1]) ** 2).sum())
    return (wrong / step) ** 0.5


def main() -> None:
    """Measure both parts; the results file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["memory", "disk"])
    parser.add_argument("--to", type=Path, default=HERE / "results" / "combine.json")
    options = parser.parse_args()
    files = make_bank(options.work / "bank")
    steps = [STEP * (k + 1) for k in range(NUM_CHECKPOINTS)]
    from lcsc.operators.profiles import ema

    coef = ema(steps, 4 * STEP)
    result = json.loads(options.to.read_text()) if options.to.exists() else {}
    result |= circumstances() | {"checkpoints": NUM_CHECKPOINTS, "parameters": 55_834_243, "dtype": "float32"}
    for part, measure in (
        ("memory", lambda: measure_memory(options.work / "bank", coef, options.rounds)),
        ("disk", lambda: measure_disk(files, coef, options.work, options.peers, options.rounds)),
    ):
        if options.only in (None, part):
            result[part] = measure() | {"load_average": os.getloadavg()[0]}
            options.to.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
