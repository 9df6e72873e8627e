"""What a file or folder name says: training step, epoch, raw or EMA, EMA rate. No file is opened here.

The conventions are those of the trainers themselves: diffusers and accelerate (`checkpoint-1000`, `unet_ema`),
openai/guided-diffusion and consistency_models (`ema_0.9999_840000.pt`), Lightning (`epoch=12-step=8000.ckpt`),
kohya sd-scripts (`name-step00006000`, `name-000004` = epoch), DiT (`0050000.pt`), ema-pytorch (`0.8000.pt`),
NVlabs/edm2 (`network-snapshot-0002048-0.050`).
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import lru_cache

#: file name endings that can hold weights; `.pkl` is never read, but it is never silently dropped either
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")

#: whole names that hold no model but a trainer's state, with their numbers taken off
_STATE = {
    *("opt", "optim", "optimizer", "optimizers", "scheduler", "scaler", "sampler", "random states", "rng state"),
    *("training args", "training state", "trainer state", "teacher model", "target model", "custom checkpoint"),
    *(
        "callbacks",
        "loops",
        "lr scheduler",
        "grad scaler",
        "dl state dict",
        "optimizer state",
        "optim state",
        "optimizer states",
    ),
}
_STATE_WORDS = {"optimizer", "optimizers", "optim", "scheduler"}
#: words that tell no network from another
_GENERIC = {
    "model",
    "models",
    "pytorch",
    "diffusion",
    "checkpoint",
    "ckpt",
    "weights",
    "network",
    "snapshot",
    "adapter",
}
_GENERIC |= {"lora", "net", "state", "dict", "params", "fsdp", "global", "save", "saved", "and"}
_LAST = {"last", "latest", "final", "best"}

#: longer names come from inside hostile files; file systems allow 255 bytes
_MAX_NAME = 512
#: keeps every character's position, which `str.lower` does not
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

_SHARD = re.compile(r"-(\d{5,6})-of-(\d{5,6})$")
_HASH = re.compile(r"[0-9a-f]{32,}")
_POSTHOC = re.compile(r"(\d+)\.(\d+)")
_EDM = re.compile(r"network-snapshot-(\d+)(?:-(\d+\.\d+))?")
_NOISE = re.compile(
    r"(?<![a-z])(?:fp|bf|int)\d+(?![a-z\d])|\d+x\d+|(?<![a-z])v(?:er(?:sion)?)?[-_.]?\d+(?:[-._]\d(?!\d))?"
)
_METRIC = re.compile(
    r"(?<![a-z])(?!(?:epochs?|ep|(?:global[-_]?)?(?:steps?|iter(?:ation)?s?))=)"
    r"[a-z_/]+=[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
)
_RATE = re.compile(
    r"(?<![a-z])ema(?:[-_]?(?:decay|rate))?[-_=]?(0?\.\d+|1\.0+)(?!\d)|(?<![\d.])(0\.\d+)[-_]?ema(?![a-z])"
)
_RAW = re.compile(r"(?<![a-z])(?:non?[-_]?ema|raw|online)(?![a-z])")
_EMA = re.compile(r"(?<![a-z])ema(?:[-_]?only)?(?![a-z])")
_MARKED = re.compile(r"(?<![a-z])(?:global[-_]?)?(?:steps?|iter(?:ation)?s?)[-_=]?(\d+)(k?)(?![\d.a-z])")
_MARKED_AFTER = re.compile(r"(?<![\d.a-z])(\d+)(k?)[-_]?(?:steps?|iter(?:ation)?s?)(?![a-z])")
_EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)[-_=]?(\d+)(?![\d.a-z])")
_LAST_NUMBER = re.compile(r"(?<![\d.])(\d+)(k?)[-_. #]*$")
_EARLY_NUMBER = re.compile(r"(?:^|(?<![a-z])(?:model|checkpoint|ckpt|net|weights)[-_])(\d+)(k?)(?![\d.a-z])")
_AGAIN = re.compile(r"-v\d+$")


@dataclass(frozen=True, slots=True)
class Name:
    """A parsed name.

    Args:
        base: what is left without numbers and words like `model`; files of one network share it.
        step: training step, None when the name has none.
        epoch: epoch, None when the name has none.
        kind: `ema`, `raw` (said so), or None (not said).
        rate: EMA decay or relative width as written, such as `0.9999`; for ema-pytorch the index of the EMA.
        marked: a word such as `step` or `epoch` says what the number is.
        loose: `step` is a bare number that may count epochs (kohya's six digits).
        state: a trainer's state (optimizer, random states, a distillation teacher), no model.
        last: the name says `last`, `final`, `latest` or `best`.
    """

    base: str
    step: int | None = None
    epoch: int | None = None
    kind: str | None = None
    rate: str | None = None
    marked: bool = False
    loose: bool = False
    state: bool = False
    last: bool = False


def split_suffix(name: str) -> tuple[str, str]:
    """`(stem, suffix)`; the suffix is one of `SUFFIXES`, or empty when the name is no weight file's."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], suffix
    return name, ""


def split_shard(stem: str) -> tuple[str, tuple[int, int] | None]:
    """`model-00002-of-00003` -> `("model", (2, 3))`; `(stem, None)` for a file that is no shard."""
    found = _SHARD.search(stem)
    return (stem[: found.start()], (int(found[1]), int(found[2]))) if found else (stem, None)


def parse(stem: str) -> Name:
    """What the name of a file (without its ending) or of a checkpoint folder says."""
    return _parse(stem) if len(stem) <= _MAX_NAME else Name(stem)


@lru_cache(maxsize=1024)
def _parse(stem: str) -> Name:
    if _HASH.fullmatch(stem):
        return Name(stem)
    if found := _POSTHOC.fullmatch(stem):
        return Name("", int(found[2]), kind="ema", rate=found[1])
    if found := _EDM.fullmatch(stem):
        return Name("", int(found[1]), kind="ema", rate=found[2])
    left = _Rest(stem)
    rate, raw, ema = left.take(_RATE), left.take(_RAW), left.take(_EMA)
    left.take(_METRIC)
    found, epoch, loose = left.take(_MARKED) or left.take(_MARKED_AFTER), left.take(_EPOCH), False
    marked = found is not None or epoch is not None
    if not marked:
        versions = left.blank(_NOISE)
        if found := _LAST_NUMBER.search(versions) or _EARLY_NUMBER.search(versions):
            loose = stem[found.start(1) - 1 :] == f"-{found[1]}" and len(found[1]) == 6
            left.cut(found.start(1), found.end(2))
    elif again := _AGAIN.search(left.text):  # Lightning's ending of a name that was taken
        left.cut(again.start(), again.end())
    base, state, last = _words(left.text)
    kind = "raw" if raw else "ema" if ema or rate else None
    step = int(found[1]) * (1000 if found[2] else 1) if found else None
    return Name(base, step, int(epoch[1]) if epoch else None, kind, _group(rate), marked, loose, state, last)


def step_of(name: str) -> int | None:
    """The training step in the name of a file without its ending, or of a folder; None when there is none."""
    return parse(name).step


def parse_component(name: str) -> tuple[str | None, str | None, str | None]:
    """`(component, kind, rate)` of a folder or file inside a checkpoint folder; numbers belong to its name.

    `unet_ema` -> `("unet", "ema", None)`, `text_encoder_2` -> itself, `model` and `pytorch_model_fsdp_0` -> no
    component (the only network there is).
    """
    return _parse_component(name) if len(name) <= _MAX_NAME else (name, None, None)


@lru_cache(maxsize=1024)
def _parse_component(name: str) -> tuple[str | None, str | None, str | None]:
    left = _Rest(name)
    rate, raw, ema = left.take(_RATE), left.take(_RAW), left.take(_EMA)
    kind = "raw" if raw else "ema" if ema or rate else None
    words = [word for word in re.split(r"[^A-Za-z0-9]+", left.text) if word]
    if all(word.lower() in _GENERIC or word == "0" for word in words):
        return None, kind, _group(rate)
    return (left.text.strip("-_. ") if kind else name), kind, _group(rate)


def is_temporary(name: str) -> bool:
    """Whether a name is hidden or that of an unfinished save."""
    low = name.lower()
    return (
        low.startswith((".", "~", "tmp-", "tmp_", "__pycache__"))
        or low.endswith((".tmp", ".temp", ".part", ".partial", ".incomplete", ".lock", "~"))
        or ".orbax-checkpoint-tmp" in low
    )


class _Rest:
    """A name from which recognised parts are cut; the matching ignores case."""

    def __init__(self, text: str) -> None:
        self.text = text

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The first match, cut out of the text; None when there is none."""
        found = pattern.search(self.text.translate(_LOWER))
        if found:
            self.cut(found.start(), found.end())
        return found

    def cut(self, start: int, stop: int) -> None:
        """Replace a range by one separator for each character, so that positions stay."""
        self.text = self.text[:start] + "-" * (stop - start) + self.text[stop:]

    def blank(self, pattern: re.Pattern[str]) -> str:
        """The lower-case text with every match replaced by `#`."""
        return pattern.sub(lambda found: "#" * len(found[0]), self.text.translate(_LOWER))


def _group(found: re.Match[str] | None) -> str | None:
    return next((group for group in found.groups() if group), None) if found else None


def _words(text: str) -> tuple[str, bool, bool]:
    """`(base, state, last)` of what is left of a name."""
    words = [word for word in re.split(r"[-_. =/]+", text) if word]
    if len(words) > 1 and words[0].lower() in _LAST and _AGAIN.fullmatch("-" + words[-1]):
        words.pop()
    low = [word.lower() for word in words]
    state = " ".join(low) in _STATE or bool(low and ({low[0], low[-1]} & _STATE_WORDS))
    state = state or any(part in " ".join(low) for part in ("mp rank", "zero pp rank"))
    last = bool(_LAST & set(low))
    kept = [word for word, plain in zip(words, low, strict=True) if plain not in _LAST]
    if all(word.lower() in _GENERIC or word == "#" for word in kept):
        kept = []
    return "-".join(kept), state, last
