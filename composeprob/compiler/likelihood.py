"""Static priors and observations: the part of a density that NumPyro's statements declare. The program is run again
with the position's values in place of its random choices, once for each annealing policy in use, because a policy
decides what the observations see of a noised site."""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from composeprob.compiler.build import draw
from composeprob.compiler.by_moments import ByMoments
from composeprob.compiler.exact import Exact
from composeprob.compiler.latents import bijection_of, place_of
from composeprob.compiler.tempering import Tempering
from composeprob.compiler.trace import Sites, Traced
from composeprob.language.interpret import Provide, Redraw, Statement, soft
from composeprob.language.policies import Policy
from composeprob.schedule import Noise, Schedule

if TYPE_CHECKING:
    from numpyro.distributions import Distribution
    from numpyro.distributions.transforms import Transform


class Likelihood(eqx.Module):
    """log p(z) and the annealed log-likelihood of a program.

    Attributes:
        traced: the program; its arrays are leaves, so new data reuse compiled code. None where it has noised sites
            alone, and says nothing.
        policies: the policy of each observation.
        exact: the observations in closed form; None where there are none.
        tempering: the powers of those whose power is measured; None where there are none.
        by_moments: those that are annealed by moments; None where there are none.
    """

    traced: Traced | None
    policies: dict[str, Policy] = eqx.field(static=True)
    exact: Exact | None = None
    tempering: Tempering | None = None
    by_moments: ByMoments | None = None

    def __call__(
        self, xs: Sites, means: Sites, zs: Sites, schedule: Schedule, noise: Noise, plain: bool = False
    ) -> tuple[Array, Array]:
        """(log p(z) in unconstrained coordinates, Σ_j γ_j·log L_j without what is annealed exactly or by moments, or of
        what is ``plain`` alone) of the noised sites at this level, their Tweedie means and the static sites,
        unconstrained."""
        clean = {name: x / noise.alpha for name, x in xs.items()}
        clearly, log_jacobian = self.replay(clean, zs, noise.index)
        log_prior = sum((s.log_prob() for s in clearly.values() if s.kind == "static"), log_jacobian)
        total = jnp.zeros((), jnp.result_type(float))
        for policy in dict.fromkeys(self.policies.values()):
            if not policy.plain if plain else policy.closed_form or policy.by_moments:
                continue
            inputs = self._program_inputs(policy, clean, xs, means, noise)
            statements = clearly if inputs is None else self.replay(inputs, zs, noise.index)[0]
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
        return log_prior, total

    def _program_inputs(self, policy: Policy, clean: Sites, xs: Sites, means: Sites, noise: Noise) -> Sites | None:
        """The noised sites as the program takes them under a policy; None for ``clean`` = x/α, as at level 0, where
        each policy is the posterior that is promised, but for one that takes levels."""
        if policy.measured and policy.plain and self.tempering is not None and self.tempering.near is not None:
            above = self.tempering.near(clean, noise.sigma / noise.alpha)
        elif policy.sees_clean:
            return None
        else:
            above = {name: policy.seen(x, means[name], noise) for name, x in xs.items()}
            if policy.takes_levels:
                return above
        return {name: jnp.where(noise.index == 0, clean[name], above[name]) for name in xs}

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
            bijection = self._bijection(name, distribution)
            value = bijection(zs[name])
            log_jacobian = log_jacobian + jnp.sum(bijection.log_abs_det_jacobian(zs[name], value))
            return value

        return self._run(provide, level), log_jacobian

    def _run(self, provide: Provide, level: Array | int = 0, redraw: Redraw | None = None) -> dict[str, Statement]:
        return {} if self.traced is None else self.traced.run(provide, level, redraw)

    def _bijection(self, name: str, distribution: Distribution) -> Transform:
        """From a static site's coordinate to its value."""
        assert self.traced is not None
        return bijection_of(distribution, name in self.traced.standardised)

    def places(self, xs: Sites, zs: Sites) -> dict[str, tuple[Array, Array]]:
        """Location and scale of static sites in their coordinate, where other static ones give them to the prior."""
        names = () if self.traced is None else self.traced.placed
        statements = self.replay(xs, zs, 0)[0] if names else {}
        return {name: place for name in names if (place := place_of(statements[name].distribution))}

    def draw(self, key: Array, xs: Sites) -> Sites:
        """Static sites drawn from their priors given the noised sites in the data's units, unconstrained."""
        drawn: Sites = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "noised":
                return xs[name]
            value = distribution.sample(jax.random.fold_in(key, len(drawn)))
            drawn[name] = self._bijection(name, distribution).inv(value)
            return value

        self._run(provide)
        return drawn

    def observed(self, values: Sites | None, key: Array | None) -> Sites:
        """The observed values; or with a ``key`` the observed sites drawn in the program's order, each seen by the
        statements after it. Latents are given as the program's statements see them: constrained, noised sites in the
        data's units."""
        count = 0

        def redraw(name: str, distribution: Distribution, value: Array) -> Array:
            nonlocal count
            if key is None or soft(distribution):
                return value
            count += 1
            batch = jnp.shape(value)[: jnp.ndim(value) - distribution.event_dim]  # data may repeat one distribution
            whole = distribution if distribution.batch_shape == batch else distribution.expand(batch)
            return whole.sample(jax.random.fold_in(key, count))

        return {s.name: s.value for s in self._observed(values, redraw)}

    def log_likelihood(self, values: Sites) -> Sites:
        """log p of every observed number, of the batch shape of its site's distribution; latents as for `observed`."""
        return {s.name: s.distribution.log_prob(s.value) for s in self._observed(values)}

    def _observed(self, values: Sites | None, redraw: Redraw | None = None) -> list[Statement]:
        """The statements with data, which soft evidence has none of."""
        provide = draw() if values is None else lambda kind, name, _: values[name]
        statements = self._run(provide, 0, redraw)
        data = [s for s in statements.values() if s.kind == "observed" and not s.substituted]
        return [s for s in data if not soft(s.distribution)]
