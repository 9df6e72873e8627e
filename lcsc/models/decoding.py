"""How fast a language model writes: measured, so never part of a score."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode()
def decode_speed(net: nn.Module, prompt_NT: Tensor, num_tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Tokens a second while a network goes on with N texts at once, one token after the other, by its cache.

    The prompt is read before the clock starts. The first round warms up and is not counted.

    Args:
        net: whose forward pass takes `input_ids`, `past_key_values` and `use_cache` and gives `logits`.
        prompt_NT: int64, on the network's device.
        num_tokens: that each text is continued by.
        repeats: rounds that count.

    Returns:
        `tokens_per_second` with `median`, `min` and `max` over the rounds, and `device`, `threads`, `batch`, `context`
        (tokens of the prompt) and `dtype`.
    """
    rates = [_round(net, prompt_NT, num_tokens) for _ in range(repeats + 1)][1:]
    device = prompt_NT.device
    return {
        "tokens_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "batch": prompt_NT.shape[0],
        "context": prompt_NT.shape[1],
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
    }


def _round(net: nn.Module, prompt_NT: Tensor, num_tokens: int) -> float:
    out = net(input_ids=prompt_NT, use_cache=True)
    _wait(prompt_NT.device)
    began = time.perf_counter()
    for _ in range(num_tokens):
        next_N1 = out.logits[:, -1:].argmax(-1)
        out = net(input_ids=next_N1, past_key_values=out.past_key_values, use_cache=True)
    _wait(prompt_NT.device)
    return prompt_NT.shape[0] * num_tokens / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
