"""The loss of a model that goes on with a text which its encoder, or its beginning, has read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import TextDataset, TextPart
from lcsc.datasets.pair_tasks import TASKS, pairs_of
from lcsc.metrics.text_measures import measure_texts, need_measures
from lcsc.models.causal_lm import BYTES, CAUSAL_LMS, check_text
from lcsc.models.fit import Windows
from lcsc.models.flat import LiveModel
from lcsc.models.flops import pair_training_flops
from lcsc.models.pairs import PairWindows, is_composite, pair_losses, write_targets
from lcsc.objectives.base import Score, spending
from lcsc.objectives.uptrained_loss import UptrainedLoss
from lcsc.operators.base import Candidate
from lcsc.recycling.composite import SHARED, STOCK


@register("objective", "seq2seq", source="arXiv:1907.12461; transformers' EncoderDecoderModel")
@dataclass(frozen=True)
class Seq2Seq(UptrainedLoss):
    """Mean cross-entropy of held-out targets given their sources, in nats, after a fixed budget of fine-tuning.

    A pair is made of a block of the text, by `task`: `continue` takes its first `source_length` tokens as the source
    and the others as the target; `restore` has the block as the target, and as the source the block in small letters,
    without punctuation and line ends. An encoder-decoder reads the source with its encoder, a language model as the
    beginning of its text. Everything else is as in `uptrained_loss`: the same pairs for all candidates, `num_steps` 0
    for what operators make as it is.

    With `samples` full scores also hold measures of targets that the model writes for the first so many sources, the
    likeliest token after the other: see `lcsc.metrics.text_measures.measure_texts`. This needs the extra
    `lcsc[seq2seq]`.

    Args:
        task: `continue`, or `restore` for a text of bytes.
        source_length: tokens of a source of `continue`; null is half of a block.
        samples: targets that are written for a full score; 0 leaves them out.
    """

    task: str = "continue"
    source_length: int | None = None
    samples: int = 0
    num_steps: int = 0
    decode_tokens: int = 0

    name: ClassVar[str] = "seq2seq"
    classes: ClassVar[tuple[str, ...]] = (STOCK[0], SHARED[0], *CAUSAL_LMS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ConfigError(f"`objective.task` is `{self.task}`; it must be one of {', '.join(TASKS)}.")
        if self.task == "restore" and (self.source_length is not None or _is_cut(self.dataset)):
            raise ConfigError(
                f"`objective.task` is `restore` with `source_length` {self.source_length} and the text of "
                f"{self.dataset.vocab_size} tokens; its sources are as long as their blocks, of bytes. Leave "
                "`source_length` and `dataset.tokenizer` out."
            )
        if self.task == "continue" and not 1 <= self._source < self.block_length:
            raise ConfigError(
                f"`objective.source_length` is {self.source_length}; it must be at least 1 and below `block_length` "
                f"{self.block_length}."
            )
        if self.samples < 0 or self.samples == 1:
            raise ConfigError(f"`objective.samples` is {self.samples}; it must be 0, or at least 2.")
        if self.samples:
            if _is_cut(self.dataset):
                raise ConfigError(
                    f"`objective.samples` is {self.samples}, and measures read texts of bytes. Leave "
                    "`dataset.tokenizer` out, or set `samples` to 0."
                )
            need_measures()

    def __call__(
        self, candidate: Candidate, *, seed: int, purpose: Purpose, images: range, full: bool = False
    ) -> Score:
        """See `Objective.__call__`; a text that is written reads each of its tokens once, as one network call does."""
        further = len(self._sampled(self._rows(seed, purpose, images))) if full else 0
        with spending(further):
            score = super().__call__(candidate, seed=seed, purpose=purpose, images=images, full=full)
        return dataclasses.replace(score, further=score.further + further)

    def batches(self, live: LiveModel, seed: int, purpose: Purpose, images: range) -> Iterator[Tensor]:
        """See `MeanLoss.batches`."""
        rows_N = self._rows(seed, purpose, images)
        for start in range(0, len(images), self.batch_size):
            ids_NL = self._pairs(purpose, rows_N[start : start + self.batch_size]).to(live.theta_P.device)
            yield pair_losses(live.net, ids_NL, self._source).mean(1)

    def circumstances(self) -> dict[str, Any]:
        """What `uptrained_loss` says, and what a pair is."""
        said, own = super().circumstances(), {"task": self.task, "source_length": self._source, "samples": self.samples}
        return {**said, "detector_digest": value_digest({"before": said["detector_digest"], **own}), **own}

    def speed(self, candidate: Candidate) -> None:
        """Not measured: encoder-decoders and language models write in other ways."""
        return

    def write(self, net: nn.Module, rows: np.ndarray, purpose: Purpose) -> list[tuple[str, str, str]]:
        """What a network writes for each row of a purpose's half, its reference and its source.

        Args:
            net: in evaluation mode.
            rows: int64 (N,).
            purpose: whose half.
        """
        found, S = [], self._source
        for start in range(0, len(rows), self.batch_size):
            ids_NL = self._pairs(purpose, rows[start : start + self.batch_size])
            source_NS = ids_NL[:, :S].to(next(net.parameters()).device)
            written_NT = write_targets(net, source_NS, ids_NL.shape[1] - S).cpu()
            texts = (written_NT, ids_NL[:, S:], ids_NL[:, :S])
            found += zip(*([_text(row) for row in some.tolist()] for some in texts), strict=True)
        return found

    def _others(
        self, live: LiveModel, purpose: Purpose, rows_N: np.ndarray, value: float, se: float | None
    ) -> Mapping[str, Mapping[str, float]]:
        found = dict(super()._others(live, purpose, rows_N, value, se))
        rows = self._sampled(rows_N)
        if len(rows) < 2:
            return found
        for name, measure in measure_texts(*zip(*self.write(live.net, rows, purpose), strict=True)).items():
            found[name] = {"value": measure.value, "se": measure.se}
            found[f"{name}_floor"] = {"value": measure.floor, "se": 0.0}
        return found

    def _sampled(self, rows_N: np.ndarray) -> np.ndarray:
        """Rows whose targets are written, each once."""
        _, first = np.unique(rows_N, return_index=True)
        return rows_N[np.sort(first)[: self.samples]]

    def _pairs(self, purpose: Purpose, rows: np.ndarray) -> Tensor:
        """Source and target of some blocks, int64 (N, S + T)."""
        return pairs_of(self._blocks(purpose)[torch.from_numpy(rows)], self.task)

    @property
    def _first(self) -> int:
        return 0 if self.task == "restore" else self._source

    @property
    def _source(self) -> int:
        """Tokens of a source."""
        if self.task == "restore":
            return self.block_length
        return self.block_length // 2 if self.source_length is None else self.source_length

    @property
    def _window(self) -> int:
        return self._source + self.block_length - self._first

    def _training_flops(self, net: nn.Module) -> int:
        if not is_composite(net):
            return super()._training_flops(net)
        pairs = self.num_steps * self.train_batch_size
        return pair_training_flops(net, pairs, self._source, self._window - self._source)

    def _windows(self, net: nn.Module, seeds: SeedRange) -> Windows:
        pairs = functools.partial(pairs_of, task=self.task)
        return PairWindows(self.dataset.tokens(TextPart.TRAIN), self.fit, seeds, net, self._source, pairs)

    def _check_tokens(self, config: Any) -> None:
        if not getattr(config, "is_encoder_decoder", False):
            check_text(config, self.dataset.vocab_size, self._window)
            return
        check_text(config.encoder, self.dataset.vocab_size, self._source)
        check_text(config.decoder, self.dataset.vocab_size, self._window - self._source)


def _is_cut(dataset: TextDataset) -> bool:
    """Whether tokens are no bytes."""
    return dataset.vocab_size != BYTES or getattr(dataset, "tokenizer", None) is not None


def _text(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace").strip()
