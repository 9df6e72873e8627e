"""Optimizers of nevergrad: those we vouch for pass the contract tests, the others a rehearsal before they start.

A rehearsal asks and tells at the real dimension in a process of its own, so that an optimizer which hangs or crashes is
refused and takes no search with it.

nevergrad costs seconds to import and is imported by `start` alone. Its state is never pickled (that fails for
a third of its optimizers): a search is resumed by replaying its own asks and tells from the seed.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.searchers.base import Proposal, Task, check_told

#: Held to the contract tests, therefore not rehearsed.
VOUCHED = ("CMA", "DE", "DiagonalCMA", "OnePlusOne", "RandomSearch", "RealSpacePSO", "TBPSA", "TwoPointsDE")
#: Of them, those that pycma does and that cannot search a line; `CMA` is another optimizer there.
NEEDS_TWO = ("DiagonalCMA",)
#: Losses beyond are told as this: nevergrad itself warns of larger ones and takes no larger one.
LARGEST = 4.9e20
#: A rehearsal: at most so many trials, twice, in so many seconds; before that Python and nevergrad may load.
REHEARSAL_TRIALS, REHEARSAL_SECONDS, LOADING_SECONDS = 200, 10.0, 120.0
READY = "ready"
CHILD = """
import json, os, sys
job = json.loads(sys.stdin.readline())
sys.path[:] = job["path"]
from lcsc.searchers.nevergrad import rehearse
rehearse(job)
os._exit(0)  # an optimizer's threads may outlive it
"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence pycma's guess that asking for one point at a time, as nevergrad does, were an oversight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*orphanated injected solution")
        yield


@dataclass(frozen=True)
class Recipe:
    """What an optimizer is made of, in plain numbers, so that another process can make the same.

    Args:
        optimizer: its name in nevergrad's registry.
        start: in units of the boxes' scale.
        lower, upper: in that unit; None where there are no bounds.
        sigma0: length of the first moves, in that unit.
        state: seed of its random numbers.
        budget: number of proposals.
        warm: scored points to begin with, in that unit, with their values, best first.
    """

    optimizer: str
    start: tuple[float, ...]
    lower: tuple[float, ...] | None
    upper: tuple[float, ...] | None
    sigma0: float
    state: int
    budget: int
    warm: tuple[tuple[tuple[float, ...], float], ...] = ()

    def make(self) -> Any:
        """The optimizer, an object of nevergrad."""
        import nevergrad as ng

        array = ng.p.Array(init=np.array(self.start)).set_mutation(sigma=self.sigma0)
        if self.lower is not None and self.upper is not None:
            array = array.set_bounds(np.array(self.lower), np.array(self.upper))
        array.random_state.seed(self.state)
        return ng.optimizers.registry[self.optimizer](array, budget=self.budget, num_workers=1)

    def session(self, scale: np.ndarray) -> NevergradSession:
        """The optimizer, told of the best scored points: a population's worth of them."""
        session = NevergradSession(self.make(), scale)
        for point, value in self.warm[: session.population()]:
            session.hear(np.array(point), value)
        return session


class NevergradSession:
    """An optimizer of nevergrad, asked for one point at a time."""

    def __init__(self, optimizer: Any, scale: np.ndarray) -> None:
        self._optimizer = optimizer
        self._scale = scale
        self._asked: dict[int, Any] = {}
        self._count = 0
        #: proposals that may be open at a time
        self.width = 1 if getattr(optimizer, "no_parallelization", False) else math.inf

    def population(self) -> int:
        """How many scored points the optimizer can begin with: those it breeds from; 1 where it says nothing."""
        optimizer = self._optimizer
        while (inner := getattr(optimizer, "optim", None)) is not None:  # one that chooses another by the problem
            optimizer = inner
        if getattr(optimizer, "one_shot", False):  # it draws without listening
            return 0
        if hasattr(optimizer, "current_center"):  # TBPSA takes the distance from there, which is 0, for its step
            return 0
        if hasattr(optimizer, "_popsize"):  # pycma refuses a whole population that it has not asked for
            return int(optimizer._popsize) - 1
        return int(getattr(optimizer, "llambda", 1))

    def hear(self, point: np.ndarray, value: float) -> None:
        """Tell of a scored point inside the bounds, shape (size,), in units of the scale; it takes no proposal."""
        self._optimizer.suggest(point)
        with _quiet():
            candidate = self._optimizer.ask()
        self._tell(candidate, value)

    def hear_corner(self, losses: np.ndarray) -> None:
        """Where volumes are measured from, shape (number of losses,), for an optimizer that is told several."""
        import nevergrad as ng

        self._optimizer.tell(ng.p.MultiobjectiveReference(), losses.tolist())

    def suggest(self, vector: np.ndarray) -> None:
        """Make a vector inside the bounds, shape (size,), the next proposal."""
        self._optimizer.suggest(vector / self._scale)

    def ask(self) -> Proposal:
        with _quiet():
            candidate = self._optimizer.ask()
        uid = self._count
        self._count += 1
        self._asked[uid] = candidate
        return Proposal(uid, np.asarray(candidate.value, dtype=np.float64) * self._scale)

    def tell(self, uid: int, value: float, gradient: np.ndarray | None = None) -> None:
        check_told(uid, value)
        self._tell(self._asked.pop(uid), float(value))

    def _tell(self, candidate: Any, value: float) -> None:
        from nevergrad.common.errors import TellNotAskedNotSupportedError

        with _quiet(), contextlib.suppress(TellNotAskedNotSupportedError):  # a suggestion is lost on some
            self._optimizer.tell(candidate, float(np.clip(value, -LARGEST, LARGEST)))

    def best(self) -> np.ndarray:
        return np.asarray(self._optimizer.provide_recommendation().value, dtype=np.float64) * self._scale

    def finalists(self, count: int) -> None:
        """The best trials."""
        return


def flaw(recipe: Recipe, num_trials: int) -> str | None:
    """What is wrong with an optimizer, as a clause; None when nothing is.

    It minimizes a bowl twice. Its proposals must be equal to the bit, finite, of the right shape and inside the bounds.
    """
    start, walks = np.array(recipe.start), []
    for _ in range(2):
        vectors = []
        try:
            session = recipe.session(np.ones(1))
            for _ in range(num_trials):
                proposal = session.ask()
                vectors.append(proposal.vector)
                if proposal.vector.shape != start.shape:
                    return f"it proposes shape {proposal.vector.shape} instead of {start.shape}"
                if not np.isfinite(proposal.vector).all():
                    return "it proposes numbers that are not finite"
                session.tell(proposal.uid, float(((proposal.vector - start - 1) ** 2).sum()))
            session.best()
        except Exception as error:
            return f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
        walks.append(np.array(vectors))
    if walks[0].tobytes() != walks[1].tobytes():
        return "it makes other proposals each time from the same seed"
    if recipe.lower is not None and ((walks[0] < recipe.lower).any() or (walks[0] > recipe.upper).any()):
        return "it leaves the bounds"
    return None


def rehearse(job: Mapping[str, Any]) -> None:
    """The child's part: print `READY` once all is loaded, then what is wrong with the optimizer, as JSON."""
    import nevergrad  # noqa: F401 - loading it is not the optimizer's fault

    print(READY, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        clause = flaw(Recipe(**job["recipe"]), job["num_trials"])
    print(json.dumps(clause), flush=True)


def verdict(job: Mapping[str, Any], code: str = CHILD, limit: float = REHEARSAL_SECONDS) -> str | None:
    """Run a rehearsal in a process of its own: what is wrong with the optimizer, as a clause; None when nothing is.

    Args:
        job: what the process reads from its input, as a line of JSON.
        code: Python that prints `READY`, then a clause or null as a line of JSON.
        limit: seconds between the two lines.
    """
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as child:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=child.stdin, flush=True)
        loaded = _line(child, LOADING_SECONDS) == READY
        began = time.monotonic()
        said = _line(child, limit) if loaded else ""
        seconds = time.monotonic() - began
        child.kill()
    if not loaded:
        return "a process of its own could not load it"
    if said:
        return json.loads(said)
    if seconds >= limit:
        return f"two rehearsals took longer than {limit:g} s"
    return f"it brought down its process with code {child.returncode}"


def _line(child: subprocess.Popen[str], limit: float) -> str:
    """What it prints next; empty where it ends before, or is killed because it takes longer than `limit` seconds."""
    timer = threading.Timer(limit, child.kill)
    timer.start()
    line = child.stdout.readline() if child.stdout else ""
    timer.cancel()
    return line.strip()


@register("searcher", "cma", source="CMA-ES, arXiv:1604.00772, by nevergrad", optimizer="CMA", warm_start=False)
@register(
    "searcher",
    "diagonal_cma",
    source="sep-CMA-ES, PPSN 2008, by nevergrad",
    optimizer="DiagonalCMA",
    warm_start=False,  # starts that lie together make the first steps of an evolution strategy too short
)
@register("searcher", "de", source="differential evolution, Storn & Price 1997, by nevergrad", optimizer="DE")
@register("searcher", "two_points_de", source="DE with two-point crossover, by nevergrad", optimizer="TwoPointsDE")
@register(
    "searcher",
    "pso",
    source="particle swarm, Kennedy & Eberhart 1995, in real space, by nevergrad",
    optimizer="RealSpacePSO",
)
@register(
    "searcher",
    "one_plus_one",
    source="(1+1) evolution strategy, Schumer & Steiglitz 1968, by nevergrad",
    optimizer="OnePlusOne",
)
@register("searcher", "tbpsa", source="TBPSA, PPSN 2016, by nevergrad", optimizer="TBPSA")
@register("searcher", "random", source="Gaussian random search, by nevergrad", optimizer="RandomSearch")
@dataclass(frozen=True)
class Nevergrad:
    """A black-box optimizer of nevergrad.

    Args:
        optimizer: its name in nevergrad's registry.
        sigma0: length of the first moves, in units of the boxes' scale.
        warm_start: whether it begins with the best starts and their values, as many as its population holds. That
            takes no trials. Otherwise it begins around the best start, as `cma` and `diagonal_cma` do unless asked.
    """

    optimizer: str = "CMA"
    sigma0: float = 1.0
    warm_start: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.sigma0 < math.inf:
            raise ConfigError(f"`searcher.sigma0` is {self.sigma0}; it must be above 0 and finite.")

    @property
    def learns(self) -> bool:
        """Whether baselines are among what it breeds from."""
        return self.warm_start

    def start(self, task: Task) -> NevergradSession:
        """Begin at the best start; see `Searcher.start`.

        Raises:
            ConfigError: nothing to search, no such optimizer, or one that fails its rehearsal.
        """
        self.check(task)
        return self.session(task)

    def check(self, task: Task) -> None:
        """Raise ConfigError where `start` would; an optimizer that we do not vouch for is rehearsed."""
        recipe = self.recipe(task)
        if self.optimizer in VOUCHED:
            return
        path = [place or os.getcwd() for place in sys.path]
        job = {"recipe": asdict(recipe), "num_trials": min(task.num_trials, REHEARSAL_TRIALS), "path": path}
        if clause := verdict(job):
            raise ConfigError(
                f"nevergrad's optimizer `{self.optimizer}` is refused: {clause}. Use searcher=cma, or another one."
            )

    def session(self, task: Task) -> NevergradSession:
        """As `start`, without a rehearsal."""
        return self.recipe(task).session(task.space.scale)

    def recipe(self, task: Task) -> Recipe:
        """What the optimizer of a task is made of.

        Raises:
            ConfigError: nothing to search, no such optimizer, one that needs more floats, or bounds on some boxes only.
        """
        import nevergrad as ng

        space, begin = task.space, task.begin()
        if self.optimizer not in ng.optimizers.registry:
            near = difflib.get_close_matches(self.optimizer, ng.optimizers.registry, n=3)
            hint = f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
            raise ConfigError(
                f"nevergrad has no optimizer `{self.optimizer}`.{hint} Vouched for: {', '.join(VOUCHED)}; "
                "`nevergrad.optimizers.registry` lists all."
            )
        if self.optimizer in NEEDS_TWO and space.size < 2:
            raise ConfigError(
                f"nevergrad's optimizer `{self.optimizer}` needs at least 2 numbers to vary, not {space.size}. "
                "Use `CMA` (searcher=cma), or more checkpoints."
            )
        lower, upper = space.lower / space.scale, space.upper / space.scale
        bounded = np.isfinite(lower) & np.isfinite(upper)
        if (bounded.any() and not bounded.all()) or (np.isfinite(lower) ^ np.isfinite(upper)).any():
            raise ConfigError("some boxes have bounds and some have none. Give all of them both bounds, or none.")
        low, high = (tuple(lower.tolist()), tuple(upper.tolist())) if bounded.all() else (None, None)
        start = tuple(np.clip(begin / space.scale, lower, upper).tolist())
        state = int(SeedRange(task.seed, Purpose.SEARCHER).generator().integers(2**32))
        warm: dict[tuple[float, ...], float] = {}
        for scored in task.starts if self.warm_start else ():
            inside = (scored.vector >= space.lower).all() and (scored.vector <= space.upper).all()
            if inside and np.isfinite(scored.value):  # a clipped point has another value
                warm.setdefault(tuple((scored.vector / space.scale).tolist()), float(scored.value))
        return Recipe(self.optimizer, start, low, high, self.sigma0, state, task.num_trials, tuple(warm.items()))


@register("searcher", "nevergrad", source="any optimizer of nevergrad, github.com/facebookresearch/nevergrad")
@dataclass(frozen=True)
class AnyNevergrad(Nevergrad):
    """Any black-box optimizer of nevergrad; one that has no name of its own here is rehearsed first."""
