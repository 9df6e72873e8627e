"""How far floats move the weights: coordinates at right angles to one another, in which lengths are distances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lcsc.core.space import Box, SearchSpace


@dataclass(frozen=True, eq=False)
class RightAngles:
    """Coordinates y = matrix @ floats; |y - y'| is the distance of two candidates' weights, in the boxes' unit.

    Args:
        matrix_YZ: float64; floats that move no weights have columns of zeros.
        own_Y: for each coordinate the float that moves it and no other.
    """

    matrix_YZ: np.ndarray
    own_Y: np.ndarray

    def slopes(self, gradients: np.ndarray) -> np.ndarray:
        """Derivatives with respect to y, shape (..., Y), of those with respect to the floats, shape (..., Z)."""
        return gradients[..., self.own_Y] / self.matrix_YZ[np.arange(self.own_Y.size), self.own_Y]


def right_angles(space: SearchSpace) -> RightAngles | None:
    """The coordinates of a space, from its boxes alone; None where the boxes do not tell.

    Boxes without `lengths` move no weights where others have them, such as a sampler's times; where none has, all
    floats count by their scale. A box of level 1 refines the one of level 0 in weights of its own, such as those of a
    layer group; then the refining boxes cover all weights that move, each with axes at right angles in its own: a move
    of the shared natural numbers moves every group by what these numbers are in the group's own floats.
    """
    known = [box for box in space.boxes if box.lengths is not None]
    if not known:
        plain = all(box.level == 0 for box in space.boxes)
        return RightAngles(np.diag(space.step_lengths), np.arange(space.size)) if plain else None
    fine = [box for box in known if box.level > 0]
    own_Y = np.concatenate([_places(space, box) for box in (fine or known)])
    matrix_YZ = np.zeros((own_Y.size, space.size))
    matrix_YZ[np.arange(own_Y.size), own_Y] = space.step_lengths[own_Y]
    if not fine:
        return RightAngles(matrix_YZ, own_Y)
    coarse = [box for box in known if box.level == 0]
    if len(coarse) != 1 or coarse[0].natural is None:
        return None
    row, columns = 0, _places(space, coarse[0])
    for box in fine:
        if box.natural is None or box.natural.axes.shape[0] != coarse[0].natural.axes.shape[0]:
            return None
        rows = slice(row, row + box.size)
        lengths = space.step_lengths[_places(space, box)]
        matrix_YZ[rows, columns] = lengths[:, None] * (box.natural.inverse @ coarse[0].natural.axes)
        row += box.size
    return RightAngles(matrix_YZ, own_Y)


def _places(space: SearchSpace, wanted: Box) -> np.ndarray:
    """Which floats of a vector are those of a box."""
    start = 0
    for box in space.boxes:
        if box.name == wanted.name:
            break
        start += box.size
    return np.arange(start, start + wanted.size)
