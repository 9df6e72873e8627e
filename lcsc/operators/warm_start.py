"""An encoder-decoder that begins as trained models. K = checkpoints, L = layers, D = width, V = tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lcsc.bank import CheckpointBank
from lcsc.core.digests import value_digest
from lcsc.core.errors import ConfigError, did_you_mean
from lcsc.core.registry import register
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.core.space import Box, Point, SearchSpace
from lcsc.operators.base import Baseline, Candidate
from lcsc.operators.surgery import Plan, candidate
from lcsc.operators.warm_sources import (
    RULES,
    Found,
    Sources,
    all_targets,
    by_rule,
    differ,
    dtype_of,
    mix_of,
    need_vocabulary,
    norm_of,
    pick,
    pieces_of,
    provenance_csv,
    tensors_told,
    token_rows,
)
from lcsc.recycling.composite import COMBINATIONS, composite_config, find_tokens, part_config
from lcsc.recycling.families import FAMILIES
from lcsc.recycling.vocabulary import find_vocabulary
from lcsc.recycling.warm_start import CROSS, EMBEDDINGS, RENEWED, SHARES, Side, totals


@register("operator", "warm_start", source="arXiv:1907.12461; sharing in transformers 5 by lcsc")
@dataclass(frozen=True)
class WarmStart:
    """An encoder-decoder of transformers from trained checkpoints; what is left null is searched.

    The bank is where encoder and decoder come from unless they are set. Without a search, null steps are the last,
    null `share` is `embeddings` where one model gives both sides or
    one is random, and null `cross_attention` is `random`.

    Args:
        combination: one of the paper's, such as `bert2gpt`: which side is random, and what is shared.
        encoder: null for the bank, a folder of another model, `random` (the bank's architecture), or `none` for a
            decoder alone.
        decoder: null for the bank, a folder of another model, or `random`.
        encoder_step, decoder_step: which of the source's checkpoints.
        encoder_other, decoder_other: a second checkpoint of the source that a side lies between.
        encoder_mix, decoder_mix: share of the second, one number or one for each layer and one for all else.
        encoder_layers, decoder_layers: layers of the source, in the new order.
        num_encoder_layers, num_decoder_layers: how many a search of them takes; without one, the first.
        share: `none`, `embeddings` (one matrix) or `all` (the decoder's tensors are the encoder's, but for attention
            to the encoder and the head).
        cross_attention: `random`, `copy` (of self-attention) or `zero` (an output of zero).
        encoder_embeddings, decoder_embeddings: `copy`, `random`, `overlap` with the tokens of `vocabulary`, or
            `pieces`: the same, and rows of its other tokens are the mean of those that spell them.
        vocabulary: folder of the tokenizer that the new model has where embeddings are `overlap` or `pieces`.
        start_token, end_token, pad_token: of the decoder; null finds them.
        try_random: whether a search may also draw a side that the bank gives, as if that were one more checkpoint.
        seed: of what is drawn.
    """

    combination: str | None = None
    encoder: str | None = None
    decoder: str | None = None
    encoder_step: int | None = None
    decoder_step: int | None = None
    encoder_other: int | None = None
    decoder_other: int | None = None
    encoder_mix: Any = None
    decoder_mix: Any = None
    encoder_layers: Any = None
    decoder_layers: Any = None
    num_encoder_layers: int | None = None
    num_decoder_layers: int | None = None
    share: str | None = None
    cross_attention: str | None = None
    encoder_embeddings: str = "copy"
    decoder_embeddings: str = "copy"
    vocabulary: str | None = None
    start_token: int | None = None
    end_token: int | None = None
    pad_token: int | None = None
    try_random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        choices = (("combination", COMBINATIONS), ("share", SHARES), ("cross_attention", CROSS))
        more = (("encoder_embeddings", EMBEDDINGS), ("decoder_embeddings", EMBEDDINGS))
        for name, known in (*choices, *more):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"`operator.{name}` is `{value}`.{did_you_mean(str(value), known)}")
        for role in ("encoder", "decoder"):
            self._check_layers(f"{role}_layers", f"num_{role}_layers")
            self._check_mix(role)
        overlaps = not {self.encoder_embeddings, self.decoder_embeddings}.isdisjoint(RENEWED)
        if overlaps != (self.vocabulary is not None):
            raise ConfigError(
                f"`operator.vocabulary` is {self.vocabulary} and embeddings are `{self.encoder_embeddings}` and "
                f"`{self.decoder_embeddings}`; a vocabulary goes with `overlap` or `pieces`. Give both, or neither."
            )
        if self.decoder == "none":
            raise ConfigError("`operator.decoder` is `none`; a decoder is needed. Give null, `random` or a folder.")
        if self.combination is not None:
            for role, wanted in zip(("encoder", "decoder"), COMBINATIONS[self.combination], strict=False):
                given = getattr(self, role)
                plain = given not in (None, "random", "none")
                if given is not None and given != wanted and not (plain and wanted in FAMILIES):
                    raise ConfigError(
                        f"`operator.{role}` is `{given}`, and in `{self.combination}` it is {wanted}. Leave one out."
                    )
        self.__dict__["_sources"] = Sources()
        _ = SeedRange(self.seed, Purpose.TRAIN)  # checks it

    def _check_layers(self, name: str, num: str) -> None:
        given, count = getattr(self, name), getattr(self, num)
        if count is not None and (given is not None or count < 1):
            raise ConfigError(f"`operator.{num}` is {count}; it must be at least 1, and goes without `{name}`.")
        if given is None:
            return
        listed = isinstance(given, Sequence) and not isinstance(given, str)
        if not listed or not given or not all(type(i) is int and i >= 0 for i in given):
            raise ConfigError(f"`operator.{name}` is `{given}`; give a list of layers, counted from 0.")
        self.__dict__[name] = tuple(given)  # equal and hashable, whatever kind of list it came as

    def _check_mix(self, role: str) -> None:
        name, given = f"{role}_mix", getattr(self, f"{role}_mix")
        if given is None:
            return
        listed = isinstance(given, Sequence) and not isinstance(given, str)
        numbers = list(given) if listed else [given]
        if not numbers or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers):
            raise ConfigError(f"`operator.{name}` is `{given}`; give a number in [0, 1], or a list of them.")
        if getattr(self, f"{role}_other") is None:
            raise ConfigError(f"`operator.{name}` is set without `{role}_other`, the step that it mixes in. Give both.")
        if listed:
            self.__dict__[name] = tuple(given)

    # -------------------------------------------------------------------------------------------------- space

    def space(self, bank: CheckpointBank) -> SearchSpace:
        """Whatever of steps, layers, mixing, sharing and attention to the encoder is not fixed; zeros are defaults."""
        boxes = []
        for role in self._roles():
            found = self._found(bank, role, None)
            warm = not found.random
            num = found.bank.num_checkpoints + (self.try_random and getattr(self, role) is None)
            if warm and getattr(self, f"{role}_step") is None and num > 1:
                boxes.append(Box(f"{role}_step", 1, 0.0, float(num), scale=num / 4))
            if warm and getattr(self, f"num_{role}_layers") is not None:
                boxes.append(Box(f"{role}_layers", found.sizes["layers"], -1.0, 1.0, scale=0.6))
            if warm and getattr(self, f"{role}_other") is not None and getattr(self, f"{role}_mix") is None:
                size = len(self._layers(found, role, None)) + 1
                boxes.append(Box(f"{role}_mix", size, 0.0, 1.0, scale=0.3))
        if "encoder" in self._roles():
            for name, options in (("share", self._shares(bank)), ("cross_attention", self._crosses(bank))):
                if len(options) > 1:
                    boxes.append(Box(name, 1, 0.0, float(len(options)), scale=len(options) / 4))
        space = SearchSpace(tuple(boxes))
        self.plan(bank, space.to_point(np.zeros(space.size)))  # refuses settings that do not fit
        return space

    def baselines(self, bank: CheckpointBank) -> list[Baseline]:
        """Each sharing and start of attention that is free, with the first, the last and evenly spread layers."""
        space = self.space(bank)
        sizes = {box.name: box.size for box in space.boxes}
        free = [name for name in ("encoder_layers", "decoder_layers") if name in sizes]
        shares = self._shares(bank) if "share" in sizes else (None,)
        crosses = self._crosses(bank) if "cross_attention" in sizes else (None,)
        rows = []
        for rule, share, cross in itertools.product(RULES if free else (None,), shares, crosses):
            point = space.to_point(np.zeros(space.size))
            for name in free:
                count = getattr(self, f"num_{name}")
                point[name][:] = -0.25  # near enough for others to take their place
                point[name][list(by_rule(rule or "", sizes[name], count))] = 0.25
            if share is not None:
                point["share"][:] = shares.index(share) + 0.5
            if cross is not None:
                point["cross_attention"][:] = crosses.index(cross) + 0.5
            said = [f"{rule} layers" if rule else None, f"share {share}" if share else None, cross]
            said = list(filter(None, said)) or ["warm start"]
            rows.append(Baseline(said[0], ", ".join(said), point))
        return rows if space.size else []

    def other_checkpoints(self, bank: CheckpointBank) -> dict[str, str]:
        """See `lcsc.operators.base.ReadsMore`."""
        folders = {role: found for role in self._roles() if (found := self._found(bank, role, None)).bank is not bank}
        words = (
            {} if self.vocabulary is None else {"vocabulary": value_digest(dict(need_vocabulary(self.vocabulary).ids))}
        )
        return {role: found.bank.digest for role, found in folders.items()} | words

    # -------------------------------------------------------------------------------------------------- models

    def apply(self, bank: CheckpointBank, point: Point) -> Candidate:
        """The encoder-decoder, or the decoder alone."""
        return candidate(self.plan(bank, point), bank)

    def plan(self, bank: CheckpointBank, point: Point | None = None) -> Plan:
        """How it is made; see `lcsc.operators.surgery`.

        Raises:
            ConfigError: settings that do not fit the models.
            BankError: models of a kind that cannot be an encoder, or a decoder that attends to one.
        """
        found = {role: self._found(bank, role, point) for role in self._roles()}
        share = pick(point, "share", self._shares(bank))
        if share == "all":
            found["decoder"] = found["encoder"]
        mine = [f for f in found.values() if f.bank is bank and not f.random]
        row = mine[0].row if mine else bank.num_checkpoints - 1
        sides = {role: self._side(bank, row, f, role, point) for role, f in found.items()}
        cross = pick(point, "cross_attention", self._crosses(bank)) if "encoder" in found else None
        if share == "all":
            sides["decoder"] = replace(sides["encoder"], stem="decoder.")
        seeds = SeedRange(self.seed, Purpose.TRAIN)
        targets = all_targets(sides, seeds, share, cross)
        dtype = dtype_of(bank, {role: f.bank for role, f in found.items() if not f.random})
        arch, files = self._arch(found, sides, share, dtype)
        others = self._others(bank, row, found)
        recipe: dict[str, Any] = {"operator": "warm_start", "steps": [bank.steps[row]]}
        settled = self._settled(found, share, cross)
        recipe |= {"combination": settled.combination, "share": share, "cross_attention": cross, "seed": self.seed}
        for role, side in sides.items():
            step = None if found[role].random else found[role].bank.steps[found[role].row]
            recipe |= {f"{role}_step": step, f"{role}_layers": list(side.layers) if side.origin else len(side.layers)}
        recipe |= {"counts": totals(targets), "tensors": tensors_told(targets)}
        recipe["sources"] = {tag: {"path": str(b.path.absolute()), **b.parent(k)} for tag, (b, k) in others.items()}
        files["provenance.csv"] = provenance_csv(targets, {"": (bank, row), **others})
        like = norm_of(self._sources.origin(bank, ""))
        pieces = tuple(pieces_of(targets, like))
        how = {"files": files, "folders": self._folders(found), "settled": settled}
        return Plan(row, arch, pieces, recipe, others, whole=True, **how)

    # ------------------------------------------------------------------------------------------------- details

    def _settled(self, found: Mapping[str, Found], share: str, cross: str | None) -> WarmStart:
        """What makes the same model where the bank holds no step but the plan's own, from any folder."""
        fixed: dict[str, Any] = {f"{r}_step": f.bank.steps[f.row] for r, f in found.items() if not f.random}
        if any(f.random and "random" not in (getattr(self, r), self._kind(r)) for r, f in found.items()):
            fixed |= {"combination": None} | {r: "random" for r, f in found.items() if f.random}
            fixed |= {} if "encoder" in found else {"encoder": "none"}
        for name in ("encoder", "decoder", "vocabulary"):
            if (place := getattr(self, name)) not in (None, "random", "none"):
                fixed[name] = str(Path(place).absolute())
        settled = replace(self, **fixed, **({"share": share, "cross_attention": cross} if len(found) > 1 else {}))
        settled.__dict__["_sources"] = self._sources  # which are open, and have their digests
        return settled

    def _folders(self, found: Mapping[str, Found]) -> dict[str, Path]:
        """Where the tokenizers of the new model are: the encoder's, and the decoder's where it is another."""
        overlaps = {role: getattr(self, f"{role}_embeddings") in RENEWED for role in found}
        places = {r: Path(str(self.vocabulary)) if overlaps[r] else f.folder for r, f in found.items()}
        first = next(iter(places.values()))
        return {"": first} | ({"decoder": places["decoder"]} if places["decoder"] != first else {})

    @property
    def _sources(self) -> Sources:
        return self.__dict__["_sources"]  # type: ignore[no-any-return]

    def _kind(self, role: str) -> str | None:
        """The model_type that the combination wants, or `random` or `none`; None for any."""
        return None if self.combination is None else COMBINATIONS[self.combination][role == "decoder"]

    def _roles(self) -> tuple[str, ...]:
        alone = "none" in (self.encoder, self._kind("encoder"))
        return ("decoder",) if alone else ("encoder", "decoder")

    def _found(self, bank: CheckpointBank, role: str, point: Point | None) -> Found:
        """Where a side comes from; raises ConfigError where it is not of the combination's kind."""
        place, kind, step = getattr(self, role), self._kind(role), getattr(self, f"{role}_step")
        if random := "random" in (place, kind):
            place = step = point = None
        at = None if step is not None or point is None or f"{role}_step" not in point else point[f"{role}_step"]
        found = self._sources.find(bank, place, role, step, at, random)
        if random:
            return found
        alone = "encoder" not in self._roles()
        if (kind not in (None, found.family.kind)) or (alone and found.family.kind != "gpt2"):
            raise ConfigError(
                f"the {role} comes from `{found.bank.path}`, a `{found.family.kind}`, and in `"
                f"{self.combination or 'encoder=none'}` it is a {kind or 'gpt2'}. Give such a model, with model=DIR or "
                f"operator.{role}=DIR."
            )
        drawn = at is not None and place is None and float(at.reshape(-1)[0]) >= found.bank.num_checkpoints
        return replace(found, random=True) if drawn and self.try_random else found

    def _layers(self, found: Found, role: str, point: Point | None) -> tuple[int, ...]:
        L, given, num = found.sizes["layers"], getattr(self, f"{role}_layers"), getattr(self, f"num_{role}_layers")
        if found.random:
            return tuple(range(len(given) if given else num or L))
        if given is not None and max(given) >= L:
            raise ConfigError(
                f"`operator.{role}_layers` has {max(given)}; `{found.bank.path}` has layers 0 to {L - 1}. Give those."
            )
        if num is not None and num > L:
            raise ConfigError(f"`operator.num_{role}_layers` is {num}; `{found.bank.path}` has {L}. Give at most that.")
        if given is not None or num is None:
            return tuple(given or range(L))
        x_L = np.zeros(L) if point is None else np.asarray(point[f"{role}_layers"], np.float64)
        return tuple(sorted(int(i) for i in np.argsort(-x_L, kind="stable")[:num]))

    def _side(self, bank: CheckpointBank, row: int, found: Found, role: str, point: Point | None) -> Side:
        family, layers = found.new_family(role), self._layers(found, role, point)
        sizes = {**found.sizes, "layers": len(layers), "T": found.sizes.get("T", 2)}
        stem = f"{role}." if "encoder" in self._roles() else ""
        embeddings, rows = getattr(self, f"{role}_embeddings"), None
        if embeddings in RENEWED:
            new = need_vocabulary(self.vocabulary)
            sizes["V"], rows = new.size, token_rows(found, role, new, embeddings)
        std = float(found.config.get("initializer_range") or 0.02)
        side = Side(stem, family, sizes, layers, None, embeddings=embeddings, rows=rows, std=std)
        if found.random:
            return replace(side, pad=found.config.get("pad_token_id"))
        origin = self._sources.origin(found.bank, "" if (found.bank, found.row) == (bank, row) else role)
        other = None if getattr(self, f"{role}_other") is None else replace(origin, tag=f"{role}_other")
        return replace(
            side, origin=origin, other=other, mix=mix_of(getattr(self, f"{role}_mix"), role, len(layers), point)
        )

    def _others(self, bank: CheckpointBank, row: int, found: Mapping[str, Found]) -> dict[str, tuple[Any, int]]:
        """Checkpoints beside the plan's own, by what they are called in it."""
        out = {}
        for role, f in found.items():
            if f.random:
                continue
            if (f.bank, f.row) != (bank, row):
                out[role] = (f.bank, f.row)
            if (step := getattr(self, f"{role}_other")) is not None:
                second = self._sources.find(bank, getattr(self, role), role, step, None, False)
                out[f"{role}_other"] = (second.bank, second.row)
        return out

    def _shares(self, bank: CheckpointBank) -> tuple[str, ...]:
        """What the two sides can share, the default first; what is set, where it is."""
        if "encoder" not in self._roles():
            return ("none",)
        a, b = (self._found(bank, role, None) for role in ("encoder", "decoder"))
        same = (a.sizes["V"], a.sizes["D"]) == (b.sizes["V"], b.sizes["D"])
        same = same and self.encoder_embeddings == self.decoder_embeddings and not differ(a, b)
        own = (self.decoder_layers, self.num_decoder_layers, self.decoder_other)
        own_step = self.decoder_step is not None and self.decoder_step != self.encoder_step
        twins = same and a.new_family("encoder") == b.new_family("decoder") and a.random == b.random
        twins = twins and a.bank is b.bank and own == (None,) * 3 and not own_step
        # two models trained apart keep their own numbers unless they are asked to share
        apart = a.bank is not b.bank and not (a.random or b.random)
        matrix = ("embeddings",) if same else ()
        able = (*(("none", *matrix) if apart else (*matrix, "none")), *(("all",) if twins else ()))
        wanted = self.share or (None if self.combination is None else COMBINATIONS[self.combination][2])
        if wanted is None:
            return able
        if wanted not in able:
            raise ConfigError(
                f"`{wanted}` cannot be shared between `{a.bank.path}` and `{b.bank.path}` as set: one matrix needs "
                "equal tokens and widths, all tensors one source and the encoder's layers. Use `operator.share=none`."
            )
        return (wanted,)

    def _crosses(self, bank: CheckpointBank) -> tuple[str, ...]:
        """How attention to the encoder can begin, the default first."""
        if self.cross_attention is not None:
            return (self.cross_attention,)
        return ("random", "zero") if self._found(bank, "decoder", None).random else CROSS

    def _arch(
        self, found: Mapping[str, Found], sides: Mapping[str, Side], share: str, dtype: str
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """`{"class", "config"}` of the new model, and files that say how it generates."""
        alone = "encoder" not in found
        parts = {
            role: part_config(side.family, found[role].config, "alone" if alone else role, side.sizes)
            for role, side in sides.items()
        }
        if alone:
            return {"class": "GPT2LMHeadModel", "config": {**parts["decoder"], "dtype": dtype}}, {}
        f = found["decoder"]
        known = need_vocabulary(self.vocabulary) if self.decoder_embeddings in RENEWED else find_vocabulary(f.folder)
        given = {"start": self.start_token, "end": self.end_token, "pad": self.pad_token}
        tokens = find_tokens(f.config, known, sides["decoder"].sizes["V"], given)
        name, config = composite_config(parts["encoder"], parts["decoder"], share, tokens, dtype)
        keys = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        text = json.dumps({key: config[key] for key in keys}, indent=2) + "\n"
        return {"class": name, "config": config}, {"generation_config.json": text}
