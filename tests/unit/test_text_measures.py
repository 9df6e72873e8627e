"""Measures of written texts: against their libraries, against hands, and what the ends of their scales are."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from lcsc.core.errors import EvaluationError, MissingExtraError
from lcsc.metrics.text_measures import measure_texts, need_measures, sari

REFERENCES = ["The cat sat on a mat.", "Who goes there?", "A b, c d e"]
WRITTEN = ["The cat sat, on the mat.", "Who goes there?", "a b c"]
SOURCES = ["the cat sat on a mat", "who goes there", "a b c d e"]


class Words:
    def tokenize(self, text):
        return text.split()


def test_they_are_those_of_their_libraries():
    found = measure_texts(WRITTEN, REFERENCES, SOURCES)
    assert found["exact_match"].value == pytest.approx(1 / 3)
    assert found["exact_match"].floor == 0
    assert found["bleu"].value == pytest.approx(corpus_bleu(WRITTEN, [REFERENCES]).score)
    assert found["bleu"].floor == pytest.approx(corpus_bleu(SOURCES, [REFERENCES]).score)
    cut = [
        [text.replace(",", " ,").replace(".", " .").replace("?", " ?") for text in some]
        for some in (WRITTEN, REFERENCES)
    ]
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        scores = [rouge.score(reference, text)[key].fmeasure for text, reference in zip(*cut, strict=True)]
        assert found[name].value == pytest.approx(np.mean(scores))
        assert found[name].se == pytest.approx(np.std(scores) / 3**0.5, rel=0.15)  # the bootstrap's, of three
    # capitals and points count: 3 of 4 tokens of a source differ from `Who goes there ?` in none but `who` and `?`
    assert found["rouge_1"].floor < 0.8


def test_sari_by_hand():
    """I = a b c, O = a b d, R = a c d, runs of one and two tokens; longer ones by the same count.

    | n | added by O | to add | kept by O | to keep | deleted by O | to delete |
    | 1 | d | d | a b | a c | c | b |
    | 2 | bd | ac cd | ab | - | bc | ab bc |
    | 3 | abd | acd | - | - | abc | abc |
    | 4 | - | - | - | - | - | - |
    """
    add_p, add_r = (1 + 0 + 0 + 1) / 4, (1 + 0 + 0 + 1) / 4
    keep_p, keep_r = (1 / 2 + 0 + 1 + 1) / 4, (1 / 2 + 1 + 1 + 1) / 4
    delete = (0 + 1 + 1 + 1) / 4
    wanted = 100 / 3 * (add_p * add_r * 2 / (add_p + add_r) + 2 * keep_p * keep_r / (keep_p + keep_r) + delete)
    assert sari(["a", "b", "c"], ["a", "b", "d"], ["a", "c", "d"]) == pytest.approx(wanted)


def test_sari_counts_repeats_of_what_is_kept_and_deleted():
    """I = a a b, O = a b, R = a a: `a` is kept once of two, and `b` should have gone in place of the other."""
    # n = 1: keep O a b, R a a; right a -> 1/2, 1/2. delete O a, R b -> 0. n = 2: I aa ab, O ab, R aa: keep 0/1, 0/1,
    # delete aa against ab -> 0. n = 3: nothing added or kept, deleted aab as asked -> 1
    keep = (1 / 2 + 0 + 1 + 1) / 4
    assert sari(["a", "a", "b"], ["a", "b"], ["a", "a"]) == pytest.approx(100 / 3 * (1 + keep + (0 + 0 + 1 + 1) / 4))


def test_the_reference_is_perfect_and_an_empty_text_is_not():
    found = measure_texts(REFERENCES, REFERENCES, SOURCES)
    assert {name: measure.value for name, measure in found.items()} == {
        name: pytest.approx(measure.ceiling) for name, measure in found.items()
    }
    nothing = measure_texts(["", "", ""], REFERENCES, SOURCES)
    assert [nothing[name].value for name in ("exact_match", "bleu", "rouge_1", "rouge_l")] == [0, 0, 0, 0]
    assert nothing["sari"].value < 60


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(EvaluationError, match="2 texts, 1 references and 2 sources cannot be compared"):
        measure_texts(["a", "b"], ["a"], ["a", "b"])
    for module, package in (("rouge_score.rouge_scorer", "rouge-score"), ("sacrebleu", "sacrebleu")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(MissingExtraError, match=f"needs `{package}`, which is not installed; .*seq2seq"):
                need_measures()
