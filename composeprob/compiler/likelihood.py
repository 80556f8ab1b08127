"""Static priors and observations: the part of a density that NumPyro's statements declare. The program is run again
with the position's values in place of its random choices, once for each annealing policy in use, because a policy
decides what the observations see of a noised site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.compiler.build import draw
from composeprob.compiler.by_moments import ByMoments
from composeprob.compiler.coordinates import bijection_of
from composeprob.compiler.exact import Exact
from composeprob.compiler.tempering import Tempering
from composeprob.compiler.trace import Sites, Source, Traced
from composeprob.ir.nodes import Graph
from composeprob.language.interpret import Provide, Redraw, Statement, soft
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

    def __call__(self, xs: Sites, means: Sites, zs: Sites, schedule: Schedule, noise: Noise) -> tuple[Array, Array]:
        """(log p(z) in unconstrained coordinates, Σ_j γ_j·log L_j without what is annealed exactly or by moments) of
        the noised sites at this level, their Tweedie means and the static sites, unconstrained."""
        clearly, log_jacobian = self.replay({name: x / noise.alpha for name, x in xs.items()}, zs, noise.index)
        log_prior = sum((s.log_prob() for s in clearly.values() if s.kind == "static"), log_jacobian)
        rest = [p for p in self.policies.values() if not (p.closed_form or p.by_moments)]
        return log_prior, self._total(rest, xs, means, zs, schedule, noise, clearly)

    def plain(self, xs: Sites, zs: Sites, schedule: Schedule, noise: Noise) -> Array:
        """Σ_j γ_k·log L_j of the observations that are plain functions of x, a scalar."""
        return self._total([p for p in self.policies.values() if p.plain], xs, {}, zs, schedule, noise)

    def _total(
        self,
        policies: Iterable[Policy],
        xs: Sites,
        means: Sites,
        zs: Sites,
        schedule: Schedule,
        noise: Noise,
        clearly: dict[str, Statement] | None = None,
    ) -> Array:
        """Σ_j γ_j·log L_j under these policies; ``clearly`` are the statements at x/α, where they are known."""
        total = jnp.zeros((), jnp.result_type(float))
        for policy in dict.fromkeys(policies):
            inputs = self._program_inputs(policy, xs, means, noise)
            if inputs is None and clearly is not None:
                statements = clearly
            else:
                clean = {name: x / noise.alpha for name, x in xs.items()}
                statements, _ = self.replay(clean if inputs is None else inputs, zs, noise.index)
            annealed = jnp.zeros((), jnp.result_type(float))
            for name in (name for name in statements if self.policies.get(name) == policy):
                log_likelihood = statements[name].log_prob()
                if policy.measured:
                    assert self.tempering is not None
                    annealed = annealed + self.tempering.log_likelihood(name, log_likelihood, noise)
                else:
                    power = jnp.where(noise.index == 0, 1.0, policy.power(schedule, noise))
                    annealed = annealed + power * log_likelihood
            total = total + annealed
        return total

    def _program_inputs(self, policy: Policy, xs: Sites, means: Sites, noise: Noise) -> Sites | None:
        """The noised sites as the program takes them under a policy; None for x/α, as at level 0, where each policy is
        the posterior that is promised, but for one that takes levels."""
        if policy.measured and policy.plain and self.tempering is not None and self.tempering.near is not None:
            clean = {name: x / noise.alpha for name, x in xs.items()}
            above = self.tempering.near(clean, noise.sigma / noise.alpha)
        elif policy.sees_clean:
            return None
        else:
            above = {name: policy.seen(x, means[name], noise) for name, x in xs.items()}
            if policy.takes_levels:
                return above
        return {name: jnp.where(noise.index == 0, x / noise.alpha, above[name]) for name, x in xs.items()}

    @property
    def sees_means(self) -> bool:
        """Whether a policy sees Tweedie means, and its gradient takes one of the score."""
        return not all(p.sees_clean for p in self.policies.values())

    def replay(self, xs: Sites, zs: Sites, level: Array | int) -> tuple[dict[str, Statement], Array]:
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

    def draw(self, key: Array, xs: Sites) -> Sites:
        """Static sites drawn from their priors given the noised sites in the data's units, unconstrained."""
        drawn: Sites = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "noised":
                return xs[name]
            value = distribution.sample(jax.random.fold_in(key, len(drawn)))
            drawn[name] = bijection_of(distribution, name in self.standardised).inv(value)
            return value

        self.source.run(provide)
        return drawn

    def data(self) -> Sites:
        """The observed values."""
        return {s.name: s.value for s in self._observed(draw())}

    def predict(self, key: Array, values: Sites) -> Sites:
        """The observed sites drawn in the program's order, each seen by the statements after it. Latents are given as
        the program's statements see them: constrained, noised sites in the data's units."""
        count = 0

        def redraw(name: str, distribution: Distribution, value: Array) -> Array:
            nonlocal count
            if soft(distribution):
                return value
            count += 1
            batch = jnp.shape(value)[: jnp.ndim(value) - distribution.event_dim]  # data may repeat one distribution
            whole = distribution if distribution.batch_shape == batch else distribution.expand(batch)
            return whole.sample(jax.random.fold_in(key, count))

        return {s.name: s.value for s in self._observed(lambda kind, name, _: values[name], redraw)}

    def log_likelihood(self, values: Sites) -> Sites:
        """log p of every observed number, of the batch shape of its site's distribution; latents as for `predict`."""
        observed = self._observed(lambda kind, name, _: values[name])
        return {s.name: s.distribution.log_prob(s.value) for s in observed}

    def _observed(self, provide: Provide, redraw: Redraw | None = None) -> list[Statement]:
        """The statements with data, which soft evidence has none of."""
        statements = self.source.run(provide, 0, redraw)
        data = [s for s in statements.values() if s.kind == "observed" and not s.substituted]
        return [s for s in data if not soft(s.distribution)]


def policies_of(graph: Graph) -> dict[str, Policy]:
    """The policy of every observation that has one; those that depend on no noised site rise where there are some."""
    rising: Policy = Rising() if graph.sites else Unannealed()
    return {o.name: o.anneal if o.looks_at else rising for o in graph.observations if o.anneal is not None}


def likelihood_of(graph: Graph, traced: Traced) -> Likelihood | None:
    """The likelihood of a program; None where it has neither static sites nor observations."""
    if not graph.statics and not graph.observations:
        return None
    return Likelihood(traced.source, policies_of(graph), standardised=traced.standardised)
