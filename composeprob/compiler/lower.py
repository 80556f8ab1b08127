"""Makes the evaluator. One evaluation of each batch of leaves gives log-density, score
and rate of every node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import Cauchy, MultivariateNormal, StudentT

from composeprob.compiler.anneal import Likelihood
from composeprob.compiler.check import divided, node_capabilities, site_parts
from composeprob.compiler.exact import no_closed_form
from composeprob.compiler.experts import ExpertExpression, experts
from composeprob.compiler.expressions import (
    Expression,
    NodeValue,
    OnDemand,
    dense,
    drawn,
    lower_expression,
    summed,
)
from composeprob.compiler.trace import Sites
from composeprob.density.evaluation import (
    ClosedFormTerm,
    DensityTerms,
    Evaluation,
    ExpertValue,
    Frame,
    Wall,
)
from composeprob.factors.factor import Factor
from composeprob.factors.networks import closed
from composeprob.factors.nodes import leaves as factor_leaves
from composeprob.factors.precision import in_precision
from composeprob.factors.whitening import whitener
from composeprob.ir.leaves import Graph, Group, leaves, spread
from composeprob.language.interpret import unwrap
from composeprob.schedule import Noise, Schedule

Sides = tuple[
    dict[str, NodeValue], dict[str, NodeValue], Array, dict[str, Array | float]
]
"""By site the marginals and potentials, log of what latents move, and the scores beside
that."""


class Evaluator(eqx.Module):
    """Evaluates a program's density at one position and level.

    Attributes:
        schedule: the levels.
        batches: the shared evaluations.
        marginal: F of each site, the part that has a rate; None where there is none.
        potential: what else multiplies the site's density.
        energies: the part of that which is the user's own energies; None where there is
            none.
        moved: of each noised site whose factors give scores to the latents that they
            depend on, the factors of F that do, and all others; None where there are
            none.
        likelihood: static priors and observations.
        places: the site, batch and member of every leaf, in the program's order.
        shapes: the noised sites' shapes.
        held: the static sites that are held; their scores are 0.
        networks_see_none: whether there are latents, and none of them depends on what
            takes a network.
        experts: every expert.
        precision: of the networks, also of those that the program makes of latents.
    """

    schedule: Schedule
    batches: tuple[Group, ...]
    marginal: dict[str, Expression | None]
    potential: dict[str, Expression | None]
    energies: dict[str, Expression | None]
    moved: dict[str, tuple[Expression, Expression | None]]
    likelihood: Likelihood
    experts: tuple[ExpertExpression, ...]
    places: tuple[tuple[str, tuple[int, int]], ...] = eqx.field(static=True)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    held: frozenset[str] = eqx.field(static=True)
    networks_see_none: bool = eqx.field(static=True)
    precision: str | None = eqx.field(static=True)

    def __call__(self, position: Sites, level: Array | int) -> Evaluation:
        noise, xs, zs = self._split(position, level)

        def factors(xs: Sites, zs: Sites) -> Sides:
            outputs = OnDemand(self._batches(zs, noise), xs, noise)
            sides = []
            for expressions in (self.marginal, self.potential):
                values = {
                    n: None if e is None else e(outputs, noise)
                    for n, e in expressions.items()
                }
                sides.append(
                    {n: _unit(xs[n]) if v is None else v for n, v in values.items()}
                )
            moved = _sum(
                latent(outputs, noise).log_density for latent, _ in self.moved.values()
            )
            others = {
                n: 0.0 if rest is None else rest(outputs, noise).score
                for n, (_, rest) in self.moved.items()
            }
            return sides[0], sides[1], moved, others

        likelihood = self.likelihood
        # What is known already has no derivative, which Tweedie means need, and latents
        # that move factors.
        again = likelihood.sees_means or self.moved
        if likelihood.by_moments is None:
            known = None if again else factors(xs, zs)
        else:

            def scores_of(xs: Sites) -> tuple[Sites, Sides]:
                found = factors(xs, zs)
                return {n: found[0][n].score for n in xs}, found

            scores, slope, known = jax.linearize(scores_of, xs, has_aux=True)

        def annotated(xs: Sites, zs: Sites) -> tuple[Array, tuple[Sides, Array, Array]]:
            sides = factors(xs, zs) if known is None or again else known
            marginal, _, moved, _ = sides
            means = {
                n: (x + noise.sigma**2 * marginal[n].score) / noise.alpha
                for n, x in xs.items()
            }
            log_prior, log_likelihood = likelihood(xs, means, zs, self.schedule, noise)
            # What is moved by latents gives them their scores.
            return log_prior + log_likelihood + moved, (
                sides,
                log_prior,
                log_likelihood,
            )

        (_, aux), (of_x, of_z) = jax.value_and_grad(
            annotated, argnums=(0, 1), has_aux=True
        )(xs, zs)
        (marginal, potential, moved, beside), log_prior, log_likelihood = aux
        gradient = {**of_x, **of_z}
        if likelihood.by_moments is not None:
            arguments = likelihood.replay, xs, zs, scores, slope, self.schedule, noise
            found, of_moments = likelihood.by_moments(*arguments)
            log_likelihood = log_likelihood + found
            gradient = {n: s + of_moments[n] for n, s in gradient.items()}
        gradient = {
            n: jnp.zeros_like(s) if n in self.held else s for n, s in gradient.items()
        }

        drift = {
            n: marginal[n].score if n in marginal else jnp.zeros_like(position[n])
            for n in position
        }
        # Without what is in the gradient already.
        beside = {n: jnp.zeros_like(s) + beside.get(n, s) for n, s in drift.items()}
        score = {
            n: beside[n] + gradient[n] + (potential[n].score if n in potential else 0.0)
            for n in position
        }
        exact = no_closed_form(xs, zs)
        if likelihood.exact is not None:
            exact = likelihood.exact(
                likelihood.replay, xs, zs, self.schedule, noise, drift
            )
        drift = {
            n: drift[n] + exact.of_exact[n] if n in xs else drift[n] for n in position
        }
        score = {n: score[n] + exact.of_annealed[n] for n in position}
        potentials = [v.log_density for v in potential.values()]
        log_potential = _total([log_likelihood + exact.correction, *potentials])
        log_marginal = _total(v.log_density for v in marginal.values())
        rate = _total([exact.crossed, *(v.rate for v in marginal.values())])
        parts = DensityTerms(
            drift=drift,
            rate=_or_nan(rate),
            excess=_sum(v.excess for v in marginal.values()),
            log_potential=_or_nan(log_potential),
            log_prior=log_prior,
            log_marginal=_or_nan(log_marginal),
            log_exact=exact.log_exact,
        )
        wall = Wall(
            jnp.isneginf(parts.log_potential),
            _total([log_prior, log_marginal, exact.log_exact]),
        )
        log_density = _total(
            [log_prior, log_marginal, exact.annealed, log_likelihood, *potentials]
        )
        # A part whose value is not known leaves that of the others, which line
        # integrals need not find again.
        value = _total([log_prior, exact.annealed, log_likelihood, moved, *potentials])
        in_part = (
            None
            if log_density is not None or value is None
            else ClosedFormTerm(value, beside)
        )
        return Evaluation(log_density, score, wall, in_part, parts)

    def _split(self, position: Sites, level: Array | int) -> tuple[Noise, Sites, Sites]:
        """The level's noise, the noised sites, the static ones."""
        zs = {
            name: value for name, value in position.items() if name not in self.marginal
        }
        return (
            self.schedule.at(level),
            {name: position[name] for name in self.marginal},
            zs,
        )

    def _outputs(
        self, position: Sites, level: Array | int
    ) -> tuple[Noise, Sites, Sites, OnDemand]:
        """As `_split`, and what the leaves are there."""
        noise, xs, zs = self._split(position, level)
        return noise, xs, zs, OnDemand(self._batches(zs, noise), xs, noise)

    def _batches(self, zs: Sites, noise: Noise) -> tuple[Group, ...]:
        """The batches with the factors that the program makes of these latents."""
        if all(batch.latent is None for batch in self.batches):
            return self.batches
        # Such a factor depends on no noised site, so what those are does not matter
        # here.
        xs = {name: jnp.zeros(shape) for name, shape in self.shapes}
        statements, _ = self.likelihood.replay(xs, zs, noise.index)

        def current(batch: Group) -> Group:
            if batch.latent is None:
                return batch
            site, index = batch.latent
            factor = in_precision(
                factor_leaves(statements[site].factor)[index], self.precision
            )
            conditions = tuple(
                spread(factor.call_conditions(), member.plates)
                for member in batch.members
            )
            moved = dataclasses.replace(batch, conditions=conditions)
            return dataclasses.replace(
                moved, factor=closed(factor, moved.first).holding({})
            )

        return tuple(map(current, self.batches))

    @property
    def has_user_potential(self) -> bool:
        plain = any(policy.plain for policy in self.likelihood.policies.values())
        return plain or any(energy is not None for energy in self.energies.values())

    def user_potential(self, position: Sites, level: Array | int) -> Array:
        noise, xs, zs, outputs = self._outputs(position, level)
        terms = [
            energy(outputs, noise).log_density
            for energy in self.energies.values()
            if energy is not None
        ]
        return _sum(
            [*terms, self.likelihood(xs, {}, zs, self.schedule, noise, plain=True)[1]]
        )

    @property
    def guided(self) -> bool:
        policies = self.likelihood.policies.values()
        observed = any(
            policy.by_moments or not policy.sees_clean for policy in policies
        )
        kinds = {
            jax.tree.structure((part,)) for part in (self.potential, self.energies)
        }
        return observed or len(kinds) > 1  # what is no energy is a classifier's

    @property
    def knows_latents(self) -> bool:
        return self.networks_see_none and self.likelihood.by_moments is None

    def log_closed_form(self, position: Sites, level: Array | int) -> Array:
        noise, xs, zs, outputs = self._outputs(position, level)
        priors = [
            latent(outputs, noise).log_density for latent, _ in self.moved.values()
        ]
        return _sum([*self.likelihood(xs, {}, zs, self.schedule, noise), *priors])

    def frames(self, position: Sites, level: Array | int) -> dict[str, Frame]:
        noise, xs, zs = self._split(position, level)
        found = {}
        for batch in self._batches(zs, noise):
            (site, region, plates), *others = batch.members
            distribution = getattr(batch.factor, "distribution", None)
            if (
                batch.latent is None
                or others
                or region is not None
                or plates
                or distribution is None
            ):
                continue
            mean, variance = distribution.mean, distribution.variance
            distribution = unwrap(distribution)
            if isinstance(
                distribution, StudentT | Cauchy
            ):  # whose moments may not exist
                mean, variance = distribution.loc, jnp.asarray(distribution.scale) ** 2
            clear = jnp.sqrt(variance + noise.variance)
            shape, roots = dict(self.shapes)[site], None
            if isinstance(distribution, MultivariateNormal):
                covariance = distribution.covariance_matrix + noise.variance * jnp.eye(
                    shape[-1]
                )
                white = whitener(covariance)
                roots = covariance @ jnp.swapaxes(white, -1, -2), white
            found[site] = Frame(
                jnp.broadcast_to(mean, shape), jnp.broadcast_to(clear, shape), roots
            )
        for site, (location, scale) in self.likelihood.places(xs, zs).items():
            shape = zs[site].shape
            found[site] = Frame(
                jnp.broadcast_to(location, shape), jnp.broadcast_to(scale, shape)
            )
        return found

    def leaf_scores(self, position: Sites, level: Array | int) -> tuple[Sites, ...]:
        _, xs, _, outputs = self._outputs(position, level)
        return tuple(
            {site: summed(outputs[slot].score, xs[site].shape)}
            for site, slot in self.places
        )

    def expert_values(
        self, position: Sites, level: Array | int
    ) -> tuple[ExpertValue, ...]:
        noise, xs, _, outputs = self._outputs(position, level)
        found = []
        for expert in self.experts:
            value, x = expert.expression(outputs, noise), xs[expert.site]
            scores, total = (
                dense(value.score).reshape(-1, x.size),
                summed(value.score, x.shape),
            )
            log_density = jnp.nan if value.log_density is None else value.log_density
            found.append(
                ExpertValue(
                    scores,
                    total.ravel(),
                    jnp.broadcast_to(jnp.ravel(log_density), scores.shape[:1]),
                )
            )
        return tuple(found)

    @property
    def drawable(self) -> bool:
        sites = {expert.site for expert in self.experts if expert.drawn}
        return sites == self.marginal.keys() and not self.held

    def draw(self, key: Array) -> Sites:
        noise = self.schedule.at(0)
        of_xs, of_zs = jax.random.split(key)
        xs = {name: jnp.zeros(shape) for name, shape in self.shapes}
        # What depends on latents follows these, and latents follow noised sites: with
        # the same numbers anew, in each round what depends on the rounds before alone
        # is as it will stay.
        for _ in range(len(xs) if self.moved else 1):
            zs = self.draw_static(of_zs, self._clean(xs))
            batches = self._batches(zs, noise)
            for i, name in enumerate(xs):
                choice, rest = jax.random.split(jax.random.fold_in(of_xs, i))
                draws = self._draws(name)
                which = jax.random.randint(choice, (), 0, len(draws))
                xs[name] = drawn(
                    which, [expression for _, expression in draws], rest, batches, noise
                )
        return {**xs, **self.draw_static(of_zs, self._clean(xs))}

    def importance(self, position: Sites) -> tuple[Array, Array]:
        evaluation, values = self(position, 0), self.expert_values(position, 0)
        log_q = evaluation.terms.log_prior
        for name, _ in self.shapes:
            each = jnp.stack([values[i].log_density[0] for i, _ in self._draws(name)])
            log_q = log_q + jax.nn.logsumexp(each) - jnp.log(len(each))
        log_density = _or_nan(evaluation.log_density)
        return log_density, log_density - log_q

    def _draws(self, name: str) -> list[tuple[int, Expression]]:
        """The numbers of the site's experts that can be drawn from, with these."""
        return [
            (i, e.expression)
            for i, e in enumerate(self.experts)
            if e.site == name and e.drawn
        ]

    def draw_static(self, key: Array, xs: Sites) -> Sites:
        return self.likelihood.draw(key, xs)

    def read(self, position: Sites) -> Sites:
        noise, xs, zs = self._split(position, 0)
        statements, _ = self.likelihood.replay(
            {name: x / noise.alpha for name, x in xs.items()}, zs, noise.index
        )
        kinds = ("static", "deterministic")
        shown = {
            s.name: jnp.asarray(s.value)
            for s in statements.values()
            if s.kind in kinds or s.substituted
        }
        return {**xs, **shown}

    def observed(self, values: Sites | None = None, key: Array | None = None) -> Sites:
        return self.likelihood.observed(
            None if values is None else self._clean(values), key
        )

    def log_likelihood(self, values: Sites) -> Sites:
        return self.likelihood.log_likelihood(self._clean(values))

    def _clean(self, values: Sites) -> Sites:
        """The latents as the program's statements see them at level 0: noised sites at
        x/α."""
        alpha = self.schedule.at(0).alpha
        return {
            name: value / alpha if name in self.marginal else value
            for name, value in values.items()
        }


def _unit(x: Array) -> NodeValue:
    """The constant factor 1."""
    zero = jnp.zeros((), x.dtype)
    return NodeValue(zero, jnp.zeros_like(x), zero, zero)


def _or_nan(value: Array | None) -> Array:
    """A scalar, NaN where it is not known; of a strong type, as a run's second stretch
    would be compiled anew else."""
    return jnp.full((), jnp.nan, jnp.result_type(float)) if value is None else value


def _sum(terms: Iterable[Array | None]) -> Array:
    """The sum of what has a log-density, as energies, likelihoods and what depends on
    latents have."""
    total = _total(terms)
    assert total is not None
    return total


def _total(terms: Iterable[Array | None]) -> Array | None:
    """The sum of scalars; None where one of them is not known."""
    total = jnp.zeros((), jnp.result_type(float))
    for term in terms:
        if term is None:
            return None
        total = total + term
    return total


def lower(
    graph: Graph, likelihood: Likelihood, precision: str | None = None
) -> Evaluator:
    """The evaluator of a checked graph."""
    parts = {site.name: site_parts(site.root) for site in graph.sites}
    ancestral = {site.name for site in graph.sites if site.ancestral}
    shapes = {site.name: site.shape for site in graph.sites}

    def lowered(factors: dict[str, Factor | None]) -> dict[str, Expression | None]:
        return {
            n: None if f is None else lower_expression(f, shapes[n])
            for n, f in factors.items()
        }

    halves = {
        n: divided(f, _of_latents)
        for n, (f, _) in parts.items()
        if f is not None and n not in ancestral
    }
    latent, others = (
        lowered({n: half[i] for n, half in halves.items()}) for i in (0, 1)
    )
    places = tuple(
        (s.name, leaf.slot)
        for s in graph.sites
        for leaf in leaves(s.root)
        if leaf.slot is not None
    )
    return Evaluator(
        graph.levels,
        graph.groups,
        lowered({n: f for n, (f, _) in parts.items()}),
        lowered({n: g for n, (_, g) in parts.items()}),
        lowered(
            {
                n: None if g is None else divided(g, _is_energy)[0]
                for n, (_, g) in parts.items()
            }
        ),
        {
            n: (expression, others[n])
            for n, expression in latent.items()
            if expression is not None
        },
        likelihood,
        experts(graph)[1],
        places,
        tuple(shapes.items()),
        graph.held,
        _networks_see_none(graph, likelihood),
        precision,
    )


def _networks_see_none(graph: Graph, likelihood: Likelihood) -> bool:
    """Whether there are latents, and none of them depends on what takes a network: a
    factor without a log-density, or a Tweedie mean."""
    if not graph.statics or graph.held:
        return False
    terms = [f for site in graph.sites for f, _ in site.root.split() if _of_latents(f)]
    energies = all(
        "energy" in node_capabilities(leaf) for f in terms for leaf in leaves(f)
    )
    return energies and all(
        p.sees_clean and not p.closed_form for p in likelihood.policies.values()
    )


def _of_latents(factor: Factor) -> bool:
    return any(leaf.latent is not None for leaf in leaves(factor))


def _is_energy(factor: Factor) -> bool:
    return all(leaf.factor.traits.user_defined for leaf in leaves(factor))
