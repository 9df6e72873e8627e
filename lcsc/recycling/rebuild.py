"""One lost layer rebuilt from the same layers of the stages beside its own, and the derivatives of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lcsc.core.errors import BankError, ConfigError
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.recycling.stages import Stages, blended, fresh, names_of, neighbours, norm_weights

#: how a lost stage is rebuilt where nothing is searched
RULES = ("average", "checkfree", "checkfree_plus", "copy_previous", "copy_next", "skip", "random")


@dataclass(frozen=True)
class Mix:
    """What one stage is rebuilt of: weights of its neighbours, share of a fresh stage, scale of what it writes."""

    weights: tuple[float, ...]
    random: float = 0.0
    scale: float = 1.0


def mix_by_rule(rule: str, lost: int, num_stages: int, norms: Sequence[float] | None, power: float = 1.0) -> Mix:
    """What a rule makes a lost stage of.

    Args:
        rule: one of `RULES`.
        lost: the stage.
        num_stages: S.
        norms: of the gradients of all stages, for `checkfree` and `checkfree_plus`.
        power: see `norm_weights`.

    Raises:
        ConfigError: a rule that does not fit the stage's place, or norms that are no norms.
    """
    beside = neighbours(lost, num_stages)
    if rule == "random":
        return Mix((0.0,) * len(beside), 1.0)
    if rule == "checkfree" and len(beside) == 1:
        raise ConfigError(
            f"`operator.rule` is `checkfree`, which rebuilds inner stages, and stage {lost} is at an end. Take "
            "`checkfree_plus`, which copies its neighbour, for a model that was trained with swapped stages."
        )
    if rule in ("copy_previous", "copy_next"):
        source = lost - 1 if rule == "copy_previous" else lost + 1
        if source not in beside:
            raise ConfigError(f"`operator.rule` is `{rule}`, and stage {lost} has no such neighbour.")
        return Mix(tuple(float(s == source) for s in beside))
    by_norms = norms is not None and rule in ("checkfree", "checkfree_plus")
    weights = norm_weights([norms[s] for s in beside] if by_norms and norms else [1.0] * len(beside), power)
    return Mix(weights, 0.0, 0.0 if rule == "skip" else 1.0)


@dataclass(frozen=True)
class LostLayer:
    """One layer to rebuild.

    Args:
        place: which of the lost stages it belongs to.
        first: place of the stage's first weight among the weights of all.
        layer: its number.
        t: its place in the stage.
        names: of its tensors, by role.
        beside: those of the same layer of each neighbour.
        shapes: by role.
        mix: see `Mix`.
        stages: see `Stages`.
        std: of new matrices.
        seed: of new ones.
    """

    place: int
    first: int
    layer: int
    t: int
    names: Mapping[str, str]
    beside: tuple[Mapping[str, str], ...]
    shapes: Mapping[str, tuple[int, ...]]
    mix: Mix
    stages: Stages
    std: float
    seed: int

    @property
    def reads(self) -> tuple[str, ...]:
        """The neighbours' tensors."""
        return tuple(name for layer in self.beside for name in layer.values())

    def rebuilt(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors, from those of its neighbours by name."""
        made = {}
        for role, name in self.names.items():
            sources, weights = self._sources(role, tensors, fresh_too=self.mix.random != 0)
            made[name] = blended(sources, weights, self._scale(role), self._offset(role))
        return made

    def slopes(
        self, tensors: Mapping[str, Tensor], grads: Mapping[str, Tensor], *, with_fresh: bool
    ) -> tuple[list[float], float]:
        """Derivatives by the weight of each source (the fresh one last), and by the scale, of what `grads` derives."""
        of_sources = [0.0] * (len(self.beside) + with_fresh)
        of_scale = 0.0
        for role, name in self.names.items():
            grad, offset = grads[name].double(), self._offset(role)
            sources, weights = self._sources(role, tensors, fresh_too=with_fresh)
            along = [float((grad * (x.double() + offset)).sum()) for x in sources]
            for k, value in enumerate(along):
                of_sources[k] += self._scale(role) * value
            if self.stages.outputs.fullmatch(role):
                of_scale += sum(w * value for w, value in zip(weights, along, strict=True))
        return of_sources, of_scale

    def _sources(
        self, role: str, tensors: Mapping[str, Tensor], *, fresh_too: bool
    ) -> tuple[list[Tensor], tuple[float, ...]]:
        sources = [tensors[layer[role]] for layer in self.beside]
        if not fresh_too:
            return sources, self.mix.weights
        rng = SeedRange(self.seed, Purpose.TRAIN).generator(self.layer, list(self.names).index(role))
        new = fresh(role, self.shapes[role], self.std, self._offset(role), rng).to(sources[0].dtype)
        return [*sources, new], (*self.mix.weights, self.mix.random)

    def _scale(self, role: str) -> float:
        return self.mix.scale if self.stages.outputs.fullmatch(role) else 1.0

    def _offset(self, role: str) -> float:
        return self.stages.offset(role, len(self.shapes[role]))


def lost_layers(
    stages: Stages,
    lost: Sequence[int],
    mixes: Sequence[Mix],
    shapes: Mapping[str, tuple[int, ...]],
    std: float,
    seed: int,
) -> Iterator[LostLayer]:
    """The layers of lost stages.

    Args:
        stages: see `Stages`.
        lost: stages.
        mixes: one each.
        shapes: of the tensors that are there, by name.
        std: of new matrices.
        seed: of new ones.

    Raises:
        BankError: layers of other tensors or shapes.
    """
    first = 0
    for place, (stage, mix) in enumerate(zip(lost, mixes, strict=True)):
        for t, layer in enumerate(stages.of(stage)):
            beside = tuple(stages.layers[stages.of(s)[t]] for s in neighbours(stage, stages.num_stages))
            like = {role: tuple(shapes[name]) for role, name in beside[0].items()}
            for other in (*beside[1:], stages.layers[layer] or beside[0]):
                if like != {role: tuple(shapes[name]) for role, name in other.items()}:
                    raise BankError(f"layer {layer} and those it is rebuilt from differ in tensors or shapes.")
            names = stages.layers[layer] or names_of(stages, layer)
            yield LostLayer(place, first, layer, t, names, beside, like, mix, stages, std, seed)
        first += len(mix.weights)
