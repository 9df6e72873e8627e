"""The loss of a text-to-music model on held-out tunes, and what its tunes are like."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import PairDataset, TextPart, need_pairs
from lcsc.datasets.content import text_digest
from lcsc.metrics.tune_measures import Measured, measure_tunes, need_measures
from lcsc.models.fit import Fit
from lcsc.models.flat import LiveModel
from lcsc.models.sampling import check_sampling, sample
from lcsc.models.tune_pairs import TUNE_MODELS, TuneSteps, check_tunes, tune_losses
from lcsc.music.files import CHECKER, abc2midi_version, tune_problems
from lcsc.music.pairs import Pair
from lcsc.music.tokens import END, PAD, decode, pair_tokens, prompt_tokens
from lcsc.objectives.base import Score, spending
from lcsc.objectives.mean_loss import grouped_se
from lcsc.objectives.shared import KeptLive
from lcsc.objectives.uptraining import Uptraining
from lcsc.operators.base import Candidate

#: Stream of what is drawn for a sample.
SAMPLE = 3
CHECKERS = ("auto", CHECKER, "lcsc")


@register("objective", "music", source="arXiv:2211.11216; Papineni et al. 2002 (BLEU); Levenshtein 1966 (EDS)")
@dataclass(frozen=True)
class Music(Uptraining):
    """Mean cross-entropy of a held-out tune's tokens given its text, in nats; a network call a pair.

    An encoder-decoder reads the text with its encoder, a language model as the beginning of the tune. With `num_steps`
    each candidate is fine-tuned on the pairs of the training part first, as trainer=tunes does it and for all
    candidates alike: so are the plans of operator=warm_start compared. Full scores then hold `trained_tokens` too.

    Image i of (seed, purpose) is a pair of text and tune, of the search or the report part; each comes up once before
    any comes up again. The loss of a pair is the mean over the tokens of its tune and the end behind it.

    Full scores also hold `shuffled_loss`, the loss with the text of another tune, and `conditioning_gap`, by how much
    that is higher: near 0 the model does not listen to the text. The model also writes tunes for the texts of the first
    `samples` pairs, with the same noise for all candidates, and `bleu_1` to `bleu_4`, `eds`, `validity`, `whole_bars`,
    `diversity` and `copying` of them are told, with the `_floor` and `_ceiling` that are no constants: see
    `lcsc.metrics.tune_measures.measure_tunes`. This needs the extra `lcsc[music]`.

    Args:
        dataset: pairs, such as dataset=tunes.
        batch_size: pairs per network call.
        samples: tunes that are written for a full score; 0 leaves them out.
        top_p: probability of the tokens that are drawn from.
        temperature: at which they are drawn, behind `top_p`.
        max_tokens: most of a tune; one that has not ended there is not valid.
        sample_seed: of the noise.
        checker: what says that a tune is valid: `abc2midi`, `lcsc` for our own reading of bars and notation, `auto` for
            the first where it is installed. Scores are comparable where it is the same.
        device: torch device; `auto` takes the GPU where there is one.
    """

    dataset: PairDataset = field(metadata={"internal": True})
    batch_size: int = 16
    samples: int = 32
    top_p: float = 0.9
    temperature: float = 1.0
    max_tokens: int = 512
    sample_seed: int = 0
    checker: str = "auto"
    device: str = "auto"

    name: ClassVar[str] = "music"
    forwards: ClassVar[tuple[int, int]] = (1, 3)

    def __post_init__(self) -> None:
        need_pairs(self.dataset, "objective `music`")
        if self.batch_size < 1 or self.samples < 0 or self.samples == 1:
            raise ConfigError(
                f"`objective.batch_size` is {self.batch_size} and `samples` {self.samples}; they must be at least 1, "
                "and 0 or at least 2."
            )
        check_sampling(self, "objective.")
        if self.checker not in CHECKERS:
            raise ConfigError(f"`objective.checker` is `{self.checker}`; it must be one of {', '.join(CHECKERS)}.")
        if self.checker == CHECKER and not abc2midi_version():
            raise ConfigError(
                "`objective.checker` is `abc2midi`, which is not installed. Install it (Debian: abcmidi), or choose "
                "`lcsc`."
            )
        if self.samples:
            need_measures()
        _ = SeedRange(self.sample_seed, Purpose.REPORT)  # checks it
        self._check_training()
        self.__dict__["_kept"] = KeptLive()

    @property
    def fit(self) -> Fit:
        """The fine-tuning of a candidate; no pair is cut."""
        return self._fit(self._longest)

    def _windows(self, net: nn.Module, seeds: SeedRange) -> TuneSteps:
        return TuneSteps(self.dataset.pairs(TextPart.TRAIN), self.fit, seeds, net)

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`; a tune that is written reads each of its tokens once, as one network call does."""
        if not full:
            return super().__call__(candidate, seed=seed, purpose=purpose, images=images)
        further = len(images) + len(self._sampled(self._rows(seed, purpose, images)))
        with spending(further):
            score = super().__call__(candidate, seed=seed, purpose=purpose, images=images, full=True)
        return dataclasses.replace(score, further=score.further + further)

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        yield from self._losses(live, [self._held[row] for row in self._rows(seed, purpose, images)])

    def half(self, purpose: Purpose) -> np.ndarray:
        """See `MeanLoss.half`; the report part's rows stand behind the search part's."""
        searched = len(self.dataset.pairs(TextPart.SEARCH))
        return np.arange(searched, len(self._held)) if purpose is Purpose.REPORT else np.arange(searched)

    def circumstances(self) -> dict[str, Any]:
        """Loss, tunes and libraries, and what judges a tune."""
        settings = {key: getattr(self, key) for key in ("samples", "top_p", "temperature", "max_tokens", "sample_seed")}
        settings |= {"checker": f"abc2midi {abc2midi_version()}" if self._checker == CHECKER else "lcsc"}
        settings |= {"transformers": importlib.metadata.version("transformers")}
        said = {
            "metric": self.name,
            "detector": self.name,
            "detector_digest": value_digest({"name": self.name, **settings}),
            "nfe": self.forwards[0],
            "items": "pairs",
            "dataset": repr(self.dataset),
            "data_digest": text_digest(self.dataset),
            **settings,
        }
        return self._with_training(said) if self.num_steps else said

    def write(self, net: nn.Module, rows: np.ndarray, purpose: Purpose) -> list[str]:
        """A tune for the text of each row, empty where it has no end within `max_tokens`.

        Args:
            net: in evaluation mode.
            rows: of the held-out pairs, int64 (N,).
            purpose: of the noise.
        """
        seeds, tunes = SeedRange(self.sample_seed, purpose), []
        for start in range(0, len(rows), 4 * self.batch_size):
            some = rows[start : start + 4 * self.batch_size]
            found = sample(
                net,
                [prompt_tokens(self._held[row].text) for row in some],
                [seeds.generator(int(row), SAMPLE) for row in some],
                end=END,
                pad=PAD,
                top_p=self.top_p,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
            )
            tunes += [decode(tokens) if tokens[-1:] == [END] else "" for tokens in found]
        return tunes

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        pairs = [self._held[row] for row in rows_N]
        swapped = [
            dataclasses.replace(pair, text=self._unrelated[row].text) for pair, row in zip(pairs, rows_N, strict=True)
        ]
        own_N, other_N = (torch.cat(list(self._losses(live, some))).double().cpu().numpy() for some in (pairs, swapped))
        groups_N = self._groups(rows_N)
        losses = {"shuffled_loss": other_N, "conditioning_gap": other_N - own_N}
        found = {name: _row(float(some.mean()), grouped_se(some, groups_N)) for name, some in losses.items()}
        if self.num_steps:
            tokens = self._windows(live.net, SeedRange(self.train_seed, Purpose.TRAIN)).tokens
            found["trained_tokens"] = _row(float(tokens), 0.0)
        rows = self._sampled(rows_N)
        if len(rows) < 2:
            return found
        measures = measure_tunes(
            self.write(live.net, rows, purpose),
            [self._held[row].tune for row in rows],
            [self._unrelated[row].tune for row in rows],
            [pair.tune for pair in self.dataset.pairs(TextPart.TRAIN)],
            lambda tune: not tune_problems(tune, self._checker),
        )
        for name, measure in measures.items():
            found |= _rows(name, measure)
        return found

    def _sampled(self, rows_N: np.ndarray) -> np.ndarray:
        """Rows whose texts are written to, each once."""
        _, first = np.unique(rows_N, return_index=True)
        return rows_N[np.sort(first)[: self.samples]]

    def _losses(self, live: LiveModel, pairs: list[Pair]) -> Iterator[Tensor]:
        """The loss of each pair, batch by batch, shape (N,)."""
        for start in range(0, len(pairs), self.batch_size):
            yield tune_losses(live.net, pairs[start : start + self.batch_size])

    def _groups(self, rows_N: np.ndarray) -> np.ndarray:
        """Settings of one melody go together."""
        return np.array([self._held[row].group for row in rows_N])

    @functools.cached_property
    def _held(self) -> tuple[Pair, ...]:
        """The pairs of the search part, and behind them those of the report part."""
        return self.dataset.pairs(TextPart.SEARCH) + self.dataset.pairs(TextPart.REPORT)

    @functools.cached_property
    def _unrelated(self) -> tuple[Pair, ...]:
        """For each of `_held` the next one of its part with another melody and another text."""
        found = []
        for part in (TextPart.SEARCH, TextPart.REPORT):
            pairs = self.dataset.pairs(part)
            for place, pair in enumerate(pairs):
                after = pairs[place + 1 :] + pairs[:place]
                other = next((some for some in after if some.group != pair.group and some.text != pair.text), None)
                if other is None:
                    raise ConfigError(
                        f"all tunes of the {part.name.lower()} part are one melody or have one text, so there is "
                        "nothing to compare with. Give more tunes."
                    )
                found.append(other)
        return tuple(found)

    @functools.cached_property
    def _checker(self) -> str:
        return self.checker if self.checker != "auto" else CHECKER if abc2midi_version() else "lcsc"

    def _fresh(self, candidate: Candidate) -> LiveModel:
        arch = candidate.arch
        if arch is not None and arch.get("class") not in TUNE_MODELS:
            raise ConfigError(
                f"objective `{self.name}` runs language models and encoder-decoders of transformers, and the "
                f"checkpoints hold `{arch.get('class')}`. Use one of: {', '.join(TUNE_MODELS)}."
            )
        live = super()._fresh(candidate)
        check_tunes(live.net.config, 2)
        config: Any = live.net.config
        most = getattr(getattr(config, "decoder", config), "max_position_embeddings", None)
        if most is not None and self._longest > most:
            raise ConfigError(
                f"the longest pair has {self._longest} tokens, and the network reads at most {most}. Set "
                f"`dataset.longest` to {most}, or take a network with more `max_position_embeddings`."
            )
        return live

    @functools.cached_property
    def _longest(self) -> int:
        """Tokens of the longest pair that is read; those of the training part are where it is fine-tuned."""
        read = self._held + (self.dataset.pairs(TextPart.TRAIN) if self.num_steps else ())
        return max(len(pair_tokens(pair.text, pair.tune)) for pair in read)


def _rows(name: str, found: Measured) -> dict[str, dict[str, float]]:
    """A measure, and the ends of its scale that are no constants."""
    rows = {name: _row(found.value, found.se)}
    if found.floor:
        rows[f"{name}_floor"] = _row(found.floor, 0.0)
    if name in ("validity", "whole_bars", "diversity"):
        rows[f"{name}_ceiling"] = _row(found.ceiling, 0.0)
    return rows


def _row(value: float, se: float | None) -> dict[str, float]:
    return {"value": value} if se is None else {"value": value, "se": se}
