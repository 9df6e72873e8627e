"""One lost layer rebuilt from the same layers of the stages beside its own, and the derivatives of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lcsc.core.seeds import Purpose, SeedRange
from lcsc.recycling.stages import Stages, blended, fresh


@dataclass(frozen=True)
class Mix:
    """What one stage is rebuilt of: weights of its neighbours, share of a fresh stage, scale of what it writes."""

    weights: tuple[float, ...]
    random: float = 0.0
    scale: float = 1.0


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
