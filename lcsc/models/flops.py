"""What a token costs a language model: its active weights and their floating point operations."""

from __future__ import annotations

from typing import Any

from torch import nn


def active_matrices(net: nn.Module) -> int:
    """Numbers in the matrices that one token is multiplied with.

    Of a mixture's experts as many as a token is sent to. A table of embeddings is looked up, not multiplied, unless it
    is the output layer too.

    Args:
        net: a language model of transformers.
    """
    head = getattr(net.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    tables = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    chosen, total = getattr(net.config, "num_experts_per_tok", None) or 1, 0
    for parameter in net.parameters():
        if id(parameter) not in tables and parameter.ndim > 1:
            fused = parameter.ndim == 3  # all experts of a layer
            total += parameter.numel() * min(chosen, len(parameter)) // len(parameter) if fused else parameter.numel()
    return total


def training_flops(net: nn.Module, tokens: int, block_length: int) -> int:
    """Floating point operations of training on `tokens` tokens, in blocks; a backward pass counts two forward ones.

    3 tokens (2 A + 4 L T W): A active matrices, L layers, T tokens that a token attends to (all of its block, as
    computed), W width of all heads together. Norms, activations and the optimizer are left out.

    Args:
        net: a language model of transformers.
        tokens: that pass through it.
        block_length: tokens of a block.
    """
    config: Any = net.config
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return 3 * tokens * (2 * active_matrices(net) + 4 * config.num_hidden_layers * block_length * heads * size)


def pair_training_flops(net: nn.Module, pairs: int, source: int, target: int) -> int:
    """Floating point operations of training an encoder-decoder on pairs; a backward pass counts two forward ones.

    3 pairs (2 (S A + T B + S C) + 4 D_e L S^2 + 4 D_d M T (T + S)): S and T tokens of a source and a target, A active
    matrices of the encoder, B of the decoder without C, the keys and values of its attention to the encoder, L and M
    their layers, D_e and D_d their widths. Tensors that both share work in both.

    Args:
        net: an encoder-decoder of transformers.
        pairs: that pass through it.
        source: tokens of each.
        target: tokens of each.
    """
    encoder, decoder = net.encoder, net.decoder
    tables = {id(module.weight) for module in encoder.modules() if isinstance(module, nn.Embedding)}  # type: ignore
    a = sum(p.numel() for p in encoder.parameters() if p.ndim > 1 and id(p) not in tables)  # type: ignore[union-attr]
    heard = ("crossattention.self.key.weight", "crossattention.self.value.weight", "crossattention.c_attn.weight")
    c = sum(p.numel() for name, p in decoder.named_parameters() if name.endswith(heard))  # type: ignore[union-attr]
    b = active_matrices(decoder) - c  # type: ignore[arg-type]
    e: Any = encoder.config
    d: Any = decoder.config
    scores = 4 * e.hidden_size * e.num_hidden_layers * source**2
    scores += 4 * d.hidden_size * d.num_hidden_layers * target * (target + source)
    return 3 * pairs * (2 * (source * (a + c) + target * b) + scores)
