"""Texts written by a language model: seeded, with transformers' `generate` and its cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.models.causal_lm import quiet

if TYPE_CHECKING:
    from transformers import LogitsProcessor


def check_sampling(settings: Any, section: str = "") -> None:
    """Refuse what cannot be sampled with.

    Args:
        settings: has the fields `top_p`, `temperature` and `max_tokens`.
        section: of the configuration where they stand, with a dot, such as `objective.`.

    Raises:
        ConfigError: naming the fields and their values.
    """
    p, temperature, most = settings.top_p, settings.temperature, settings.max_tokens
    if not 0 < p <= 1 or not 0 < temperature <= 100 or most < 1:
        raise ConfigError(
            f"`{section}top_p`, `temperature`, `max_tokens` are {p}, {temperature}, {most}; they must be above 0 and "
            "at most 1, above 0 and at most 100, and at least 1."
        )


@torch.no_grad()
def sample(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    rngs: Sequence[np.random.Generator],
    *,
    end: int,
    pad: int,
    top_p: float = 0.9,
    temperature: float = 1.0,
    max_tokens: int = 1024,
) -> list[list[int]]:
    """What the network writes behind each prompt: N lists of tokens, up to `end`, which is in the list where it came.

    The smallest set of tokens that has a probability of `top_p` is kept and drawn from at `temperature`, in this order;
    transformers has the other one. Each text is drawn by its own generator, so what stands beside it in a batch makes
    no difference but by rounding.

    Args:
        net: a language model of transformers, in evaluation mode.
        prompts: tokens of each, at least one.
        rngs: a generator for each prompt; one draw a token is taken from it.
        end: token that ends a text.
        pad: token that fills up shorter prompts.
        top_p: above 0, at most 1.
        temperature: above 0.
        max_tokens: most that are written; fewer where the network reads no more.

    Raises:
        ConfigError: a prompt leaves no room in the network.
    """
    from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    device, width = next(net.parameters()).device, max(map(len, prompts))
    room = (getattr(net.config, "max_position_embeddings", None) or width + max_tokens) - width
    if room < 1:
        raise ConfigError(
            f"a prompt has {width} tokens, and the network reads at most {width + room}. Give a shorter text, or a "
            "network with more `max_position_embeddings`."
        )
    ids_NT = torch.full((len(prompts), width), pad)
    for row, prompt in enumerate(prompts):
        ids_NT[row, width - len(prompt) :] = torch.tensor(prompt)
    lengths_N1 = torch.tensor([[len(prompt)] for prompt in prompts])
    mask_NT = (torch.arange(width)[None] >= width - lengths_N1).long()
    how = GenerationConfig(
        max_new_tokens=min(max_tokens, room), do_sample=False, eos_token_id=end, pad_token_id=pad, use_cache=True
    )
    processors = LogitsProcessorList([TopPLogitsWarper(top_p), TemperatureLogitsWarper(temperature), _drawn(rngs)])
    with quiet(), own_settings_aside(net):
        found_NT = net.generate(  # type: ignore[operator]
            ids_NT.to(device), attention_mask=mask_NT.to(device), generation_config=how, logits_processor=processors
        )
    texts = found_NT[:, width:].tolist()
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


@contextlib.contextmanager
def own_settings_aside(net: nn.Module) -> Iterator[None]:
    """Without what a network's folder says of beams, penalties or words to avoid: the draws are what was asked for."""
    from transformers import GenerationConfig

    own, net.generation_config = net.generation_config, GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        net.generation_config = own


def _drawn(rngs: Sequence[np.random.Generator]) -> LogitsProcessor:
    """Gumbel noise on the scores: the highest of them is then a draw from their softmax (Gumbel, 1954)."""
    from transformers import LogitsProcessor

    class Drawn(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            noise_NV = np.stack([rng.gumbel(size=scores.shape[1]) for rng in rngs])
            return scores + torch.from_numpy(noise_NV).to(scores)

    return Drawn()
