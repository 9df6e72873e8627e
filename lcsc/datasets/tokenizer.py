"""Text into the tokens of a model of transformers, offline, with the bytes that each stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError, MissingExtraError

FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text in tokens.

    Args:
        ids_N: int32.
        bytes_N: bytes of the text that each token stands for, int64; where a character is spread over several tokens,
            the last of them has its bytes.
        vocab_size: tokens that there are, those that were added included.
    """

    ids_N: np.ndarray
    bytes_N: np.ndarray
    vocab_size: int


def encode(text: bytes, folder: Path) -> Encoded:
    """A text in the tokens of `folder`, none added at begin or end; bytes that are no UTF-8 are replaced.

    Raises:
        ConfigError: no `tokenizer.json` there, or one that cannot be read.
        MissingExtraError: the library `tokenizers` is not installed.
    """
    tokenizer = _open(folder)
    words = text.decode("utf-8", errors="replace")
    found = tokenizer.encode(words, add_special_tokens=False)
    # a token reaches to where the next one begins, so that spaces which belong to none are counted too
    place_C = np.concatenate([[0], np.cumsum([len(char.encode()) for char in words])])
    begins_N = np.array([begin for begin, _ in found.offsets], np.int64)
    edges = np.concatenate([[0], place_C[begins_N[1:]], [place_C[-1]]]) if len(begins_N) else np.zeros(1, np.int64)
    return Encoded(np.array(found.ids, np.int32), np.diff(edges), _vocab_size(tokenizer))


def _open(folder: Path) -> Any:
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"`dataset.tokenizer` is `{folder}`, which has no `{FILE}`. Give the folder of a model with a fast "
            "tokenizer (`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes one)."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(
            "`dataset.tokenizer` needs the library `tokenizers`. Install it with: pip install 'lcsc[lm]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"`{folder / FILE}` is no tokenizer: {' '.join(str(error).split())}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _vocab_size(tokenizer: Any) -> int:
    """One more than the largest number of a token, which may be more than there are tokens."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
