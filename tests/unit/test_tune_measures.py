"""Measures of generated tunes against the libraries and hand-made cases."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

from lcsc.core.errors import EvaluationError, MissingExtraError
from lcsc.metrics.tune_measures import apart, bleu, bleu_counts, eds, measure_tunes, measured, nearest
from lcsc.music.check import problems
from lcsc.music.compose import compose

TUNES = [compose(np.random.default_rng(i), i).abc for i in range(24)]


def valid(abc):
    return not problems(abc)


def test_eds_is_what_the_paper_says():
    assert eds(["kitten", "", "a", "ab"], ["sitting", "a", "", "ab"]).tolist() == pytest.approx([4 / 7, 0, 0, 1])
    ours, theirs = eds(TUNES, TUNES[1:] + TUNES[:1]), eds(TUNES[1:] + TUNES[:1], TUNES)
    assert np.array_equal(ours, theirs)
    for value, (a, b) in zip(ours, zip(TUNES, TUNES[1:] + TUNES[:1], strict=True), strict=True):
        assert value == pytest.approx(1 - Levenshtein.distance(a, b) / max(len(a), len(b)), abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_is_sacrebleus_of_space_joined_characters(order):
    ours, theirs = TUNES[:12], TUNES[12:]
    library = BLEU(tokenize="none", max_ngram_order=order, force=True)
    joined = ([" ".join(tune) for tune in some] for some in (ours, theirs))
    wanted = library.corpus_score(next(joined), [next(joined)]).score
    assert bleu(bleu_counts(ours, theirs).sum(0), order) == pytest.approx(wanted, abs=1e-9)
    assert 10 < wanted < 100
    assert bleu(bleu_counts(ours, ours).sum(0), order) == pytest.approx(100, abs=1e-9)
    # no run agrees, and a tune of nothing
    assert bleu(bleu_counts(["xy", ""], ["ab", "ab"]).sum(0), order) == 0


def test_likeness_to_others():
    assert nearest(["abcd", "zz"], ["abcx", "q", "abcd"]).tolist() == [1, 0]
    assert apart(["abcd", "abcx", "zzzz"]).tolist() == pytest.approx([0.25, 0.25, 1])
    assert apart(["a", "a"]).tolist() == [0, 0]


def test_the_scale_of_each_measure():
    real, other, train = TUNES[:8], TUNES[8:16], TUNES[16:]
    perfect = measure_tunes(real, real, other, train, valid)
    assert [perfect[name].value for name in ("bleu_1", "bleu_4", "eds", "validity")] == pytest.approx([100, 100, 1, 1])
    assert perfect["diversity"].value == perfect["diversity"].ceiling == pytest.approx(apart(real).mean())
    assert perfect["copying"].value == perfect["copying"].floor == pytest.approx(nearest(real, train).mean())
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "eds", "validity", "diversity"):
        assert perfect[name].ceiling == pytest.approx(perfect[name].value)
        assert perfect[name].floor < perfect[name].value
        assert perfect[name].low > 0
    aimless = measure_tunes(other, real, other, train, valid)
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "eds"):
        found = aimless[name]
        assert (found.value, found.above, found.low, found.high) == (found.floor, 0, 0, 0)
        assert found.se > 0
    copies = measure_tunes([train[0]] * 8, real, other, train, lambda abc: False)
    assert (copies["copying"].value, copies["diversity"].value, copies["validity"].value) == (1, 0, 0)
    assert copies["validity"].ceiling == 0


def test_the_paired_bootstrap_knows_its_standard_error():
    rng = np.random.default_rng(0)
    floor = rng.normal(size=200)
    ours = floor + 0.3 + 0.1 * rng.normal(size=200)
    found = measured(ours, floor, 9.0)
    assert found.value == pytest.approx(ours.mean())
    assert found.above == pytest.approx((ours - floor).mean())
    assert found.se == pytest.approx(ours.std(ddof=1) / 200**0.5, rel=0.15)
    # pairs take the items' own spread out
    wanted = 1.96 * (ours - floor).std(ddof=1) / 200**0.5
    assert (found.high - found.low) / 2 == pytest.approx(wanted, rel=0.15)
    assert found == measured(ours, floor, 9.0)


def test_what_cannot_be_measured_is_said(monkeypatch):
    with pytest.raises(EvaluationError, match="1 tunes, 1 references, 1 unrelated and 1 training tunes cannot be"):
        measure_tunes(["a"], ["a"], ["b"], ["c"], valid)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(MissingExtraError, match=r"needs `rapidfuzz`, which is not installed; .* 'lcsc\[music\]'"):
        eds(["a"], ["a"])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingExtraError, match="needs `sacrebleu`, which is not installed"):
        bleu_counts(["a"], ["a"])
