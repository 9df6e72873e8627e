"""Sources and targets made of a text by rule: going on with it, and restoring what a source has lost."""

from __future__ import annotations

import re
import string

import torch
from torch import Tensor

#: what a source is -> what is asked for
TASKS = {"continue": "the first tokens of a block; the others", "restore": "a block written plainly; the block"}
_LOWER = bytes(range(256)).lower()
_PUNCTUATION = string.punctuation.encode()
_GAPS = re.compile(rb"[ \t\r\n]+")


def plain_text(text: bytes) -> bytes:
    """A text in small letters without punctuation, words apart by one space; letters beyond ASCII stay.

    The original is to be told from it: text normalisation, backwards.
    """
    return _GAPS.sub(b" ", text.translate(_LOWER, _PUNCTUATION)).strip()


def pairs_of(blocks_NL: Tensor, task: str) -> Tensor:
    """Source and target of each block, one behind the other.

    `continue` leaves a block as it is: its first tokens are the source. The source of `restore` is `plain_text` of the
    block, filled up with spaces to its length, and the target the block.

    Args:
        blocks_NL: tokens, shape (..., L); bytes for `restore`.
        task: one of `TASKS`.

    Returns:
        int64, shape (..., L), for `restore` (..., 2 L).
    """
    ids_NL = blocks_NL.long()
    if task == "continue":
        return ids_NL
    L = ids_NL.shape[-1]
    rows = [plain_text(bytes(row)).ljust(L) for row in ids_NL.reshape(-1, L).tolist()]
    sources_NL = torch.tensor([list(row) for row in rows]).reshape(ids_NL.shape)
    return torch.cat([sources_NL.to(ids_NL.device), ids_NL], -1)
