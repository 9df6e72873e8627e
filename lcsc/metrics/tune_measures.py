"""What is measured of generated tunes: likeness to a reference, validity, diversity, copying; each with its scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcsc.core.errors import EvaluationError, not_installed
from lcsc.metrics.paired import paired_draws
from lcsc.music.check import whole_bars

#: Longest runs of characters that BLEU compares.
ORDERS = (1, 2, 3, 4)
#: Share of the resamples on each side of an interval.
TAIL = 0.025


@dataclass(frozen=True)
class Measured:
    """One measure of N tunes.

    Args:
        value: over all of them.
        se: standard error, by the bootstrap over tunes.
        floor: what a model that knows nothing about a text, or a model without worth, gets.
        ceiling: what a perfect one gets.
        above: value minus floor.
        low: lower end of the 95 % interval of `above`, by the paired bootstrap.
        high: its upper end.
    """

    value: float
    se: float
    floor: float
    ceiling: float
    above: float
    low: float
    high: float


def measure_tunes(
    tunes: Sequence[str],
    references: Sequence[str],
    unrelated: Sequence[str],
    training: Sequence[str],
    is_valid: Callable[[str], bool],
) -> dict[str, Measured]:
    """All measures of generated tunes, by name.

    | name | what | floor | ceiling |
    |---|---|---|---|
    | `bleu_1` .. `bleu_4` | BLEU of characters against the references, 0 to 100 | unrelated real tunes | 100 |
    | `eds` | 1 - edit distance / longer length | unrelated real tunes | 1 |
    | `validity` | share of valid tunes | 0 | the references' |
    | `whole_bars` | share of a tune's bars that are as long as its metre says | 0 | the references' |
    | `diversity` | 1 - likeness to the most similar other tune | 0 | the references' |
    | `copying` | likeness to the most similar training tune | the references' | 1 |

    Args:
        tunes: generated ones, N of them.
        references: the real tunes of the same texts, N.
        unrelated: real tunes of other texts, N.
        training: what the model was trained on, at least one.
        is_valid: whether a tune can be played.

    Raises:
        EvaluationError: fewer than two tunes, or lists of different lengths.
        MissingExtraError: rapidfuzz or sacrebleu is not installed.
    """
    if len(tunes) < 2 or not len(tunes) == len(references) == len(unrelated) or not training:
        raise EvaluationError(
            f"{len(tunes)} tunes, {len(references)} references, {len(unrelated)} unrelated and {len(training)} training"
            " tunes cannot be compared: the first three must be equally many, at least 2, and the last at least 1."
        )
    counts_NS, floor_NS = bleu_counts(tunes, references), bleu_counts(unrelated, references)
    zeros_N = np.zeros(len(tunes))
    valid_N, real_N = (np.array([float(is_valid(tune)) for tune in some]) for some in (tunes, references))
    found = {f"bleu_{n}": measured(counts_NS, floor_NS, 100.0, _bleu_of(n)) for n in ORDERS}
    found["eds"] = measured(eds(tunes, references), eds(unrelated, references), 1.0)
    found["validity"] = measured(valid_N, zeros_N, float(real_N.mean()))
    bars_N, real_bars_N = (np.array([whole_bars(tune) for tune in some]) for some in (tunes, references))
    found["whole_bars"] = measured(bars_N, zeros_N, float(real_bars_N.mean()))
    found["diversity"] = measured(apart(tunes), zeros_N, float(apart(references).mean()))
    found["copying"] = measured(nearest(tunes, training), nearest(references, training), 1.0)
    return found


def need_measures() -> None:
    """Raise MissingExtraError where rapidfuzz or sacrebleu is not installed."""
    _rapidfuzz()
    _bleu()


def eds(tunes: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """1 - lev / max length of each pair, float64 (N,); 1 for equal texts, 0 for one that is empty.

    Raises:
        MissingExtraError: rapidfuzz is not installed.
    """
    distance, _ = _rapidfuzz()
    return np.array([distance.normalized_similarity(a, b) for a, b in zip(tunes, references, strict=True)])


def nearest(tunes: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """The highest `eds` of each tune with one of `others`, float64 (N,)."""
    distance, cdist = _rapidfuzz()
    found_NM = cdist(tunes, others, scorer=distance.normalized_similarity, dtype=np.float64)
    return found_NM.max(1)  # type: ignore[no-any-return]


def apart(tunes: Sequence[str]) -> np.ndarray:
    """1 - the highest `eds` of each tune with another one of them, float64 (N,); 0 where all are equal."""
    distance, cdist = _rapidfuzz()
    found_NN = cdist(tunes, tunes, scorer=distance.normalized_similarity, dtype=np.float64)
    np.fill_diagonal(found_NN, 0)
    return 1 - found_NN.max(1)  # type: ignore[no-any-return]


def bleu_counts(tunes: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Of each pair the runs of 1 to 4 characters that agree, those there are, and both lengths; float64 (N, 10).

    Spaces and line ends do not count. Sums over pairs are what BLEU of a corpus is made of.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    scorer = _bleu()(tokenize="none", max_ngram_order=ORDERS[-1], force=True, effective_order=True)
    rows = []
    for tune, reference in zip(tunes, references, strict=True):
        score = scorer.sentence_score(" ".join(tune), [" ".join(reference)])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * len(ORDERS) + 2)


def bleu(counts_S: np.ndarray, order: int) -> float:
    """BLEU, 0 to 100, of a sum of `bleu_counts`, shape (10,), as sacrebleu computes that of a corpus."""
    numbers, most = [int(count) for count in counts_S], ORDERS[-1]
    correct, total = numbers[:order], numbers[most : most + order]
    score = _bleu().compute_bleu(correct, total, *numbers[2 * most :], smooth_method="exp", max_ngram_order=order)
    return float(score.score)


def measured(
    ours_N: np.ndarray,
    floor_N: np.ndarray,
    ceiling: float,
    value_of: Callable[[np.ndarray], float] | None = None,
) -> Measured:
    """A measure that is a function of a sum over tunes, and its distance from the floor over the same items.

    Args:
        ours_N: what each tune adds, shape (N,) or (N, S).
        floor_N: the same of the floor, for the same items.
        ceiling: of the measure.
        value_of: the measure of a sum, shape (S,); None takes the mean.
    """
    num = len(ours_N)
    value_of = value_of or (lambda sum_: float(sum_) / num)
    draws_RN = paired_draws(num)
    ours_R = np.array([value_of(ours_N[draws].sum(0)) for draws in draws_RN])
    above_R = ours_R - np.array([value_of(floor_N[draws].sum(0)) for draws in draws_RN])
    value, floor = value_of(ours_N.sum(0)), value_of(floor_N.sum(0))
    low, high = np.quantile(above_R, [TAIL, 1 - TAIL])
    return Measured(value, float(ours_R.std(ddof=1)), floor, ceiling, value - floor, float(low), float(high))


def _bleu_of(order: int) -> Callable[[np.ndarray], float]:
    return lambda sum_S: bleu(sum_S, order)


def _rapidfuzz() -> tuple[Any, Any]:
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError as error:
        raise not_installed("A measure of tunes", "rapidfuzz", "music") from error
    return Levenshtein, cdist


def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise not_installed("A measure of tunes", "sacrebleu", "music") from error
    return BLEU
