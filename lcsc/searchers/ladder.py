"""Nested families of combinations, climbed as long as the gain is significant on noise that no search has seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import register
from lcsc.searchers.base import Proposal, Searcher, Session, Start, Task, check_told
from lcsc.searchers.gradient import Gradient
from lcsc.searchers.nevergrad import Nevergrad
from lcsc.searchers.rungs import Family, Rung, families, lines, next_t, paired_test, scored_rungs

#: Share of all trials that the comparison of the scored rungs, and the extrapolation with its test, may cost.
SCORED_SHARE = EXTRAPOLATION_SHARE = 0.15
#: How what is left after these is divided among the searched rungs that exist, tests included.
SHARES = {"low rank": 0.375, "full": 0.375, "groups": 0.25}
#: Fewest noise blocks on which the scored rungs are compared.
LEAST_BLOCKS = 3
#: Fewest trials on a line, and fewest trials of a searched rung as a multiple of its test's.
MIN_LINE_TRIALS, MIN_SEARCH = 3, 2
#: Noise blocks from here on are for tests; descents number theirs by trials and stay far below.
TEST_BLOCKS = 10**6

Heard = tuple[float, np.ndarray | None]
Steps = Generator[Proposal, Heard | None, None]


@dataclass(eq=False)
class _Descent:
    """A search of one family around a base point."""

    family: Family
    base: np.ndarray
    session: Session
    first_block: int

    def lift(self, floats: np.ndarray) -> np.ndarray:
        vector = self.base.copy()
        vector[self.family.index] = floats
        return vector

    def step(self) -> Steps:
        """One trial."""
        sub = self.session.ask()
        block = None if sub.block is None else self.first_block + sub.block  # no two descents see the same noise
        told = yield dataclasses.replace(sub, vector=self.lift(sub.vector), block=block)
        if told is not None:
            value, gradient = told
            self.session.tell(sub.uid, value, None if gradient is None else np.asarray(gradient)[self.family.index])

    def best(self) -> np.ndarray:
        return self.lift(self.session.best())

    def averages(self, count: int) -> list[tuple[str, np.ndarray]]:
        found = self.session.finalists(count) or []
        return [(f"rung {self.family.name}, {label}", self.lift(floats)) for label, floats in found]


class _Session:
    """The climb is a generator that yields proposals and is sent what was told about each, None for nothing."""

    def __init__(self, settings: Ladder, task: Task) -> None:
        self._settings, self._task = settings, task
        self._families = families(task.space, settings.rank, SHARES)
        self._scored = scored_rungs(task.starts) or [Rung("start", "", task.begin())]
        self._rungs: list[Rung] = []
        self._champion = self._scored[0]
        self._descents: dict[str, _Descent] = {}
        self._continued = False
        self._asked, self._num_tests, self._open = 0, 0, -1
        for family in self._families:  # what cannot be searched is said now, not after an hour
            self._start(family, 1)
        self._steps = self._climb()
        self._next = next(self._steps)

    def ask(self) -> Proposal:
        if self._open >= 0:  # nobody could say anything about the last one
            self._next = self._steps.send(None)
        self._open = self._asked
        self._asked += 1
        return dataclasses.replace(self._next, uid=self._open)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        if uid != self._open:
            raise EvaluationError(f"the ladder waits for trial {self._open} and was told about {uid}; tell each once.")
        self._open = -1
        self._next = self._steps.send((float(value), gradient))

    def best(self) -> np.ndarray:
        """The champion."""
        return self._champion.vector

    def finalists(self, count: int) -> list[tuple[str, np.ndarray]]:
        """The champion, the other points that the ladder made, other averages of the champion's descent, the rest."""
        champion, given = self._champion, {rung.name for rung in self._scored}
        seen = [rung for rung in self._rungs[::-1] if rung.verdict or rung.name in self._descents]
        rows = [(_label(rung), rung.vector) for rung in [champion, *(r for r in seen if r.name not in given)]]
        names = list(self._descents)[::-1]
        if self._continued:
            rows.append((f"rung {names[0]}, continued", self._descents[names[0]].best()))
        names.sort(key=lambda name: name != champion.name)  # its own first, else the newest
        averages = [self._descents[name].averages(count) for name in names]
        rows += averages[0] if averages else []
        rows += [(_label(rung), rung.vector) for rung in seen if rung.name in given]
        rows += [row for others in averages[1:] for row in others]
        unique: dict[bytes, tuple[str, np.ndarray]] = {}
        for label, vector in rows:
            unique.setdefault(vector.tobytes(), (label, vector))
        return list(unique.values())[:count]

    def account(self) -> list[str]:
        """The climb in words, one line for each rung that was looked at."""
        return [rung.line() for rung in self._rungs]

    @property
    def _left(self) -> int:
        return self._task.num_trials - self._asked

    def _climb(self) -> Steps:
        yield from self._compare_scored()
        yield from self._extrapolate()
        yield from self._search()

    def _compare_scored(self) -> Steps:
        """The rungs that come scored share their noise blocks: their tuning did not see these either."""
        first, *others = self._scored
        distinct = {rung.vector.tobytes(): rung.vector for rung in self._scored}
        most = self._settings.num_blocks
        count = min(most, round(SCORED_SHARE * self._task.num_trials) // len(distinct))
        few = f"; those that come scored are compared on {count} blocks of noise instead of {most}"
        self._rungs.append(dataclasses.replace(first, note=f"where the ladder begins{few if count < most else ''}"))
        if count < min(LEAST_BLOCKS, most) and len(distinct) > 1:
            self._champion = min(self._scored, key=lambda rung: rung.value)
            note = f"not compared, {self._task.num_trials} trials are too few; the ladder begins at the best of these"
            self._rungs = [dataclasses.replace(rung, note=note) for rung in self._scored]
            return
        blocks, scores = self._blocks()[:count], {}
        for key, vector in distinct.items() if len(distinct) > 1 else ():
            scores[key] = yield from self._score(vector, blocks)
        for rung in others:
            if rung.vector.tobytes() == self._champion.vector.tobytes():
                self._rungs.append(dataclasses.replace(rung, note=f"the same point as {self._champion.label}"))
            else:
                self._judge(rung, scores[self._champion.vector.tobytes()], scores[rung.vector.tobytes()])

    def _extrapolate(self) -> Steps:
        settings, space, found = self._settings, self._task.space, lines(self._task.starts)
        room = round(EXTRAPOLATION_SHARE * self._task.num_trials) - 2 * settings.num_blocks
        per_line = min(settings.line_trials, room // len(found)) if found else 0
        if per_line < min(MIN_LINE_TRIALS, max(1, settings.line_trials)):
            if found and settings.line_trials:
                self._skip("extrapolation", f"left out, {self._task.num_trials} trials are too few")
            return
        best = Rung("extrapolation", "", self._champion.vector)
        for line in found:
            points = dict(line.known)
            for _ in range(per_line):
                t = next_t(points, line.step)
                vector = np.clip(line.origin + t * line.direction, space.lower, space.upper)
                told = yield Proposal(0, vector)
                points[t] = math.inf if told is None else told[0]
                if points[t] < best.value:
                    best = Rung("extrapolation", f"{line.label}, t {t:.3g}", vector, points[t])
        yield from self._challenge(best)

    def _search(self) -> Steps:
        settings, test = self._settings, 2 * self._settings.num_blocks
        failures, descent = 0, None
        if (low := f"low rank {settings.rank}") not in (family.name for family in self._families):
            self._skip(low, "no other than full, the space has no more coordinates")
        for place, family in enumerate(self._families):
            rest = self._families[place:]
            if failures >= settings.give_up:
                self._skip(family.name, f"not tried after {failures} rungs without a gain")
                continue
            budget = round(self._left * family.share / sum(other.share for other in rest))  # the last takes all
            enough = budget >= (1 + MIN_SEARCH) * test
            if not enough and len(rest) > 1:
                self._skip(family.name, f"left out, {budget} trials are too few")
                continue
            count = budget - test if enough else budget
            descent = self._descents[family.name] = self._start(family, count)
            for _ in range(count):
                yield from descent.step()
            rung = Rung(family.name, "", descent.best())
            if enough:
                yield from self._challenge(rung)
            else:
                self._rungs.append(dataclasses.replace(rung, note=f"not tested, {budget} trials are too few"))
            failures = 0 if self._champion.name == family.name else failures + 1
        while descent is not None:  # whatever is left goes into the last descent; it may win on the select seeds
            yield from descent.step()
            self._continued = True

    def _start(self, family: Family, num_trials: int) -> _Descent:
        """A search of `family` from the champion."""
        task, champion = self._task, self._champion
        start = Start(champion.vector[family.index], champion.value, champion.label, champion.name)
        seed = (task.seed + len(self._descents)) % 2**64
        sub = Task(family.space, num_trials, seed, (start,), task.no_gradient)
        # the champion's value may be of a test's noise: nothing to compare a trial's with
        searcher: Searcher = Gradient() if task.no_gradient is None else Nevergrad(warm_start=False)
        return _Descent(family, champion.vector.copy(), searcher.start(sub), self._asked)

    def _challenge(self, rung: Rung) -> Steps:
        """Champion against rival on blocks of their own."""
        if rung.vector.tobytes() == self._champion.vector.tobytes():
            self._rungs.append(dataclasses.replace(rung, note=f"the same point as {_label(self._champion)}"))
            return
        blocks = self._blocks()
        champion_B = yield from self._score(self._champion.vector, blocks)
        rival_B = yield from self._score(rung.vector, blocks)
        self._judge(rung, champion_B, rival_B)

    def _judge(self, rung: Rung, champion_B: np.ndarray, rival_B: np.ndarray) -> None:
        verdict = paired_test(champion_B, rival_B)
        against = self._champion.label or self._champion.name
        rung = dataclasses.replace(rung, against=against, verdict=verdict, taken=verdict.p < self._settings.alpha)
        if not math.isfinite(rung.value) and np.isfinite(rival_B).any():
            rung = dataclasses.replace(rung, value=float(np.nanmean(rival_B)))
        self._rungs.append(rung)
        if rung.taken:
            self._champion = rung

    def _blocks(self) -> range:
        """Noise blocks that nothing has been scored on."""
        start = TEST_BLOCKS + self._num_tests * self._settings.num_blocks
        self._num_tests += 1
        return range(start, start + self._settings.num_blocks)

    def _score(self, vector: np.ndarray, blocks: range) -> Generator[Proposal, Heard | None, np.ndarray]:
        """Values of a point on `blocks`, NaN where there is none, shape (B,)."""
        values_B = np.full(len(blocks), np.nan)
        for place, block in enumerate(blocks):
            told = yield Proposal(0, vector, block=block, num_images=self._settings.test_images)
            if told is not None:
                values_B[place] = told[0]
        return values_B

    def _skip(self, name: str, note: str) -> None:
        self._rungs.append(Rung(name, "", self._champion.vector, note=note))


def _label(rung: Rung) -> str:
    return f"rung {rung.name}" + (f", {rung.label}" if rung.label else "")


@register(
    "searcher", "ladder", source="lcsc; BEMA, arXiv:2508.00180, Extra-Merge, arXiv:2605.26484; see docs/methods.md"
)
@dataclass(frozen=True)
class Ladder:
    """Nested families, from the last checkpoint to all coefficients; a rung is taken where its gain is significant.

    The rungs: last, best single, uniform window, EMA, minus-sqrt window, extrapolation with one parameter, the first
    `rank` coordinates, all coordinates, and the refinements by layer group where the operator has them. Each is
    compared with the champion so far on `num_blocks` blocks of noise that no search has seen. The searched rungs are
    descended where there is a gradient (`gradient`), else left to CMA-ES.

    Args:
        rank: coordinates of the low-rank rung, of each box.
        alpha: level of the one-sided paired t-test; a useless rung is taken this often.
        num_blocks: blocks of noise of a comparison, each scored once for the champion and once for the rival; fewer,
            but at least 3, for the rungs that come scored where trials are few.
        test_images: images of such a block; None takes the budget's.
        line_trials: trials on each line of extrapolation, at most; 0 leaves that rung out.
        give_up: searched rungs without a gain, one after the other, after which the climb ends.
    """

    rank: int = 8
    alpha: float = 0.05
    num_blocks: int = 6
    test_images: int | None = None
    line_trials: int = 6
    give_up: int = 2

    @property
    def learns(self) -> bool:
        """Whether trials on lines are compared with the baselines that lie on them."""
        return self.line_trials > 0

    def __post_init__(self) -> None:
        least = {"rank": 1, "num_blocks": 2, "line_trials": 0, "give_up": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"`searcher.{name}` is {getattr(self, name)}; it must be at least {low}.")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"`searcher.alpha` is {self.alpha}; the level of a test lies between 0 and 1.")
        if self.test_images is not None and self.test_images < 1:
            raise ConfigError(f"`searcher.test_images` is {self.test_images}; it must be at least 1, or left out.")

    def start(self, task: Task) -> _Session:
        """Begin on the lowest rung that the starts have; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, too few images, or the searcher of a rung cannot work on it.
        """
        task.begin()  # which says what is wrong with an empty space
        task.need_images("test_images", self.test_images)
        return _Session(self, task)
