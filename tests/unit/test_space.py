"""Points and vectors are the same thing."""

from __future__ import annotations

import numpy as np
import pytest

from lcsc.core.errors import ConfigError
from lcsc.core.space import Box, SearchSpace

SPACE = SearchSpace((Box("a", 2, -1.0, 1.0, scale=0.5), Box("b", 1)))


def test_vector_and_point_round_trip():
    point = SPACE.to_point(np.array([0.1, 0.2, 0.3]))
    assert {name: values.tolist() for name, values in point.items()} == {"a": [0.1, 0.2], "b": [0.3]}
    assert SPACE.to_vector(point).tolist() == [0.1, 0.2, 0.3]


def test_bounds_and_scales_follow_the_boxes():
    assert SPACE.lower.tolist() == [-1, -1, -np.inf]
    assert SPACE.upper.tolist() == [1, 1, np.inf]
    assert SPACE.scale.tolist() == [0.5, 0.5, 1.0]


def test_wrong_points_are_refused():
    with pytest.raises(ConfigError, match="a point of this space has 3 floats, got shape"):
        SPACE.to_point(np.zeros(2))
    with pytest.raises(ConfigError, match=r"point has \['a'\], the space wants \['a', 'b'\]"):
        SPACE.to_vector({"a": np.zeros(2)})
    with pytest.raises(ConfigError, match="holds at least 1"):
        Box("a", 0)
    with pytest.raises(ConfigError, match="lower must be below upper"):
        Box("a", 1, 1.0, 1.0)
