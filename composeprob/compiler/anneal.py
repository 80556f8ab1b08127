"""Static priors and observations: the part of a density that NumPyro's statements
declare, and how each observation is annealed. Linear measurements with Gaussian noise
are recognised, and annealed exactly or by moments.

The program is run again with the position's values in place of its random choices, once
for each annealing policy in use, because a policy decides what the observations see of
a noised site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
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
from composeprob.compiler.discrete import Summed
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
        network_free: bool = False,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """log p(z) in unconstrained coordinates, and Σ_j γ_j·log L_j.

        The sum leaves out observations that are annealed exactly or by moments.

        Args:
            xs: the noised sites at this level.
            means: their Tweedie means.
            zs: the static sites, unconstrained.
            schedule: the levels.
            noise: this level's noise.
            network_free: sum the observations of ``network_free`` policies alone.
        """
        # Priors of static sites see x/α at every level.
        clean = {name: x / noise.alpha for name, x in xs.items()}
        of_clean, log_jacobian = self.replay(clean, zs, noise.index)
        log_prior = log_jacobian
        for statement in of_clean.values():
            if statement.kind == "static" and statement.name not in self.in_sums:
                log_prior = log_prior + statement.log_prob()
        total = jnp.zeros((), jnp.result_type(float))
        for group in self.summed:
            # log Σ_v p(v)·L(v), of which the priors' part is log Σ_v p(v).
            of_prior = self._log_sum(group, clean, zs, schedule, noise, data=False)
            log_prior = log_prior + of_prior
            if not network_free:
                of_all = self._log_sum(group, clean, zs, schedule, noise)
                total = total + of_all - of_prior
        # Each policy in use runs the program once, as it decides what statements see.
        for policy in dict.fromkeys(self.policies.values()):
            counted = not (policy.closed_form or policy.by_moments)
            if network_free:
                counted = policy.network_free
            if not counted:
                continue
            statements = of_clean
            inputs = self._program_inputs(policy, clean, xs, means, noise)
            if inputs is not None:
                statements, _ = self.replay(inputs, zs, noise.index)
            total = total + self._annealed(policy, statements, schedule, noise)
        return log_prior, total

    def _annealed(
        self,
        policy: Policy,
        statements: dict[str, Statement],
        schedule: Schedule,
        noise: Noise,
    ) -> Float[Array, ""]:
        """Σ_j γ_j·log L_j of the observations under one policy."""
        total = jnp.zeros((), jnp.result_type(float))
        for name, statement in statements.items():
            if self.policies.get(name) != policy or name in self.in_sums:
                continue
            log_likelihood = statement.log_prob()
            if policy.measured:
                assert self.tempering is not None
                tempered = self.tempering.log_likelihood(name, log_likelihood, noise)
                total = total + tempered
            else:
                # Level 0 is the posterior that the program promises: power 1.
                power = jnp.where(noise.index == 0, 1.0, policy.power(schedule, noise))
                total = total + power * log_likelihood
        return total

    @property
    def summed(self) -> tuple[Summed, ...]:
        """Groups of discrete latents that are summed out."""
        return () if self.traced is None else self.traced.summed

    @property
    def in_sums(self) -> frozenset[str]:
        """Statements that count within the sums over discrete latents."""
        return frozenset(name for group in self.summed for name in group.statements)

    def _table(
        self,
        group: Summed,
        clean: Sites,
        zs: Sites,
        schedule: Schedule,
        noise: Noise,
        data: bool = True,
    ) -> Float[Array, "values ..."]:
        """log p(v)·L(v)^γ of each joint value v, for each entry; with ``data`` False
        the priors alone."""

        def power(name: str) -> Array | float | None:
            if name not in self.policies:
                # A latent's prior; or data of a program without its observations.
                return 1.0 if name in group.latents else None
            if not data:
                return None
            above = self.policies[name].power(schedule, noise)
            return jnp.where(noise.index == 0, 1.0, above)

        def terms(joint: Array) -> Array:
            codes = group.codes(jnp.full(group.shape, joint))
            statements, _ = self.replay(clean, zs, noise.index, codes)
            return group.terms(statements, power)

        return jax.vmap(terms)(jnp.arange(group.num_values))

    def _log_sum(
        self,
        group: Summed,
        clean: Sites,
        zs: Sites,
        schedule: Schedule,
        noise: Noise,
        data: bool = True,
    ) -> Float[Array, ""]:
        """Σ over entries of log Σ over values of `_table`."""
        table = self._table(group, clean, zs, schedule, noise, data)
        return jnp.sum(jax.nn.logsumexp(table, axis=0))

    def draw_summed(
        self, key: Array, clean: Sites, zs: Sites, schedule: Schedule, noise: Noise
    ) -> dict[str, Array]:
        """Indices of the values of discrete latents that are summed out, drawn given
        all else."""
        drawn: dict[str, Array] = {}
        # No statement depends on two groups, so these are independent given the rest.
        for i, group in enumerate(self.summed):
            table = self._table(group, clean, zs, schedule, noise)
            joint = jax.random.categorical(jax.random.fold_in(key, i), table, axis=0)
            drawn.update(group.codes(joint))
        return drawn

    def _program_inputs(
        self, policy: Policy, clean: Sites, xs: Sites, means: Sites, noise: Noise
    ) -> Sites | None:
        """The noised sites as the program takes them under a policy; None for ``clean``
        = x/α.

        At level 0 every policy sees x/α, since level 0 is the posterior that the
        program promises. A policy that takes levels is the exception: the user's
        function defines level 0 too.
        """
        near = None if self.tempering is None else self.tempering.near
        if policy.measured and policy.network_free and near is not None:
            above = near(clean, noise.sigma / noise.alpha)
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
        """True if a policy sees Tweedie means, so that its gradient differentiates
        scores."""
        return not all(p.sees_clean for p in self.policies.values())

    def replay(
        self,
        xs: Sites,
        zs: Sites,
        level: Array | int,
        codes: Mapping[str, Array] | None = None,
    ) -> tuple[dict[str, Statement], Array]:
        """Every statement with these values, and Σ log|dz/du| of the static sites'
        bijections.

        Discrete latents that are summed out have the values of these ``codes``, their
        indices; left out, the first value.
        """
        log_jacobian = jnp.zeros((), jnp.result_type(float))
        summed = {name for group in self.summed for name in group.sites}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            nonlocal log_jacobian
            if kind == "noised":
                return xs[name]
            bijection = self._bijection(name, distribution)
            if name in summed:
                first = jnp.zeros(distribution.shape(), int)
                return bijection((codes or {}).get(name, first))
            value = bijection(zs[name])
            log_jacobian = log_jacobian + jnp.sum(
                bijection.log_abs_det_jacobian(zs[name], value)
            )
            return value

        return self._run(provide, level), log_jacobian

    def _run(
        self, provide: Provide, level: Array | int = 0, redraw: Redraw | None = None
    ) -> dict[str, Statement]:
        if self.traced is None:
            return {}
        return self.traced.run(provide, level, redraw)

    def _bijection(self, name: str, distribution: Distribution) -> Transform:
        """The bijection from a static site's coordinate to its value."""
        assert self.traced is not None
        return bijection_of(distribution, name in self.traced.standardised)

    def places(self, xs: Sites, zs: Sites) -> dict[str, tuple[Array, Array]]:
        """Location and scale of static sites in their coordinate, where other static
        ones give them to the prior."""
        if self.traced is None or not self.traced.placed:
            return {}
        statements, _ = self.replay(xs, zs, 0)
        places = {}
        for name in self.traced.placed:
            place = place_of(statements[name].distribution)
            if place is not None:
                places[name] = place
        return places

    def draw(self, key: Array, xs: Sites) -> Sites:
        """Static sites drawn from their priors given the noised sites in the data's
        units, unconstrained."""
        drawn: Sites = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "noised":
                return xs[name]
            # A key for each site, by its place in the program.
            value = distribution.sample(jax.random.fold_in(key, len(drawn)))
            drawn[name] = self._bijection(name, distribution).inv(value)
            return value

        self._run(provide)
        for group in self.summed:
            for name in group.sites:
                del drawn[name]
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
            # Data may have more axes than the distribution that they share.
            batch = jnp.shape(value)[: jnp.ndim(value) - distribution.event_dim]
            if distribution.batch_shape != batch:
                distribution = distribution.expand(batch)
            return distribution.sample(jax.random.fold_in(key, count))

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
        """The statements with data. Soft evidence has none, nor has a latent whose
        value a handler substitutes."""

        def given(kind: str, name: str, distribution: Distribution) -> Array:
            assert values is not None
            return values[name]

        provide = draw() if values is None else given
        statements = self._run(provide, 0, redraw)
        return [
            s
            for s in statements.values()
            if s.kind == "observed" and not s.substituted and not soft(s.distribution)
        ]


def anneal(graph: Graph, traced: Traced) -> tuple[Graph, Likelihood]:
    """Settle the policy of every observation that left it open: ``exact`` where that is
    possible, else ``moments`` where that is possible and pays, else ``tempered``. One
    that asks for an impossible policy is refused.

    Both take y = A·x + b + noise, A, b and the noise's covariance constant or functions
    of static sites; ``exact`` under a prior that is a mixture of Gaussians, ``moments``
    under any score. That the mean is linear in x, and which entries of A and of the
    covariance can be other than zero, is read off the program's own trace, not off
    numbers.
    """
    if not graph.observations:
        # Statements beside the noised sites are static latents or deterministics.
        if len(graph.dims) > len(graph.sites):
            return graph, Likelihood(traced, {})
        return graph, Likelihood(None, {})
    priors = {site.name: _prior(site) for site in graph.sites}
    graph, exact, by_moments = _settled(graph, traced, priors)
    policies = {o.name: o.anneal for o in graph.observations if o.anneal is not None}
    measured = tuple(name for name, policy in policies.items() if policy.measured)
    powers = None
    if measured:
        shapes = {site.name: site.shape for site in graph.sites}
        powers = tempering(traced, measured, priors, shapes, graph.levels)
        network_free = any(policies[name].network_free for name in measured)
        if powers.near is not None and network_free:
            graph = graph.noted(
                "temper",
                "tempered observations fall faster than any power of x/α, so they see "
                "x/α drawn towards the prior's mean",
            )
    return graph, Likelihood(traced, policies, exact, powers, by_moments)


@dataclass(frozen=True)
class _Candidates:
    """Observations that may be annealed in closed form, and the facts that decide which
    of them are.

    Attributes:
        traced: the program.
        observations: those that left their policy open, or ask for a closed form.
        sites: every noised site by its name.
        priors: the prior of each noised site that one of them looks at, or the reason
            why it is not a mixture of Gaussians.
        xs: random values of the noised sites, at which derivatives are compared.
    """

    traced: Traced
    observations: list[Observation]
    sites: dict[str, Site]
    priors: dict[str, Prior | str]
    xs: dict[str, Any]

    @property
    def shapes(self) -> Shapes:
        return tuple(
            (name, site.shape)
            for name, site in self.sites.items()
            if name in self.priors
        )

    def depend_on_statics(self, names: Iterable[str]) -> bool:
        """Return whether one of these observations depends on a static site."""
        return any(
            o.name in names and o.depends_on - self.sites.keys()
            for o in self.observations
        )

    def not_mixture(self) -> dict[str, str]:
        """The observations that look at a prior which is not a mixture of Gaussians,
        with the reason."""

        def reason_of(site: str) -> str | None:
            prior = self.priors[site]
            return prior if isinstance(prior, str) else None

        reasons = {o.name: _first_reason(o, reason_of) for o in self.observations}
        return {name: reason for name, reason in reasons.items() if reason}

    def wants_moments(self, o: Observation, not_mixture: dict[str, str]) -> bool:
        """Return whether moments are asked for, or pay where the policy is open.

        They do where scores alone are known. An observation of latents is better
        tempered: kernels move latents best by log-densities, which moments lack.
        """
        if o.anneal is not None:
            return o.anneal.by_moments
        # Under a mixture of Gaussians there is an exact closed form.
        if o.name not in not_mixture or self.depend_on_statics({o.name}):
            return False
        return not _first_reason(o, lambda name: no_use(self.sites[name]))

    def not_linear(
        self, wanted: list[Observation], not_mixture: dict[str, str]
    ) -> dict[str, str]:
        """The observations that are not A·x + b plus Gaussian noise, with the reason.
        Linearity is examined where a closed form would follow from it."""
        reasons: dict[str, str] = {}
        for o in self.observations:
            not_gaussian = self.traced.code.reasons[o.name]
            if not_gaussian:
                reasons[o.name] = not_gaussian
        names = [
            o.name
            for o in self.observations
            if o.name not in reasons and (o.name not in not_mixture or o in wanted)
        ]
        if names:
            reasons |= _not_linear(self.traced, names, self.shapes)
        # The trace shows the function, and not whether its derivative was stopped or
        # replaced. For exact annealing `grouped` compares both.
        linear = tuple(o.name for o in wanted if o.name not in reasons)
        if linear:
            off = np.asarray(bent(self.traced, linear, self.shapes, self.xs))
            for name, wrong in zip(linear, off, strict=True):
                if wrong:
                    reasons[name] = not_linear()
        return reasons

    def no_moments(
        self, wanted: list[Observation], not_linear: dict[str, str]
    ) -> dict[str, str]:
        """The ``wanted`` observations that cannot be annealed by moments, with the
        reason."""
        reasons = {}
        for o in wanted:
            reason = not_linear.get(o.name)
            reason = reason or _first_reason(o, lambda name: no_slope(self.sites[name]))
            if reason:
                reasons[o.name] = reason
        return reasons

    def by_moments(self, names: tuple[str, ...]) -> ByMoments:
        """These observations, annealed by moments."""
        if self.depend_on_statics(names):
            return ByMoments(names, True, None)
        # Without latents A and Σ are constants, and are decomposed once.
        spectrum = eigendecomposed(self.traced, names, self.shapes, self.xs)
        return ByMoments(names, False, spectrum)

    def exact(self, names: list[str], reasons: dict[str, str]) -> Exact | None:
        """The named observations in closed form; None if each has a reason against it.

        ``reasons`` gains the observations whose closed form is too large, or whose
        derivative is not their slope.
        """
        # Each pass without success has added a reason, so the loop ends.
        while True:
            linear = tuple(name for name in names if name not in reasons)
            if not linear:
                return None
            bridged = self.depend_on_statics(linear)
            exact = grouped(
                self.traced, linear, self.shapes, self.priors, self.xs, bridged, reasons
            )
            if exact is not None:
                return exact


def _first_reason(o: Observation, reason_of: Callable[[str], str | None]) -> str | None:
    """The first reason that ``reason_of`` gives for a site that the observation looks
    at; None if it gives none."""
    for name in sorted(o.looks_at):
        reason = reason_of(name)
        if reason:
            return reason
    return None


def _candidates(
    graph: Graph, traced: Traced, priors: dict[str, Prior | str]
) -> _Candidates:
    observations = [
        o
        for o in graph.observations
        if o.anneal is None or o.anneal.closed_form or o.anneal.by_moments
    ]
    looked_at = {name for o in observations for name in o.looks_at}
    # Any values would do, but for those at which a wrong slope is right by chance.
    rng = np.random.default_rng(0)
    dtype = np.dtype(jnp.result_type(float))
    return _Candidates(
        traced,
        observations,
        sites={site.name: site for site in graph.sites},
        priors={name: prior for name, prior in priors.items() if name in looked_at},
        xs={
            site.name: rng.standard_normal(site.shape).astype(dtype)
            for site in graph.sites
        },
    )


def _settled(
    graph: Graph, traced: Traced, priors: dict[str, Prior | str]
) -> tuple[Graph, Exact | None, ByMoments | None]:
    """The graph with every policy settled, and those of its observations that are
    annealed exactly and by moments."""
    candidates = _candidates(graph, traced, priors)
    if not candidates.observations:
        return graph, None, None
    not_mixture = candidates.not_mixture()
    wanted = [
        o for o in candidates.observations if candidates.wants_moments(o, not_mixture)
    ]
    not_exact = candidates.not_linear(wanted, not_mixture)
    no_moments = candidates.no_moments(wanted, not_exact)
    # The prior's reason is named first: linearity matters under a mixture only.
    not_exact |= not_mixture

    # Closed forms in order of preference: moments where they are wanted, exact ones for
    # all others without a reason against it, and tempering for the rest.
    names = tuple(o.name for o in wanted if o.name not in no_moments)
    by_moments = candidates.by_moments(names) if names else None
    others = [o.name for o in candidates.observations if o.name not in names]
    exact = candidates.exact(others, not_exact)
    # Only now, since the closed form itself may be a reason: it can be too large.
    for o in candidates.observations:
        _check_possible(o, not_exact, no_moments)

    settled: dict[str, Policy] = {}
    for o in candidates.observations:
        if o.name in names:
            settled[o.name] = POLICIES["moments"]
        elif o.name in not_exact:
            settled[o.name] = POLICIES["tempered"]
        else:
            settled[o.name] = POLICIES["exact"]
    observations = tuple(
        replace(o, anneal=settled.get(o.name, o.anneal)) for o in graph.observations
    )
    graph = replace(graph, observations=observations)
    sentences = _sentences(candidates, settled, not_exact | no_moments)
    if sentences:
        graph = graph.noted("anneal", "; ".join(sentences))
    return graph, exact, by_moments


def _sentences(
    candidates: _Candidates, settled: dict[str, Policy], reasons: dict[str, str]
) -> list[str]:
    """The notes about policies that were left open, or that cost evaluations."""
    names = tuple(name for name, policy in settled.items() if policy.by_moments)
    directions = min(sum(candidates.traced.sizes(names)), tuning.MOMENTS.directions)
    sentences = []
    for o in candidates.observations:
        if o.anneal is not None and o.name not in names:
            continue
        sentence = f"{o.name} {settled[o.name]}"
        if o.name in names:
            sentence += f" ({directions} Jacobian–vector products an evaluation)"
        if o.name in reasons:
            sentence += f", since {reasons[o.name]}"
        sentences.append(sentence)
    return sentences


def _check_possible(
    o: Observation, not_exact: dict[str, str], no_moments: dict[str, str]
) -> None:
    """Refuse an observation that asks for a closed form which it does not have."""
    if o.anneal is None:
        return
    form = "exactly"
    reason = not_exact.get(o.name)
    if o.anneal.by_moments:
        form = "by moments"
        reason = no_moments.get(o.name)
    if reason is not None:
        raise CapabilityError(
            f"Observation {o.name!r} cannot be annealed {form}: {reason}.",
            where=o.where,
            fix="leave anneal= out, or use anneal='tempered' or 'denoised'.",
        )


def _prior(site: Site) -> Prior | str:
    """The prior of a site as mixtures of Gaussians, or the reason why it is not one."""
    marginal, _ = site_parts(site.root)
    try:
        if marginal is None:
            raise NotGaussian("it has no prior with noised marginals")
        prior = prior_of(unrolled(marginal), site.shape)
        # p(y | x_k) averages over x₀ under the prior, so it must cover every entry.
        covered = sum(len(part.entries) for part in prior.parts)
        if covered < np.prod(site.shape, dtype=int):
            raise NotGaussian("its prior leaves entries free")
    except NotGaussian as reason:
        return f"the prior of {site.name!r} is not a mixture of Gaussians ({reason})"
    return prior


def _not_linear(traced: Traced, names: list[str], shapes: Shapes) -> dict[str, str]:
    """The observations that are not A·x + b + noise with A, b and the noise free of x,
    with the reason."""
    # Kinds of functions need no numbers, so nothing is computed.
    kinds: dict[str, tuple[Value, Value]] = jax.eval_shape(
        lambda: traced.linearity(shapes)
    )
    reasons = {}
    for name in names:
        mean, noise = kinds[name]
        # Latents may move A, b and the noise; x may not.
        if noise.kind > Kind.LATENT:
            reasons[name] = "the spread of its noise depends on what it measures"
        elif mean.why == "custom_vjp_call":
            reasons[name] = (
                f"the derivative of its mean cannot be taken (JAX's `{mean.why}`)"
            )
        elif mean.kind == Kind.OTHER:
            reasons[name] = not_linear(mean.why)
    return reasons
