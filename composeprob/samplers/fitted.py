"""A reverse step that integrates what is linear in the drift exactly: stable however stiff the density is."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Evaluation, Position
from composeprob.pytree import all_finite, where
from composeprob.samplers.base import REVERSE
from composeprob.samplers.control import fixed_gain, steered
from composeprob.samplers.fit import FEWEST, MOST, Fit, dimensions, fit, flat, power, row, unfitted, unflat
from composeprob.samplers.integrators import Departure, Integrator
from composeprob.samplers.reverse import LEAN
from composeprob.samplers.spread import Spread
from composeprob.samplers.turned import Turned, scale

LEAST = 0.01
"""The least slope, in units of 1/s, that is integrated exactly."""
MOST_CHANGE = 16.0
"""How much faster than s the time scale of a direction may change in one step."""


class Flow(eqx.Module):
    r"""A linear diffusion over one step: y' = K·y + (J/h − K)·μ₁ + (1 − J/h)·μ₀ + √Q·z in the basis U.

    In each direction the drift is −(y − μ)/n, where n goes linearly from n₁ to n₀, and μ from μ₁ to μ₀, while h of the
    variance is taken away. With ρ = log(n₁/n₀), m = (n₁ − n₀)/ρ and E(x) = (eˣ − 1)/x,

        K = exp(−h/m),    J = h·(n₀/m)·E(ρ − h/m),    Q = h·(n₀/m)·E(ρ − 2h/m).

    A factor whose data are points has n = s: then K = s₀/s₁ and Q = s₀·h/s₁, which is DDPM's step. A Gaussian of
    variance c has n = c + s, a product of P of them with its control 2(c + s)/(P + 1): exact for any h and P.

    Attributes:
        basis: U, columns of length 1, (d, d); None for the coordinate axes.
        first, last: n₁ and n₀, (d,).
        decay: K, (d,).
        mean: J/h, (d,).
        noise: √Q, (d,).
    """

    basis: Array | None
    first: Array
    last: Array
    decay: Array
    mean: Array
    noise: Array

    @classmethod
    def between(cls, first: Array, last: Array | None, s1: Array, s0: Array, power: Array) -> Flow:
        """The flow from s₁ to s₀ along slopes at both ends.

        The basis is that of their mean's eigenvectors; what is not diagonal in it counts as not linear.

        Args:
            first, last: the slopes, (d, d) or (d,); without the second it is what a product of so many equal Gaussians
                has there.
            s1, s0: σ²/α² at both ends.
            power: how many, (d,).
        """
        basis, one, other = None, first, last
        if first.ndim == 2:
            _, basis = jnp.linalg.eigh(first if last is None else 0.5 * (first + last))
            one = jnp.sum(basis * (first @ basis), axis=0)
            other = None if last is None else jnp.sum(basis * (last @ basis), axis=0)
            power = (basis**2).T @ power
        h, fall = s1 - s0, s0 / s1
        n1 = -1 / jnp.minimum(one, -LEAST / s1)
        n0 = jnp.maximum(n1 - 2 * h / (1 + power), n1 * fall) if other is None else -1 / jnp.minimum(other, -LEAST / s0)
        n0 = jnp.clip(n0, n1 * fall / MOST_CHANGE, n1 * MOST_CHANGE)
        ratio = jnp.log(n1 / n0)
        mean = n0 * relative_exponential(ratio)
        share = n0 / mean
        noise = jnp.sqrt(h * share * relative_exponential(ratio - 2 * h / mean))
        return cls(basis, n1, n0, jnp.exp(-h / mean), share * relative_exponential(ratio - h / mean), noise)

    def into(self, vector: Array) -> Array:
        """Coordinates of a vector in the basis."""
        return vector if self.basis is None else self.basis.T @ vector

    def out(self, vector: Array) -> Array:
        """The vector of such coordinates."""
        return vector if self.basis is None else self.basis @ vector


class Fitted(Integrator):
    """The step of a `Flow` along slopes that are fitted over the cloud of chains; ``control`` fits one too.

    Of first order the slope at the end is that of a product of Gaussians; of second order it is fitted over where that
    step leads, and the step is made once more with the same noise: Heun's method for what is not linear.
    """

    name = "fitted"

    def look(
        self,
        spread: Spread,
        density: AnnealedDensity,
        level: Array,
        chains: tuple[Position, Evaluation],
        log_weights: Array,
    ) -> Fit:
        noise = density.schedule.at(level)
        base = power(density) * (noise.alpha / noise.sigma) ** 2
        count, size = spread.number_of(log_weights), dimensions(density)
        if count < FEWEST or count * size > MOST:
            return unfitted(base)

        def seen(position: Position, evaluation: Evaluation) -> Array:
            before = steered(evaluation, position, density, level) if self.control else evaluation
            return row(evaluation, before.parts.rate, position, density, level)

        table = spread.gather(jnp.concatenate([spread.map(seen, *chains), log_weights[:, None]], axis=1))
        return spread.alone(lambda table: fit(table[:, :-1], table[:, -1], base, self.control), table)

    def steered(
        self, evaluation: Evaluation, position: Position, half: Array, seen: Fit, density: AnnealedDensity, level: Array
    ) -> Evaluation:
        if not self.control:
            return evaluation
        alpha = density.schedule.at(level).alpha
        by = steered(evaluation, position, density, level)
        pull, divergence = seen.control(flat(position, density) / alpha, half)
        pull = pull / alpha  # u in x, as S is
        added = unflat(pull, jax.tree.map(jnp.zeros_like, position), density)
        drift, score = (jax.tree.map(jnp.add, of, added) for of in (by.parts.drift, by.score))
        # The score's own part: ⟨u, S⟩ with S free of either control.
        rate = by.parts.rate + divergence / alpha**2 + pull @ flat(evaluation.parts.drift, density)
        return dataclasses.replace(by, score=score, parts=dataclasses.replace(by.parts, drift=drift, rate=rate))

    def depart(
        self, key: Array, position: Position, began: Evaluation, seen: Fit, density: AnnealedDensity, *levels: Array
    ) -> Departure:
        (alpha, s1), (below, s0) = (scale(density, level) for level in levels)
        flow = Flow.between(seen.along(self._gain(density, levels[0])), None, s1, s0, power(density))
        y, drift = flow.into(flat(position, density) / alpha), flow.into(alpha * flat(began.parts.drift, density))
        lean = flow.into(alpha * flat(began.score, density)) - drift
        z = flow.into(jax.random.normal(jax.random.fold_in(key, REVERSE), y.shape, y.dtype))
        # Data and user energies shift the step by at most half the length √d of its noise, as in `leaning`.
        lean = (1 - flow.decay) * flow.first * lean / flow.noise
        length = jnp.sum(lean**2)
        share = jnp.where(
            jnp.isfinite(length), jnp.minimum(1.0, LEAN * jnp.sqrt(y.size / jnp.maximum(length, 1e-30))), 0
        )
        noise = z + jnp.where(share > 0, share * lean, 0.0)
        ended = flow.decay * y + (1 - flow.decay) * (y + flow.first * drift) + flow.noise * noise
        moved = unflat(below * flow.out(ended), position, density)
        log_ratio = 0.5 * jnp.sum((z - noise) * (z + noise))
        fine = all_finite(moved)
        return Departure(where(fine, moved, position), flow.out(noise), jnp.where(fine, log_ratio, 0.0))

    def settle(
        self,
        departure: Departure,
        ended: Evaluation,
        position: Position,
        began: Evaluation,
        seen: tuple[Fit, Fit],
        density: AnnealedDensity,
        *levels: Array,
    ) -> tuple[Position, Array]:
        (alpha, s1), (below, s0) = (scale(density, level) for level in levels)
        first, last = (fit.along(self._gain(density, level)) for fit, level in zip(seen, levels, strict=True))
        flow = Flow.between(first, last, s1, s0, power(density))
        y, drift = flow.into(flat(position, density) / alpha), flow.into(alpha * flat(began.parts.drift, density))
        there = flow.into(flat(departure.moved, density) / below)
        goal = there + flow.last * flow.into(below * flat(ended.parts.drift, density))
        start = y + flow.first * drift
        settled = flow.decay * y + (flow.mean - flow.decay) * start + (1 - flow.mean) * goal
        settled = settled + flow.noise * flow.into(departure.noise)
        moved, error = (
            unflat(below * flow.out(settled), position, density),
            jnp.mean((settled - there) ** 2 / flow.last),
        )
        fine = all_finite(moved)
        return where(fine, moved, departure.moved), jnp.where(fine, error, jnp.inf)

    def turned(self, seen: tuple[Fit, Fit], density: AnnealedDensity, *levels: Array) -> Turned:
        level, below = levels
        return Turned.between(density, level, below, seen, self.control)

    def _gain(self, density: AnnealedDensity, level: Array) -> Array:
        """The slope of the fixed control in y, (d,)."""
        noise = density.schedule.at(level)
        gain = noise.alpha**2 * fixed_gain(power(density), noise)
        return gain if self.control else jnp.zeros_like(gain)


def relative_exponential(x: Array) -> Array:
    """(eˣ − 1)/x."""
    small = jnp.abs(x) < 1e-3
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 + x / 2 + x**2 / 6, jnp.expm1(safe) / safe)
