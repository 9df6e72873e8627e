"""Texts written by a language model: seeded, with transformers' `generate` and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.errors import ConfigError
from lcsc.models.causal_lm import quiet
from lcsc.models.generation import own_settings_aside
from lcsc.models.pairs import is_composite

if TYPE_CHECKING:
    from transformers import LogitsProcessor

#: Room of a network that reads any number of tokens.
ENDLESS = 2**31


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
    begun: Sequence[Sequence[int]] | None = None,
    top_p: float = 0.9,
    temperature: float = 1.0,
    max_tokens: int = 1024,
) -> list[list[int]]:
    """What the network writes for each prompt: N lists of tokens, up to `end`, which is in the list where it came.

    A language model goes on behind its prompt, an encoder-decoder reads it with its encoder. The smallest set of tokens
    that has a probability of `top_p` is kept and drawn from at `temperature`, in this order; transformers has the other
    one. Each text is drawn by its own generator, so what stands beside it in a batch makes no difference but by
    rounding.

    Args:
        net: a language model or an encoder-decoder of transformers, in evaluation mode.
        prompts: tokens of each, at least one.
        rngs: a generator for each prompt; one draw a token is taken from it.
        end: token that ends a text.
        pad: token that fills up shorter prompts.
        begun: what each text begins with; the list holds what comes behind. None begins them all.
        top_p: above 0, at most 1.
        temperature: above 0.
        max_tokens: most that are written; fewer where the network reads no more.

    Raises:
        ConfigError: a prompt, or what is begun, leaves no room in the network.
    """
    from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    begun = begun or [[]] * len(prompts)
    if not is_composite(net):
        groups = [(range(len(prompts)), *_continued(net, prompts, begun, pad))]
    else:  # a decoder's positions count from its first token, so texts that are begun unequally stand apart
        lengths = [len(some) for some in begun]
        alike = [[row for row in range(len(begun)) if lengths[row] == length] for length in sorted(set(lengths))]
        groups = [(rows, *_composed(net, prompts, begun, rows, pad)) for rows in alike]
    texts: list[list[int]] = [[] for _ in prompts]
    for rows, inputs, width, room in groups:
        how = GenerationConfig(
            max_new_tokens=min(max_tokens, room), do_sample=False, eos_token_id=end, pad_token_id=pad, use_cache=True
        )
        if is_composite(net):
            how.decoder_start_token_id = inputs["decoder_input_ids"][0, 0].item()
        drawn = _drawn([rngs[row] for row in rows])
        processors = LogitsProcessorList([TopPLogitsWarper(top_p), TemperatureLogitsWarper(temperature), drawn])
        with quiet(), own_settings_aside(net):
            found_NT = net.generate(**inputs, generation_config=how, logits_processor=processors)  # type: ignore
        for row, text in zip(rows, found_NT[:, width:].tolist(), strict=True):
            texts[row] = text[: text.index(end) + 1] if end in text else text
    return texts


def _continued(
    net: nn.Module, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]], pad: int
) -> tuple[dict[str, Tensor], int, int]:
    """Inputs of a language model, their width and the room behind them; what is shorter is padded before it."""
    rows = [[*prompt, *some] for prompt, some in zip(prompts, begun, strict=True)]
    device, width = next(net.parameters()).device, max(map(len, rows))
    room = _room(getattr(net.config, "max_position_embeddings", None), width, "prompt")
    ids_NT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask_NT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids_NT, "attention_mask": mask_NT}, width, room


def _composed(
    net: nn.Module, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]], rows: Sequence[int], pad: int
) -> tuple[dict[str, Tensor], int, int]:
    """Inputs of an encoder-decoder for rows that are begun equally far; prompts are padded behind them."""
    config: Any = net.config
    device, width = next(net.parameters()).device, max(len(prompts[row]) for row in rows)
    _room(getattr(config.encoder, "max_position_embeddings", None), width, "prompt", 0)
    first_NT = torch.tensor([[config.decoder_start_token_id, *begun[row]] for row in rows], device=device)
    room = _room(getattr(config.decoder, "max_position_embeddings", None), first_NT.shape[1], "beginning")
    ids_NS = [[*prompts[row]] + [pad] * (width - len(prompts[row])) for row in rows]
    mask_NS = [[1] * len(prompts[row]) + [0] * (width - len(prompts[row])) for row in rows]
    inputs = {"input_ids": torch.tensor(ids_NS, device=device), "attention_mask": torch.tensor(mask_NS, device=device)}
    return {**inputs, "decoder_input_ids": first_NT}, first_NT.shape[1], room


def _room(most: int | None, width: int, what: str, least: int = 1) -> int:
    """Tokens that a network reads behind so many; raises ConfigError where there are fewer than `least`."""
    if most is not None and most - width < least:
        raise ConfigError(
            f"a {what} has {width} tokens, and the network reads at most {most}. Give a shorter text, or a "
            "network with more `max_position_embeddings`."
        )
    return ENDLESS if most is None else most - width


def _drawn(rngs: Sequence[np.random.Generator]) -> LogitsProcessor:
    """Gumbel noise on the scores: the highest of them is then a draw from their softmax (Gumbel, 1954)."""
    from transformers import LogitsProcessor

    class Drawn(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            noise_NV = np.stack([rng.gumbel(size=scores.shape[1]) for rng in rngs])
            return scores + torch.from_numpy(noise_NV).to(scores)

    return Drawn()
