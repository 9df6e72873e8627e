"""The hybrid: when it changes over, what the black box sees, what it hands over, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.core.space import Box, SearchSpace
from lcsc.searchers.base import Start, Task
from lcsc.searchers.hybrid import fall_p_value

SPACE = SearchSpace((Box("z", 4, scale=0.5),))
TARGET = np.linspace(-1, 1, 4)


def start(num_trials=100, space=SPACE, begin=(0.0,) * 4, **settings):
    task = Task(space, num_trials, 3, (Start(np.array(begin), 1.0, "here"),), no_gradient=None)
    return build("searcher", "hybrid", **settings).start(task)


def drive(session, num, value, slope=lambda v: 2 * (v - TARGET)):
    """Proposals and the values told; `value` gets turn and vector."""
    proposals, values = [], []
    for turn in range(num):
        proposals.append(session.ask())
        values.append(float(value(turn, proposals[-1].vector)))
        vector = proposals[-1].vector
        session.tell(proposals[-1].uid, values[-1], slope(vector) if proposals[-1].gradient else None)
    return proposals, values


def bowl(_, vector):
    return ((vector - TARGET) ** 2).sum() + 1


def test_too_few_images_are_refused_at_the_start():
    task = Task(SPACE, 10, 0, no_gradient=None, min_images=20)
    with pytest.raises(ConfigError, match=r"`searcher\.num_images` is 19: too few images .* at least 20\."):
        build("searcher", "hybrid", num_images=19).start(task)
    build("searcher", "hybrid", num_images=20).start(task)


def test_p_value_is_welchs():
    rng = np.random.default_rng(0)
    for size, shift, spread in [(5, 0.0, 1.0), (20, 0.5, 3.0), (20, -0.5, 0.1), (40, 2.0, 1.0)]:
        before, after = rng.normal(size=size), rng.normal(-shift, spread, size=size)
        wanted = scipy.stats.ttest_ind(before, after, equal_var=False, alternative="greater").pvalue
        assert fall_p_value(before, after) == pytest.approx(wanted, rel=1e-9)
    assert fall_p_value([2.0, 2.0], [1.0, 1.0]) == 0
    assert fall_p_value([1.0, 1.0], [1.0, 1.0]) == 1


def changed_at(proposals):
    flags = [proposal.gradient for proposal in proposals]
    place = flags.index(False) if False in flags else len(flags)
    assert flags == [True] * place + [False] * (len(flags) - place)
    return place


def test_values_that_do_not_fall_end_the_descent():
    noise = np.random.default_rng(0).normal(size=100)
    flat, _ = drive(start(patience=10), 60, lambda turn, _: 5 + noise[turn])
    assert changed_at(flat) == 20
    steady, _ = drive(start(patience=10), 100, lambda turn, _: 5 - turn + noise[turn])
    assert changed_at(steady) == 70  # the largest share of the budget
    late, _ = drive(start(patience=10), 60, lambda turn, _: max(5 - turn, -20) + noise[turn])
    assert changed_at(late) == 50  # 30-39 against 40-49; 20-29 against 30-39 still fell


def test_false_stalls_are_as_rare_as_the_level_says():
    rng, fell = np.random.default_rng(0), 0
    for _ in range(400):  # values without a trend: the fall is significant in `level` of the cases
        fell += fall_p_value(rng.normal(size=20), rng.normal(size=20)) <= 0.05
    assert scipy.stats.binomtest(int(fell), 400, 0.05).pvalue > 1e-3


def test_broken_candidates_say_nothing_about_a_stall():
    session = start(patience=5)
    for _ in range(40):
        proposal = session.ask()
        assert proposal.gradient
        session.tell(proposal.uid, 7.0, None)


def test_what_the_black_box_sees():
    session = start(most=0.4, num_images=1000, noise="fresh", sigma0=0.2)
    descent, _ = drive(session, 40, bowl)
    assert [proposal.block for proposal in descent] == list(range(40))
    assert {proposal.num_images for proposal in descent} == {None}
    average = session.best()
    found, _ = drive(session, 60, bowl)
    assert [proposal.uid for proposal in found] == list(range(40, 100))
    assert {(proposal.gradient, proposal.block, proposal.num_images) for proposal in found} == {(False, None, 1000)}
    assert np.array_equal(found[0].vector, average)
    cma = build("searcher", "cma", sigma0=0.2, warm_start=False).start(
        Task(SPACE, 60, 3, (Start(average, 1.0, "average"),))
    )
    cma.suggest(average)
    wanted, _ = drive(cma, 60, bowl)
    assert [p.vector.tobytes() for p in found] == [p.vector.tobytes() for p in wanted]


def test_the_descent_is_that_of_gradient():
    settings = {"step_size": 0.1, "hold": 0.2, "noise": "rotating"}
    found, _ = drive(start(100, most=0.5, **settings), 50, bowl)
    task = Task(SPACE, 50, 3, (Start(np.zeros(4), 1.0, "here"),), no_gradient=None)
    wanted, _ = drive(build("searcher", "gradient", **settings).start(task), 50, bowl)
    assert [p.vector.tobytes() for p in found] == [p.vector.tobytes() for p in wanted]


def test_the_black_box_goes_where_the_derivative_does_not_lead():
    session = start(120, most=0.4)
    _, values = drive(session, 120, bowl, slope=lambda v: 2 * (v - TARGET - 0.3))  # of another minimum
    assert values[48] == pytest.approx(1 + 4 * 0.3**2, rel=0.2)
    assert min(values[48:]) < 1.1
    assert bowl(0, session.best()) == min(values[48:])


def test_finalists_are_of_both_kinds():
    session = start(most=0.4)
    assert [label for label, _ in session.finalists(4)] == ["last iterate"]
    drive(session, 40, bowl)
    means = ["mean of 20 iterates", "mean of 10 iterates", "mean of 5 iterates", "last iterate"]
    assert [label for label, _ in session.finalists(9)] == means
    proposals, values = drive(session, 30, lambda turn, v: bowl(0, v) - turn / 10)
    labels = dict(session.finalists(4))
    assert len(labels) == 4
    assert [label for label in labels if "iterate" in label] == means[:2]
    for label in set(labels) - set(means):
        place = int(label.split()[-1]) - 40
        assert label == f"black-box trial {place + 40}"
        assert np.array_equal(proposals[place].vector, labels[label])
        assert values[place] <= sorted(values)[1]
    assert [label for label, _ in session.finalists(1)] == [f"black-box trial {40 + int(np.argmin(values))}"]
    assert len(session.finalists(30)) == 30


def test_the_average_it_began_with_is_named_and_not_listed_twice():
    session = start(most=0.4)
    drive(session, 40, bowl)
    drive(session, 10, lambda turn, _: turn)  # nothing is as good as the first
    finalists = session.finalists(6)
    labels = [label for label, _ in finalists]
    assert labels[:3] == ["descent's average", "black-box trial 41", "black-box trial 42"]
    assert "mean of 10 iterates" not in labels
    assert len({vector.tobytes() for _, vector in finalists}) == len(labels)


def test_the_trust_region_holds_for_both():
    session = start(most=0.3, radius=0.5, sigma0=1.0)
    proposals, _ = drive(session, 60, bowl)
    away = np.array([np.linalg.norm(p.vector) / 0.5 for p in proposals])  # a step of one `scale` counts one
    assert away.max() <= 0.5 * (1 + 1e-12)
    assert (away[30:] > 0.49).sum() > 10


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step_size": 0.0}, "`searcher.step_size` is 0.0"),
        ({"sigma0": 0.0}, "`searcher.sigma0` is 0.0; it must be above 0"),
        ({"num_images": 0}, "`searcher.num_images` is 0"),
        ({"patience": 1}, "`searcher.patience` is 1"),
        ({"most": 0.0}, "`searcher.level` is 0.05 and `most` 0.0"),
        ({"level": 1.0}, "`searcher.level` is 1.0"),
        ({"optimizer": "CMAA"}, "nevergrad has no optimizer `CMAA`. Did you mean `CMA`"),
        ({"space": SearchSpace((Box("a", 1, 0, 1), Box("b", 3)))}, "some boxes have bounds and some have none"),
    ],
)
def test_mistakes_are_named_before_anything_is_scored(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(**settings)


def test_without_a_gradient_it_refuses():
    with pytest.raises(ConfigError, match="searcher `hybrid` needs a derivative, and it is closed. Use searcher=cma"):
        build("searcher", "hybrid").start(Task(SPACE, 5, 0, no_gradient="it is closed"))
