"""What a score is made of, in the words of its evaluator: images, blocks of text, or texts and tunes."""

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
        whole: several items and what they are made of; empty where they are sampled and not read.
        drawn: what a standard error covers the choice of.
        beside: what is said of the numbers beside a score where some are better when they are higher.
    """

    one: str
    many: str
    sampled: str
    half: str
    spread: str
    calls: str
    whole: str = ""
    drawn: str = ""
    beside: str = ""


IMAGES = Words(
    "image",
    "images",
    "sampled",
    "on seeds and on a half of the reference images",
    "bootstrap over blocks of samples",
    "NFE (network calls an image)",
)
BLOCKS = Words(
    *("block", "blocks", "read", "on a part of the text", "over stretches of the text", "network calls a block"),
    whole="blocks of text",
    drawn="stretches of the text",
)
PAIRS = Words(
    *("pair", "pairs", "read", "on a part of the tunes", "over tunes", "network calls a pair"),
    whole="pairs of text and tune",
    drawn="tunes",
    beside=" in the first column; likeness (bleu, eds), validity, diversity and gap are better when higher",
)


def words_of(evaluator: Mapping[str, Any]) -> Words:
    """The words for an objective's circumstances, as run.json has them; text is read in blocks or in pairs."""
    if evaluator.get("items") == "pairs":
        return PAIRS
    return BLOCKS if "block_length" in evaluator else IMAGES
