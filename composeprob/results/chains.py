"""The chains of a run that has ended: an array for each quantity, with the chains along
its first axis."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import numpy as np
from jaxtyping import Float, Int

from composeprob.density.evaluation import Position


@dataclass(frozen=True, eq=False)
class Chains:
    """`Chains` hold what a run keeps of each of its chains, without copies of them.

    Args:
        positions: where they are, ``{site: (N, …)}``.
        arrival: where they were on arrival at level 0; None where that is unknown, or
            nothing has moved them since.
        log_density: log π₀ there, (N,); None by scores alone.
        scores: ∇log π₀ there, of the positions' structure; None where no transition has
            left any.
        log_weights: (N,), up to a constant.
        path_weights: Feynman–Kac log-weights of their paths, (N,); all 0 where the run
            accumulated none.
        ancestors: index of the first chain that each descends from, (N,).
    """

    positions: Position
    arrival: Position | None
    log_density: Float[np.ndarray, " chains"] | None
    scores: Position | None
    log_weights: Float[np.ndarray, " chains"]
    path_weights: Float[np.ndarray, " chains"]
    ancestors: Int[np.ndarray, " chains"]

    def chosen(self, index: Int[np.ndarray, " some"]) -> Self:
        """The same of some of the chains, as copies: the arrays of all need not
        stay."""

        def rows(values: np.ndarray) -> np.ndarray:
            return np.asarray(values)[index]

        some = {}
        for quantity in dataclasses.fields(Chains):
            some[quantity.name] = jax.tree.map(rows, getattr(self, quantity.name))
        return dataclasses.replace(self, **some)
