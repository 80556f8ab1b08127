"""Makes the evaluator. One evaluation of each batch of leaves gives log-density, score
and rate of every node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpyro.distributions import Cauchy, MultivariateNormal, StudentT

from composeprob.compiler.anneal import Likelihood
from composeprob.compiler.check import node_capabilities, site_parts, split_by
from composeprob.compiler.discrete import key_of
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
    TrackedFactors,
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


class FactorValues(NamedTuple):
    """Values of a program's factors at one position and level.

    Attributes:
        marginal: F of each noised site; the constant 1 where there is none.
        potential: the site's own part of G, without observations; 1 where there is
            none.
        log_moved: the logarithm of all factors of F that latents move, a scalar.
        unmoved_scores: the score of the other factors of F, of the sites that have such
            factors.
        tracked: the factors of F whose log-densities chains carry.
    """

    marginal: dict[str, NodeValue]
    potential: dict[str, NodeValue]
    log_moved: Float[Array, ""]
    unmoved_scores: dict[str, Array | float]
    tracked: TrackedFactors | None


class StatementValues(NamedTuple):
    """Values of static priors and observations at one position and level, without the
    observations that are annealed exactly.

    Attributes:
        log_prior: log p(z), a scalar.
        log_likelihood: Σ_j γ_j·log L_j, a scalar.
        gradient: ∇(log p + Σ_j γ_j·log L_j + log of the factors that latents move).
    """

    log_prior: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    gradient: Sites


class Evaluator(eqx.Module):
    """Evaluates a program's density at one position and level.

    Attributes:
        schedule: the levels.
        batches: the shared evaluations.
        marginal: F of each site, the part that has a rate; None where there is none.
        potential: the other factors of the site's density.
        energies: the user's own energies in that potential; None where there are none.
        moved: for each noised site with factors that give scores to the latents they
            depend on, these factors of F and all others; None where there are no
            others.
        likelihood: static priors and observations.
        places: the site, batch and member of every leaf, in the program's order.
        shapes: the noised sites' shapes.
        held: the static sites that are held; their scores are 0.
        networks_see_none: whether there are latents, and no factor of theirs takes a
            network.
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
        factors, statements = self._evaluate(xs, zs, noise)
        log_prior, log_likelihood, gradient = statements
        drift, unmoved_score = _marginal_scores(position, factors)

        # E_k, the observations that are annealed exactly, needs ∇log F for its rate.
        exact = no_closed_form(xs, zs)
        if self.likelihood.exact is not None:
            replay = self.likelihood.replay
            exact = self.likelihood.exact(replay, xs, zs, self.schedule, noise, drift)
        # ∇log π = ∇log F + ∇log G + ∇(log p(z) + Σ γ·log L), each factor once.
        score = {}
        for name in position:
            potential_score = factors.potential[name].score if name in xs else 0.0
            of_program = unmoved_score[name] + gradient[name] + potential_score
            score[name] = of_program + exact.of_annealed[name]
        for name in xs:
            drift[name] = drift[name] + exact.of_exact[name]

        # The rate of a product of sites is the sum of theirs; E crosses with F.
        marginal = factors.marginal.values()
        log_marginal = _total(value.log_density for value in marginal)
        log_potentials = [value.log_density for value in factors.potential.values()]
        log_potential = _total([log_likelihood + exact.correction, *log_potentials])
        rate = _total([exact.crossed, *(value.rate for value in marginal)])
        terms = DensityTerms(
            drift=drift,
            rate=_or_nan(rate),
            excess=_sum(value.excess for value in marginal),
            log_potential=_or_nan(log_potential),
            log_prior=log_prior,
            log_marginal=_or_nan(log_marginal),
            log_exact=exact.log_exact,
        )
        wall = Wall(
            outside=jnp.isneginf(terms.log_potential),
            log_open=_total([log_prior, log_marginal, exact.log_exact]),
        )
        # Without log F there is still the logarithm of all else, which line integrals
        # of scores then leave out.
        annealed = [exact.annealed, log_likelihood]
        log_density = _total([log_prior, log_marginal, *annealed, *log_potentials])
        log_rest = _total([log_prior, *annealed, factors.log_moved, *log_potentials])
        closed_form = None
        if log_density is None and log_rest is not None:
            closed_form = ClosedFormTerm(log_rest, unmoved_score)
        return Evaluation(log_density, score, wall, closed_form, terms, factors.tracked)

    def _evaluate(
        self, xs: Sites, zs: Sites, noise: Noise
    ) -> tuple[FactorValues, StatementValues]:
        """Values of the factors, and values and gradients of the statements."""
        # Factors that are evaluated beforehand are constants of the gradient below.
        # Tweedie means need derivatives of scores, and latents those of the factors
        # that they move, so there factors are evaluated again under the gradient.
        differentiated = self.likelihood.sees_means or bool(self.moved)
        by_moments = self.likelihood.by_moments
        factors: FactorValues | None = None
        if by_moments is not None:
            scores, slope, factors = jax.linearize(
                partial(self._scores, zs=zs, noise=noise), xs, has_aux=True
            )
        elif not differentiated:
            factors = self._factors(xs, zs, noise)
        constant_factors = None if differentiated else factors

        log_statements = partial(
            self._log_statements, noise=noise, factors=constant_factors
        )
        (_, values), (of_x, of_z) = jax.value_and_grad(
            log_statements, argnums=(0, 1), has_aux=True
        )(xs, zs)
        factors, log_prior, log_likelihood = values
        gradient = {**of_x, **of_z}

        # N(y; A·m + b, Σ + A·V·Aᵀ) with V from the slope of the score, which was taken
        # above together with the values: networks are called once.
        if by_moments is not None:
            log_moments, of_moments = by_moments(
                self.likelihood.replay, xs, zs, scores, slope, self.schedule, noise
            )
            log_likelihood = log_likelihood + log_moments
            gradient = {n: s + of_moments[n] for n, s in gradient.items()}
        # Held sites keep draws of their prior, so no kernel may move them.
        for name, of_site in gradient.items():
            if name in self.held:
                gradient[name] = jnp.zeros_like(of_site)
        return factors, StatementValues(log_prior, log_likelihood, gradient)

    def _factors(self, xs: Sites, zs: Sites, noise: Noise) -> FactorValues:
        # All expressions read one set of outputs: each network is called once.
        outputs = OnDemand(self._batches(zs, noise), xs, noise)

        def values_of(
            expressions: dict[str, Expression | None],
        ) -> dict[str, NodeValue]:
            values = {}
            for name, expression in expressions.items():
                if expression is None:
                    values[name] = _unit(xs[name])
                else:
                    values[name] = expression(outputs, noise)
            return values

        marginal = values_of(self.marginal)
        potential = values_of(self.potential)
        log_moved = _sum(
            latent(outputs, noise).log_density for latent, _ in self.moved.values()
        )
        unmoved_scores: dict[str, Array | float] = {}
        for name, (_, unmoved) in self.moved.items():
            if unmoved is None:
                unmoved_scores[name] = 0.0
            else:
                unmoved_scores[name] = unmoved(outputs, noise).score
        tracked = None
        for name, expression in self.marginal.items():
            if expression is None:
                continue
            # One site at most has tracked factors (`grow`).
            of_site = expression.tracked(outputs, noise)
            tracked = tracked or _structured(of_site, name)
        return FactorValues(marginal, potential, log_moved, unmoved_scores, tracked)

    def _scores(self, xs: Sites, zs: Sites, noise: Noise) -> tuple[Sites, FactorValues]:
        """Scores of F, whose slopes give the moments of x₀ given x, and all values."""
        factors = self._factors(xs, zs, noise)
        return {name: factors.marginal[name].score for name in xs}, factors

    def _log_statements(
        self, xs: Sites, zs: Sites, noise: Noise, factors: FactorValues | None
    ) -> tuple[Array, tuple[FactorValues, Array, Array]]:
        """The log-density of all terms that give latents their scores: priors,
        observations and the factors that latents move. With ``factors`` None, factors
        are evaluated here."""
        if factors is None:
            factors = self._factors(xs, zs, noise)
        # Tweedie: E[x₀ | x] = (x + σ²·∇log F)/α.
        means = {
            name: (x + noise.sigma**2 * factors.marginal[name].score) / noise.alpha
            for name, x in xs.items()
        }
        log_prior, log_likelihood = self.likelihood(xs, means, zs, self.schedule, noise)
        total = log_prior + log_likelihood + factors.log_moved
        return total, (factors, log_prior, log_likelihood)

    def _split(self, position: Sites, level: Array | int) -> tuple[Noise, Sites, Sites]:
        """The level's noise, the noised sites, the static ones."""
        noise = self.schedule.at(level)
        xs = {name: position[name] for name in self.marginal}
        zs = {
            name: value for name, value in position.items() if name not in self.marginal
        }
        return noise, xs, zs

    def _outputs(
        self, position: Sites, level: Array | int
    ) -> tuple[Noise, Sites, Sites, OnDemand]:
        """The results of `_split`, and the leaves' values at the position."""
        noise, xs, zs = self._split(position, level)
        return noise, xs, zs, OnDemand(self._batches(zs, noise), xs, noise)

    def _batches(self, zs: Sites, noise: Noise) -> tuple[Group, ...]:
        """The batches, with the factors that the program makes of these latents."""
        if all(batch.latent is None for batch in self.batches):
            return self.batches
        # Such a factor depends on no noised site, so any values of these will do.
        xs = {name: jnp.zeros(shape) for name, shape in self.shapes}
        statements, _ = self.likelihood.replay(xs, zs, noise.index)

        def current(batch: Group) -> Group:
            if batch.latent is None:
                return batch
            site, index = batch.latent
            stated = factor_leaves(statements[site].factor)[index]
            factor = in_precision(stated, self.precision)
            conditions = tuple(
                spread(factor.call_conditions(), member.plates)
                for member in batch.members
            )
            moved = dataclasses.replace(batch, conditions=conditions)
            # The conditions are the batch's own from here on.
            bare = closed(factor, moved.first).holding({})
            return dataclasses.replace(moved, factor=bare)

        return tuple(map(current, self.batches))

    @property
    def has_user_potential(self) -> bool:
        if self.likelihood.has_network_free:
            return True
        return any(energy is not None for energy in self.energies.values())

    def user_potential(self, position: Sites, level: Array | int) -> Float[Array, ""]:
        noise, xs, zs, outputs = self._outputs(position, level)
        energies = []
        for energy in self.energies.values():
            if energy is not None:
                energies.append(energy(outputs, noise).log_density)
        _, log_likelihood = self.likelihood(
            xs, {}, zs, self.schedule, noise, network_free=True
        )
        return _sum([*energies, log_likelihood])

    @property
    def guided(self) -> bool:
        if self.likelihood.sees_means or self.likelihood.by_moments is not None:
            return True
        # A part of the potential that is not an energy is a classifier's.
        potential: object = jax.tree.structure((self.potential,))
        energies: object = jax.tree.structure((self.energies,))
        return potential != energies

    @property
    def knows_latents(self) -> bool:
        return self.networks_see_none and self.likelihood.by_moments is None

    @property
    def summed(self) -> tuple[str, ...]:
        return tuple(n for group in self.likelihood.summed for n in group.sites)

    def log_closed_form(self, position: Sites, level: Array | int) -> Float[Array, ""]:
        noise, xs, zs, outputs = self._outputs(position, level)
        priors = [
            latent(outputs, noise).log_density for latent, _ in self.moved.values()
        ]
        statements = self.likelihood(xs, {}, zs, self.schedule, noise)
        return _sum([*statements, *priors])

    def frames(self, position: Sites, level: Array | int) -> dict[str, Frame]:
        noise, xs, zs = self._split(position, level)
        shapes = dict(self.shapes)
        frames = {}
        # Noised sites under closed forms, then static ones.
        for batch in self._batches(zs, noise):
            if _is_conditional_prior(batch):
                site = batch.members[0].site
                frames[site] = _frame(batch, shapes[site], noise)
        for site, (location, scale) in self.likelihood.places(xs, zs).items():
            shape = zs[site].shape
            centre = jnp.broadcast_to(location, shape)
            width = jnp.broadcast_to(scale, shape)
            frames[site] = Frame(centre, width)
        return frames

    def frames_by_data(self, position: Sites, level: Array | int) -> dict[str, Frame]:
        _, _, zs = self._split(position, level)
        places = self.likelihood.places_by_data(zs)
        return {site: Frame(*place) for site, place in places.items()}

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
        values = []
        for expert in self.experts:
            value = expert.expression(outputs, noise)
            x = xs[expert.site]
            # One row for each condition in plates; `total` sums over them without
            # spreading each over the whole site.
            scores = dense(value.score).reshape(-1, x.size)
            total = summed(value.score, x.shape)
            log_density = jnp.nan if value.log_density is None else value.log_density
            by_row = jnp.broadcast_to(jnp.ravel(log_density), scores.shape[:1])
            values.append(ExpertValue(scores, total.ravel(), by_row))
        return tuple(values)

    @property
    def drawable(self) -> bool:
        sites = {expert.site for expert in self.experts if expert.drawn}
        return sites == self.marginal.keys() and not self.held

    def draw(self, key: Array) -> Sites:
        noise = self.schedule.at(0)
        noised_key, static_key = jax.random.split(key)
        xs = {name: jnp.zeros(shape) for name, shape in self.shapes}
        # Factors that latents move follow latents, and latents follow noised sites, so
        # sites are drawn in rounds. Each round uses the same random numbers: a site
        # that depends only on sites of earlier rounds keeps its value. Every round
        # settles at least one more site.
        rounds = len(xs) if self.moved else 1
        for _ in range(rounds):
            zs = self.draw_static(static_key, self._clean(xs))
            batches = self._batches(zs, noise)
            for i, name in enumerate(xs):
                site_key = jax.random.fold_in(noised_key, i)
                choice_key, draw_key = jax.random.split(site_key)
                expressions = [expression for _, expression in self._draws(name)]
                choice = jax.random.randint(choice_key, (), 0, len(expressions))
                xs[name] = drawn(choice, expressions, draw_key, batches, noise)
        return {**xs, **self.draw_static(static_key, self._clean(xs))}

    def importance(self, position: Sites) -> tuple[Float[Array, ""], Float[Array, ""]]:
        evaluation = self(position, 0)
        values = self.expert_values(position, 0)
        # q = p(z | x)·Π_sites (1/n)·Σ_i f_i(x): `draw` takes each of n experts equally
        # often.
        log_q = evaluation.terms.log_prior
        for name, _ in self.shapes:
            logs = jnp.stack([values[i].log_density[0] for i, _ in self._draws(name)])
            log_q = log_q + jax.nn.logsumexp(logs) - jnp.log(len(logs))
        log_density = _or_nan(evaluation.log_density)
        return log_density, log_density - log_q

    def _draws(self, name: str) -> list[tuple[int, Expression]]:
        """Indices and expressions of the site's experts that have exact draws."""
        draws = []
        for i, expert in enumerate(self.experts):
            if expert.site == name and expert.drawn:
                draws.append((i, expert.expression))
        return draws

    def draw_static(self, key: Array, xs: Sites) -> Sites:
        return self.likelihood.draw(key, xs)

    def read(self, position: Sites) -> Sites:
        noise, xs, zs = self._split(position, 0)
        clean = {name: x / noise.alpha for name, x in xs.items()}
        codes: Sites = {}
        if self.likelihood.summed:
            key = key_of(position)
            codes = self.likelihood.draw_summed(key, clean, zs, self.schedule, noise)
        statements, _ = self.likelihood.replay(clean, zs, noise.index, codes)
        values = dict(xs)
        for statement in statements.values():
            latent = statement.kind in ("static", "deterministic")
            if latent or statement.substituted:
                values[statement.name] = jnp.asarray(statement.value)
        return values

    def unread(self, values: Sites, key: Array) -> Sites:
        xs = {name: values[name] for name, _ in self.shapes}
        return {**xs, **self.likelihood.coordinates(self._clean(values), key)}

    def observed(self, values: Sites | None = None, key: Array | None = None) -> Sites:
        if values is not None:
            values = self._clean(values)
        return self.likelihood.observed(values, key)

    def log_likelihood(self, values: Sites) -> Sites:
        return self.likelihood.log_likelihood(self._clean(values))

    def log_priors(self, values: Sites) -> Sites:
        return self.likelihood.log_priors(self._clean(values))

    def _clean(self, values: Sites) -> Sites:
        """The latents as the program's statements see them at level 0: noised sites at
        x/α."""
        alpha = self.schedule.at(0).alpha
        clean = dict(values)
        for name in self.marginal:
            if name in values:
                clean[name] = values[name] / alpha
        return clean


def _structured(tracked: TrackedFactors | None, name: str) -> TrackedFactors | None:
    """Tracked factors of the one site, whose scores are structured like a position."""
    if tracked is None:
        return None
    scores = tuple({name: score} for score in tracked.scores)
    return dataclasses.replace(tracked, scores=scores)


def _marginal_scores(position: Sites, factors: FactorValues) -> tuple[Sites, Sites]:
    """∇log F, zero at static sites; and the part of it that the statements' gradient
    lacks, the scores of the factors that no latent moves."""
    scores = {}
    unmoved_scores = {}
    for name, value in position.items():
        score = jnp.zeros_like(value)
        if name in factors.marginal:
            score = factors.marginal[name].score
        scores[name] = score
        # The sum gives a 0.0 the site's shape.
        unmoved = factors.unmoved_scores.get(name, score)
        unmoved_scores[name] = jnp.zeros_like(score) + unmoved
    return scores, unmoved_scores


def _is_conditional_prior(batch: Group) -> bool:
    """Return whether a batch is one distribution over a whole site that depends on
    latents."""
    (_, region, plates), *others = batch.members
    whole = not others and region is None and not plates
    has_distribution = getattr(batch.factor, "distribution", None) is not None
    return batch.latent is not None and whole and has_distribution


def _frame(batch: Group, shape: tuple[int, ...], noise: Noise) -> Frame:
    """Mean and spread of x/α under a site's prior given latents."""
    stated: Any = batch.factor
    distribution = stated.distribution
    inner = unwrap(distribution)
    if isinstance(inner, StudentT | Cauchy):
        # Their moments may not exist.
        mean = inner.loc
        variance = jnp.asarray(inner.scale) ** 2
    else:
        mean = distribution.mean
        variance = distribution.variance
    roots = None
    if isinstance(inner, MultivariateNormal):
        # x/α = x₀ + (σ/α)·ε has the covariance C + (σ/α)²·I = L·Lᵀ.
        identity = jnp.eye(shape[-1])
        covariance = inner.covariance_matrix + noise.variance * identity
        inverse_root = whitener(covariance)
        root = covariance @ jnp.swapaxes(inverse_root, -1, -2)
        roots = (root, inverse_root)
    centre = jnp.broadcast_to(mean, shape)
    width = jnp.broadcast_to(jnp.sqrt(variance + noise.variance), shape)
    return Frame(centre, width, roots)


def _unit(x: Array) -> NodeValue:
    """The constant factor 1."""
    zero = jnp.zeros((), x.dtype)
    return NodeValue(zero, jnp.zeros_like(x), zero, zero)


def _or_nan(value: Array | None) -> Float[Array, ""]:
    """The scalar, or NaN in the place of None.

    NaN has a strong type: a weak one would have the second stretch of a run compiled
    anew."""
    if value is None:
        return jnp.full((), jnp.nan, jnp.result_type(float))
    return value


def _sum(terms: Iterable[Array | None]) -> Float[Array, ""]:
    """The sum of scalars that all have values, such as log-densities of energies,
    likelihoods and factors that depend on latents."""
    total = _total(terms)
    assert total is not None
    return total


def _total(terms: Iterable[Array | None]) -> Float[Array, ""] | None:
    """The sum of scalars; None if one of them is None."""
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
    shapes = {site.name: site.shape for site in graph.sites}
    marginals: dict[str, Factor | None] = {}
    potentials: dict[str, Factor | None] = {}
    energies: dict[str, Factor | None] = {}
    for site in graph.sites:
        # Classifiers and energies have no rate: they are G, not F.
        marginals[site.name], potential = site_parts(site.root)
        potentials[site.name] = potential
        energies[site.name] = None
        if potential is not None:
            energies[site.name], _ = split_by(potential, _is_energy)

    # Leaves in the order of `Described.offers`, which names them in messages.
    places = []
    for site in graph.sites:
        for leaf in leaves(site.root):
            if leaf.slot is not None:
                places.append((site.name, leaf.slot))
    _, expert_expressions = experts(graph)
    return Evaluator(
        schedule=graph.levels,
        batches=graph.groups,
        marginal=_lowered(marginals, shapes),
        potential=_lowered(potentials, shapes),
        energies=_lowered(energies, shapes),
        moved=_moved(graph, marginals),
        likelihood=likelihood,
        experts=expert_expressions,
        places=tuple(places),
        shapes=tuple(shapes.items()),
        held=graph.held,
        networks_see_none=_networks_see_none(graph, likelihood),
        precision=precision,
    )


def _lowered(
    factors: dict[str, Factor | None], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Expression | None]:
    """The executable form of each site's factor."""
    expressions: dict[str, Expression | None] = {}
    for name, factor in factors.items():
        if factor is None:
            expressions[name] = None
        else:
            expressions[name] = lower_expression(factor, shapes[name])
    return expressions


def _moved(
    graph: Graph, marginals: dict[str, Factor | None]
) -> dict[str, tuple[Expression, Expression | None]]:
    """For each site with factors of F that latents move: these factors, and the others.

    Latents that are held get no scores, so ancestral sites are left out.
    """
    moved: dict[str, tuple[Expression, Expression | None]] = {}
    for site in graph.sites:
        marginal = marginals[site.name]
        if marginal is None or site.ancestral:
            continue
        latent, unmoved = split_by(marginal, _of_latents)
        if latent is None:
            continue
        rest = None
        if unmoved is not None:
            rest = lower_expression(unmoved, site.shape)
        moved[site.name] = (lower_expression(latent, site.shape), rest)
    return moved


def _networks_see_none(graph: Graph, likelihood: Likelihood) -> bool:
    """Return whether the program has latents, and all that depends on them has a
    log-density without a network: no factor is score-only, and no observation sees a
    Tweedie mean."""
    if not graph.statics or graph.held:
        return False
    for site in graph.sites:
        for factor, _ in site.root.split():
            if _of_latents(factor) and not _has_log_density(factor):
                return False
    # `log_closed_form` leaves out E, which may depend on latents.
    return not likelihood.sees_means and likelihood.exact is None


def _of_latents(factor: Factor) -> bool:
    return any(leaf.latent is not None for leaf in leaves(factor))


def _has_log_density(factor: Factor) -> bool:
    return all("energy" in node_capabilities(leaf) for leaf in leaves(factor))


def _is_energy(factor: Factor) -> bool:
    """Return whether a factor is made of the user's own energies."""
    return all(leaf.factor.traits.user_defined for leaf in leaves(factor))
