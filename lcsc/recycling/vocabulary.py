"""What the tokens of a model stand for, read from its files: for special tokens, and for rows of embeddings.

A token's surface is the bytes that it adds to a text; a word's first token begins with a space. So `##ing` of a BERT is
`ing` of a GPT-2, and `dog` is `Ġdog`. Special tokens have surfaces by what they are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank.shard_index import open_regular, read_range, strict_json
from lcsc.core.errors import BankError

FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
#: what a token is for -> its names
SPECIAL = {
    "start": ("[CLS]", "<s>", "<|endoftext|>"),
    "end": ("[SEP]", "</s>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "mask": ("[MASK]", "<mask>"),
}
#: largest file that is read, in bytes, and most tokens in it
MAX_FILE, MAX_TOKENS = 64 << 20, 4_000_000


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by name, and how their names are to be read."""

    ids: Mapping[str, int]

    @property
    def size(self) -> int:
        """One more than the largest number."""
        return max(self.ids.values()) + 1

    def special(self, purpose: str) -> int | None:
        """The token that is there for a purpose of `SPECIAL`; None where there is none."""
        return next((self.ids[name] for name in SPECIAL[purpose] if name in self.ids), None)

    def surfaces(self) -> dict[bytes, int]:
        """Number by surface; of tokens with the same one the first counts."""
        names = {name: purpose for purpose, row in SPECIAL.items() for name in reversed(row)}
        pieces = any(name.startswith("##") for name in self.ids)
        of_bytes = None if pieces or not any(name.startswith("Ġ") for name in self.ids) else _byte_of()
        found: dict[bytes, int] = {}
        for name, number in sorted(self.ids.items(), key=lambda item: item[1]):
            if (purpose := names.get(name)) is not None:
                found.setdefault(b"\0" + purpose.encode(), number)
                continue
            if pieces:
                surface = name[2:].encode() if name.startswith("##") else b" " + name.encode()
            elif of_bytes is not None and all(char in of_bytes for char in name):
                surface = bytes(of_bytes[char] for char in name)
            else:
                surface = name.replace("▁", " ").encode()
            found.setdefault(surface, number)
        return found


def find_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokens of a model's folder, None where it has no file that lists them.

    Raises:
        BankError: a file that is no vocabulary, or too large.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    with open_regular(path) as (fd, size):
        if size > MAX_FILE:
            raise BankError(f"`{path}` has {size} bytes; a vocabulary has at most {MAX_FILE}.")
        raw = read_range(fd, 0, size, path)
    if path.name == "vocab.txt":
        ids = {line: number for number, line in enumerate(raw.decode("utf-8", "replace").splitlines())}
    else:
        said = strict_json(raw, path, objects=MAX_TOKENS, names=MAX_TOKENS)
        ids = _from_tokenizer(said) if path.name == "tokenizer.json" else said
    if not ids or not all(type(number) is int and 0 <= number < MAX_TOKENS for number in ids.values()):
        raise BankError(f"`{path}` lists no tokens with their numbers. Save the tokenizer anew.")
    return Vocabulary(ids)


def _from_tokenizer(said: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens of a tokenizer.json: those of its model, and those that were added."""
    model = said.get("model")
    known = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, Any] = dict(known) if isinstance(known, dict) else {}
    if isinstance(known, list):
        ids = {str(row[0]): number for number, row in enumerate(known) if isinstance(row, list) and row}
    added = said.get("added_tokens")
    rows = added if isinstance(added, list) else []
    return ids | {str(row.get("content")): row.get("id") for row in rows if isinstance(row, dict)}


@dataclass(frozen=True, eq=False)
class Rows:
    """What rows of a table by tokens are made of, all int64.

    Args:
        same: numbers of tokens that are in both vocabularies, in the new one and in the old one, shapes (N,).
        spelled: of others, each with all of the old one's tokens that spell it, a pair of numbers a piece, shapes (M,).
    """

    same: tuple[np.ndarray, np.ndarray]
    spelled: tuple[np.ndarray, np.ndarray]


def find_rows(old: Vocabulary, new: Vocabulary, spell: bool) -> Rows:
    """Which tokens of `new` are tokens of `old`, and with `spell` which are spelled by some of them.

    A surface is cut from the left into the longest tokens of `old`, as wordpieces are; one that they do not spell is
    left out, and so are special tokens.
    """
    before, same, spelled = old.surfaces(), [], []
    longest = max(map(len, before), default=0)
    for surface, number in sorted(new.surfaces().items(), key=lambda item: item[1]):
        if surface in before:
            same.append((number, before[surface]))
        elif spell and not surface.startswith(b"\0"):
            spelled += [(number, piece) for piece in _pieces(surface, before, longest)]
    same_N2, spelled_M2 = (np.array(pairs, np.int64).reshape(-1, 2) for pairs in (same, spelled))
    return Rows((same_N2[:, 0], same_N2[:, 1]), (spelled_M2[:, 0], spelled_M2[:, 1]))


def _pieces(surface: bytes, known: Mapping[bytes, int], longest: int) -> list[int]:
    """Tokens that spell a surface, the longest first from the left; empty where they do not."""
    found, at = [], 0
    while at < len(surface):
        end = next((e for e in range(min(len(surface), at + longest), at, -1) if surface[at:e] in known), None)
        if end is None:
            return []
        found.append(known[surface[at:end]])
        at = end
    return found


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones their own, others from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
