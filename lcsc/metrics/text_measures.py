"""What is measured of texts that a model wrote for sources: likeness to references, each with its error and its floor.

All but `exact_match` see words and punctuation as sacrebleu's tokenizer `13a` cuts them, capitals included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lcsc.core.errors import EvaluationError, not_installed
from lcsc.metrics.tune_measures import ORDERS, Measured, bleu, measured

#: name -> what rouge-score calls it
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def measure_texts(written: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> dict[str, Measured]:
    """All measures of written texts, by name; higher is better, and floors are those of sources given back unchanged.

    `exact_match`, share of texts equal to their references; `bleu`, of the corpus, 0 to 100 (Papineni et al., 2002, by
    sacrebleu); `sari`, mean over texts, 0 to 100; `rouge_1`, `rouge_2`, `rouge_l`, mean F1 (Lin, 2004, by rouge-score).
    Standard errors are by the bootstrap over texts.

    Args:
        written: by the model, N of them.
        references: N.
        sources: what it read, N.

    Raises:
        EvaluationError: fewer than two texts, or lists of different lengths.
        MissingExtraError: sacrebleu or rouge-score is not installed.
    """
    if len(written) < 2 or not len(written) == len(references) == len(sources):
        raise EvaluationError(
            f"{len(written)} texts, {len(references)} references and {len(sources)} sources cannot be compared: they "
            "must be equally many, at least 2."
        )
    cut = _tokenizer()
    ours, wanted, read = ([cut(text) for text in texts] for texts in (written, references, sources))

    def pair(of: Callable[..., np.ndarray], *more: Any, ceiling: float = 1.0, value_of: Any = None) -> Measured:
        return measured(of(ours, wanted, *more), of(read, wanted, *more), ceiling, value_of)

    same, copied = (
        np.array([float(a == b) for a, b in zip(texts, references, strict=True)]) for texts in (written, sources)
    )
    found = {"exact_match": measured(same, copied, 1.0)}
    found["bleu"] = pair(_bleu_counts, ceiling=100.0, value_of=lambda sum_S: bleu(sum_S, ORDERS[-1]))
    sari_N, floor_N = (
        np.array([sari(s.split(), o.split(), r.split()) for s, o, r in zip(read, some, wanted, strict=True)])
        for some in (ours, read)
    )
    found["sari"] = measured(sari_N, floor_N, 100.0)
    return found | {name: pair(_rouge, key) for name, key in ROUGE.items()}


def need_measures() -> None:
    """Raise MissingExtraError where sacrebleu or rouge-score is not installed."""
    _tokenizer()
    _rouge_scorer()


def sari(source: Sequence[str], output: Sequence[str], reference: Sequence[str]) -> float:
    """SARI of one text with one reference, 0 to 100: what is added, kept and deleted, each as the reference does it.

    Xu et al., 2016 (doi:10.1162/tacl_a_00107), section 4: the mean of F1 of additions, F1 of what is kept and the
    precision of deletions, where precision and recall are means over runs of 1 to 4 tokens. Additions are counted once
    each. Where there is nothing to add, keep or delete, and nothing was, 0 / 0 is 1, so that the reference itself gets
    100. The authors' script takes the mean of F1 over the runs in place of the F1 of means.

    No kept package has it: sacrebleu, torchmetrics and rouge-score do not, `evaluate` fetches its code when it runs,
    and EASSE is not published.
    """
    rows_43 = np.array([_sari_rates(*(_runs(tokens, n) for tokens in (source, output, reference))) for n in ORDERS])
    add, keep = (_f1(*rows_43[:, i : i + 2].mean(0)) for i in (0, 2))
    return float(100 * (add + keep + rows_43[:, 4].mean()) / 3)


def _sari_rates(given: Counter[Any], ours: Counter[Any], wanted: Counter[Any]) -> tuple[float, ...]:
    """Precision and recall of additions, of what is kept, and precision of deletions, of runs of one length."""
    added, to_add = set(ours) - set(given), set(wanted) - set(given)
    right = len(added & to_add)
    kept, to_keep = given & ours, given & wanted
    stayed = (kept & to_keep).total()
    deleted, to_delete = given - ours, given - wanted
    gone = (deleted & to_delete).total()
    return (
        _rate(right, len(added)),
        _rate(right, len(to_add)),
        _rate(stayed, kept.total()),
        _rate(stayed, to_keep.total()),
        _rate(gone, deleted.total()),
    )


def _runs(tokens: Sequence[str], n: int) -> Counter[Any]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bleu_counts(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What each pair adds to BLEU of the corpus, float64 (N, 10); see `lcsc.metrics.tune_measures.bleu`."""
    scorer = _sacrebleu().metrics.BLEU(tokenize="none", force=True)
    rows = []
    for text, reference in zip(texts, references, strict=True):
        score = scorer.corpus_score([text], [[reference]])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.float64)


def _rouge(texts: Sequence[str], references: Sequence[str], key: str) -> np.ndarray:
    scorer = _rouge_scorer()
    return np.array(
        [scorer.score(reference, text)[key].fmeasure for text, reference in zip(texts, references, strict=True)]
    )


class _Words:
    """rouge-score's own tokenizer would drop capitals and punctuation."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return text.split()


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise not_installed("A measure of texts", "rouge-score", "seq2seq") from error
    return RougeScorer(list(ROUGE.values()), tokenizer=_Words())


def _tokenizer() -> Callable[[str], str]:
    _sacrebleu()
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()  # type: ignore[no-any-return]


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise not_installed("A measure of texts", "sacrebleu", "seq2seq") from error
    return sacrebleu
