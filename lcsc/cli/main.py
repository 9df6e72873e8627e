"""`lcsc VERB key=value ...`: dispatch, and one sentence for every mistake."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lcsc.core.errors import ConfigError, LcscError, did_you_mean

#: verb -> what it does; the module `lcsc.cli.<verb>` has `main(words)`.
VERBS = {
    "train": "train a network and save its checkpoints: lcsc train experiment=digits",
    "search": "find coefficients, report and export: lcsc search experiment=digits",
    "report": "draw a run, or compare several: lcsc report run=DIR | 'runs=runs/*'",
    "export": "write a run's winner for use: lcsc export run=DIR to=out/ format=diffusers",
    "combine": "a model without a search: lcsc combine bank=DIR schedule=ema halflife=1000,2000 to=out/",
    "verify": "make an exported model again from its recipe and compare: lcsc verify out/ [bank=DIR]",
    "bank": "look at checkpoints, pack or convert them: lcsc bank scan DIR",
    "list": "the parts lcsc knows, with their sources: lcsc list [searchers]",
}


def usage() -> str:
    """The help text."""
    rows = "\n".join(f"  {verb:<8} {text}" for verb, text in VERBS.items())
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
    verb, rest = words[0], words[1:]
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
    except KeyboardInterrupt:
        print("\nlcsc: interrupted; the same line continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def main_exit() -> None:
    """Entry point of the `lcsc` script."""
    sys.exit(main())
