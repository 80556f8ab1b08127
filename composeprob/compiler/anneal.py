"""Static priors and observations: the part of a density that NumPyro's statements
declare, and how each observation is annealed. Linear measurements with Gaussian noise
are found, and annealed exactly or by moments.

The program is run again with the position's values in place of its random choices, once
for each annealing policy in use, because a policy decides what the observations see of
a noised site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution
from numpyro.distributions.transforms import Transform

from composeprob import tuning
from composeprob.compiler.build import draw
from composeprob.compiler.by_moments import (
    ByMoments,
    bent,
    eigendecomposed,
    no_slope,
    no_use,
)
from composeprob.compiler.check import site_parts
from composeprob.compiler.conjugate import NotGaussian, Prior, prior_of
from composeprob.compiler.exact import Exact, grouped
from composeprob.compiler.latents import bijection_of, place_of
from composeprob.compiler.linearity import Kind, Value
from composeprob.compiler.tempering import Tempering, tempering
from composeprob.compiler.top import unrolled
from composeprob.compiler.trace import Shapes, Sites, Traced, not_linear
from composeprob.errors import CapabilityError
from composeprob.ir.leaves import Graph, Observation, Site
from composeprob.language.interpret import Provide, Redraw, Statement, soft
from composeprob.language.policies import POLICIES, Policy
from composeprob.schedule import Noise, Schedule


class Likelihood(eqx.Module):
    """log p(z) and the annealed log-likelihood of a program.

    Attributes:
        traced: the program; its arrays are leaves, so new data reuse compiled code.
            None where it has noised sites alone, and says nothing.
        policies: the policy of each observation.
        exact: the observations in closed form; None where there are none.
        tempering: the powers of those whose power is measured; None where there are
            none.
        by_moments: those that are annealed by moments; None where there are none.
    """

    traced: Traced | None
    policies: dict[str, Policy] = eqx.field(static=True)
    exact: Exact | None = None
    tempering: Tempering | None = None
    by_moments: ByMoments | None = None

    def __call__(
        self,
        xs: Sites,
        means: Sites,
        zs: Sites,
        schedule: Schedule,
        noise: Noise,
        plain: bool = False,
    ) -> tuple[Array, Array]:
        """(log p(z) in unconstrained coordinates, Σ_j γ_j·log L_j without what is
        annealed exactly or by moments, or of what is ``plain`` alone) of the noised
        sites at this level, their Tweedie means and the static sites, unconstrained."""
        clean = {name: x / noise.alpha for name, x in xs.items()}
        clearly, log_jacobian = self.replay(clean, zs, noise.index)
        log_prior = sum(
            (s.log_prob() for s in clearly.values() if s.kind == "static"), log_jacobian
        )
        total = jnp.zeros((), jnp.result_type(float))
        for policy in dict.fromkeys(self.policies.values()):
            if not policy.plain if plain else policy.closed_form or policy.by_moments:
                continue
            inputs = self._program_inputs(policy, clean, xs, means, noise)
            statements = (
                clearly if inputs is None else self.replay(inputs, zs, noise.index)[0]
            )
            annealed = jnp.zeros((), jnp.result_type(float))
            for name in (
                name for name in statements if self.policies.get(name) == policy
            ):
                log_likelihood = statements[name].log_prob()
                if policy.measured:
                    assert self.tempering is not None
                    annealed = annealed + self.tempering.log_likelihood(
                        name, log_likelihood, noise
                    )
                else:
                    power = jnp.where(
                        noise.index == 0, 1.0, policy.power(schedule, noise)
                    )
                    annealed = annealed + power * log_likelihood
            total = total + annealed
        return log_prior, total

    def _program_inputs(
        self, policy: Policy, clean: Sites, xs: Sites, means: Sites, noise: Noise
    ) -> Sites | None:
        """The noised sites as the program takes them under a policy; None for ``clean``
        = x/α, as at level 0, where each policy is the posterior that is promised, but
        for one that takes levels."""
        if (
            policy.measured
            and policy.plain
            and self.tempering is not None
            and self.tempering.near is not None
        ):
            above = self.tempering.near(clean, noise.sigma / noise.alpha)
        elif policy.sees_clean:
            return None
        else:
            above = {name: policy.seen(x, means[name], noise) for name, x in xs.items()}
            if policy.takes_levels:
                return above
        return {
            name: jnp.where(noise.index == 0, clean[name], above[name]) for name in xs
        }

    @property
    def sees_means(self) -> bool:
        """Whether a policy sees Tweedie means, and its gradient takes one of the
        score."""
        return not all(p.sees_clean for p in self.policies.values())

    def replay(
        self, xs: Sites, zs: Sites, level: Array | int
    ) -> tuple[dict[str, Statement], Array]:
        """Every statement with these values, and Σ log|dz/du| of the static sites'
        bijections."""
        log_jacobian = jnp.zeros((), jnp.result_type(float))

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            nonlocal log_jacobian
            if kind == "noised":
                return xs[name]
            bijection = self._bijection(name, distribution)
            value = bijection(zs[name])
            log_jacobian = log_jacobian + jnp.sum(
                bijection.log_abs_det_jacobian(zs[name], value)
            )
            return value

        return self._run(provide, level), log_jacobian

    def _run(
        self, provide: Provide, level: Array | int = 0, redraw: Redraw | None = None
    ) -> dict[str, Statement]:
        return {} if self.traced is None else self.traced.run(provide, level, redraw)

    def _bijection(self, name: str, distribution: Distribution) -> Transform:
        """From a static site's coordinate to its value."""
        assert self.traced is not None
        return bijection_of(distribution, name in self.traced.standardised)

    def places(self, xs: Sites, zs: Sites) -> dict[str, tuple[Array, Array]]:
        """Location and scale of static sites in their coordinate, where other static
        ones give them to the prior."""
        names = () if self.traced is None else self.traced.placed
        statements = self.replay(xs, zs, 0)[0] if names else {}
        return {
            name: place
            for name in names
            if (place := place_of(statements[name].distribution))
        }

    def draw(self, key: Array, xs: Sites) -> Sites:
        """Static sites drawn from their priors given the noised sites in the data's
        units, unconstrained."""
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
        """The observed values; or with a ``key`` the observed sites drawn in the
        program's order, each seen by the statements after it. Latents are given as the
        program's statements see them: constrained, noised sites in the data's units."""
        count = 0

        def redraw(name: str, distribution: Distribution, value: Array) -> Array:
            nonlocal count
            if key is None or soft(distribution):
                return value
            count += 1
            batch = jnp.shape(value)[
                : jnp.ndim(value) - distribution.event_dim
            ]  # data may repeat one distribution
            whole = (
                distribution
                if distribution.batch_shape == batch
                else distribution.expand(batch)
            )
            return whole.sample(jax.random.fold_in(key, count))

        return {s.name: s.value for s in self._observed(values, redraw)}

    def log_likelihood(self, values: Sites) -> Sites:
        """log p of every observed number, of the batch shape of its site's
        distribution; latents as for `observed`."""
        return {
            s.name: s.distribution.log_prob(s.value) for s in self._observed(values)
        }

    def _observed(
        self, values: Sites | None, redraw: Redraw | None = None
    ) -> list[Statement]:
        """The statements with data, which soft evidence has none of."""
        provide = draw() if values is None else lambda kind, name, _: values[name]
        statements = self._run(provide, 0, redraw)
        data = [
            s for s in statements.values() if s.kind == "observed" and not s.substituted
        ]
        return [s for s in data if not soft(s.distribution)]


def anneal(graph: Graph, traced: Traced) -> tuple[Graph, Likelihood]:
    """Settle the policy of every observation that left it open: ``exact`` where that is
    possible, else ``moments`` where that is possible and pays, else ``tempered``. One
    that asks for what is not possible is refused.

    Both take y = A·x + b + noise, A, b and the noise's covariance constant or functions
    of static sites; ``exact`` under a prior that is a mixture of Gaussians, ``moments``
    under any score. That the mean is linear in x, and which entries of A and of the
    covariance can be other than zero, is read off the program's own trace, not off
    numbers.
    """
    if not graph.observations:
        more = len(graph.dims) > len(graph.sites)  # static sites or deterministics
        return graph, Likelihood(traced if more else None, {})
    priors = {site.name: _prior(site) for site in graph.sites}
    graph, exact, by_moments = _settled(graph, traced, priors)
    policies = {o.name: o.anneal for o in graph.observations if o.anneal is not None}
    measured, powers = (
        tuple(name for name, policy in policies.items() if policy.measured),
        None,
    )
    if measured:
        powers = tempering(
            traced,
            measured,
            priors,
            {site.name: site.shape for site in graph.sites},
            graph.levels,
        )
        if powers.near is not None and any(policies[name].plain for name in measured):
            why = "tempered observations fall faster than any power of x/α"
            graph = graph.noted(
                "temper", f"{why}, so they see x/α drawn towards the prior's mean"
            )
    return graph, Likelihood(traced, policies, exact, powers, by_moments)


def _settled(
    graph: Graph, traced: Traced, priors: dict[str, Prior | str]
) -> tuple[Graph, Exact | None, ByMoments | None]:
    """The graph with every policy settled, and those of its observations that are
    annealed exactly and by moments."""
    asking = [
        o
        for o in graph.observations
        if o.anneal is None or o.anneal.closed_form or o.anneal.by_moments
    ]
    if not asking:
        return graph, None, None
    sites = {site.name: site for site in graph.sites}
    looked_at = {name for o in asking for name in o.looks_at}
    shapes = tuple(
        (name, site.shape) for name, site in sites.items() if name in looked_at
    )
    priors = {name: prior for name, prior in priors.items() if name in looked_at}
    rng, float_ = np.random.default_rng(0), np.dtype(jnp.result_type(float))
    xs: dict[str, Any] = {
        name: rng.standard_normal(site.shape).astype(float_)
        for name, site in sites.items()
    }

    def why(of_site: Callable[[str], str | None], o: Observation) -> str | None:
        return next(
            (reason for name in sorted(o.looks_at) if (reason := of_site(name))), None
        )

    no_mixture = {
        name: prior if isinstance(prior, str) else None
        for name, prior in priors.items()
    }
    wide = {o.name: reason for o in asking if (reason := why(no_mixture.get, o))}

    of_statics = {o.name for o in asking if o.depends_on - sites.keys()}

    def pays(o: Observation) -> bool:
        """Latents in it are moved best where what is known of them is in
        log-densities."""
        alone = o.name in wide and o.name not in of_statics
        return alone and not why(lambda name: no_use(sites[name]), o)

    wanted = [
        o for o in asking if (pays(o) if o.anneal is None else o.anneal.by_moments)
    ]
    reasons = {
        o.name: reason for o in asking if (reason := traced.code.reasons[o.name])
    }
    linear = [
        o.name
        for o in asking
        if o.name not in reasons and (o.name not in wide or o in wanted)
    ]
    reasons |= _not_linear(traced, linear, shapes) if linear else {}
    names = tuple(o.name for o in wanted if o.name not in reasons)
    off = np.asarray(bent(traced, names, shapes, xs)) if names else np.zeros(0)
    reasons |= {
        name: not_linear() for name, here in zip(names, off, strict=True) if here
    }
    no_moments = {
        o.name: reason
        for o in wanted
        if (reason := reasons.get(o.name) or why(lambda name: no_slope(sites[name]), o))
    }
    reasons |= wide
    names = tuple(o.name for o in wanted if o.name not in no_moments)
    by_moments = None
    if names:
        bridged = not of_statics.isdisjoint(names)
        by_moments = ByMoments(
            names,
            bridged,
            None if bridged else eigendecomposed(traced, names, shapes, xs),
        )
    exact, others = None, [o.name for o in asking if o.name not in names]
    while (
        left := tuple(name for name in others if name not in reasons)
    ) and exact is None:
        exact = grouped(
            traced, left, shapes, priors, xs, not of_statics.isdisjoint(left), reasons
        )
    for o in asking:
        by_name = o.anneal is not None and o.anneal.by_moments
        refused = (
            None
            if o.anneal is None
            else (no_moments if by_name else reasons).get(o.name)
        )
        if refused is not None:
            raise CapabilityError(
                f"Observation {o.name!r} cannot be annealed {'by moments' if by_name else 'exactly'}: {refused}.",
                where=o.where,
                fix="leave anneal= out, or use anneal='tempered' or 'denoised'.",
            )

    settled = {
        o.name: POLICIES[
            "moments"
            if o.name in names
            else "tempered"
            if o.name in reasons
            else "exact"
        ]
        for o in asking
    }
    directions = min(sum(traced.sizes(names)), tuning.MOMENTS.directions)
    reasons |= no_moments
    sentences = [
        f"{o.name} {settled[o.name]}"
        + (
            f" ({directions} Jacobian–vector products an evaluation)"
            if o.name in names
            else ""
        )
        + (f", since {reasons[o.name]}" if o.name in reasons else "")
        for o in asking
        if o.anneal is None or o.name in names
    ]
    observations = tuple(
        replace(o, anneal=settled.get(o.name, o.anneal)) for o in graph.observations
    )
    graph = replace(graph, observations=observations)
    return (
        graph.noted("anneal", "; ".join(sentences)) if sentences else graph,
        exact,
        by_moments,
    )


def _prior(site: Site) -> Prior | str:
    """The prior of a site as mixtures of Gaussians, or why it is none."""
    marginal, _ = site_parts(site.root)
    try:
        if marginal is None:
            raise NotGaussian("it has no prior with noised marginals")
        prior = prior_of(unrolled(marginal), site.shape)
        if sum(len(part.entries) for part in prior.parts) < np.prod(
            site.shape, dtype=int
        ):
            raise NotGaussian("its prior leaves entries free")
    except NotGaussian as reason:
        return f"the prior of {site.name!r} is no mixture of Gaussians ({reason})"
    return prior


def _not_linear(traced: Traced, names: list[str], shapes: Shapes) -> dict[str, str]:
    """Why measurements are not A·x + b + noise with A, b and the noise free of x, by
    name."""
    found: dict[str, tuple[Value, Value]] = jax.eval_shape(
        lambda: traced.linearity(shapes)
    )  # kinds need no numbers
    reasons = {}
    for name in names:
        mean, noise = found[name]
        if noise.kind > Kind.LATENT:
            reasons[name] = "the spread of its noise depends on what it measures"
        elif mean.why == "custom_vjp_call":
            reasons[name] = (
                f"the derivative of its mean cannot be taken (JAX's `{mean.why}`)"
            )
        elif mean.kind == Kind.OTHER:
            reasons[name] = not_linear(mean.why)
    return reasons
