"""Static priors and observations: the part of a density that NumPyro's statements
declare, and how each observation is annealed. Linear measurements with Gaussian noise
are recognised, and annealed exactly or by moments.

The program is run again with the position's values in place of its random choices, once
for each annealing policy in use, because a policy decides what the observations see of
a noised site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpyro.distributions import Distribution
from numpyro.distributions.transforms import Transform

from composeprob.compiler.build import drawn_latents
from composeprob.compiler.by_moments import ByMoments, Moments, pays
from composeprob.compiler.denoised import Denoised
from composeprob.compiler.discrete import Summed
from composeprob.compiler.evaluated import Evaluated
from composeprob.compiler.exact import Exact, ExactTerm
from composeprob.compiler.facts import Bound, Facts
from composeprob.compiler.latents import bijection_of, place_of
from composeprob.compiler.noised import Noised
from composeprob.compiler.tempering import Tempered
from composeprob.compiler.trace import Sites, Traced
from composeprob.errors import CapabilityError, WrongTypeError
from composeprob.ir.leaves import Graph, Observation
from composeprob.language.interpret import Provide, Redraw, Statement, soft
from composeprob.language.policies import POLICIES, Policy
from composeprob.schedule import Noise, Schedule

for _policy in (Exact(), Moments(), Tempered(), Denoised(), Noised()):
    POLICIES[str(_policy)] = _policy


class Likelihood(eqx.Module):
    """log p(z) and the annealed log-likelihood of a program.

    Attributes:
        traced: the program; its arrays are leaves, so new data reuse compiled code.
            None where it has noised sites alone, and says nothing.
        evaluated: the observations whose likelihood itself is evaluated, by their
            policies.
        exact: the observations in closed form; None where there are none.
        by_moments: those that are annealed by moments; None where there are none.
    """

    traced: Traced | None
    evaluated: tuple[Evaluated, ...] = ()
    exact: ExactTerm | None = None
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
            network_free: sum the observations alone that take no network.
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
        for term in self.evaluated:
            if network_free and not term.network_free:
                continue
            statements = of_clean
            inputs = term.inputs(clean, xs, means, noise)
            if inputs is not None:
                statements, _ = self.replay(inputs, zs, noise.index)
            apart = {n: s for n, s in statements.items() if n not in self.in_sums}
            total = total + term(apart, schedule, noise)
        return log_prior, total

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
        terms_of_data = {name: term for term in self.evaluated for name in term.names}

        def power(name: str) -> Array | float | None:
            if name not in terms_of_data:
                # A latent's prior; or data of a program without its observations.
                return 1.0 if name in group.latents else None
            if not data:
                return None
            return terms_of_data[name].power(schedule, noise)

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

    @property
    def sees_means(self) -> bool:
        """True if a policy sees Tweedie means, so that its gradient differentiates
        scores."""
        return not all(term.sees_clean for term in self.evaluated)

    @property
    def has_network_free(self) -> bool:
        """True if an observation is evaluated without a network."""
        return any(term.network_free for term in self.evaluated)

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

    def places_by_data(self, zs: Sites) -> dict[str, tuple[Array, Array]]:
        """−m/s and 1/s of static sites ξ whose data have the location m + s·ξ: ξ in
        terms of that location."""
        if self.traced is None:
            return {}
        places = {}
        for latent, data in self.traced.centred:

            def location(xi: Array, latent: str = latent, data: str = data) -> Array:
                statements, _ = self.replay({}, {**zs, latent: xi}, 0)
                place = place_of(statements[data].distribution)
                assert place is not None  # as it was when the program was compiled
                return place[0]

            xi = zs[latent]
            here, slope = jax.jvp(location, (xi,), (jnp.ones_like(xi),))
            places[latent] = (xi - here / slope, 1 / slope)
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
        return self._without_summed(drawn)

    def coordinates(self, values: Sites, key: Array) -> Sites:
        """Coordinates of the static sites, from the latents' values as the program's
        statements see them; missing ones, and last members, are drawn from their
        priors."""
        found: Sites = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            value = values.get(name)
            if kind == "noised":
                assert value is not None
                return value
            if value is None or value.shape != distribution.shape():
                drawn = distribution.sample(jax.random.fold_in(key, len(found)))
                if value is not None:
                    kept = tuple(map(slice, value.shape))
                    drawn = drawn.at[kept].set(value)
                value = drawn
            found[name] = self._bijection(name, distribution).inv(value)
            return value

        self._run(provide)
        return self._without_summed(found)

    def _without_summed(self, values: Sites) -> Sites:
        """Values without those of discrete latents that are summed out, which have no
        coordinates."""
        summed = {name for group in self.summed for name in group.sites}
        return {name: value for name, value in values.items() if name not in summed}

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

    def log_priors(self, values: Sites) -> Sites:
        """log p of every static site, of the batch shape of its distribution; latents
        as for `observed`."""
        return {
            s.name: s.distribution.log_prob(s.value)
            for s in self._statements(values).values()
            if s.kind == "static"
        }

    def _observed(
        self, values: Sites | None, redraw: Redraw | None = None
    ) -> list[Statement]:
        """The statements with data. Soft evidence has none, nor has a latent whose
        value a handler substitutes."""
        return [
            s
            for s in self._statements(values, redraw).values()
            if s.kind == "observed" and not s.substituted and not soft(s.distribution)
        ]

    def _statements(
        self, values: Sites | None, redraw: Redraw | None = None
    ) -> dict[str, Statement]:
        """The statements at level 0, at values of the latents or at draws of them."""

        def given(kind: str, name: str, distribution: Distribution) -> Array:
            assert values is not None
            return values[name]

        provide = drawn_latents() if values is None else given
        return self._run(provide, 0, redraw)


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
            return graph, Likelihood(traced)
        return graph, Likelihood(None)
    facts = Facts(traced, graph)
    settled = {}
    observations = []
    for o in graph.observations:
        settled[o.name] = _settled(o, facts)
        facts.bound[o.name] = settled[o.name].bound
        observations.append(replace(o, anneal=settled[o.name].bound.policy))
    graph = replace(graph, observations=tuple(observations))

    evaluated = []
    exact = None
    by_moments = None
    for term in _terms(facts):
        if isinstance(term, Evaluated):
            evaluated.append(term)
        elif isinstance(term, ExactTerm):
            exact = term
        elif isinstance(term, ByMoments):
            by_moments = term
    sentences = _sentences(facts, settled, by_moments)
    if sentences:
        graph = graph.noted("anneal", "; ".join(sentences))
    if any(term.sees_near for term in evaluated):
        graph = graph.noted(
            "temper",
            "tempered observations fall faster than any power of x/α, so they see x/α "
            "drawn towards the prior's mean",
        )
    return graph, Likelihood(traced, tuple(evaluated), exact, by_moments)


class Settled(NamedTuple):
    """The policy that binds an observation, and the reason against the one before
    it."""

    bound: Bound
    reason: str | None


def _settled(o: Observation, facts: Facts) -> Settled:
    """Return the first policy that binds an observation: the one that it asks for, or
    of those that are possible by default."""
    reason = None
    for policy in _offered(o, facts):
        answer = policy.bind(o, facts)
        if isinstance(answer, Bound):
            return Settled(answer, reason)
        reason = answer
    raise CapabilityError(
        f"Observation {o.name!r} cannot be annealed {policy.form}: {reason}.",
        where=o.where,
        fix="leave anneal= out, or use anneal='tempered' or 'denoised'.",
    )


def _offered(o: Observation, facts: Facts) -> list[Policy]:
    """Policies in order of preference."""
    if o.anneal is not None:
        return [o.anneal]
    if pays(o, facts):
        return [POLICIES["exact"], POLICIES["moments"], POLICIES["tempered"]]
    return [POLICIES["exact"], POLICIES["tempered"]]


Term = Evaluated | ExactTerm | ByMoments
"""The terms of a `Likelihood`."""


def _terms(facts: Facts) -> list[Term]:
    """Return the terms of all observations that are settled, one for each policy."""
    names: dict[Policy, list[str]] = {}
    for name, bound in facts.bound.items():
        names.setdefault(bound.policy, []).append(name)
    terms = []
    for policy, of_policy in names.items():
        bound = facts.bound[of_policy[0]]
        term = bound.join(policy, tuple(of_policy), facts)
        if not isinstance(term, Term):
            raise WrongTypeError(
                f"The annealing policy '{policy}' makes a {type(term).__name__} of "
                f"{', '.join(of_policy)}, which no density contains.",
                fix="let its bind() return what the bind() of another policy does, as "
                "super().bind(observation, facts).",
            )
        terms.append(term)
    return terms


def _sentences(
    facts: Facts, settled: dict[str, Settled], by_moments: ByMoments | None
) -> list[str]:
    """The notes about policies that were left open, or that cost evaluations."""
    sentences = []
    for o in facts.candidates:
        bound, reason = settled[o.name]
        costs = by_moments is not None and o.name in by_moments.names
        if o.anneal is not None and not costs:
            continue
        sentence = f"{o.name} {bound.policy}"
        if by_moments is not None and costs:
            sentence += f" ({by_moments.cost(facts.traced)})"
        reason = reason or facts.not_mixture(o)
        if reason:
            sentence += f", since {reason}"
        sentences.append(sentence)
    return sentences
