"""The repetition of a run, over every other level and by other random numbers, which
tells what no spread over the run's own chains shows.

An error that all chains of a mode share moves the mode's share and leaves no trace
among its chains: the distance of levels, log-densities that are tracked with slopes
which these chains have fitted, and a mode whose few chains have missed the paths of
large weight. Two runs differ by all of these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from composeprob.density.evaluation import Position
from composeprob.results.geometry import rows, units


class Repetition(NamedTuple):
    """A run over every other level.

    Attributes:
        log_evidence: its log-evidence.
        variance: the relative variance of the evidence.
        positions: of its chains at level 0, ``{site: (N, …)}``; None where means need
            no error by them.
        evaluations: of each of its chains.
    """

    log_evidence: float
    variance: float
    positions: Position | None
    evaluations: int = 0


def repeated_weights(
    positions: Position, repetition: Repetition | None
) -> Float[np.ndarray, " chains"] | None:
    """Return the weights that a repetition gives the chains of a run: the share of its
    chains to which each is the nearest. None where nothing can be compared.

    A mean under these weights is that of the repetition, to the distance between
    neighbours: within a mode that is little, and between modes all that counts. Tokens
    are the nearer the more of them are equal, as their numbers are names.
    """
    if repetition is None or repetition.positions is None:
        return None
    points, sizes, _ = rows(positions)
    others, _, _ = rows({name: repetition.positions[name] for name in positions})
    if not (np.isfinite(points).all() and np.isfinite(others).all()):
        return None
    distances = _differing
    if not all(np.issubdtype(x.dtype, np.integer) for x in positions.values()):
        distances = _squares
        scale = units(points.var(0), sizes)
        points = points / scale
        others = others / scale
    nearest = []
    # In blocks, as all distances together may not fit into memory.
    for i in range(0, len(others), 512):
        nearest.append(np.argmin(distances(others[i : i + 512], points), axis=1))
    number = np.bincount(np.concatenate(nearest), minlength=len(points))
    return number / len(others)


def _squares(
    block: Float[np.ndarray, "m d"], points: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "m n"]:
    """‖a − b‖² but for ‖a‖², which all neighbours of a have in common."""
    return np.sum(points**2, axis=1) - 2 * block @ points.T


def _differing(
    block: Float[np.ndarray, "m d"], points: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "m n"]:
    """The share of tokens that differ."""
    from scipy.spatial.distance import cdist

    shares: Float[np.ndarray, "m n"] = cdist(block, points, "hamming")
    return shares
