"""What a score is made of, in the words of its evaluator: images, or blocks of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Words:
    """Words for the items of a score.

    Args:
        one, many: an item, and several.
        sampled: what was done to get them.
        half: what the final scores are taken on, beside seeds.
        spread: what the standard error covers.
        calls: a fact's name for the network calls of an item.
    """

    one: str
    many: str
    sampled: str
    half: str
    spread: str
    calls: str


IMAGES = Words(
    "image",
    "images",
    "sampled",
    "on seeds and on a half of the reference images",
    "bootstrap over blocks of samples",
    "NFE (network calls an image)",
)
BLOCKS = Words(
    "block", "blocks", "read", "on a part of the text", "over stretches of the text", "network calls a block"
)


def words_of(evaluator: Mapping[str, Any]) -> Words:
    """The words for an objective's circumstances, as run.json has them; text is read in blocks."""
    return BLOCKS if "block_length" in evaluator else IMAGES
