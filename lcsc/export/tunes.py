"""Tunes that a trained model writes for a text, as files: notation, sound and picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lcsc.core.errors import ConfigError, OutputExistsError, RunError
from lcsc.core.files import new_directory, writing
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.models.sampling import check_sampling, sample
from lcsc.models.tune_pairs import TUNE_MODELS, check_tunes
from lcsc.music.abc import ascii_text
from lcsc.music.check import UNFINISHED, problems
from lcsc.music.files import (
    ENGRAVER,
    PACKAGES,
    abc2midi_errors,
    abc2midi_version,
    midi_bytes,
    picture,
    whole_abc,
)
from lcsc.music.tokens import END, PAD, TOKENS, decode, prompt_tokens

#: Stream of the first try; each further one has the next.
TRY = 16
#: Most characters of a text that asks for a tune.
LONGEST_TEXT = 400


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Args:
        text: such as `a jig in D, 6/8`, in the words of the training texts.
        num: tunes.
        seed: of the draws; tune i of a seed is the same however many there are.
        tries: that each tune has to be valid.
        top_p: probability of the tokens that are drawn from.
        temperature: at which they are drawn, behind `top_p`.
        max_tokens: most of a tune.
    """

    text: str
    num: int = 1
    seed: int = 0
    tries: int = 16
    top_p: float = 0.9
    temperature: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        text = " ".join(ascii_text(self.text).split())
        if not text or len(text) > LONGEST_TEXT:
            raise ConfigError(
                f"the text `{self.text[:60]}` has {len(text)} characters in ASCII; it must have 1 to {LONGEST_TEXT}. "
                'Ask for a tune in words such as "a jig in D, 6/8".'
            )
        object.__setattr__(self, "text", text)
        if not 1 <= self.num <= 1000 or not 1 <= self.tries <= 1000:
            raise ConfigError(f"`num` is {self.num} and `tries` {self.tries}; they must be from 1 to 1000.")
        check_sampling(self)
        _ = SeedRange(self.seed, Purpose.FRESH)  # checks it


@dataclass(frozen=True)
class Found:
    """A valid tune, its number, and the tries that it took."""

    number: int
    abc: str
    tries: int


def find_tunes(net: nn.Module, wish: Wish) -> tuple[list[Found], list[str]]:
    """Valid tunes for a text, in their order, and why the last try of each missing one was refused.

    A tune that is not valid is written again with other draws from its first wrong bar on, and where that does not get
    further, from 1, 3, 7 and so on bars earlier. Valid is what our own reading of notation and bars accepts, and
    abc2midi too where it is installed.

    Raises:
        ConfigError: the network is no language model or encoder-decoder of these tokens, or reads too few.
    """
    kind = type(net).__name__
    if kind not in TUNE_MODELS:
        raise ConfigError(
            f"tunes are written by language models and encoder-decoders of transformers, and this is a `{kind}`."
        )
    prompt, seeds = prompt_tokens(wish.text), SeedRange(wish.seed, Purpose.FRESH)
    check_tunes(net.config, 2)
    drafts, found = {number: _Draft() for number in range(wish.num)}, []
    how = {key: getattr(wish, key) for key in ("top_p", "temperature", "max_tokens")}
    for turn in range(wish.tries):
        numbers = sorted(drafts)
        rngs = [seeds.generator(number, TRY + turn) for number in numbers]
        begun = [drafts[number].kept for number in numbers]
        texts = sample(net, [prompt] * len(numbers), rngs, begun=begun, end=END, pad=PAD, **how)
        for number, tokens in zip(numbers, texts, strict=True):
            draft = drafts[number]
            draft.judge(draft.kept + tokens, wish.max_tokens)
            if not draft.wrong:
                found.append(Found(number, decode(draft.tokens), turn + 1))
                del drafts[number]
        if not drafts:
            break
    return sorted(found, key=lambda one: one.number), [drafts[number].wrong for number in sorted(drafts)]


@dataclass
class _Draft:
    """A tune that is being written: its last try, what is wrong with it, and what the next one begins with."""

    tokens: list[int] = field(default_factory=list)
    wrong: str = ""
    kept: list[int] = field(default_factory=list)
    reached: int = 0
    stuck: int = 0

    def judge(self, tokens: list[int], most: int) -> None:
        """Find what is wrong with a try, and how much of it to keep."""
        self.tokens, abc = tokens, decode(tokens)
        ended = tokens[-1:] == [END] and len(tokens) <= most + 1
        wrong = problems(abc) if ended else [f"it has no end after {min(len(tokens), most)} tokens"]
        wrong = wrong or (abc2midi_errors(abc) if abc2midi_version() else [])
        self.wrong = wrong[0] if wrong else ""
        if not wrong:
            return
        sound = [0]
        for end in (place + 1 for place, token in enumerate(tokens[:most]) if "|" in TOKENS[token]):
            if set(problems(decode(tokens[:end]))) - set(UNFINISHED):
                break
            sound.append(end)
        self.stuck = 0 if sound[-1] > self.reached else self.stuck + 1
        self.reached = max(self.reached, sound[-1])
        self.kept = tokens[: sound[max(0, len(sound) - 2**self.stuck)]]


def write_tunes(net: nn.Module, wish: Wish, to: Path, model: str) -> dict[str, Any]:
    """Write tunes for a text into the new folder `to`: `tune-1.abc`, `.mid`, `.svg` and so on, and `tunes.json`.

    Args:
        net: the model, in evaluation mode.
        wish: what is asked for.
        to: a path that does not exist.
        model: where the model came from, for `tunes.json`.

    Returns:
        What `tunes.json` holds: the wish, `files` of each tune with its tries, `refused` with the reason of each tune
        that was never valid, and `missing`, what could not be written for want of a library or a tool.

    Raises:
        ConfigError: see `find_tunes`.
        RunError: no tune was valid; nothing is written.
        OutputExistsError: `to` exists.
    """
    if to.exists():  # before anything is written for nothing
        raise OutputExistsError(
            f"output `{to}` exists already. Nothing is overwritten; choose another path or remove it."
        )
    found, refused = find_tunes(net, wish)
    if not found:
        raise RunError(
            f"no valid tune for `{wish.text}` in {wish.tries} tries; the last was refused because {refused[0]}. Raise "
            "`tries`, lower `temperature` or `top_p`, or train the model for longer."
        )
    files, missing = [], set()
    with writing(to), new_directory(to) as folder:
        for one in found:
            stem = f"tune-{one.number + 1}"
            made: dict[str, str | bytes | None] = {
                ".abc": whole_abc(one.abc, wish.text, one.number + 1),
                ".mid": midi_bytes(one.abc),
                ".svg": picture(one.abc, wish.text),
            }
            for suffix, content in made.items():
                if content is None:
                    missing.add(_why_not(suffix))
                elif isinstance(content, str):
                    (folder / (stem + suffix)).write_text(content)
                else:
                    (folder / (stem + suffix)).write_bytes(content)
            written = [stem + suffix for suffix, content in made.items() if content is not None]
            files.append({"files": written, "tries": one.tries})
        checked = ["lcsc", *([f"abc2midi {abc2midi_version()}"] if abc2midi_version() else [])]
        told = {"wish": asdict(wish), "model": model, "checked_by": checked, "tunes": files, "refused": refused}
        told["missing"] = sorted(missing)
        (folder / "tunes.json").write_text(json.dumps(told, indent=2) + "\n")
    return told


def _why_not(suffix: str) -> str:
    if suffix == ".mid":
        return "no MIDI: `symusic` is not installed, or found no note; install it with `pip install 'lcsc[music]'`"
    return f"no picture of the score: `{ENGRAVER}` is not installed (Debian: apt install {PACKAGES[ENGRAVER]})"
