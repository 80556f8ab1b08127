"""Positions as flat vectors: the noised entries in y = x/α, then the static ones in
unconstrained space."""

from __future__ import annotations

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position, unknown

Sites = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of sites, in alphabetical order."""


class Layout(eqx.Module):
    """The places of sites' entries in the vector v = (y, z) of one chain, of D = d + m
    numbers.

    The noised sites come first, then the static ones, held ones among them.

    In y = x/α the reverse process of every schedule is dy = S dτ + dW, with S the score
    in y and τ the variance that is taken away from s = σ²/α². So steps, fits, weights
    and kernels need no schedule but s, and know no sites.
    """

    noised: Sites = eqx.field(static=True)
    static: Sites = eqx.field(static=True)

    @classmethod
    def of_density(cls, density: AnnealedDensity) -> Layout:
        """Return the layout of a density's sites."""
        noised: list[tuple[str, tuple[int, ...]]] = []
        static: list[tuple[str, tuple[int, ...]]] = []
        for name in sorted(density.sites):
            site = density.sites[name]
            group = noised if site.kind == "noised" else static
            group.append((name, site.shape))
        return cls(tuple(noised), tuple(static))

    @property
    def dims(self) -> int:
        """d, the number of noised entries."""
        return _count(self.noised)

    @property
    def size(self) -> int:
        """D, the number of all entries."""
        return self.dims + _count(self.static)

    def entries(self, names: tuple[str, ...]) -> Int[np.ndarray, " entries"]:
        """Indices of the entries of some sites in alphabetical order, which is the
        order of matrices over them."""
        # Places are known while traced, so indices are NumPy's.
        places = {}
        begin = 0
        for name, shape in (*self.noised, *self.static):
            end = begin + math.prod(shape)
            places[name] = np.arange(begin, end)
            begin = end
        indices = [places[name] for name in sorted(names)]
        return np.concatenate(indices or [np.arange(0)])

    def position(
        self, v: Float[Array, "*batch size"], alpha: Array | float
    ) -> Position:
        """Return the position {site: array} of a vector at a level of this α; leading
        axes stay in front."""
        position = {}
        begin = 0
        for i, (name, shape) in enumerate((*self.noised, *self.static)):
            end = begin + math.prod(shape)
            entries = v[..., begin:end].reshape((*v.shape[:-1], *shape))
            if i < len(self.noised):
                entries = alpha * entries  # x = α·y
            position[name] = entries
            begin = end
        return position

    def vector(self, position: Position, alpha: Array | float) -> Float[Array, " size"]:
        """Return the vector of a position."""
        return self.gradient(position, 1 / alpha)

    def gradient(self, score: Position, alpha: Array | float) -> Float[Array, " size"]:
        """∇ with respect to the vector, of a function that has the gradient ``score``
        with respect to the position."""
        # As x = α·y, a gradient in y is α times that in x.
        pieces = []
        for name, _ in self.noised:
            pieces.append(alpha * score[name].reshape(-1))
        for name, _ in self.static:
            pieces.append(score[name].reshape(-1))
        return _joined(pieces)

    def log_volume(self, alpha: Array | float) -> Float[Array, ""]:
        """log |dx/dv| at a level of this α: densities are those of x, and steps and
        mixtures those of v."""
        return self.dims * jnp.log(alpha)

    def power(
        self, density: AnnealedDensity, level: Array | int
    ) -> Float[Array, " dims"]:
        """P, the total power of the factors at each noised entry."""
        # Arrays that broadcast to the shapes of their sites
        of_sites = density.top.at(level).power
        powers = []
        for name, shape in self.noised:
            powers.append(jnp.broadcast_to(of_sites[name], shape).reshape(-1))
        return _joined(powers)

    def evaluate(
        self,
        density: AnnealedDensity,
        v: Float[Array, " size"],
        level: Array | int,
        terms: bool = True,
    ) -> Evaluation:
        """Evaluate π_k at the vector of one chain.

        Args:
            density: of all levels.
            v: the chain.
            level: k.
            terms: whether density terms are wanted.

        Returns:
            An evaluation whose ``score`` is that of the vector, (D,). Of its terms
                ``drift`` is S, (d,), and ``rate`` is per unit of τ, α² times the one of
                x.
        """
        alpha = density.schedule.at(level).alpha
        evaluation = density.evaluator(self.position(v, alpha), level)
        flat = evaluation.with_gradients(
            self.gradient(score, alpha) for score in evaluation.gradients
        )
        if not terms:
            return flat.without_terms
        # Static sites have no drift: their entries, of the score, are cut off.
        drift = {**evaluation.score, **evaluation.terms.drift}
        in_y = dataclasses.replace(
            evaluation.terms,
            drift=self.gradient(drift, alpha)[: self.dims],
            rate=alpha**2 * evaluation.terms.rate,
        )
        tracked = flat.tracked
        if tracked is not None:
            slopes = alpha**2 * tracked.slopes
            tracked = dataclasses.replace(tracked, slopes=slopes)
        return dataclasses.replace(flat, terms=in_y, tracked=tracked)

    def unevaluated(self, density: AnnealedDensity, terms: bool = True) -> Evaluation:
        """Return an evaluation of one chain that is NaN throughout, for chains that
        were not evaluated yet.

        So only one executable, that of the levels, has the networks in it; a start that
        evaluated would be a second one.
        """

        def evaluate(v: Array) -> Evaluation:
            return self.evaluate(density, v, 0, terms)

        return unknown(jax.eval_shape(evaluate, jnp.zeros((self.size,))))


def _count(sites: Sites) -> int:
    """Number of entries of all of these sites."""
    return sum(math.prod(shape) for _, shape in sites)


def _joined(pieces: list[Array]) -> Array:
    """Return flat arrays as one; without any, an array of no numbers."""
    if not pieces:
        return jnp.zeros((0,))
    return jnp.concatenate(pieces)
