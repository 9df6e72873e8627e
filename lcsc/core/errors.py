"""The errors lcsc raises on purpose.

    LcscError
    |- ConfigError      (ValueError)   a setting that is unknown, ill-typed or contradictory
    |  `- UnknownPart                  a part name nobody registered
    |- BankError        (ValueError)   checkpoints that are absent, damaged or do not fit together
    |  `- NonFiniteError               NaN or Inf where numbers are required
    |- EvaluationError  (ValueError)   a candidate that cannot be scored
    |- RunError         (ValueError)   a run directory that does not fit the request
    |- OutputExistsError(FileExistsError)  an output path that is already taken
    `- MissingExtraError(ImportError)  an optional dependency that is not installed

Every message says what was wrong, the value, what is allowed and what to do. The command line prints
the message alone and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LcscError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(LcscError, ValueError):
    """A setting is unknown, has the wrong type or contradicts another."""


class UnknownPart(ConfigError):
    """No part of that name is registered."""


class BankError(LcscError, ValueError):
    """Checkpoints are absent, damaged or do not fit together."""


class NonFiniteError(BankError):
    """A tensor holds NaN or Inf."""


class EvaluationError(LcscError, ValueError):
    """A candidate or a sample set cannot be scored.

    `image_forwards`: network evaluations of one image that it took to find out.
    """

    image_forwards: int = 0


class RunError(LcscError, ValueError):
    """A run directory does not fit the request."""


class OutputExistsError(LcscError, FileExistsError):
    """The output path is taken; nothing is ever overwritten."""


class MissingExtraError(LcscError, ImportError):
    """An optional dependency is not installed."""


def not_installed(part: str, package: str, extra: str) -> MissingExtraError:
    """The error of a `part`, as a sentence begins with it, that needs a `package`, which an `extra` of lcsc brings."""
    return MissingExtraError(
        f"{part} needs `{package}`, which is not installed; install it with `pip install 'lcsc[{extra}]'`."
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean `cma`? Known: cma, de."` for an unknown `name` (the hint only when one is near)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."
