"""Trace a program into the IR: run it, find its sites, and find which latents every
statement depends on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, Unit, constraints

from composeprob.compiler.centring import centred_by_data
from composeprob.compiler.discrete import (
    Candidates,
    Summed,
    are_independent,
    unsuited_statements,
)
from composeprob.compiler.evidence import mask, plate_axes, plates, scaled
from composeprob.compiler.latents import (
    Dependencies,
    ancestors,
    awaits_result,
    bijection_of,
    held_for,
    located,
    place_of,
)
from composeprob.compiler.placing import Place, placed
from composeprob.compiler.trace import Traced, trace
from composeprob.density.reward import SiteReward
from composeprob.errors import DoublyIntractableError, InvalidValueError, ProgramError
from composeprob.factors.categorical import num_values_of
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.factors.networks import no_random_numbers
from composeprob.factors.nodes import SETS, Plate, Product, rewrite_leaves, walk
from composeprob.factors.nodes import leaves as factor_leaves
from composeprob.factors.window import Cells, Region, Window
from composeprob.ir.leaves import (
    Graph,
    Leaf,
    Observation,
    Site,
    Static,
    same_conditions,
    same_network,
)
from composeprob.language.checks import check_draw
from composeprob.language.decorator import Program
from composeprob.language.finite import is_discrete, values_of
from composeprob.language.interpret import (
    PRIOR_LEVELS,
    Provide,
    Statement,
    looked_at,
    masked,
    run,
    unwrap,
)
from composeprob.language.policies import Policy, Rising


def build(
    program: Program, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Graph, Traced]:
    """Return the program as written, not yet simplified, and its trace.

    The program is run with numbers, and once more if a factor at a site looks at a
    NumPyro prior. It is traced, which tells what each statement depends on, and run
    with reflected latents, which tells scales of both signs. Refused are a program
    without latent sites, one that asks for the number of a site (by ``if``, ``float``
    or NumPy), and a factor of a latent that may not be normalised where ancestral order
    is not the program's distribution.
    """
    statements = run(program.function, args, kwargs, drawn_latents())
    # Sites of NumPyro priors that a factor at a site looks at are noised.
    noised = looked_at(statements)
    if noised:
        statements = run(program.function, args, kwargs, drawn_latents(), noised=noised)
    latents = {s.name: s for s in statements.values() if s.kind in ("noised", "static")}
    if not latents:
        raise ProgramError(
            f"Program '{program.name}' has no site to sample.",
            where=program.where,
            fix="give it at least one cp.sample(name, factor_or_distribution).",
        )
    values = {name: s.value for name, s in latents.items()}
    # The equations of the trace tell which latents each statement depends on.
    traced, requests = trace(program, args, kwargs, values, noised)
    _check_callbacks(traced, statements)
    # A run with latents at the other side of their location refuses a scale that takes
    # both signs.
    with no_random_numbers(
        f"Program '{program.name}'",
        ProgramError,
        "make the random number a site, cp.sample(name, distribution), or pass it as "
        "data to compile.",
        program.where,
    ):
        mirrored = run(
            program.function, args, kwargs, reflected(latents), noised=noised
        )
    dependencies, by_leaf = traced.dependencies()
    variables = program.names_of(args, kwargs)
    builder = _Builder(statements, latents, dependencies, by_leaf, variables)
    for statement in statements.values():
        if statement.kind == "observed" and not masked(statement.distribution):
            _check_weight(statement, mirrored[statement.name])
        builder.add(statement)
    _check_observations(builder.observations)
    summed = builder.sum_out(traced)

    graph = builder.graph(program)
    sentences = list(requests)
    for site in builder.sites:
        sentences += _normalised_weights(site)
    for sentence in sentences:
        graph = graph.noted("build", sentence)
    if builder.held:
        graph = graph.noted("build", _ancestral_sentence(builder))
    for group in summed:
        graph = graph.noted("sum", _summed_sentence(group))
    return graph, replace(builder.coordinates(traced), summed=summed)


def _ancestral_sentence(builder: _Builder) -> str:
    """The note about latents that no chain moves."""
    held = ", ".join(sorted(builder.held))
    below = ", ".join(site.name for site in builder.sites if site.ancestral)
    source = "the prior"
    if builder.given:
        source = "an earlier result"
    return f"ancestral order: {held} by {source}, then {below} given that"


def _summed_sentence(group: Summed) -> str:
    """The note about discrete latents that are summed out."""
    names = " and ".join(group.sites)
    entries = ""
    if group.shape:
        entries = (
            f"; its {math.prod(group.shape)} entries are independent given the rest"
        )
    return f"{names} over {group.num_values} values, then drawn given the rest{entries}"


def _check_callbacks(traced: Traced, statements: dict[str, Statement]) -> None:
    """Refuse a likelihood or a log-weight that calls the host, which has no
    gradient."""
    for name in traced.calling_host():
        raise ProgramError(
            f"{name!r} calls the host (jax.pure_callback), which has no gradient.",
            where=statements[name].where,
            fix=f"leave it to the run: cp.factor({name!r}, cp.Reward(fn), at=x), with "
            "fn of a batch of values of the site x.",
        )


class _Builder:
    """Collects the sites and observations of a program, statement by statement.

    Attributes:
        statements: every statement of the program, as it was run with numbers.
        latents: the statements of noised and static sites.
        dependencies: the latents that each statement depends on directly.
        by_leaf: of noised sites the latents that each leaf of the factor depends on.
        variables: leaf factors with the names that the program's author gave them.
        sites, statics, observations: those that were collected so far.
        held: the static sites that keep draws of their prior.
        given: those of them whose values an earlier result gives.
        placed_by_statics: the static sites whose location and scale other static sites
            give.
    """

    def __init__(
        self,
        statements: dict[str, Statement],
        latents: dict[str, Statement],
        dependencies: Dependencies,
        by_leaf: dict[str, list[frozenset[str]]],
        variables: list[tuple[LeafFactor, str]],
    ):
        self.statements = statements
        self.latents = latents
        self.dependencies = dependencies
        self.by_leaf = by_leaf
        self.variables = variables
        self.sites: list[Site] = []
        self.statics: list[Static] = []
        self.observations: list[Observation] = []
        self.rewards: list[SiteReward] = []
        self.held: frozenset[str] = frozenset()
        self.given: frozenset[str] = frozenset()
        self.placed_by_statics: list[str] = []

    def add(self, statement: Statement) -> None:
        """Add the latent or the observation that the statement declares."""
        if statement.kind == "noised":
            self._add_site(statement)
        elif statement.kind == "static":
            self._add_static(statement)
        elif statement.kind == "observed" and self._is_observation(statement):
            self._add_observation(statement)
        elif statement.kind == "reward":
            self._add_reward(statement)

    def coordinates(self, traced: Traced) -> Traced:
        """Return the traced program with what the coordinates of its latents are."""
        standardised = frozenset(s.name for s in self.statics if s.standardised)
        centred: tuple[tuple[str, str], ...] = ()
        if not self.sites:
            centred = centred_by_data(
                traced.run, self.statements, self.dependencies, self.placed_by_statics
            )
        return replace(
            traced,
            standardised=standardised,
            placed=tuple(self.placed_by_statics),
            centred=centred,
        )

    def _add_reward(self, statement: Statement) -> None:
        """A criterion that `infer` asks for on the host."""
        name = statement.name
        site = statement.site
        if self.latents[site].kind != "noised":
            raise ProgramError(
                f"The reward {name!r} looks at {site!r}, which has no noise to be "
                "moved by.",
                where=statement.where,
                fix="look at a noised site; of a NumPyro latent write its log-weight "
                "in JAX: cp.factor(name, log_weight).",
            )
        assert statement.reward is not None
        self.rewards.append(SiteReward(name, site, statement.reward, statement.where))

    def _is_observation(self, statement: Statement) -> bool:
        """Return whether an observed value is data or depends on latents: a value that
        a handler gives to a site without parents is a constant of the program."""
        return bool(self.dependencies[statement.name]) or not statement.substituted

    def _add_site(self, statement: Statement) -> None:
        """A noised site, with the evidence at it."""
        name = statement.name
        parents = self.dependencies[name]
        root = _site_root(statement)
        held: frozenset[str] = frozenset()
        if parents:
            # A factor of unknown normaliser holds its parents at draws of their prior.
            held = held_for(statement, self.statements, self.dependencies)
            if awaits_result(statement, self.statements, self.dependencies):
                self.given |= held
            if held and not statement.conditional:
                _check_product(statement, self.by_leaf[name])
            root = _from_latents(root, statement, parents)
        self.held |= held
        evidence = [
            s
            for s in self.statements.values()
            if s.kind == "evidence" and s.site == name
        ]
        root = _with_evidence(root, statement, evidence, self.dependencies)
        root = rewrite_leaves(root, self._labelled)
        # Members of plates are independent unless another statement joins them.
        joined = any(name in others for others in self.dependencies.values())
        independent_axes = 0
        if not joined:
            independent_axes = sum(dim is not None for dim in statement.dims)
        shape = tuple(statement.distribution.shape())
        # Evidence multiplies the site; it has no place of its own in the graph.
        self.sites.append(
            Site(name, root, shape, statement.where, bool(held), independent_axes)
        )

    def _labelled(self, leaf: Leaf) -> Leaf:
        """The leaf, labelled with the author's variable if there is one.

        Networks are compared, not objects: the variable may hold the factor before
        `given`, which makes a new factor. A model without conditions names all of its
        uses, whose conditions are printed beside the name.
        """
        names = [
            (factor, name)
            for factor, name in self.variables
            if same_network(factor, leaf.factor)
        ]
        for factor, name in names:
            if not factor.fixed:
                return replace(leaf, label=name)
        for factor, name in names:
            if same_conditions(factor.fixed, leaf.factor.fixed):
                return replace(leaf, label=name)
        if names:
            return replace(leaf, label=names[0][1])
        return leaf

    def _add_static(self, statement: Statement) -> None:
        name = statement.name
        distribution = statement.distribution
        follows = any(
            self.latents[n].kind == "noised" for n in ancestors(name, self.dependencies)
        )
        # x/α of a noised site moves far from one level to the next; a coordinate
        # relative to it moves along.
        standardised = follows and located(distribution)
        if self.dependencies[name] and not follows and place_of(distribution):
            self.placed_by_statics.append(name)
        inverse = bijection_of(distribution, standardised).inv
        coordinate = jax.eval_shape(inverse, statement.value).shape
        num_values = 0
        if is_discrete(distribution):
            values = values_of(distribution)
            assert values is not None
            num_values = values.number
        self.statics.append(
            Static(
                name,
                jnp.shape(statement.value),
                coordinate,
                describe(distribution),
                statement.where,
                standardised,
                num_values,
            )
        )

    def sum_out(self, traced: Traced) -> tuple[Summed, ...]:
        """Mark the discrete latents that are summed out, and return their groups."""
        if not any(static.num_values for static in self.statics):
            return ()
        unsuited = unsuited_statements(
            self.statements.values(),
            standardised=(s.name for s in self.statics if s.standardised),
            looking=(o.name for o in self.observations if o.looks_at),
        )
        candidates = Candidates(
            self.statements, self.dependencies, unsuited | self.held
        )
        groups = []
        for group in candidates.groups():
            if are_independent(group, traced.run):
                groups.append(group)
        summed = {name for group in groups for name in group.sites}
        # Draws of what is summed out follow from a position's bits, which must differ
        # from chain to chain.
        continuous = bool(self.sites) or any(
            not s.num_values and s.name not in self.held for s in self.statics
        )
        if not continuous:
            return ()
        self.statics = [
            replace(static, summed=static.name in summed) for static in self.statics
        ]
        dependents = {name for group in groups for name in group.statements}
        self.placed_by_statics = [
            name for name in self.placed_by_statics if name not in dependents
        ]
        return tuple(groups)

    def _add_observation(self, statement: Statement) -> None:
        name = statement.name
        depends_on = self.dependencies[name]
        # An observation looks at noised sites directly, and through static sites whose
        # coordinate follows these.
        following = {static.name for static in self.statics if static.standardised}
        passed_on: dict[str, frozenset[str]] = {}
        for other, parents in self.dependencies.items():
            passed_on[other] = parents if other in following else frozenset()
        passed_on[name] = depends_on
        looks_at = frozenset(
            n for n in ancestors(name, passed_on) if self.latents[n].kind == "noised"
        )
        policy = statement.anneal
        # Policies are about noise, and there is none in static sites.
        if not looks_at:
            policy = self._policy_without_sites()
        kind = describe(statement.distribution)
        self.observations.append(
            Observation(name, policy, depends_on, looks_at, kind, statement.where)
        )

    def _policy_without_sites(self) -> Policy:
        """The policy of an observation that looks at no noised site: its power rises
        with the levels if the program has noised sites, and is 1 otherwise."""
        if any(s.kind == "noised" for s in self.latents.values()):
            return Rising()
        return Policy()

    def graph(self, program: Program) -> Graph:
        """The graph of the sites and observations that were collected."""
        dims = {
            s.name: s.dims for s in self.statements.values() if s.kind != "evidence"
        }
        return Graph(
            name=program.name,
            sites=tuple(self.sites),
            statics=tuple(self.statics),
            observations=tuple(self.observations),
            schedule=None,
            groups=(),
            notes=(),
            where=program.where,
            dims=dims,
            held=self.held,
            given=self.given,
            rewards=tuple(self.rewards),
        )


def _check_observations(observations: list[Observation]) -> None:
    """Refuse an observation that depends on no latent."""
    for o in observations:
        if not o.depends_on:
            raise ProgramError(
                f"Observation {o.name!r} depends on no site, so it weighs all samples "
                "alike.",
                where=o.where,
                fix="let it use the value that cp.sample returned; if "
                f"{o.name!r} is a number that is known, assign it by = instead.",
            )


def drawn_latents() -> Provide:
    """Return what gives latents their values: standard normals at noised sites, tokens
    at categorical ones, draws of their priors at static ones."""
    rng = np.random.default_rng(0)
    count = itertools.count()

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        num_values = 0
        if kind == "noised":
            num_values = num_values_of(unwrap(distribution).factor)
        if num_values:
            tokens = rng.integers(0, num_values, distribution.shape())
            return jnp.asarray(tokens, jnp.int32)
        if kind == "noised":
            normals = rng.standard_normal(distribution.shape())
            return jnp.asarray(normals, jnp.result_type(float))
        key = jax.random.fold_in(jax.random.key(0), next(count))
        value = distribution.sample(key)
        check_draw(name, value)
        return value

    return provide


def reflected(latents: dict[str, Statement]) -> Provide:
    """Latents reflected about their location: real-valued ones change side, noised ones
    change sign, and all others keep their values."""

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        value = latents[name].value
        # Event dimensions wrap the constraint of their entries.
        support = distribution.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        loc: Any = 0.0
        if kind != "noised":
            loc = getattr(unwrap(distribution), "loc", None)
        if loc is None or support is not constraints.real:
            return value
        return 2 * loc - value

    return provide


def describe(distribution: Distribution) -> str:
    """The name of a distribution, without plates and masks."""
    return type(unwrap(distribution)).__name__


def _normalised_weights(site: Site) -> list[str]:
    """The notes about mixtures whose weights did not sum to 1."""
    totals = dict.fromkeys(getattr(node, "total", 1.0) for node in walk(site.root))
    return [
        f"weights of a mixture at {site.name} sum to {total:.6g}; the shares are the "
        "weights divided by this sum"
        for total in totals
        if abs(total - 1.0) > 1e-6
    ]


def _site_root(statement: Statement) -> Factor:
    """The site's expression; inside plates, one independent copy of the factor for each
    index."""
    factor = statement.factor
    shape = tuple(statement.distribution.shape())
    batch = statement.distribution.batch_shape
    if not batch:
        return placed(factor, Place(shape))
    event = factor.event_shape
    no_offset = (0,) * len(event)
    extent = (1,) * len(batch) + event
    block = (1,) * len(shape)
    copies = []
    # Axes of plates come first: each copy sees one entry of them.
    for member in np.ndindex(*batch):
        region = Region(member + no_offset, extent, block)
        copies.append(placed(factor, Place(shape, region)))
    powers = (1.0,) * len(copies)
    return Product(factors=tuple(copies), numbers=powers, event_shape=shape)


def _check_weight(statement: Statement, mirrored: Statement) -> None:
    """Refuse a log-weight that is NaN in both runs. One that is NaN in one of them
    alone may have no density in places."""
    for run_of_it in (statement, mirrored):
        weight = unwrap(run_of_it.distribution)
        if not isinstance(weight, Unit):
            return
        if not np.isnan(np.asarray(weight.log_factor)).any():
            return
    raise InvalidValueError(
        f"The log-weight of {statement.name!r} is NaN.",
        where=statement.where,
        fix="check the data in it, and mask what is missing (numpyro.handlers.mask). "
        "A log-weight must be right for all values of its sites: for impossible ones "
        "write jnp.where(possible, …, -jnp.inf).",
    )


def _check_product(site: Statement, by_leaf: list[frozenset[str]]) -> None:
    """Refuse a product of which some factors depend on latents and others do not: it
    may be meant as evidence."""
    nothing = frozenset[str]()
    leaves = iter(by_leaf)
    # `by_leaf` has the leaves of the whole factor in order, term after term.
    latents_of_terms = []
    for factor, _ in site.factor.split():
        of_leaves = [next(leaves) for _ in factor_leaves(factor)]
        latents_of_terms.append(nothing.union(*of_leaves))
    if all(latents_of_terms):
        return
    latents = ", ".join(map(repr, sorted(nothing.union(*latents_of_terms))))
    raise ProgramError(
        f"At site {site.name!r} some factors of a product depend on the latent "
        f"{latents}, and others do not. As evidence the others are informative of "
        f"{latents} too; in a conditional, normalised for every {latents}, they are "
        "not.",
        where=site.where,
        fix=f"for evidence sample the factors of {latents} and add the others: "
        f"x = cp.sample({site.name!r}, prior), then cp.factor('evidence', others, "
        f"at=x); for a conditional write cp.sample({site.name!r}, …, "
        "conditional=True).",
    )


def _with_evidence(
    root: Factor, site: Statement, evidence: list[Statement], dependencies: Dependencies
) -> Factor:
    """A site's expression times the factors that look at it."""
    if not evidence:
        return root
    if site.kind == "noised":
        root = _at_levels_of(root, site, evidence[0])
    for e in evidence:
        if dependencies[e.name]:
            latents = ", ".join(map(repr, sorted(dependencies[e.name])))
            raise DoublyIntractableError(
                f"The factor {e.name!r} at site {site.name!r} depends on the "
                f"unobserved latent {latents}: its unknown normaliser would depend on "
                "it too.",
                where=e.where,
                fix="give its conditions data; a factor of a latent is a "
                "distribution: cp.sample it.",
            )
    factors = [root]
    for e in evidence:
        factor = _evidence_root(e, site)
        if factor is not None:
            factors.append(factor)
    powers = (1.0,) * len(factors)
    return Product(factors=tuple(factors), numbers=powers, event_shape=root.event_shape)


def _at_levels_of(root: Factor, site: Statement, evidence: Statement) -> Factor:
    """A NumPyro prior with the evidence's levels, as it has none itself; other factors
    as they are."""
    if unwrap(site.distribution).factor.schedule is not PRIOR_LEVELS:
        return root
    schedule = factor_leaves(evidence.factor)[0].schedule
    return rewrite_leaves(
        root, lambda leaf: eqx.tree_at(lambda f: f.factor.schedule, leaf, schedule)
    )


def _evidence_root(evidence: Statement, site: Statement) -> Factor | None:
    """The evidence factor at a site; in plates, one copy for each member, with that
    member's conditions. None if a mask leaves no member."""
    shape = tuple(jnp.shape(site.value))
    factor = scaled(evidence)
    keep = mask(evidence)
    about = plates(evidence, site)
    batch = tuple(about.values())
    # Members that a mask leaves out are not evaluated at all.
    kept = np.flatnonzero(np.broadcast_to(keep, batch))
    if not kept.size:
        return None
    if not batch:
        return placed(factor, Place(shape))
    count = math.prod(batch)
    running: set[str] = set()

    def of_kept(values: Any) -> Any:
        """The rows of the members that count; a single member needs no axis."""
        return values[kept] if len(kept) > 1 else values[kept[0]]

    def rows(value: Array, lead: int) -> Array:
        """The values of a condition, (members, …), from its ``lead`` plate axes."""
        event = jnp.shape(value)[lead:]
        by_member = jnp.broadcast_to(value, (*batch, *event))
        return of_kept(jnp.reshape(by_member, (count, *event)))

    def of_members(leaf: LeafFactor) -> LeafFactor:
        """The leaf with its conditions in the plates as rows."""
        by_member = {}
        for name, lead in plate_axes(evidence, leaf, about).items():
            if lead:
                by_member[name] = rows(leaf.fixed[name], lead)
        running.update(by_member)
        if not by_member:
            return leaf
        return leaf.holding({**leaf.fixed, **by_member})

    # The cells of the site that belong to each member.
    size = math.prod(factor.event_shape)
    inner = shape[: len(shape) - len(factor.event_shape)]
    cells = np.arange(math.prod(inner) * size).reshape(*inner, size)
    cells = np.broadcast_to(cells, (*batch, size)).reshape(count, size)
    region = Cells.from_array(of_kept(cells))
    factor = rewrite_leaves(factor, of_members)
    plate = None
    if len(kept) > 1:
        plate = Plate((SETS, *sorted(running)), len(kept), evidence.block)
    window = Window(factor=factor, event_shape=shape, region=region, plate=plate)
    return placed(window, Place(shape))


def _from_latents(
    root: Factor, statement: Statement, parents: frozenset[str]
) -> Factor:
    """The expression, with its leaves numbered as in the statement's factor; each copy
    in a plate begins anew."""
    count = itertools.count()
    size = len(factor_leaves(statement.factor))

    # The program is run again for such a factor; the number finds the leaf in it.
    def number(leaf: Leaf) -> Leaf:
        latent = (statement.name, next(count) % size)
        return replace(leaf, conditions=tuple(sorted(parents)), latent=latent)

    return rewrite_leaves(root, number)
