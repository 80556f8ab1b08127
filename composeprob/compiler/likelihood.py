"""Static priors and observations: the part of a density that NumPyro's statements declare.

The program is run again with the position's values in place of its random choices, once for each annealing policy
in use, because a policy decides what the observations see of a noised site.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.compiler.coordinates import bijection_of
from composeprob.compiler.linear_gaussian import Exact, moments
from composeprob.compiler.tempering import Tempering
from composeprob.compiler.trace import Source
from composeprob.ir.nodes import Graph
from composeprob.language.interpret import Statement
from composeprob.schedule import Noise, Schedule

POWERED = ("tempered", "denoised")
"""The policies under which an observation's likelihood is raised to a power."""


class Likelihood(eqx.Module):
    """log p(z) and the annealed log-likelihood of a program.

    Attributes:
        source: the program; its arrays are leaves, so new data reuse compiled code.
        policies: the policy of each observation, ``"static"`` where it looks at no noised site.
        exact: the observations under ``"exact"``; None where there are none.
        tempering: the powers of those under ``"tempered"`` and ``"denoised"``; None where there are none.
        standardised: the static sites whose coordinate is relative to their prior's location and scale.
        rising: the observations of static sites alone, where there are noisy levels: their power rises to 1.
    """

    source: Source
    policies: dict[str, str] = eqx.field(static=True)
    exact: Exact | None = None
    tempering: Tempering | None = None
    standardised: frozenset[str] = eqx.field(static=True, default=frozenset())
    rising: frozenset[str] = eqx.field(static=True, default=frozenset())

    def __call__(
        self, xs: dict[str, Array], means: dict[str, Array], zs: dict[str, Array], schedule: Schedule, noise: Noise
    ) -> tuple[Array, Array]:
        """(log p(z) in unconstrained coordinates, Σ_j γ_j·log L_j without what is annealed exactly).

        Args:
            xs: the noised sites at this level.
            means: their Tweedie means.
            zs: the static sites, unconstrained.
            schedule: the levels.
            noise: this level's noise.
        """
        clean = {name: x / noise.alpha for name, x in xs.items()}
        # At level 0 every policy is the posterior that the program promises, seen at x/α.
        denoised = {name: jnp.where(noise.index == 0, clean[name], mean) for name, mean in means.items()}
        seen = {"static": clean, "tempered": clean, "denoised": denoised, "noised": xs}
        policies = sorted(set(self.policies.values()) - {"exact"} | {"static"}, key=lambda p: p != "static")
        log_prior = log_likelihood = jnp.zeros((), jnp.result_type(float))
        for policy in policies:
            own = {name for name, p in self.policies.items() if p == policy}
            statements, log_jacobian = self.replay(seen[policy], zs, noise.index)
            if policy == "static":  # each latent's prior counts once
                statics = [s.log_prob() for s in statements.values() if s.kind == "static"]
                log_prior = log_prior + sum(statics, log_jacobian)
            for name in (name for name in statements if name in own):
                log_likelihood = log_likelihood + self._annealed(name, statements[name].log_prob(), schedule, noise)
        return log_prior, log_likelihood

    def tempered(self, xs: dict[str, Array], zs: dict[str, Array], noise: Noise) -> Array:
        """Σ_j γ_k·log L_j of the observations that are tempered, a scalar."""
        clean = {name: x / noise.alpha for name, x in xs.items()}
        statements, _ = self.replay(clean, zs, noise.index)
        own = [name for name in statements if self.policies.get(name) == "tempered"]
        assert self.tempering is not None or not own
        terms = [self.tempering.of(name, statements[name].log_prob(), noise) for name in own]  # type: ignore[union-attr]
        return sum(terms, jnp.zeros((), jnp.result_type(float)))

    def _annealed(self, name: str, log_likelihood: Array, schedule: Schedule, noise: Noise) -> Array:
        """log L_j to the power of its policy."""
        if name in self.rising:
            return bridge(schedule, noise) * log_likelihood
        if self.policies[name] not in POWERED:
            return log_likelihood
        assert self.tempering is not None
        return self.tempering.of(name, log_likelihood, noise)

    def exactly(self, xs: dict[str, Array], zs: dict[str, Array], noise: Noise) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)) of the observations that are annealed exactly, shape (3,)."""
        assert self.exact is not None
        names = self.exact.names

        def seen(at: dict[str, Array]) -> list[tuple[Array, Array]]:
            statements, _ = self.replay(at, zs, noise.index)
            return [moments(statements[name]) for name in names]

        return self.exact(xs, seen, noise)

    def replay(self, xs: dict[str, Array], zs: dict[str, Array], level: Any) -> tuple[dict[str, Statement], Array]:
        """Every statement with these values, and Σ log|dz/du| of the static sites' bijections."""
        log_jacobian = jnp.zeros((), jnp.result_type(float))

        def provide(kind: str, name: str, distribution: Any) -> Array:
            nonlocal log_jacobian
            if kind == "noised":
                return xs[name]
            bijection = bijection_of(distribution, name in self.standardised)
            value = bijection(zs[name])
            log_jacobian = log_jacobian + jnp.sum(bijection.log_abs_det_jacobian(zs[name], value))
            return value

        return self.source.run(provide, level), log_jacobian

    def draw(self, key: Array, xs: dict[str, Array]) -> dict[str, Array]:
        """Static sites drawn from their priors given the noised sites in the data's units, unconstrained."""
        drawn: dict[str, Array] = {}

        def provide(kind: str, name: str, distribution: Any) -> Array:
            if kind == "noised":
                return xs[name]
            value = distribution.sample(jax.random.fold_in(key, len(drawn)))
            drawn[name] = bijection_of(distribution, name in self.standardised).inv(value)
            return value

        self.source.run(provide)
        return drawn


FULL = -2.0
"""log-SNR from which on observations that are annealed exactly count in full for static sites: α/σ = 0.37."""


def bridge(schedule: Schedule, noise: Noise) -> Array:
    """The power of p(y | x_k, z) where static sites have a say: u² with u going from 0 at the noisiest level to 1 at
    log-SNR −2, and 1 from there on.

    Where no signal is left p(y | x_k, z) is p(y | z): without a power, static sites would meet all of the data at the
    first level, far from where their priors put them.
    """
    top = schedule.log_snr[-1]
    way = jnp.where(top < FULL, (noise.log_snr - top) / jnp.where(top < FULL, FULL - top, 1.0), 1.0)
    return jnp.clip(way, 0.0, 1.0) ** 2


def likelihood_of(graph: Graph, source: Source) -> Likelihood | None:
    """The likelihood of a program; None where it has neither static sites nor observations."""
    if not graph.statics and not graph.observations:
        return None
    policies = {o.name: str(o.anneal) for o in graph.observations}
    standardised = frozenset(static.name for static in graph.statics if static.standardised)
    rising = frozenset(o.name for o in graph.observations if o.anneal == "static" and graph.sites)
    return Likelihood(source, policies, standardised=standardised, rising=rising)
