"""What the tests of language models share: tiny networks of transformers and banks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lcsc.models.network import build_network, save_network

CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = {"class": "LlamaForCausalLM", "config": CONFIG}
TIED: dict[str, Any] = {"class": "LlamaForCausalLM", "config": {**CONFIG, "tie_word_embeddings": True}}
MIXTURE: dict[str, Any] = {
    "class": "Qwen3MoeForCausalLM",
    "config": {
        **{**CONFIG, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
        "pad_token_id": 0,
    },
}


def language_bank(
    folder: Path, arch: dict[str, Any] = LLAMA, *, dtype: torch.dtype = torch.float32, num: int = 4
) -> Path:
    """Four checkpoints of a walk, as transformers lays them out."""
    torch.manual_seed(0)
    net = build_network(arch)
    for step in range(1, 5):
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        save_network(net.to(dtype), folder / f"checkpoint-{step}")
        net.float()
    return folder
