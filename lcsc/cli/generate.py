"""`lcsc generate`: what a trained model writes for a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc.cli.settings import need, parse_words
from lcsc.core.errors import ConfigError, RunError, did_you_mean

USAGE = 'Write: lcsc generate music "a jig in D, 6/8" to=out/'
DEFAULTS: dict[str, str | None] = {
    **{"to": None, "model": None, "num": "1", "seed": "0", "tries": "16", "top_p": "0.9", "temperature": "1.0"},
    **{"max_tokens": "1024", "device": "auto"},
}
#: Where the experiments' own models lie.
RUNS, BANKS = Path("runs"), (Path("banks/text_to_music_tuned"), Path("banks/text_to_music_small"))


def main(words: Sequence[str]) -> None:
    """`music TEXT to=DIR [model=DIR] [num=1] [seed=0] [tries=16] [top_p=0.9] [temperature=1.0] [max_tokens=1024]`."""
    if not words or words[0] != "music":
        given = f"`{words[0]}` cannot be generated.{did_you_mean(words[0], ['music'])} " if words else ""
        raise ConfigError(f"{given or 'nothing is asked for. '}{USAGE}")
    if len(words) < 2 or words[1].startswith("--") or words[1].partition("=")[0] in DEFAULTS:
        raise ConfigError(f"no text says which tune is wanted. {USAGE}")
    settings = parse_words(_plain(words[2:]), DEFAULTS)
    to = Path(need(settings, "to"))
    from lcsc.export.tunes import Wish, write_tunes
    from lcsc.models.network import load_network
    from lcsc.objectives.shared import choose_device

    wish = Wish(
        words[1],
        **{key: _number(settings, key, int) for key in ("num", "seed", "tries", "max_tokens")},
        **{key: _number(settings, key, float) for key in ("top_p", "temperature")},
    )
    folder = find_model(None if settings["model"] is None else Path(settings["model"]))
    print(f"model: {folder}", flush=True)
    net = load_network(folder).to(choose_device(need(settings, "device")))
    told = write_tunes(net, wish, to, str(folder))
    for tune in told["tunes"]:
        tries = "" if tune["tries"] == 1 else f" (try {tune['tries']})"
        print(f"tune: {', '.join(str(to / name) for name in tune['files'])}{tries}")
    for reason in told["refused"]:
        print(f"refused: a tune that was not valid in {wish.tries} tries; at last {reason}")
    for reason in told["missing"]:
        print(f"missing: {reason}", flush=True)


def find_model(path: Path | None) -> Path:
    """The folder of a network: of a network, of a finished run's winner, or of a bank's last checkpoint.

    Args:
        path: of any of the three; None takes the newest finished run on tunes below `runs/`, or else the bank of
            experiment=text_to_music_tuned or text_to_music_small.

    Raises:
        RunError: there is none, or a run's winner is where a training begins.
    """
    if path is None:
        path = _newest_run() or next((bank for bank in BANKS if bank.is_dir()), None)
        if path is None:
            raise RunError(
                "there is no model that writes tunes here yet. Give one with model=DIR, or make one with: "
                "lcsc search experiment=text_to_music_small train_if_missing=true"
            )
    if (path / "best" / "config.json").is_file():
        if _begins(path):
            raise RunError(
                f"`model` is `{path}`, whose winner was scored behind a fine-tuning and is saved as it was before. "
                "Train it: lcsc search experiment=text_to_music_tuned train_if_missing=true "
                f"trainer.start={path / 'best'}"
            )
        return path / "best"
    if (path / "config.json").is_file():
        return path
    steps = [(int(step), at) for at in path.glob("checkpoint-*") if (step := at.name.partition("-")[2]).isdecimal()]
    if not steps:
        raise RunError(
            f"`model` is `{path}`, which holds no network (config.json), finished run (best/) or checkpoint-*/. Give a "
            "folder of one of these."
        )
    return max(steps)[1]


def _newest_run() -> Path | None:
    """The last finished run that searched models of tunes as they are."""
    done = []
    for summary in RUNS.glob("*/summary.json"):
        if _config(summary.parent).get("dataset", {}).get("name") == "tunes" and not _begins(summary.parent):
            done.append((summary.stat().st_mtime, summary.parent))
    return max(done)[1] if done else None


def _begins(path: Path) -> bool:
    """Whether a run's winner is where a training begins."""
    return bool(_config(path).get("objective", {}).get("num_steps"))


def _config(path: Path) -> Mapping[str, Any]:
    """The configuration of a run; nothing of one that is of another lcsc, or damaged."""
    from lcsc.report.run import Run

    try:
        return Run.open(path).info["config"]  # type: ignore[no-any-return]
    except RunError:
        return {}


def _plain(words: Sequence[str]) -> list[str]:
    """`--to DIR` as `to=DIR`."""
    out, rest = [], iter(words)
    for word in rest:
        out.append(f"{word[2:]}={next(rest, '')}" if word.startswith("--") and "=" not in word else word)
    return [word.removeprefix("--") for word in out]


def _number(settings: dict[str, str | None], key: str, kind: type) -> int | float:
    text = need(settings, key)
    try:
        return kind(text)  # type: ignore[no-any-return]
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"`{key}` is `{text}`; it must be {what}.") from None
