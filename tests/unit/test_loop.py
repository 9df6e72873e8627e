"""The loop's promises, on an objective whose every number is known: failures, suspicion, selection, counting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers_line import Line, Plain

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose
from lcsc.core.space import Box, SearchSpace
from lcsc.objectives.base import Score
from lcsc.operators.base import Baseline
from lcsc.search.budget import Budget
from lcsc.search.fitting import fitting_note
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.retry import WINDOW
from lcsc.searchers.base import Proposal, Task


@dataclass
class Scripted(Plain):
    """Distance from the origin, spoilt on purpose."""

    spoil: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    floor_value: float | None = None
    name: str = "distance"
    min_images: int = 2

    def floor(self):
        return self.floor_value

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        index = sum(p is purpose for p, _ in self.calls)
        self.calls.append((purpose, len(images)))
        value = float(np.hypot(*candidate.x)) + 1
        outcome = self.spoil.get((purpose, index), value)
        if isinstance(outcome, Exception):
            raise outcome
        return Score(outcome, len(images), 1, 0.1 if full else None)


def search(tmp_path, objective, num_trials=12, searcher="one_plus_one", **budget):
    tmp_path.mkdir(exist_ok=True)
    budget = Budget(num_trials, 10, **{"num_finalists": 3, "num_images_select": 20, "num_images_report": 30, **budget})
    problem = Problem(None, Line(), build("searcher", searcher), objective, budget, 0)
    with Progress("loop", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        return Search(problem, journal, progress).run(), read_records(tmp_path / "journal.jsonl")[0]


@pytest.mark.parametrize(("name", "told"), [("ladder", True), ("one_plus_one", False)])
def test_batches_that_a_searcher_does_not_fill_are_named(tmp_path, monkeypatch, name, told):
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    search(tmp_path, Scripted(), searcher=name, batch_size=4)
    text = "note: `search.batch_size` 4 counts for nothing: this searcher proposes 1 at a time"
    assert (text in notes) == told


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


BASELINES = 3  # calls with search seeds before the first trial
RIVALS = 3  # calls with select seeds before the first finalist


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "the score is nan"),
        (math.inf, "the score is inf"),
        (-math.inf, "the score is -inf"),
        (EvaluationError("all images are equal"), "all images are equal"),
    ],
)
def test_a_failed_trial_costs_one_evaluation_and_never_wins(tmp_path, bad, reason):
    outcome, records = search(tmp_path, Scripted({(Purpose.SEARCH, BASELINES + 4): bad}))
    failed = of_kind(records, "trial")[4]
    assert (failed["value"], failed["status"], failed["reason"]) == (None, "failed", reason)
    assert outcome.num_failed == 1
    assert outcome.winner["label"] != "trial 4"
    assert "trial 4" not in [record["label"] for record in of_kind(records, "select")]
    assert len(of_kind(records, "trial")) == 12


def test_a_failure_is_told_as_the_worst_value_and_nothing_else(tmp_path, monkeypatch):
    told = []
    from lcsc.searchers.nevergrad import NevergradSession

    real = NevergradSession.tell
    monkeypatch.setattr(
        NevergradSession, "tell", lambda self, uid, value, _: told.append(value) or real(self, uid, value)
    )
    _, records = search(tmp_path, Scripted({(Purpose.SEARCH, BASELINES): math.nan}))
    values = [record["value"] for record in of_kind(records, "trial")]
    worst_baseline = max(record["value"] for record in of_kind(records, "baseline"))
    assert told[0] == worst_baseline == pytest.approx(math.hypot(3, 3) + 1)
    assert told[1:] == values[1:]


def test_better_than_real_data_is_scored_again_and_the_worse_value_counts(tmp_path):
    spoil = {(Purpose.SEARCH, BASELINES + 2): 0.001, (Purpose.RECHECK, 0): 7.5}
    objective = Scripted(spoil, floor_value=0.5)
    outcome, records = search(tmp_path, objective)
    suspect = of_kind(records, "trial")[2]
    assert (suspect["value"], suspect["recheck"]) == (7.5, 7.5)
    assert sum(purpose is Purpose.RECHECK for purpose, _ in objective.calls) == 1
    assert outcome.images_sampled == sum(num for _, num in objective.calls)


def test_a_suspect_that_fails_when_scored_again_has_failed(tmp_path):
    spoil = {(Purpose.SEARCH, BASELINES + 2): 0.001, (Purpose.RECHECK, 0): EvaluationError("collapsed")}
    _, records = search(tmp_path, Scripted(spoil, floor_value=0.5))
    suspect = of_kind(records, "trial")[2]
    assert suspect["status"] == "failed"
    assert suspect["reason"] == "too good (0.001), then: collapsed"
    assert suspect["image_forwards"] == 10  # of the first score; the other failed before it cost anything


def test_twenty_failures_in_a_row_stop_the_search(tmp_path):
    spoil = {(Purpose.SEARCH, BASELINES + i): EvaluationError(f"broken {i}.") for i in range(40)}
    reasons = r"1 x broken 0; 1 x broken 1; 1 x broken 2\. Mend the cause"
    with pytest.raises(EvaluationError, match=rf"20 of the last {WINDOW} trials failed: {reasons}"):
        search(tmp_path, Scripted(spoil), num_trials=40)
    records, _ = read_records(tmp_path / "journal.jsonl")
    assert len(of_kind(records, "trial")) == WINDOW


@pytest.mark.parametrize(
    ("broken", "num_trials", "num_again"),
    [
        ({(Purpose.SEARCH, i) for i in range(BASELINES, 40)}, 30, WINDOW),
        ({(Purpose.SEARCH, i) for i in range(40)}, 30, BASELINES + WINDOW),  # baselines failed by the same cause
        ({(Purpose.SEARCH, i) for i in range(BASELINES + 5, 40)}, 30, WINDOW - 5),  # after some good trials
        ({(Purpose.SEARCH, i) for i in range(BASELINES, 40)}, 7, 7),  # all trials, though they are few
        ({(Purpose.SELECT, i) for i in range(20)}, 7, RIVALS + 3),
        ({(Purpose.REPORT, 1)}, 7, 1),
    ],
)
def test_failures_that_stopped_a_search_are_tried_again(tmp_path, monkeypatch, broken, num_trials, num_again):
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, _ = search(tmp_path / "a", Scripted(), num_trials)
    with pytest.raises(EvaluationError, match=r"disk full\. Mend the cause and run the same line again\.$"):
        search(tmp_path / "b", Scripted(dict.fromkeys(broken, EvaluationError("disk full."))), num_trials)
    assert notes == []
    outcome, _ = search(tmp_path / "b", Scripted(), num_trials)
    assert notes == [f"the last {num_again} steps failed and stopped the search; trying them again"]
    assert outcome == whole
    assert (tmp_path / "b" / "journal.jsonl").read_bytes() == (tmp_path / "a" / "journal.jsonl").read_bytes()


def test_the_winner_is_chosen_on_the_select_seeds_and_reported_on_the_report_seeds(tmp_path):
    # the third of the finalists is the best on the select seeds
    spoil = {
        (Purpose.SELECT, RIVALS): 5.0,
        (Purpose.SELECT, RIVALS + 1): math.nan,
        (Purpose.SELECT, RIVALS + 2): 1.0,
        (Purpose.REPORT, 0): 4.25,
    }
    outcome, records = search(tmp_path, Scripted(spoil))
    finalists = of_kind(records, "select")[RIVALS:]
    ranked = sorted(of_kind(records, "trial"), key=lambda r: (r["value"], r["uid"]))
    labels = [f"trial {record['uid']}" for record in ranked[:3]]
    assert [record["label"] for record in finalists] == labels
    assert [record["label"] for record in of_kind(records, "select")[:RIVALS]] == ["near", "far", "other"]
    assert outcome.winner["label"] == finalists[2]["label"]
    assert outcome.reports[0]["who"] == "best"
    assert (outcome.reports[0]["value"], outcome.reports[0]["se"]) == (4.25, 0.1)
    assert [(r["who"], r["label"]) for r in outcome.reports[1:]] == [("a", "near"), ("b", "other")]


@pytest.mark.parametrize("warm_start", [False, True])
def test_the_searcher_starts_at_the_best_baseline(tmp_path, warm_start):
    budget = Budget(30, 10, num_finalists=2, num_images_select=20, num_images_report=30)
    problem = Problem(None, Line(), build("searcher", "one_plus_one", warm_start=warm_start), Scripted(), budget, 0)
    with Progress("loop", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        Search(problem, journal, progress).run()
    vectors = [record["vector"] for record in of_kind(read_records(tmp_path / "journal.jsonl")[0], "trial")]
    assert (vectors[0] == [1.0, 1.0]) != warm_start  # who has heard its value need not ask
    assert [1.0, 1.0] not in vectors[1:]


def test_images_are_counted_once_also_when_continued(tmp_path):
    objective = Scripted()
    first, records = search(tmp_path, objective)
    assert first.images_sampled == sum(num for _, num in objective.calls) == 3 * 10 + 12 * 10 + 6 * 20 + 3 * 30
    idle = Scripted()
    again, same = search(tmp_path, idle)
    assert idle.calls == []
    assert same == records
    assert again == first


@dataclass(frozen=True)
class Other:
    """A further metric, as far as a guard looks at it."""

    name: str
    higher_is_better: bool
    min_samples: int = 2


@dataclass
class Guarded(Scripted):
    """Scores `variety` (higher is better) and `spread` (lower is better) beside the distance, to 0.001."""

    found: dict = field(default_factory=dict)
    other_metrics: tuple = (Other("variety", True), Other("spread", False))

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        score = super().__call__(candidate, seed=seed, purpose=purpose, images=images, full=full)
        index = sum(p is purpose for p, _ in self.calls) - 1
        rows = {"variety": 0.5, "spread": 2.0} | self.found.get((purpose, index), {})
        return Score(
            score.value, score.num_images, 1, score.se, {k: {"value": v, "se": 0.001} for k, v in rows.items()}
        )


def test_a_guard_vetoes_what_loses_too_much_and_says_so(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    # call 0 is the best baseline
    rows = {RIVALS: {"variety": 0.47}, RIVALS + 1: {"variety": 0.48}, RIVALS + 2: {"spread": 2.3}}
    objective = Guarded(found={(Purpose.SELECT, index): row for index, row in rows.items()})
    objective.spoil = {(Purpose.SELECT, index): value for index, value in enumerate([9.0, 9.5, 9.5, 1.0, 4.0, 2.0])}
    outcome, records = search(tmp_path, objective, guards={"variety": 0.05, "spread": 0.1})
    baseline, _, _, lost, fine, wide = of_kind(records, "select")
    assert baseline["label"] == "near"
    assert lost["vetoed"] == "`variety` is 0.47, the best baseline's 0.5; 0.05 of it is allowed, and 0.0029 for chance"
    assert wide["vetoed"] == "`spread` is 2.3, the best baseline's 2; 0.1 of it is allowed, and 0.003 for chance"
    assert "vetoed" not in fine
    assert "vetoed" not in baseline
    assert outcome.winner["label"] == fine["label"]
    assert fine["others"]["variety"]["value"] == 0.48
    assert notes == [f"{record['label']} is vetoed: {record['vetoed']}" for record in (lost, wide)]
    assert search(tmp_path, Guarded(), guards={"variety": 0.05, "spread": 0.1})[0] == outcome  # replayed


def test_the_best_baseline_is_never_vetoed(tmp_path):
    found = {(Purpose.SELECT, 0): {"variety": 0.5, "spread": -1.0}}  # shares are of the size, also below zero
    found |= {(Purpose.SELECT, RIVALS + i): {"variety": 0.9, "spread": -0.8} for i in range(3)}
    spoil = {(Purpose.SELECT, i): 9.0 + i for i in range(RIVALS)}
    outcome, records = search(tmp_path, Guarded(spoil, found=found), guards={"spread": 0.1})
    assert [("vetoed" in record) for record in of_kind(records, "select")] == [False] * RIVALS + [True] * 3
    assert outcome.winner["label"] == "near"


def test_guards_cost_nothing_where_none_is_set(tmp_path):
    _, records = search(tmp_path, Guarded())
    assert all("others" not in record for record in of_kind(records, "select"))
    assert of_kind(records, "select")[0]["label"] == "near"


def test_a_guard_covers_a_metric_at_all_numbers_of_calls(tmp_path):
    found = {(Purpose.SELECT, 0): {"variety@1": 0.5, "variety@2": 0.5}}
    found |= {(Purpose.SELECT, RIVALS + i): {"variety@1": 0.6, "variety@2": 0.3} for i in range(3)}
    _, records = search(tmp_path, Guarded(found=found), guards={"variety": 0.05})
    assert [record.get("vetoed", "")[:18] for record in of_kind(records, "select")] == [
        *[""] * RIVALS,
        *["`variety@2` is 0.3,"[:18]] * 3,
    ]


def test_guards_without_a_scored_baseline_are_said_to_be_idle(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    monkeypatch.setattr(Line, "baselines", lambda self, bank: [])
    search(tmp_path, Guarded(), guards={"variety": 0.05})
    assert notes == ["note: no baseline could be scored, so `search.guards` has nothing to compare with"]


def test_the_guards_rival_is_the_best_baseline_that_can_be_scored(tmp_path, monkeypatch):
    """A baseline that breaks on the select seeds must not switch the guards off."""
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    broken = EvaluationError("broken.")
    spoil = {(Purpose.SELECT, 0): broken, (Purpose.SELECT, 1): 7.0, (Purpose.SELECT, 2): 6.0}
    found = {(Purpose.SELECT, 1): {"variety": 0.1}, (Purpose.SELECT, 2): {"variety": 0.4}}
    found |= {(Purpose.SELECT, RIVALS + i): {"variety": v} for i, v in enumerate((0.3, 0.39, 0.2))}
    outcome, records = search(tmp_path / "one", Guarded(spoil, found=found), guards={"variety": 0.05})
    rows = of_kind(records, "select")
    assert [row["label"] for row in rows[:RIVALS]] == ["near", "far", "other"]
    assert ["vetoed" in row for row in rows[RIVALS:]] == [True, False, True]  # against 0.4, which is `other`
    assert outcome.winner["label"] == rows[RIVALS + 1]["label"]
    assert [(r["who"], r["label"]) for r in outcome.reports[1:]] == [("a", "far"), ("b", "other")]
    notes.clear()
    all_broken = {(Purpose.SELECT, index): broken for index in range(RIVALS)}
    outcome, _ = search(tmp_path / "all", Guarded(all_broken, found=found), guards={"variety": 0.05})
    assert notes == ["note: no baseline could be scored, so `search.guards` has nothing to compare with"]
    assert outcome.winner["label"].startswith("trial")


def test_families_are_represented_by_their_best_on_the_select_seeds(tmp_path):
    """`near` is ahead on the search seeds by luck; finalists get a second look, and so do baselines."""
    outcome, records = search(tmp_path, Scripted({(Purpose.SELECT, 0): 8.0, (Purpose.SELECT, 1): 0.5}))
    assert [(r["who"], r["label"]) for r in outcome.reports] == [("best", "far"), ("a", "far"), ("b", "other")]
    assert outcome.winner["value"] == 0.5
    assert outcome.image_forwards == outcome.images_sampled == 3 * 10 + 12 * 10 + 6 * 20 + 3 * 30
    _, records = search(tmp_path / "one", Scripted(), num_finalists=1)
    assert [record["label"] for record in of_kind(records, "select")][:2] == ["near", "other"]


def test_a_member_of_two_families_is_scored_once(tmp_path, monkeypatch):
    rows = [Baseline("a", "mine", {"x": [1.0, 1.0]}), Baseline("b", "yours", {"x": [1.0, 1.0]})]
    monkeypatch.setattr(Line, "baselines", lambda self, bank: rows)
    outcome, records = search(tmp_path, Scripted())
    assert len(of_kind(records, "select")) == 1 + 3
    assert [(r["who"], r["label"]) for r in outcome.reports[1:]] == [("a", "mine"), ("b", "yours")]


def test_a_finalist_that_is_a_baseline_is_not_scored_again(tmp_path, monkeypatch):
    session = type(build("searcher", "one_plus_one").start(Task(Line().space(None), 1, 0)))
    monkeypatch.setattr(session, "finalists", lambda self, count: [("mine", np.array([1.0, 1.0]))])
    outcome, records = search(tmp_path, Scripted())
    assert len(of_kind(records, "select")) == RIVALS
    assert outcome.winner["label"] == "near"


@pytest.mark.parametrize("same", [False, True])
def test_the_progress_plan_is_what_is_done(tmp_path, monkeypatch, same):
    if same:  # families that share a member
        rows = [Baseline("a", "mine", {"x": [1.0, 1.0]}), Baseline("b", "yours", {"x": [1.0, 1.0]})]
        monkeypatch.setattr(Line, "baselines", lambda self, bank: rows)
    plans, steps = [], []
    monkeypatch.setattr(Progress, "expect", lambda self, total: plans.append(total))
    monkeypatch.setattr(Progress, "step", lambda self, *args: steps.append(args))
    search(tmp_path, Scripted())
    assert plans[-1] == len(steps)


def test_a_search_whose_finalists_all_fail_says_so(tmp_path):
    spoil = {(Purpose.SELECT, index): EvaluationError(f"broken {index}.") for index in range(RIVALS + 3)}
    with pytest.raises(EvaluationError, match=r"no finalist could be scored on the select seeds: broken 5\."):
        search(tmp_path, Scripted(spoil))


def test_unknown_guards_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"names `varety`, .* \(`spread`, `variety`\)\. Did you mean `variety`"):
        search(tmp_path, Guarded(), guards={"varety": 0.05})
    with pytest.raises(ConfigError, match=r"names `kid`, which is none of the `other_metrics` \(none is configured\)"):
        search(tmp_path, Scripted(), guards={"kid": 0.05})


def test_a_searcher_hears_how_many_images_a_score_takes(tmp_path):
    problem = Problem(None, Line(), build("searcher", "cma"), Scripted(min_images=7), Budget(3, 10), 0)
    assert problem.task().min_images == 7


def test_budgets_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"`search\.num_trials` is 0; it must be at least 1"):
        Budget(num_trials=0)
    with pytest.raises(ConfigError, match=r"`search\.num_images_select` is 1: too few images for `distance`"):
        search(tmp_path, Scripted(), num_images_select=1)


@dataclass
class Knob(Scripted):
    """An objective with a setting of its own, best at 1, that is worth more than the weights."""

    knob: float = 0.0

    def space(self):
        return SearchSpace((Box("knob", 1, level=1),))

    def at(self, point):
        return Knob(self.spoil, self.calls, self.floor_value, knob=float(point["knob"][0]))

    def __call__(self, candidate, **how):
        score = super().__call__(candidate, **how)
        return Score(score.value + 10 * (self.knob - 1) ** 2, score.num_images, 1, score.se)


def test_baselines_get_the_winners_settings_of_the_objective(tmp_path):
    outcome, records = search(tmp_path, Knob(), num_trials=60)
    knob = outcome.winner["vector"][2]
    assert knob > 0.1
    _, first, second = outcome.reports
    assert (first["label"], second["label"]) == ("near, settings of the winner", "other, settings of the winner")
    assert (first["vector"], second["vector"]) == ([1.0, 1.0, knob], [2.0, 2.0, knob])
    assert first["value"] == pytest.approx(math.hypot(1, 1) + 1 + 10 * (knob - 1) ** 2)
    before = [record["vector"][2] for record in of_kind(records, "baseline")]
    assert before == [0, 0, 0, knob, knob, knob]


def test_a_winner_with_idle_settings_costs_no_second_round_of_baselines(tmp_path):
    outcome, records = search(tmp_path, Knob({(Purpose.SELECT, RIVALS + i): 99.0 for i in range(3)}))
    assert outcome.winner["label"] == "near"
    assert len(of_kind(records, "baseline")) == 3


@pytest.mark.parametrize(
    ("name", "settings", "num_images", "noise"),
    [
        ("cma", {}, 199, "199"),
        ("cma", {}, 200, None),  # 100 for each of 2 coefficients
        ("lcsc_evolution", {}, 50, "50"),
        ("gradient", {}, 10, None),  # fresh noise cannot be fitted
        ("gradient", {"noise": "common"}, 10, "10"),
        ("gradient", {"noise": "rotating", "num_blocks": 3}, 66, "198"),
        ("gradient", {"noise": "rotating", "num_blocks": 4}, 50, None),
        ("lbfgs", {}, 10, "10"),
        ("auto", {}, 10, None),
    ],
)
def test_noise_of_too_few_images_is_said_where_it_is_shared(name, settings, num_images, noise):
    searcher, objective = build("searcher", name, **settings), Guarded()
    task = Task(SearchSpace((Box("x", 2),)), 20, 0, no_gradient=None)
    proposal = searcher.start(task).ask()
    assert fitting_note(searcher, objective, proposal, num_images, 2) is None  # it has no data set
    objective.dataset = "scans"
    text = fitting_note(searcher, objective, proposal, num_images, 2)
    assert (text is None) == (noise is None)
    if text:
        assert text.startswith(f"note: trials share the noise of {noise} images for 2 coefficients, so their scores fl")
        assert ("`searcher.num_blocks` until there are 200" in text) == (settings.get("noise") == "rotating")


def test_a_hybrid_says_it_when_it_comes_to_shared_noise(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    objective = Scripted()
    objective.dataset = "scans"
    problem = Problem(None, Line(), build("searcher", "cma"), objective, Budget(3, 10), 0)
    with Progress("loop", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        found = Search(problem, journal, progress)
        for block in (0, 1, None, None):
            found.say_fitting(Proposal(0, np.zeros(2), gradient=block is not None, block=block))
            assert len(notes) == (block is None)


def test_auto_says_what_it_chose(tmp_path):
    budget = Budget(6, 10, num_finalists=2, num_images_select=20, num_images_report=30)
    problem = Problem(None, Line(), build("searcher", "auto"), Scripted(), budget, 0)
    for _ in range(2):  # also when replayed
        with Progress("loop", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
            outcome = Search(problem, journal, progress).run()
        assert outcome.searcher_ran == "cma"
    (record,) = of_kind(read_records(tmp_path / "journal.jsonl")[0], "account")
    assert record["lines"] == ["auto chose cma: objective `distance` has no derivative"]
    session = build("searcher", "auto").start(Task(SearchSpace((Box("x", 2),)), 6, 0, no_gradient=None))
    assert session.account() == ["auto chose gradient: the problem has a derivative"]
    assert session.ask().gradient


def test_what_a_session_says_about_its_way_is_kept(tmp_path):
    budget = Budget(24, 10, num_finalists=2, num_images_select=20, num_images_report=30)
    searcher = build("searcher", "ladder", num_blocks=2, line_trials=1)
    problem = Problem(None, Line(), searcher, Scripted(), budget, 0)
    with Progress("loop", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        Search(problem, journal, progress).run()
    (record,) = of_kind(read_records(tmp_path / "journal.jsonl")[0], "account")
    assert record["lines"][-1].startswith("full: ")
