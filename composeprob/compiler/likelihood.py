"""Static priors and observations: the part of a density that NumPyro's statements declare.

The program is run again with the position's values in place of its random choices, once for each annealing policy
in use, because a policy decides what the observations see of a noised site.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.compiler.by_moments import ByMoments, Slope, whitened
from composeprob.compiler.coordinates import bijection_of
from composeprob.compiler.exact import Exact
from composeprob.compiler.tempering import Tempering
from composeprob.compiler.trace import Source, moments
from composeprob.ir.nodes import Graph
from composeprob.language.interpret import Statement
from composeprob.language.policies import Policy, Rising, Unannealed
from composeprob.schedule import Noise, Schedule

if TYPE_CHECKING:
    from numpyro.distributions import Distribution


class Likelihood(eqx.Module):
    """log p(z) and the annealed log-likelihood of a program.

    Attributes:
        source: the program; its arrays are leaves, so new data reuse compiled code.
        policies: the policy of each observation.
        exact: the observations in closed form; None where there are none.
        tempering: the powers of those whose power is measured; None where there are none.
        by_moments: those that are annealed by moments; None where there are none.
        standardised: the static sites whose coordinate is relative to their prior's location and scale.
    """

    source: Source
    policies: dict[str, Policy] = eqx.field(static=True)
    exact: Exact | None = None
    tempering: Tempering | None = None
    by_moments: ByMoments | None = None
    standardised: frozenset[str] = eqx.field(static=True, default=frozenset())

    def __call__(
        self, xs: dict[str, Array], means: dict[str, Array], zs: dict[str, Array], schedule: Schedule, noise: Noise
    ) -> tuple[Array, Array]:
        """(log p(z) in unconstrained coordinates, Σ_j γ_j·log L_j without what is annealed exactly or by moments).

        Args:
            xs: the noised sites at this level.
            means: their Tweedie means.
            zs: the static sites, unconstrained.
            schedule: the levels.
            noise: this level's noise.
        """
        clean = {name: x / noise.alpha for name, x in xs.items()}
        clearly, log_jacobian = self.replay(clean, zs, noise.index)
        log_prior = sum((s.log_prob() for s in clearly.values() if s.kind == "static"), log_jacobian)
        log_likelihood = jnp.zeros((), jnp.result_type(float))
        for policy in dict.fromkeys(p for p in self.policies.values() if not (p.closed_form or p.by_moments)):
            inputs = self._program_inputs(policy, xs, means, noise)
            statements = clearly if inputs is None else self.replay(inputs, zs, noise.index)[0]
            log_likelihood = log_likelihood + self._annealed(policy, statements, schedule, noise)
        return log_prior, log_likelihood

    def plain(self, xs: dict[str, Array], zs: dict[str, Array], schedule: Schedule, noise: Noise) -> Array:
        """Σ_j γ_k·log L_j of the observations that are plain functions of x, a scalar."""
        clean = {name: x / noise.alpha for name, x in xs.items()}
        total = jnp.zeros((), jnp.result_type(float))
        for policy in dict.fromkeys(p for p in self.policies.values() if p.plain):
            inputs = self._program_inputs(policy, xs, {}, noise)
            statements, _ = self.replay(clean if inputs is None else inputs, zs, noise.index)
            total = total + self._annealed(policy, statements, schedule, noise)
        return total

    def _program_inputs(
        self, policy: Policy, xs: dict[str, Array], means: dict[str, Array], noise: Noise
    ) -> dict[str, Array] | None:
        """The noised sites as the program takes them under a policy; None for x/α."""
        if policy.measured and policy.plain and self.tempering is not None and self.tempering.near is not None:
            clean = {name: x / noise.alpha for name, x in xs.items()}
            near = self.tempering.near(clean, noise.sigma / noise.alpha)
            return {name: jnp.where(noise.index == 0, x, near[name]) for name, x in clean.items()}
        if policy.sees_clean:
            return None
        return {name: _program_input(policy, x, means[name], noise) for name, x in xs.items()}

    def _annealed(self, policy: Policy, statements: dict[str, Statement], schedule: Schedule, noise: Noise) -> Array:
        """Σ_j log L_j of the observations under one policy, each to its power."""
        total = jnp.zeros((), jnp.result_type(float))
        for name in (name for name in statements if self.policies.get(name) == policy):
            log_likelihood = statements[name].log_prob()
            if policy.measured:
                assert self.tempering is not None
                total = total + self.tempering.log_likelihood(name, log_likelihood, noise)
            else:
                total = total + jnp.where(noise.index == 0, 1.0, policy.power(schedule, noise)) * log_likelihood
        return total

    def exactly(self, xs: dict[str, Array], zs: dict[str, Array], noise: Noise) -> Array:
        """(log p(y | x), log p(y | x₀ = x/α), log p(x)) of the observations that are annealed exactly, shape (3,)."""
        assert self.exact is not None
        names = self.exact.names

        def moments_at(at: dict[str, Array]) -> list[tuple[Array, Array]]:
            statements, _ = self.replay(at, zs, noise.index)
            return [moments(statements[name]) for name in names]

        return self.exact(xs, moments_at, noise)

    @property
    def sees_means(self) -> bool:
        """Whether a policy sees Tweedie means, and its gradient takes one of the score."""
        return not all(p.sees_clean for p in self.policies.values())

    def with_moments(
        self, xs: dict[str, Array], zs: dict[str, Array], scores: dict[str, Array], slope: Slope,
        schedule: Schedule, noise: Noise,
    ) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        """log p(y | x) of the observations that are annealed by moments, a scalar, and its gradient; arguments as of
        `ByMoments`."""
        assert self.by_moments is not None
        names = self.by_moments.names

        def residuals(at: dict[str, Array], zs: dict[str, Array]) -> tuple[Array, Array]:
            statements, _ = self.replay(at, zs, noise.index)
            pairs = [whitened(statements[name]) for name in names]
            return jnp.concatenate([e for e, _ in pairs]), sum((log_det for _, log_det in pairs), jnp.zeros(()))

        return self.by_moments(residuals, xs, zs, scores, slope, schedule, noise)

    def replay(
        self, xs: dict[str, Array], zs: dict[str, Array], level: Array | int
    ) -> tuple[dict[str, Statement], Array]:
        """Every statement with these values, and Σ log|dz/du| of the static sites' bijections."""
        log_jacobian = jnp.zeros((), jnp.result_type(float))

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
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

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "noised":
                return xs[name]
            value = distribution.sample(jax.random.fold_in(key, len(drawn)))
            drawn[name] = bijection_of(distribution, name in self.standardised).inv(value)
            return value

        self.source.run(provide)
        return drawn


def _program_input(policy: Policy, x: Array, mean: Array, noise: Noise) -> Array:
    """A noised site as the program takes it: at level 0 x/α, where each policy is the posterior that is promised."""
    if policy.takes_levels:
        return policy.seen(x, mean, noise)
    return jnp.where(noise.index == 0, x / noise.alpha, policy.seen(x, mean, noise))


def policies_of(graph: Graph) -> dict[str, Policy]:
    """The policy of every observation that has one; those that depend on no noised site rise where there are some."""
    rising: Policy = Rising() if graph.sites else Unannealed()
    return {o.name: o.anneal if o.looks_at else rising for o in graph.observations if o.anneal is not None}


def likelihood_of(graph: Graph, source: Source) -> Likelihood | None:
    """The likelihood of a program; None where it has neither static sites nor observations."""
    if not graph.statics and not graph.observations:
        return None
    standardised = frozenset(static.name for static in graph.statics if static.standardised)
    return Likelihood(source, policies_of(graph), standardised=standardised)
