"""What the tests of warm starts share: tiny trained models in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lcsc.bank import CheckpointBank
from lcsc.models.flat import LiveModel
from lcsc.operators.base import Candidate

SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 24},
}
GPT: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 24}


def model(kind: str, seed: int = 0, **more: Any) -> Any:
    """A model with its head; biases and gains are not all alike."""
    import transformers

    torch.manual_seed(seed)
    if kind == "gpt2":
        net = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{**GPT, "bos_token_id": 3, "eos_token_id": 3, **more})
        )
    elif kind == "roberta":
        net = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**{**SIZES, **more}))
    else:
        net = transformers.BertForMaskedLM(
            transformers.BertConfig(**{**SIZES, "bos_token_id": 1, "eos_token_id": 2, **more})
        )
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return net.eval()


def saved(net: Any, folder: Path) -> CheckpointBank:
    """A bank of one checkpoint."""
    net.save_pretrained(folder)
    return CheckpointBank.open(folder)


def live(candidate: Candidate) -> Any:
    """The network of a candidate, in evaluation mode."""
    found = LiveModel(candidate.arch, candidate.layout, candidate.constants, torch.device("cpu"))
    found.fill(candidate.write)
    return found.net


def hollow(folder: Path, arch: str, config: dict[str, Any]) -> Path:
    """A model of any size in float16 whose file is a hole: names and shapes as transformers saves them, all zeros."""
    import json

    import transformers

    cls = getattr(transformers, arch)
    with torch.device("meta"):
        net = cls(cls.config_class(**config))
    ties = net.all_tied_weights_keys
    table, at = {}, 0
    for name, tensor in net.state_dict().items():
        if name not in ties:
            end = at + 2 * tensor.numel()
            table[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)
    settings = {**net.config.to_dict(), "architectures": [arch]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
