"""Which entries of a site a leaf sees, where they are no box."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from composeprob.factors.window import Indices


@dataclass(frozen=True)
class Cells:
    """The linear map from a site to a leaf's event that picks entries, the sibling of `Region`.

    Attributes:
        indices: of the flattened site, (*counts, size): an axis for each of the leaf's plates that run over sets of
            cells, the outermost first, then one for the entries of the event.
        shown: how the cells are printed.
    """

    indices: Indices
    shown: str = field(compare=False)

    averaged = 1

    @property
    def axes(self) -> int:
        """The number of plates that run over sets."""
        return len(self.indices.shape) - 1

    def entries(self, shape: tuple[int, ...]) -> np.ndarray:
        """Which entries of a flattened site of this shape are seen."""
        return self.indices.array

    def row(self, i: int) -> Cells:
        """The cells of the outermost plate's set i."""
        return Cells(Indices.from_array(self.indices.array[i]), listed(self.indices.array[i]))

    def pick(self, cells: np.ndarray, shown: str) -> Cells:
        """The cells that a window (*counts, size) of the event sees."""
        return Cells(Indices.from_array(self.indices.array[..., cells]), shown)


def listed(cells: np.ndarray) -> str:
    """The first few cells, for printing."""
    flat = cells.ravel()
    return ", ".join(map(str, flat[:4])) + (", …" if len(flat) > 4 else "")
