"""Racing: paired bootstrap against scipy, false drops at the level asked for, and what a race may never change."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
import torch
from helpers_line import Line, Plain, Weights
from scipy import stats

from lcsc.bank import CheckpointBank
from lcsc.config.hydra_app import compose_config
from lcsc.core.errors import ConfigError, EvaluationError
from lcsc.core.registry import build, discover, part
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.metrics.bootstrap import resampled_scores
from lcsc.metrics.paired import NUM_RESAMPLES, chance_better, frechet_to_first_order, paired_scores
from lcsc.models.network import build_network, save_network
from lcsc.objectives.base import Blocks, Raceable, Score
from lcsc.operators.base import Baseline
from lcsc.search.budget import Budget
from lcsc.search.evaluate import Evaluator
from lcsc.search.frames import read_records
from lcsc.search.journal import Journal
from lcsc.search.loop import Search
from lcsc.search.problem import Problem
from lcsc.search.progress import Progress
from lcsc.search.racing import Racer
from lcsc.searchers.base import Proposal

METRIC = build("metric", "fid_pixels")
D = 4


@dataclass(frozen=True)
class Mean:
    """The mean of the values as a metric; a state is (count, sum)."""

    name: str = "mean"

    def zeros(self):
        return 0, 0.0

    def merge(self, a, b):
        return a[0] + b[0], a[1] + b[1]

    def compute(self, state, reference):
        return state[1] / state[0]


def states_of(features_ND, num_blocks=20):
    return [METRIC.update(METRIC.zeros(), block) for block in torch.as_tensor(features_ND).tensor_split(num_blocks)]


@functools.cache
def reference(num=4000):
    return METRIC.reference(states_of(np.random.default_rng(0).standard_normal((num, D)), 1)[0])


def test_paired_resamples_of_a_mean_meet_scipy():
    """Blocks of one value each: the share of better resamples is scipy's paired bootstrap distribution at 0."""
    rng = np.random.default_rng(1)
    ours = rng.normal(size=30)
    theirs = ours - 0.04 + 0.3 * rng.normal(size=30)
    pair = [paired_scores(Mean(), [(1, float(x)) for x in values], None) for values in (ours, theirs)]
    wanted = stats.bootstrap(
        (ours, theirs),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(2),
    ).bootstrap_distribution
    error = np.sqrt(0.25 / NUM_RESAMPLES)
    assert 0.02 < (wanted < 0).mean() < 0.3  # not a question that any answer settles
    assert chance_better(*pair) == pytest.approx((wanted < 0).mean(), abs=3 * error)
    assert np.std(pair[0] - pair[1], ddof=1) == pytest.approx(wanted.std(ddof=1), rel=0.12)
    normal = stats.norm.cdf(0, (ours - theirs).mean(), (ours - theirs).std() / np.sqrt(30))
    assert chance_better(*pair) == pytest.approx(normal, abs=3 * error)


def test_ties_are_half_won():
    same_R = np.ones(10)
    assert chance_better(same_R, same_R) == 0.5
    assert chance_better(same_R, same_R + 1) == 1.0


def test_first_order_is_exact_where_the_covariance_stays_and_close_elsewhere():
    rng = np.random.default_rng(3)
    block_ND = rng.standard_normal((50, D))
    twice = states_of(np.concatenate([block_ND] * 6), 6)  # equal blocks: every resample is the whole, up to n - 1
    counts_RB = np.stack([np.bincount(draw, minlength=6) for draw in rng.integers(6, size=(9, 6))])
    whole = METRIC.compute(functools.reduce(METRIC.merge, twice), reference())
    assert frechet_to_first_order(METRIC, twice, reference(), counts_RB) == pytest.approx(whole, rel=1e-9)
    states = states_of(rng.standard_normal((4000, D)) @ np.diag([1.0, 1.5, 0.7, 1.2]) + 0.4)
    draws_RB = rng.integers(20, size=(300, 20))
    counts_RB = np.stack([np.bincount(draw, minlength=20) for draw in draws_RB])
    exact_R = np.array(resampled_scores(METRIC, states, reference(), draws_RB))
    first_R = frechet_to_first_order(METRIC, states, reference(), counts_RB)
    assert (first_R - exact_R).std() < 0.1 * exact_R.std()
    assert abs((first_R - exact_R).mean()) < 0.2 * exact_R.std()


def test_an_equal_candidate_is_dropped_about_as_often_as_asked():
    """Two sets of one distribution: the drop level is the rate, up to what 20 blocks and 200 trials can tell."""
    rng = np.random.default_rng(4)
    rates = {0.05: 0, 0.2: 0}
    for _ in range(200):
        base_ND, own_ND, other_ND = rng.standard_normal((3, 400, D))
        pair = [
            paired_scores(METRIC, states_of(1.3 * (0.8 * base_ND + 0.6 * part_ND) + 0.5), reference())
            for part_ND in (own_ND, other_ND)
        ]
        for level in rates:
            rates[level] += chance_better(*pair) < level
    assert 0.02 <= rates[0.05] / 200 <= 0.10
    assert 0.13 <= rates[0.2] / 200 <= 0.27


class Plane(Line):
    """Two numbers: the shift of a cloud."""

    rows = (("far", "far", [2.0, 0.5]), ("near", "near", [1.5, 0.5]))


@functools.cache
def noise(seed, purpose, images):
    return torch.from_numpy(SeedRange(seed, purpose).normal(images, (D,)))


@dataclass
class Cloud(Plain):
    """Fréchet distance of shifted normal noise to normal noise: the optimum is the origin."""

    metric: object = METRIC
    calls: list = field(default_factory=list)
    broken_at: int | None = None
    name: str = "fid_pixels"

    def block_states(self, candidate, *, seed, purpose, images, num_blocks):
        self.calls.append((tuple(candidate.x), purpose, images))
        if self.broken_at is not None and sum(call[2].start == 0 for call in self.calls) == self.broken_at:
            raise EvaluationError("broken.")
        noise_ND = noise(seed, purpose, images).double()
        noise_ND[:, :2] += torch.from_numpy(candidate.x)
        return Blocks(tuple(states_of(noise_ND, num_blocks)), len(images))

    def merge_states(self, states):
        return functools.reduce(METRIC.merge, states)

    def value_of(self, states, purpose):
        return METRIC.compute(self.merge_states(states), reference())

    def resampled(self, states, purpose):
        return paired_scores(METRIC, states, reference())

    def __call__(self, candidate, *, seed, purpose, images, full=False):
        blocks = self.block_states(candidate, seed=seed, purpose=purpose, images=images, num_blocks=20)
        return Score(self.value_of(blocks.states, purpose), len(images), 1, 0.1 if full else None)

    def sampled(self):
        return sum(len(images) for _, _, images in self.calls)


def search(folder, objective, prefixes, stop_after=None, mutation_scale=0.4, **budget):
    budget = {"num_trials": 60, "num_images": 400, "num_images_select": 500, "num_images_report": 500, **budget}
    problem = Problem(
        None,
        Plane(),
        build("searcher", "lcsc_evolution", mutation=0.9, mutation_scale=mutation_scale),
        objective,
        Budget(prefixes=prefixes, **budget),
        0,
    )
    folder.mkdir(exist_ok=True)
    with Progress("race", 0, quiet=True) as progress, Journal(folder, print) as journal:
        run = Search(problem, journal, progress)
        if stop_after is not None:
            tell, count = journal.step, iter(range(stop_after))

            def step(*args):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return tell(*args)

            journal.step = step
        return run.run()


def of_kind(folder, kind):
    return [record for record in read_records(folder / "journal.jsonl")[0] if record["kind"] == kind]


def test_a_race_finds_the_same_quality_with_fewer_images(tmp_path):
    plain, raced = Cloud(), Cloud()
    whole = search(tmp_path / "plain", plain, [])
    outcome = search(tmp_path / "raced", raced, [40, 150])
    assert outcome.reports[0]["value"] == pytest.approx(whole.reports[0]["value"], abs=0.01)
    assert outcome.reports[0]["value"] < 0.2 * min(report["value"] for report in outcome.reports[1:])
    assert outcome.images_saved > 0.4 * 60 * 400
    assert outcome.images_sampled == raced.sampled()
    assert whole.images_sampled == plain.sampled()
    trials = of_kind(tmp_path / "raced", "trial")
    assert outcome.images_saved == 60 * 400 - sum(trial["images"] for trial in trials)
    assert outcome.image_forwards == raced.sampled()
    assert whole.images_saved == 0
    assert "images" not in of_kind(tmp_path / "plain", "trial")[0]


def test_what_a_dropped_trial_leaves_behind(tmp_path):
    objective = Cloud()
    outcome = search(tmp_path, objective, [40, 150])
    trials = of_kind(tmp_path, "trial")
    dropped = [trial for trial in trials if "dropped_at" in trial]
    best = next(record for record in of_kind(tmp_path, "baseline") if record["label"] == "near")
    assert {trial["dropped_at"] for trial in dropped} == {40, 150}
    for trial in trials:
        assert trial["images"] == trial["image_forwards"] == trial.get("dropped_at", 400)
        if "dropped_at" in trial:
            assert trial["status"] == "ok"
            assert trial["value"] > best["value"]  # never ahead of the incumbent
            exact = objective(Weights(np.array(trial["vector"])), seed=0, purpose=Purpose.SEARCH, images=range(400))
            assert trial["value"] == pytest.approx(exact.value, rel=0.5)
            assert trial["prefix_value"] != trial["value"]
        elif trial["value"] < best["value"]:
            best = trial
    names = {record["label"] for record in of_kind(tmp_path, "select")}
    assert not names & {f"trial {trial['uid']}" for trial in dropped}
    assert outcome.winner["label"] in names


def test_where_all_trials_are_dropped_the_best_baseline_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(Plane, "baselines", lambda self, bank: [Baseline("best", "best", {"x": [0.0, 0.0]})])
    outcome = search(tmp_path, Cloud(), [100], num_trials=20, mutation_scale=4.0)
    assert len([trial for trial in of_kind(tmp_path, "trial") if "dropped_at" in trial]) == 20
    assert outcome.winner["label"] == "best"


@dataclass(frozen=True)
class Stubborn:
    """Proposes far points and recommends them all the same."""

    def start(self, task):
        return self

    def ask(self):
        return Proposal(0, np.array([3.0, 3.0]))

    def tell(self, uid, value, gradient=None):
        return None

    def finalists(self, count):
        return [("mine", np.array([3.0, 3.0])), ("other", np.array([0.5, 0.5]))]


def test_a_searcher_cannot_make_a_dropped_candidate_a_finalist(tmp_path):
    budget = Budget(1, 400, 3, 500, 500, prefixes=[100])
    with Progress("race", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        Search(Problem(None, Plane(), Stubborn(), Cloud(), budget, 0), journal, progress).run()
    assert [record["label"] for record in of_kind(tmp_path, "select")] == ["far", "near", "other"]


@pytest.mark.parametrize("stop_after", [2, 6, 24])
def test_an_interrupted_race_leaves_the_same_bytes_and_counts(tmp_path, stop_after):
    whole = search(tmp_path / "whole", Cloud(), [40, 150], num_trials=25)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "broken", Cloud(), [40, 150], stop_after=stop_after, num_trials=25)
    assert search(tmp_path / "broken", Cloud(), [40, 150], num_trials=25) == whole
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in ("whole", "broken")]
    assert journals[0] == journals[1]


def test_full_scores_are_one_number_whoever_asks_for_them(tmp_path):
    """A survivor's score is that of `full`, bit for bit, and the ordinary one up to the order of the sums."""
    objective, operator = Cloud(), Plane()
    evaluator = Evaluator(None, operator, objective, operator.space(None), 0)
    racer = Racer(evaluator, (40, 150, 400), 0.05)
    at = np.array([0.1, -0.2])
    raced, full = racer.race(at, ((2.0, 2.0), 9.0)), racer.full(at)
    assert raced == full
    assert raced["images"] == 400
    assert raced["value"] == pytest.approx(evaluator.score(at, Purpose.SEARCH, range(400))["value"], rel=1e-12)
    mine = [images for x, _, images in objective.calls if x == tuple(at)]
    assert mine[:3] == [range(40), range(40, 150), range(150, 400)]  # nested, and nothing twice


@pytest.mark.parametrize("metric", ["fid_pixels", "kid_pixels"])
def test_sampled_images_race(tmp_path, metric):
    """Real samplers, banks and metrics: prefixes add up to the ordinary score, and a bad candidate is dropped."""
    torch.manual_seed(0)
    net = build_network({"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}})
    for step in (1, 2, 3):
        for parameter in net.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        save_network(net, tmp_path / f"checkpoint-{step}" / "unet")
    bank, operator = CheckpointBank.open(tmp_path), build("operator", "linear")
    kinds = {"model": "direct", "sampler": "euler", "dataset": "gaussian", "metric": metric}
    parts = {kind: build(kind, name) for kind, name in kinds.items()}
    objective = build("objective", "sample_quality", **parts, batch_size=64, device="cpu")
    evaluator = Evaluator(bank, operator, objective, operator.space(bank), 0)
    racer, good, bad = Racer(evaluator, (40, 120, 300), 0.05), np.zeros(2), np.array([30.0, 30.0])
    row, plain = racer.full(good), evaluator.score(good, Purpose.SEARCH, range(300))
    assert row["value"] == pytest.approx(plain["value"], rel=1e-9)
    assert {**plain, "images": 300, "value": 0} == {**row, "value": 0}
    rival = (tuple(good.tolist()), row["value"])
    lost = racer.race(bad, rival)
    assert (lost["dropped_at"], lost["images"], lost["coef"]) == (40, 40, evaluator.candidate(bad).recipe["coef"])
    assert lost["image_forwards"] == 40 * objective.sampler.nfe()
    assert racer.race(good, rival) == row


KINDS = {"model": "direct", "sampler": "euler", "dataset": "gaussian", "metric": "fid_pixels"}


def gaussian_problem(folder, objective, budget, **settings):
    """A search among three scattered ideal denoisers, by one of lcsc's own objectives."""
    torch.manual_seed(0)
    net = build_network({"class": "GaussianDenoiser", "config": {"shape": [1, 2, 2]}})
    for step in (1, 2, 3):
        for parameter in net.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        save_network(net, folder / f"checkpoint-{step}" / "unet")
    wanted = {f.name for f in fields(part("objective", objective).cls)}
    parts = {kind: build(kind, name) for kind, name in KINDS.items() if kind in wanted}
    if objective == "consistency_loss":
        parts["model"] = build("model", "consistency")
    scorer = build("objective", objective, **parts, batch_size=64, device="cpu", **settings)
    searcher = build("searcher", "lcsc_evolution", mutation=0.9, mutation_scale=1.0)
    return Problem(CheckpointBank.open(folder), build("operator", "linear"), searcher, scorer, Budget(**budget), 0)


def raced(problem, folder):
    with Progress("race", 0, quiet=True) as progress, Journal(folder, print) as journal:
        return Search(problem, journal, progress).run()


RACED = {"fid_nfe": {"nfe": [1, 2]}, "denoising_loss": {}, "consistency_loss": {}}


@pytest.mark.parametrize("objective", RACED)
def test_other_objectives_race_and_survivors_score_what_they_score_alone(tmp_path, objective):
    budget = {"num_images_select": 50, "num_images_report": 50, "num_finalists": 1}
    budget |= {"num_trials": 25, "num_images": 300, "prefixes": [40, 120]}
    problem = gaussian_problem(tmp_path / "bank", objective, budget, **RACED[objective])
    outcome = raced(problem, tmp_path)
    evaluator = Evaluator(problem.bank, problem.operator, problem.objective, problem.space(), 0)
    trials, baselines = of_kind(tmp_path, "trial"), of_kind(tmp_path, "baseline")
    survivors = [trial for trial in trials if "dropped_at" not in trial]
    assert 0 < len(survivors) < len(trials)
    for record in (*survivors, *baselines):
        plain = evaluator.score(np.array(record["vector"]), Purpose.SEARCH, range(300))
        assert record["value"] == pytest.approx(plain["value"], rel=1e-9)
        assert record["image_forwards"] == plain["image_forwards"]
    best = min(record["value"] for record in (*survivors, *baselines))
    for trial in trials:  # none that was dropped would have won
        assert evaluator.score(np.array(trial["vector"]), Purpose.SEARCH, range(300))["value"] >= best * (1 - 1e-9)
    assert outcome.images_saved == sum(300 - trial["images"] for trial in trials) > 0


def test_resamples_of_a_mean_over_nfes_are_of_first_order(tmp_path):
    problem = gaussian_problem(tmp_path, "fid_nfe", {"num_images": 300}, nfe=[1, 2], weights=[3.0, 1.0])
    scorer, candidate = problem.objective, problem.operator.apply(problem.bank, {"z": np.array([0.2, -0.1])})
    blocks = scorer.block_states(candidate, seed=0, purpose=Purpose.SEARCH, images=range(2000), num_blocks=20)
    own = [member.resampled([s[i] for s in blocks.states], Purpose.SEARCH) for i, member in enumerate(scorer.members)]
    exact_R, first_R = own[0] ** 0.75 * own[1] ** 0.25, scorer.resampled(blocks.states, Purpose.SEARCH)
    assert exact_R.std() > 0
    assert abs(first_R - exact_R).max() < 0.1 * exact_R.std()
    merged = [scorer.merge_states(blocks.states[:7]), scorer.merge_states(blocks.states[7:])]
    assert scorer.value_of(merged, Purpose.SEARCH) == pytest.approx(scorer.value_of(blocks.states, Purpose.SEARCH))


def test_all_objectives_race_but_those_that_run_the_users_own_code():
    known = discover("objective")
    assert {name for name in known if not issubclass(known[name].cls, Raceable)} == {"command", "function"}
    command = build("objective", "command", command="true")
    with pytest.raises(ConfigError, match=r"is \[100\], but objective `command` cannot score a part of its images"):
        Problem(None, Plane(), None, command, Budget(prefixes=[100]), 0)


def test_a_candidate_that_fails_early_costs_its_prefix(tmp_path):
    search(tmp_path, Cloud(broken_at=8), [40, 150])
    failed = [trial for trial in of_kind(tmp_path, "trial") if trial["status"] == "failed"]
    assert [(trial["reason"], trial["images"]) for trial in failed] == [("broken.", 40)]


def test_trials_on_other_noise_are_not_raced_and_that_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Stubborn, "ask", lambda self: Proposal(0, np.array([3.0, 3.0]), block=1))
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    budget = Budget(3, 400, 3, 500, 500, prefixes=[100])
    with Progress("race", 0, quiet=True) as progress, Journal(tmp_path, print) as journal:
        Search(Problem(None, Plane(), Stubborn(), Cloud(), budget, 0), journal, progress).run()
    assert not [trial for trial in of_kind(tmp_path, "trial") if "dropped_at" in trial or "images" in trial]
    assert notes == ["note: the searcher's gradients and trials on noise of their own are not raced"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prefixes": [100, 100]}, r"`search\.prefixes` is \[100, 100\]; it must increase"),
        ({"prefixes": [400]}, r"below `search\.num_images`, which is 400"),
        ({"prefixes": [0, 10]}, "from above 0"),
        ({"drop_level": 0.5}, r"`search\.drop_level` is 0\.5; it must lie between 0 and 0\.5"),
        ({"guards": {"kid": -0.1}}, r"`search\.guards\.kid` is `-0\.1`; a share is a number of at least 0"),
        ({"guards": ["kid"]}, r"`search\.guards` is `\['kid'\]`; write shares by name"),
    ],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Budget(num_images=400, **settings)


def test_what_cannot_race_is_refused(tmp_path):
    class Plain:
        name, min_images, other_metrics = "plain", 2, ()

    with pytest.raises(ConfigError, match=r"objective `plain` cannot score a part of its images\. Leave the setting"):
        Problem(None, Plane(), None, Plain(), Budget(prefixes=[100]), 0)
    with pytest.raises(ConfigError, match=r"begins with 10; a race needs at least 20 images"):
        Problem(None, Plane(), None, Cloud(), Budget(prefixes=[10]), 0)


def test_the_settings_reach_the_configuration():
    words = ["experiment=toy_gaussian", "search.prefixes=[50,100]", "search.guards={kid_pixels: 0.1}"]
    found = compose_config(words)["search"]
    assert (found["prefixes"], found["drop_level"], found["guards"]) == ([50, 100], 0.05, {"kid_pixels": 0.1})
    assert json.loads(json.dumps(found)) == vars(Budget(**found))
