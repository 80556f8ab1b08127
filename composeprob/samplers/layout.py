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

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position, unknown


class Layout(eqx.Module):
    """Where each site's entries are in the vector v = (y, z) of one chain, of D = d + m
    numbers: ``(name, shape)`` of the noised sites, then of the static ones, held ones
    among them, in alphabetical order.

    In y = x/α the reverse process of every schedule is dy = S dτ + dW, with S the score
    in y and τ the variance that is taken away from s = σ²/α². So steps, fits, weights
    and kernels need no schedule but s, and know no sites.
    """

    noised: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    static: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)

    @classmethod
    def of_density(cls, density: AnnealedDensity) -> Layout:
        sites = [(name, density.sites[name]) for name in sorted(density.sites)]
        noised = tuple(
            (name, site.shape) for name, site in sites if site.kind == "noised"
        )
        return cls(
            noised,
            tuple((name, site.shape) for name, site in sites if site.kind != "noised"),
        )

    @property
    def dims(self) -> int:
        """d, the number of noised entries."""
        return sum(math.prod(shape) for _, shape in self.noised)

    @property
    def size(self) -> int:
        """D, the number of all entries."""
        return self.dims + sum(math.prod(shape) for _, shape in self.static)

    def entries(self, names: tuple[str, ...]) -> np.ndarray:
        """Indices of the entries of some sites, the sites in alphabetical order, as
        matrices over them are."""
        ends = np.cumsum(
            [0, *(math.prod(shape) for _, shape in (*self.noised, *self.static))]
        )
        where = {
            name: (ends[i], ends[i + 1])
            for i, (name, _) in enumerate((*self.noised, *self.static))
        }
        return np.concatenate(
            [np.arange(*where[name]) for name in sorted(names)] or [np.arange(0)]
        )

    def position(self, v: Array, alpha: Array | float) -> Position:
        """The position {site: array} of a vector (D,) at a level of this α; leading
        axes (…, D) stay in front."""
        position, begin = {}, 0
        for i, (name, shape) in enumerate((*self.noised, *self.static)):
            end = begin + math.prod(shape)
            entries = v[..., begin:end].reshape((*v.shape[:-1], *shape))
            position[name], begin = (
                alpha * entries if i < len(self.noised) else entries,
                end,
            )
        return position

    def vector(self, position: Position, alpha: Array | float) -> Array:
        """The vector (D,) of a position."""
        return self.gradient(position, 1 / alpha)

    def gradient(self, score: Position, alpha: Array | float) -> Array:
        """∇ with respect to the vector, (D,), of what has the gradient ``score`` with
        respect to the position."""
        parts = [alpha * score[name].reshape(-1) for name, _ in self.noised]
        parts += [score[name].reshape(-1) for name, _ in self.static]
        return jnp.concatenate(parts) if parts else jnp.zeros((0,))

    def power(self, density: AnnealedDensity, level: Array | int) -> Array:
        """P, the total power of the factors at each noised entry, (d,)."""
        found = density.top.at(level).power
        powers = [
            jnp.broadcast_to(found[name], shape).reshape(-1)
            for name, shape in self.noised
        ]
        return jnp.concatenate(powers) if powers else jnp.zeros((0,))

    def evaluate(
        self, density: AnnealedDensity, v: Array, level: Array | int, terms: bool = True
    ) -> Evaluation:
        """π_k at the vector of one chain: its ``score`` is that of the vector, (D,),
        and where ``terms`` are wanted their ``drift`` is S, (d,), and their ``rate``
        that per unit of τ, α² times the one of x."""
        alpha = density.schedule.at(level).alpha
        found = density.evaluator(self.position(v, alpha), level)
        flat = found.with_gradients(
            self.gradient(score, alpha) for score in found.gradients
        )
        if not terms:
            return flat.without_terms
        drift = self.gradient({**found.score, **found.terms.drift}, alpha)[: self.dims]
        known = dataclasses.replace(
            found.terms, drift=drift, rate=alpha**2 * found.terms.rate
        )
        return dataclasses.replace(flat, terms=known)

    def unevaluated(self, density: AnnealedDensity, terms: bool = True) -> Evaluation:
        """An evaluation of one chain that is NaN throughout, for chains that were not
        evaluated yet: so one executable, that of the levels, has the networks in it,
        and not a second one that only starts the chains."""
        return unknown(
            jax.eval_shape(
                lambda v: self.evaluate(density, v, 0, terms), jnp.zeros((self.size,))
            )
        )
