"""What the tests of pipelines share: a tiny Llama of four stages, its text, and its training in one process."""

from __future__ import annotations

import torch

from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextPart
from lcsc.models.fit import Windows
from lcsc.models.network import build_network
from lcsc.training.causal_lm import CausalLM
from lcsc.training.failing_stages import train_failing

STAGES = 4
ARCH = {
    "class": "LlamaForCausalLM",
    "config": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": STAGES,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    },
}


def trainer(num_steps):
    """Steps of 4 windows of 16 tokens."""
    return CausalLM(num_steps=num_steps, batch_size=4, learning_rate=1e-2, block_length=16)


def windows(num_steps):
    """Those of a training, from Python's language reference."""
    return Windows(build("dataset", "text").tokens(TextPart.TRAIN), trainer(num_steps), SeedRange(0, Purpose.TRAIN))


def unsplit(recovery, num_steps, failures):
    """Final weights by name, and the curve, of the network in one piece, trained by transformers."""
    torch.manual_seed(5)
    net = build_network(ARCH)
    curve = train_failing(
        net,
        ARCH,
        windows(num_steps),
        trainer(num_steps),
        recovery,
        failures,
        evaluate=lambda net: 0.0,
        evaluate_every=num_steps,
    )
    return dict(net.named_parameters()), curve
