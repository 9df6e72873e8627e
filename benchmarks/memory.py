"""Does a process take the memory that the scan predicts? Banks of many shapes in each storage, and whole searches.

    python benchmarks/memory.py --work scratch/ [--to benchmarks/results/memory.json]

Each row is a process of its own. A bank's opens it, reads it as its storage does and combines one candidate. A search's
is `lcsc search` of the toy problem, and of a UNet of 22 M parameters by its loss on few images, so that activations do
not count. Peak resident memory (VmHWM) stands beside the prediction. Needs 4 GB of disk and 2 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import circumstances

HERE = Path(__file__).parent
STORAGES = ("resident", "delta", "streamed")
PEAK = """
from pathlib import Path
status = Path("/proc/self/status").read_text()
print("VmHWM", 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))))
"""
BANK = """
import sys, torch
from lcsc.bank import CheckpointBank
bank = CheckpointBank.open(sys.argv[1], storage=sys.argv[2])
bank.load()
coef = torch.full((bank.num_checkpoints,), 1 / bank.num_checkpoints, dtype=torch.float64)
bank.combine(coef, out=torch.empty(bank.layout.num_parameters))
"""
SEARCH = "import sys\nfrom lcsc.cli.main import main\nassert main(['search', *sys.argv[1:]]) == 0\n"
SCAN = """
import sys, json
from dataclasses import asdict
from lcsc.bank.memory import STORAGES, bank_peak, search_peak
from lcsc.bank.survey import survey
(row,) = survey(sys.argv[1], read=False).groups
kinds = {"bank": bank_peak, "search": search_peak}
peaks = {name: {s: peak(row.extent, s) for s in STORAGES} for name, peak in kinds.items()}
print(json.dumps({**asdict(row.extent), **peaks}))
"""
UNET = {
    "class": "UNet2DModel",
    "config": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [128, 224, 352],
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "add_attention": False,
    },
}
FEW = ["search.num_trials=3", "search.num_finalists=1", "quiet=true"]
FEW += [f"search.num_images{use}=64" for use in ("", "_select", "_report")]


def safetensors(folder: Path, checkpoints: int, parameters: int, tensors: int = 10) -> None:
    """Checkpoints of equal tensors."""
    import numpy as np
    from safetensors.numpy import save_file

    values = np.random.default_rng(0).standard_normal((tensors, parameters // tensors), np.float32)
    for k in range(checkpoints):
        shifted = {f"layer{i}": values[i] + np.float32(k) for i in range(tensors)}
        save_file(shifted, folder / f"model-{k + 1:06d}.safetensors")


def strided(folder: Path) -> None:
    """torch files of one long tensor, saved transposed, and a second, shorter one."""
    import torch

    for step in range(1, 9):
        torch.save({"a": torch.randn(3000, 4000).t(), "b": torch.randn(1000, 500).t()}, folder / f"model{step}.pt")


def shards(folder: Path) -> None:
    """torch.distributed.checkpoint as two processes write it, cut along the first axis."""
    import torch.multiprocessing as mp

    mp.spawn(_save_shards, (str(folder),), nprocs=2)


def _save_shards(rank: int, folder: str) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    meeting = Path(folder).parent / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for step in range(1, 9):
        weight = distribute_tensor(torch.full((4000, 3000), float(step)), mesh, [Shard(0)])
        dcp.save({"w": weight}, checkpoint_id=f"{folder}/checkpoint-{step}")
    torch.distributed.destroy_process_group()


def toy(folder: Path) -> None:
    """The toy experiment's checkpoints."""
    run(
        "from lcsc.cli.main import main\nmain(['train', *sys.argv[1:]])",
        "experiment=toy_gaussian",
        f"bank.path={folder}",
    )


def unet(folder: Path) -> None:
    """Two checkpoints of a UNet."""
    from lcsc.models.network import build_network, save_network

    net = build_network(UNET)
    for step in (1, 2):
        save_network(net, folder / f"checkpoint-{step}" / "unet")
        for parameter in net.parameters():
            parameter.data.mul_(1.01)


#: name -> what makes the files
BANKS: dict[str, Callable[[Path], None]] = {
    "10000_small": lambda folder: safetensors(folder, 10_000, 25_000),
    "40_large": lambda folder: safetensors(folder, 40, 8_000_000),
    "4000_of_700_tensors": lambda folder: safetensors(folder, 4_000, 2_800, 700),
    "8_strided_torch": strided,
    "8_dcp_shards": shards,
}
#: name -> what makes the files, words of the search, storages
SEARCHES: dict[str, tuple[Callable[[Path], None], list[str], tuple[str, ...]]] = {
    "toy": (toy, ["experiment=toy_gaussian", *FEW], ("resident",)),
    "unet_22m": (
        unet,
        ["experiment=digits", "objective=denoising_loss", "objective.batch_size=8", "searcher=cma", *FEW],
        ("resident", "streamed"),
    ),
}


def run(code: str, *words: str) -> str:
    """Standard output of a Python process."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *words], capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measure(code: str, *words: str) -> int:
    """Peak resident memory of a Python process, in bytes."""
    return int(run(code + PEAK, *words).split("VmHWM")[1])


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=HERE / "results" / "memory.json")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    work = options.work.resolve()

    def add(case: str, process: str, storage: str, predicted: dict, measured: int) -> None:
        expected = predicted[process][storage]
        size = {key: predicted[key] for key in ("num_checkpoints", "num_parameters", "num_chunks")}
        numbers = {
            "predicted_bytes": expected,
            "measured_bytes": measured,
            "measured_over_predicted": measured / expected,
        }
        rows.append({"case": case, "process": process, "storage": storage, **size, **numbers})
        print(rows[-1], flush=True)

    for name, (make, words, storages) in SEARCHES.items():
        predicted = made(work / name, make)
        for storage in storages:
            use = [*words, f"bank.path={work / name}", f"bank.storage={storage}", f"runs_dir={work / 'runs'}"]
            add(name, "search", storage, predicted, measure(SEARCH, *use))
    for name, make in BANKS.items():
        predicted = made(work / name, make)
        for storage in STORAGES:
            add(name, "bank", storage, predicted, measure(BANK, str(work / name), storage))
    options.to.write_text(json.dumps({**circumstances(), "rows": rows}, indent=2) + "\n")


def made(folder: Path, make: Callable[[Path], None]) -> dict:
    """Make a case's files unless an earlier call did; what the scan says of them."""
    if not folder.exists():
        folder.mkdir(parents=True)
        make(folder)
    return json.loads(run(SCAN, str(folder)))


if __name__ == "__main__":
    main()
