"""Samples with weights: one site's, all chains' draws together, or as many of equal weight."""

from __future__ import annotations

import math

import numpy as np

from composeprob.errors import UnknownSiteError
from composeprob.results.estimates import Families, systematic


class Weighted:
    """`Weighted` is what a result is as a set of weighted samples.

    Attributes:
        samples: ``{site: (N, …)}``, or ``(N, draws, …)``.
        log_weights: (N,).
        first_ancestors: the first chain that each descends from, (N,).
        draws: of each chain; None without draws.
    """

    samples: dict[str, np.ndarray]
    log_weights: np.ndarray
    first_ancestors: np.ndarray | None
    draws: int | None

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the samples of one site, shape (N, …), or (N, draws, …).

        Raises:
            UnknownSiteError: the program has no site of that name; a KeyError too.
        """
        if name not in self.samples:
            has = ", ".join(repr(n) for n in self.samples)
            raise UnknownSiteError(f"This result has no site {name!r}.", fix=f"its sites are: {has}.")
        return self.samples[name]

    @property
    def num_chains(self) -> int:
        """The number of chains, N."""
        return int(self.log_weights.shape[0])

    @property
    def weights(self) -> np.ndarray:
        """Normalised weights, shape (N,), summing to 1."""
        shifted = np.exp(self.log_weights - np.max(self.log_weights))
        return shifted / shifted.sum()

    @property
    def families(self) -> Families:
        """Groups the chains by the first chain that they descend from; groups are independent of each other."""
        assert self.first_ancestors is not None  # filled in where it was left out
        return Families.from_ancestors(self.weights, self.first_ancestors)

    def pooled(self, name: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns one site's samples and their weights, draws of all chains in one axis: shapes (M, …) and (M,).

        Args:
            name: the site.
            most: read no more than about so many numbers: every k-th draw.
        """
        values, n = self[name], self.num_chains
        if self.draws is None:
            return np.asarray(values), self.weights
        size = n * self.draws * math.prod(values.shape[2:])
        step = 1 if most is None else min(max(1, -(-size // most)), self.draws)
        some = np.asarray(values[:, ::step])
        weights = np.repeat(self.weights, some.shape[1])
        return some.reshape(-1, *some.shape[2:]), weights / weights.sum()

    def unweighted(self, most: int | None = None) -> dict[str, np.ndarray]:
        """Returns samples of equal weight, ``{name: (M, …)}``.

        They are those of the run where the weights are equal, else they are resampled systematically (with offset ½, so
        the answer is always the same). Draws of all chains are in one axis; ``most`` limits how many of each site are
        read, as in `pooled`.
        """
        weights = self.weights
        n = self.num_chains
        if self.draws is not None:
            return {name: self.pooled(name, most)[0] for name in self.samples}
        if np.allclose(weights * n, 1.0, rtol=1e-5):
            return {name: np.asarray(value) for name, value in self.samples.items()}
        chosen = systematic(weights, n)
        return {name: np.asarray(value)[chosen] for name, value in self.samples.items()}
