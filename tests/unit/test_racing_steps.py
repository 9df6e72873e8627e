"""Races over training steps: who is dropped, after how many, what it cost, and what a race may never change."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers_line import Line, Plain, Weights

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.metrics.paired import paired_draws
from lcsc.objectives.base import Blocks, Score
from lcsc.report.races import dropped_note
from lcsc.search.budget import Budget, check_budget
from lcsc.search.evaluate import Evaluator
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.racing import Racer

BATCH = 4


@dataclass
class Learner(Plain):
    """A loss that training brings down: what a point is apart from the origin counts the more, the longer it goes."""

    num_steps: int = 10
    calls: list = field(default_factory=list)
    name: str = "learner"

    def losses(self, candidate, seed, purpose, images, steps):
        noise_N = SeedRange(seed, purpose).normal(images, (1,))[:, 0].astype(float)
        return 3 / (1 + steps) + 0.1 * steps * float(np.square(candidate.x).sum()) + 0.1 * noise_N

    def leg_states(self, candidate, *, seed, purpose, images, num_blocks, steps):
        self.calls.append((tuple(candidate.x), images, steps))
        blocks = np.array_split(self.losses(candidate, seed, purpose, images, steps.stop), num_blocks)
        states = tuple(np.array([len(block), block.sum()]) for block in blocks)
        return Blocks(states, len(images) + 3 * BATCH * len(steps))

    def block_states(self, candidate, *, seed, purpose, images, num_blocks):
        steps = range(self.num_steps)
        return self.leg_states(candidate, seed=seed, purpose=purpose, images=images, num_blocks=num_blocks, steps=steps)

    def merge_states(self, states):
        return np.sum(states, axis=0)

    def value_of(self, states, purpose):
        count, total = self.merge_states(states)
        return float(total / count)

    def resampled(self, states, purpose):
        counts_R, totals_R = np.stack(states)[paired_draws(len(states))].sum(1).T
        return totals_R / counts_R

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        losses_N = self.losses(candidate, seed, purpose, images, self.num_steps)
        return Score(float(losses_N.mean()), len(images), 1, 0.1 if full else None, further=3 * BATCH * self.num_steps)


def evaluator(objective):
    operator = Line()
    return Evaluator(None, operator, objective, operator.space(None), 0)


def test_a_candidate_that_is_behind_is_dropped_and_paid_as_far_as_it_went():
    objective = Learner()
    racer = Racer(evaluator(objective), (40, 40, 40), 0.05, (2, 5, 10))
    good, bad = np.array([0.1, 0.0]), np.array([0.3, 0.3])
    best = racer.full(good)
    assert best["image_forwards"] == 3 * 40 + 3 * BATCH * 10
    assert "dropped_at" not in best
    assert best["value"] == pytest.approx(
        objective(Weights(good), seed=0, purpose=Purpose.SEARCH, images=range(40)).value
    )
    lost = racer.race(bad, (tuple(good), best["value"]))
    assert (lost["dropped_at"], lost["dropped_after"], lost["images"]) == (40, 2, 40)
    assert lost["image_forwards"] == 40 + 3 * BATCH * 2
    # the best one's full score, and what the other was behind on the same images after as many steps
    assert lost["value"] == pytest.approx(best["value"] + 0.1 * 2 * (0.18 - 0.01))
    assert [call[2] for call in objective.calls] == [range(2), range(2, 5), range(5, 10), range(2)]
    near = np.array([0.0, 0.0])
    kept = racer.race(near, (tuple(good), best["value"]))
    assert kept == racer.full(near)


def search(folder, objective, **budget):
    given = {"num_trials": 40, "num_images": 40, "num_images_select": 60, "num_images_report": 60, **budget}
    searcher = build("searcher", "lcsc_evolution", mutation=0.9, mutation_scale=0.4)
    folder.mkdir(exist_ok=True)
    with Progress("race", 0, quiet=True) as progress, Journal(folder, print) as journal:
        outcome = Search(Problem(None, Line(), searcher, objective, Budget(**given), 0), journal, progress).run()
    return outcome, [r for r in read_records(folder / "journal.jsonl")[0] if r["kind"] == "trial"]


def test_a_search_says_what_it_dropped(tmp_path):
    whole, plain = search(tmp_path / "plain", Learner())
    outcome, trials = search(tmp_path / "raced", Learner(), race_steps=[2, 5])
    assert outcome.reports[0]["value"] < whole.reports[1]["value"]
    dropped = [trial for trial in trials if "dropped_at" in trial]
    counts = [sum(trial["dropped_after"] == step for trial in dropped) for step in (2, 5)]
    assert sum(counts) == len(dropped) > 10
    spent = sum(trial["image_forwards"] for trial in trials)
    assert spent < 0.7 * sum(trial["image_forwards"] for trial in plain)
    (note,) = dropped_note(trials)
    told = ", ".join(f"{num} after {step}" for num, step in zip(counts, (2, 5), strict=True) if num)
    assert note == f"race: {len(dropped)} of 40 trials were dropped behind the best so far: {told} training steps"
    assert dropped_note(plain) == ()
    by_images = dropped_note([{"dropped_at": 40}, {"dropped_at": 40}, {"value": 1.0}])
    assert by_images == ("race: 2 of 3 trials were dropped behind the best so far: 2 at 40 images",)
    again, _ = search(tmp_path / "raced", Learner(), race_steps=[2, 5])
    assert again.winner == outcome.winner


@pytest.mark.parametrize(
    ("budget", "objective", "message"),
    [
        ({"race_steps": [2, 2]}, Learner(), r"`search.race_steps` is \[2, 2\]; it must increase, from above 0"),
        ({"race_steps": [0]}, Learner(), r"`search.race_steps` is \[0\]; it must increase"),
        ({"race_steps": [2], "prefixes": [40]}, Learner(), "a race is over images or over training steps. Leave one"),
        ({"race_steps": [10]}, Learner(), r"all must be below `objective.num_steps`, which is 10"),
        ({"race_steps": [2]}, Plain(), "objective `distance` trains no candidates"),
        ({"race_steps": [2], "num_images": 19}, Learner(), "`search.num_images` is 19; a race needs at least 20"),
        ({"race_steps": [2], "penalty": 1.0}, Learner(), "knows no distance of weights"),
    ],
)
def test_what_cannot_race_is_refused(budget, objective, message):
    with pytest.raises(ConfigError, match=message):
        check_budget(objective, Line(), Budget(**budget))
