"""Guards: what chance explains is no veto, what it does not is one, and rivals on one noise are paired."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lcsc.bank import CheckpointBank
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.metrics.bootstrap import bootstrap
from lcsc.models.network import build_network, save_network
from lcsc.search.evaluate import Evaluator
from lcsc.search.guards import Watch

NUM_PAIRS, NUM_BLOCKS = 400, 20


@dataclass(frozen=True)
class Mean:
    """The mean of the values as a metric, as far as a bootstrap needs it; a state is (count, sum)."""

    name: str = "kid"
    higher_is_better: bool = False

    def compute_resampled(self, states, reference, counts_RB):
        nums_B, sums_B = np.array(states).T
        return (counts_RB @ sums_B / (counts_RB @ nums_B)).tolist()


@dataclass(frozen=True)
class Guarded:
    other_metrics: tuple = (Mean(), Mean("recall", True))


def row(values_N, key="kid", paired=True):
    """What the search has of a candidate whose `key` is the mean of `values_N`."""
    states = [(1, float(value)) for value in values_N]
    se, drawn = bootstrap(Mean(), states, None, rng=np.random.default_rng(0))
    tail = {"resamples": {key: drawn}} if paired else {}
    return {"others": {key: {"value": float(np.mean(values_N)), "se": se}}, **tail}


def veto_rate(gap, share, paired=True, key="kid", sign=1, common=0.8):
    """Share of vetoes where ours is worse by `gap`, in units of a score's standard error around a mean of half one."""
    rng, vetoes = np.random.default_rng(0), 0
    for _ in range(NUM_PAIRS):
        shared_N, own_N, other_N = rng.normal(size=(3, NUM_BLOCKS)) * np.sqrt(NUM_BLOCKS)
        rest = np.sqrt(1 - common**2)
        watch = Watch(Guarded(), {key: share})
        watch.rival = watch.judged(row(0.5 + common * shared_N + rest * other_N, key, paired))
        ours = watch.judged(row(0.5 + sign * gap + common * shared_N + rest * own_N, key, paired))
        vetoes += "vetoed" in ours
        assert "resamples" not in ours
    return vetoes / NUM_PAIRS


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("paired", [True, False])
def test_equal_candidates_are_not_vetoed_by_chance(share, paired):
    """Near zero a share of the value is nothing; 2 standard errors let 2.3 % through, 20 blocks 3 %."""
    assert veto_rate(0.0, share, paired) < 0.05


@pytest.mark.parametrize(("key", "sign"), [("kid", 1), ("recall", -1)])
def test_a_truly_worse_candidate_is_vetoed(key, sign):
    assert veto_rate(4.0, 0.0, key=key, sign=sign) > 0.99
    assert veto_rate(4.0, 0.0, key=key, sign=-sign) == 0  # it is better


def test_pairs_see_what_independent_scores_cannot():
    assert veto_rate(1.0, 0.0, common=0.98) > 0.9
    assert veto_rate(1.0, 0.0, paired=False, common=0.98) == 0


def test_a_score_without_an_error_is_compared_as_it_stands():
    watch = Watch(Guarded(), {"kid": 0.5})
    watch.rival = {"others": {"kid": {"value": 1.0, "se": None}}}
    assert "vetoed" not in watch.judged({"others": {"kid": {"value": 1.5, "se": None}}})
    judged = watch.judged({"others": {"kid": {"value": 1.51, "se": None}}})
    assert judged["vetoed"] == "`kid` is 1.51, the best baseline's 1; 0.5 of it is allowed, and 0 for chance"


@pytest.mark.parametrize("name", ["sample_quality", "fid_nfe"])
def test_objectives_tell_resamples_that_pair_up(tmp_path, name):
    net = build_network({"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}})
    for step in (1, 2):
        for parameter in net.parameters():
            parameter.data += 0.2
        save_network(net, tmp_path / f"checkpoint-{step}" / "unet")
    kinds = {"model": "direct", "sampler": "euler", "dataset": "gaussian", "metric": "fid_pixels"}
    parts = {kind: build(kind, part) for kind, part in kinds.items()}
    settings = {"nfe": [1, 2]} if name == "fid_nfe" else {}
    objective = build("objective", name, **parts, other_metrics=(build("metric", "kid_pixels"),), **settings)
    bank, operator = CheckpointBank.open(tmp_path), build("operator", "linear")
    evaluator = Evaluator(bank, operator, objective, operator.space(bank), 0)
    keys = ["kid_pixels@1", "kid_pixels@2"] if settings else ["kid_pixels"]
    found = [
        evaluator.score(np.array([z]), Purpose.SELECT, range(100), full=True, resamples=True) for z in (0.0, 0.0, 0.1)
    ]
    for key in keys:
        drawn = np.array([one["resamples"][key] for one in found])
        assert np.array_equal(drawn[0], drawn[1])
        assert drawn.std(1, ddof=1) == pytest.approx([one["others"][key]["se"] for one in found], rel=1e-12)
        assert (drawn[0] - drawn[2]).std(ddof=1) < 0.5 * drawn[0].std(ddof=1)  # the same images, slightly moved
    assert "resamples" not in evaluator.score(np.zeros(1), Purpose.SELECT, range(100), full=True)
