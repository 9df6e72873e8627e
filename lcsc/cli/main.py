"""`lcsc VERB key=value ...`: dispatch, and one sentence for every mistake."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lcsc.core.errors import ConfigError, LcscError, did_you_mean

#: verb -> what it does; the module `lcsc.cli.<verb>` has `main(words)`.
VERBS = {
    "train": "train a network and save its checkpoints: lcsc train experiment=digits",
    "search": "find coefficients, report and export: lcsc search experiment=digits",
    "status": "how far runs have come: lcsc status RUN...",
    "watch": "follow a run that is at work, here or elsewhere: lcsc watch RUN",
    "report": "draw a run, or compare several: lcsc report run=DIR | 'runs=runs/*'",
    "export": "write a run's winner for use: lcsc export run=DIR to=out/ format=diffusers",
    "combine": "a model without a search: lcsc combine bank=DIR schedule=ema halflife=1000,2000 to=out/",
    "transform": "one model in another form: lcsc transform operator=gqa model=DIR to=OUT operator.num_kv_heads=2",
    "verify": "make an exported model again from its recipe and compare: lcsc verify out/ [bank=DIR]",
    "bank": "look at checkpoints, pack or convert them: lcsc bank scan DIR",
    "generate": 'a tune for a text: lcsc generate music "a jig in D, 6/8" to=out/',
    "selftest": "try the promises out on a file system: lcsc selftest --dir PATH [seconds=60]",
    "list": "the parts lcsc knows, with their sources: lcsc list [searchers]",
}


def usage() -> str:
    """The help text."""
    rows = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    return (
        "lcsc turns the checkpoints a training run already saved into a better model.\n\n"
        f"usage: lcsc VERB [key=value ...]\n\n{rows}\n\n"
        "train and search take Hydra overrides (-m for a sweep, --cfg job to see the configuration).\n"
        "The same line again continues what was interrupted."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all went well, 2 for the user's mistakes, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    with noticing_ctrl_c() as pressed:
        return _dispatch(words[0], words[1:], pressed)


def _dispatch(verb: str, rest: list[str], pressed: list[int]) -> int:
    """Run one verb; `pressed` fills when Ctrl-C is pressed."""
    try:
        if verb == "--version":
            from lcsc import __version__

            print(__version__)
            return 0
        if verb not in VERBS:
            raise ConfigError(f"no verb named `{verb}`.{did_you_mean(verb, VERBS)}")
        importlib.import_module(f"lcsc.cli.{verb}").main(rest)
    except LcscError as error:
        print(f"lcsc: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if not (pressed or isinstance(error, KeyboardInterrupt)):
            raise
        print("\nlcsc: interrupted; the same line continues", file=sys.stderr)
        return 130
    return 0


@contextmanager
def noticing_ctrl_c() -> Iterator[list[int]]:
    """Keep Python's KeyboardInterrupt, and remember that it was raised.

    Compiled modules that are interrupted while they load turn it into an ImportError of their own.
    """
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler  # a shell's background job ignores Ctrl-C, and shall
    if not ours or threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield pressed
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def main_exit() -> None:
    """Entry point of the `lcsc` script."""
    sys.exit(main())
