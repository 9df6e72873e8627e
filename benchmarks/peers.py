"""One merge by another tool, as a whole process: `python peers.py TOOL OUT COEF.json`. Run by combine.py.

`read` merely reads the files; `torch_loop` is the loop that people write; the others are tools as their users start
them. COEF.json is `{"files": [...], "coef": [...]}`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def read(files: list[str], coef: list[float], out: str) -> None:
    """Every byte of every file into one buffer, by as many threads as there are cores."""
    from concurrent.futures import ThreadPoolExecutor

    def one(file: str) -> None:
        buffer, fd = bytearray(1 << 20), os.open(file, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, files))


def torch_loop(files: list[str], coef: list[float], out: str) -> None:
    """One state dict at a time, added up key by key."""
    from safetensors.torch import load_file, save_file

    total: dict = {}
    for file, number in zip(files, coef, strict=True):
        for name, tensor in load_file(file).items():
            total[name] = total[name].add_(tensor, alpha=number) if name in total else tensor * number
    save_file(total, out)


def mergekit(files: list[str], coef: list[float], out: str) -> None:
    """`mergekit-pytorch` with a linear merge; weights as they are (normalize off)."""
    models = [{"model": file, "parameters": {"weight": number}} for file, number in zip(files, coef, strict=True)]
    config = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "float32"}
    path = Path(out).with_suffix(".json")  # JSON is YAML
    path.write_text(json.dumps(config))
    tool = Path(sys.executable).with_name("mergekit-pytorch")
    subprocess.run([tool, path, out, "--safe-serialization"], check=True, stdout=subprocess.DEVNULL)


def sd_mecha(files: list[str], coef: list[float], out: str) -> None:
    """A merge method of our own (sd-mecha has no n-ary weighted sum), for a network that it does not know by name."""
    import sd_mecha
    import torch
    from safetensors import safe_open
    from sd_mecha.extensions import model_configs

    @sd_mecha.merge_method
    def weighted(*models: sd_mecha.Parameter(torch.Tensor)) -> sd_mecha.Return(torch.Tensor):
        total = models[0] * coef[0]
        for tensor, number in zip(models[1:], coef[1:], strict=True):
            total = total.add_(tensor, alpha=number)
        return total

    with safe_open(files[0], "pt") as handle:
        names = {name: torch.Size(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    keys = {name: model_configs.KeyMetadata(shape, torch.float32) for name, shape in names.items()}
    config = model_configs.ModelConfigImpl("bench-diffusers", {"unet": model_configs.ModelComponent(keys)})
    model_configs.register_aux(config)
    recipe = weighted(*(sd_mecha.model(file, config) for file in files))
    sd_mecha.merge(recipe, output=out, merge_dtype=torch.float32, output_dtype=torch.float32, merge_device="cpu")


if __name__ == "__main__":
    what, out, spec = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    {"read": read, "torch_loop": torch_loop, "mergekit": mergekit, "sd_mecha": sd_mecha}[what](
        spec["files"], spec["coef"], out
    )
