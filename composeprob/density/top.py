"""The distribution of levels that are noise alone, which chains are drawn from."""

from __future__ import annotations

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.pytree import normal_like


class TopLaw(eqx.Module):
    """The distribution of a level that is noise alone: F = exp(constant)·(2πσ²)^{−degree/2}·exp(−½·Σ power·x²/σ²).

    Attributes:
        power: total power at each entry, ``{site: array}``.
        degree: powers times dimensions, factors counted as normalised; NaN where a constant is unknown.
        constant: what mixture weights add.
        entries: Σ |power|·dimensions over the factors.
        exact: whether F has this form; where not, kernels and weights move the first draws to it.
        normalised: whether every factor's log-density is normalised, so that the values of F determine ∫F too.
        stacked: whether the arrays have an axis of all K levels in front, as exponents grow from level to level; `at`
            takes one of them. Elsewhere they are the same at all levels.
    """

    power: dict[str, Array]
    degree: Array
    constant: Array
    entries: Array
    exact: bool = eqx.field(static=True)
    normalised: bool = eqx.field(static=True)
    stacked: bool = eqx.field(static=True, default=False)

    def at(self, level: Array | int) -> TopLaw:
        """That of one level, which may be traced."""
        if not self.stacked:
            return self
        return dataclasses.replace(jax.tree.map(lambda a: a[level], self), stacked=False)

    def draw(self, key: Array, sigma: Array) -> dict[str, Array]:
        """One draw of N(0, σ²/power) at each noised site."""
        noise = normal_like(key, self.power)
        return {name: sigma * noise[name] / jnp.sqrt(power) for name, power in self.power.items()}

    def log_density(self, xs: dict[str, Array], sigma: Array) -> Array:
        """The log-density that `draw` has, a scalar."""
        terms = [
            jnp.sum(0.5 * jnp.log(power / (2 * jnp.pi * sigma**2)) - 0.5 * power * (xs[name] / sigma) ** 2)
            for name, power in self.power.items()
        ]
        return sum(terms, jnp.zeros(()))

    def log_normaliser(self, sigma: Array) -> Array:
        """log ∫F; NaN where a factor's constant is unknown."""
        logs = [jnp.sum(0.5 * jnp.log(2 * jnp.pi * sigma**2 / power)) for power in self.power.values()]
        return self.constant - 0.5 * self.degree * jnp.log(2 * jnp.pi * sigma**2) + sum(logs, jnp.zeros(()))

    def signal(self, log_snr: float) -> float:
        """About how far ``log_normaliser`` is off, as data of unit size are not quite gone at this log-SNR: each factor
        N(α·m, σ²) with m of order 1 is taken for N(0, σ²)."""
        return 0.5 * float(np.asarray(self.entries)) * math.exp(log_snr)
