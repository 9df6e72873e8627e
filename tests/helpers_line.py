"""A search without images or networks: candidates are points, and an objective needs no more than its score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lcsc.core.space import Box, SearchSpace
from lcsc.operators.base import Baseline


@dataclass
class Weights:
    """A candidate reduced to its point."""

    x: np.ndarray
    measured: ClassVar[dict] = {}

    @property
    def recipe(self):
        return {"operator": "line"}


class Line:
    """As many numbers as its baselines have."""

    #: family, label and point of each
    rows = (("a", "near", [1.0, 1.0]), ("a", "far", [3.0, 3.0]), ("b", "other", [2.0, 2.0]))

    def space(self, bank):
        return SearchSpace((Box("x", len(self.rows[0][2])),))

    def apply(self, bank, point):
        return Weights(np.asarray(point["x"]))

    def baselines(self, bank):
        return [Baseline(family, label, {"x": np.array(at)}) for family, label, at in self.rows]


class Plain:
    """What an objective says beside its scores."""

    name = "distance"
    min_images = 2

    def floor(self):
        return None

    def circumstances(self):
        return {"nfe": 1}
