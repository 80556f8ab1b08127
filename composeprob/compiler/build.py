"""Trace a program into the IR: run it, see which sites it has, and what depends on
what."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, Unit, constraints

from composeprob.compiler.evidence import mask, plate_axes, plates, scaled
from composeprob.compiler.latents import (
    Dependencies,
    ancestors,
    bijection_of,
    held_for,
    located,
    place_of,
)
from composeprob.compiler.trace import Traced, trace
from composeprob.errors import DoublyIntractableError, InvalidValueError, ProgramError
from composeprob.factors.calibrated import CalibratedExpression
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.factors.nodes import (
    SETS,
    Combination,
    Plate,
    Product,
    rewrite_leaves,
    walk,
)
from composeprob.factors.nodes import leaves as factor_leaves
from composeprob.factors.passes import Pass
from composeprob.factors.window import Cells, Region, Window, listed
from composeprob.ir.leaves import (
    Graph,
    Leaf,
    Normaliser,
    Observation,
    Site,
    Static,
    same_network,
)
from composeprob.ir.render import index
from composeprob.language.checks import check_draw
from composeprob.language.decorator import Program
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
    """The program as written, not yet simplified, and its trace. The program is run
    with numbers, and traced. Refused are a program without latent sites, one that asks
    for the number of a site (by ``if``, ``float`` or NumPy), and a factor of a latent
    that may not be normalised where ancestral order is not the program's
    distribution."""
    statements = run(program.function, args, kwargs, draw())
    if noised := looked_at(statements):
        statements = run(program.function, args, kwargs, draw(), noised=noised)
    latents = {s.name: s for s in statements.values() if s.kind in ("noised", "static")}
    if not latents:
        raise ProgramError(
            f"Program '{program.name}' has no site to sample.",
            where=program.where,
            fix="give it at least one cp.sample(name, factor_or_distribution).",
        )
    traced, asks = trace(
        program, args, kwargs, {name: s.value for name, s in latents.items()}, noised
    )
    # Once more, with latents at the other side of their location: a scale that takes
    # both signs is refused there.
    generators = _generators()
    mirrored = run(program.function, args, kwargs, reflected(latents), noised=noised)
    if generators != _generators():
        raise ProgramError(
            f"Program '{program.name}' draws random numbers of NumPy or Python, which would be drawn once.",
            where=program.where,
            fix="make the random number a site, cp.sample(name, distribution), or pass it as data to compile.",
        )
    dependencies, by_leaf = traced.dependencies()
    variables = program.names_of(args, kwargs)

    def named(leaf: Leaf) -> Leaf:
        """By the author's variable (of the factor before `given`, which makes a new
        one), else by its own label."""
        return replace(
            leaf,
            label=next(
                (n for f, n in variables if same_network(f, leaf.factor)), leaf.label
            ),
        )

    # Of what depends on no noised site, while there are some.
    elsewhere = (
        Rising() if any(s.kind == "noised" for s in latents.values()) else Policy()
    )
    sites, statics, observations, by_others = [], [], [], list[str]()
    held: frozenset[str] = frozenset()
    for s in statements.values():
        if s.kind == "observed" and not masked(s.distribution):
            _check_weight(s, mirrored[s.name])
        if s.kind == "noised":
            root, held_here = _site_root(s), frozenset[str]()
            if dependencies[s.name]:
                held_here = held_for(s, statements, dependencies)
                if held_here and not s.conditional:
                    _check_product(s, by_leaf[s.name])
                root = _from_latents(root, s, dependencies[s.name])
            held |= held_here
            evidence = [
                e
                for e in statements.values()
                if e.kind == "evidence" and e.site == s.name
            ]
            root = rewrite_leaves(
                _with_evidence(root, s, evidence, dependencies), named
            )
            alone = not any(s.name in parents for parents in dependencies.values())
            plates = sum(dim is not None for dim in s.dims) if alone else 0
            sites.append(
                Site(
                    s.name,
                    root,
                    tuple(s.distribution.shape()),
                    s.where,
                    bool(held_here),
                    plates,
                )
            )
        elif s.kind == "static":
            follows = any(
                latents[n].kind == "noised" for n in ancestors(s.name, dependencies)
            )
            standardised = follows and located(s.distribution)
            if dependencies[s.name] and not follows and place_of(s.distribution):
                by_others.append(s.name)
            inverse = bijection_of(s.distribution, standardised).inv
            coordinate = jax.eval_shape(inverse, s.value).shape
            kind = describe(s.distribution)
            statics.append(
                Static(
                    s.name, jnp.shape(s.value), coordinate, kind, s.where, standardised
                )
            )
        elif s.kind == "observed" and (dependencies[s.name] or not s.substituted):
            following = {static.name for static in statics if static.standardised}
            passed = {
                n: parents if n in following else frozenset()
                for n, parents in dependencies.items()
            }
            parents = frozenset(
                ancestors(s.name, {**passed, s.name: dependencies[s.name]})
            )
            looks_at = frozenset(n for n in parents if latents[n].kind == "noised")
            policy, kind = s.anneal if looks_at else elsewhere, describe(s.distribution)
            observations.append(
                Observation(
                    s.name, policy, dependencies[s.name], looks_at, kind, s.where
                )
            )
    for o in observations:
        if not o.depends_on:
            raise ProgramError(
                f"Observation {o.name!r} depends on no site, so it changes nothing.",
                where=o.where,
                fix="let its distribution use the value that cp.sample returned.",
            )
    dims = {s.name: s.dims for s in statements.values() if s.kind != "evidence"}
    graph = Graph(
        program.name,
        tuple(sites),
        tuple(statics),
        tuple(observations),
        None,
        (),
        (),
        program.where,
        dims,
        held,
    )
    for sentence in [*asks, *itertools.chain(*map(_normalised_weights, sites))]:
        graph = graph.noted("build", sentence)
    if held:
        given = ", ".join(site.name for site in sites if site.ancestral)
        graph = graph.noted(
            "build",
            f"ancestral order: {', '.join(sorted(held))} by the prior, then {given} given that",
        )
    by_prior = frozenset(s.name for s in statics if s.standardised)
    return graph, replace(traced, standardised=by_prior, placed=tuple(by_others))


def draw() -> Provide:
    """Noised sites get standard normals, static ones a draw of their prior."""
    rng, count = np.random.default_rng(0), itertools.count()

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        if kind == "noised":
            return jnp.asarray(
                rng.standard_normal(distribution.shape()), jnp.result_type(float)
            )
        value = distribution.sample(jax.random.fold_in(jax.random.key(0), next(count)))
        check_draw(name, value)
        return value

    return provide


def reflected(latents: dict[str, Statement]) -> Provide:
    """Latents on the real line at the other side of their location, of noised ones 0;
    others as they were."""

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        value, support = latents[name].value, distribution.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        loc = 0.0 if kind == "noised" else getattr(unwrap(distribution), "loc", None)
        return (
            value if loc is None or support is not constraints.real else 2 * loc - value
        )

    return provide


def describe(distribution: Distribution) -> str:
    """The name of a distribution, without plates and masks."""
    return type(unwrap(distribution)).__name__


def _normalised_weights(site: Site) -> list[str]:
    """The note about mixtures whose weights did not sum to 1."""
    totals = dict.fromkeys(getattr(node, "total", 1.0) for node in walk(site.root))
    off = [total for total in totals if abs(total - 1.0) > 1e-6]
    return [
        f"weights of a mixture at {site.name} sum to {total:.6g}; divided by that to be shares"
        for total in off
    ]


def _site_root(statement: Statement) -> Factor:
    """The site's expression; inside plates, one independent copy of the factor for each
    index."""
    factor, shape = statement.factor, tuple(statement.distribution.shape())
    batch = statement.distribution.batch_shape
    if not batch:
        return placed(factor, Place(shape))
    ones = (1,) * len(batch)
    copies = []
    for place in np.ndindex(*batch):
        offset = place + (0,) * len(factor.event_shape)
        region = Region(
            offset, ones + factor.event_shape, ones + (1,) * len(factor.event_shape)
        )
        copies.append(placed(factor, Place(shape, region)))
    return Product(
        factors=tuple(copies), numbers=(1.0,) * len(copies), event_shape=shape
    )


def _generators() -> tuple[object, ...]:
    """Where the random numbers of NumPy and of Python are."""
    numpys: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what programs call
    return (
        random.getstate(),
        numpys["state"]["key"].tobytes(),
        numpys["state"]["pos"],
        numpys["has_gauss"],
    )


def _check_weight(*made: Statement) -> None:
    """Refuse a log-weight that is NaN wherever latents are; where it is in places,
    those have no density."""
    weights = [unwrap(s.distribution) for s in made]
    if all(
        isinstance(weight, Unit) and np.isnan(np.asarray(weight.log_factor)).any()
        for weight in weights
    ):
        raise InvalidValueError(
            f"The log-weight of {made[0].name!r} is NaN.",
            where=made[0].where,
            fix="check the data in it, and mask what is missing (numpyro.handlers.mask). What depends on a site "
            "must be right for all its values: for impossible ones write jnp.where(possible, …, -jnp.inf).",
        )


def _check_product(site: Statement, by_leaf: list[frozenset[str]]) -> None:
    """Refuse a product of which some factors depend on latents and others do not: it
    may be meant as evidence."""
    leaves = iter(by_leaf)
    terms = [
        frozenset[str]().union(*(next(leaves) for _ in factor_leaves(f)))
        for f, _ in site.factor.split()
    ]
    if all(terms):
        return
    on = ", ".join(map(repr, sorted(frozenset[str]().union(*terms))))
    raise ProgramError(
        f"At site {site.name!r} some factors of a product depend on the latent {on}, and others do not. As evidence "
        f"the others say something of {on} too; in a conditional, normalised for every {on}, they do not.",
        where=site.where,
        fix=f"for evidence sample what depends on {on} and add the others: x = cp.sample({site.name!r}, prior), then "
        f"cp.factor('evidence', others, at=x); for a conditional write cp.sample({site.name!r}, …, conditional=True).",
    )


def _with_evidence(
    root: Factor, site: Statement, evidence: list[Statement], dependencies: Dependencies
) -> Factor:
    """A site's expression times the factors that look at it."""
    if not evidence:
        return root
    known = factor_leaves(evidence[0].factor)[0].schedule
    if (
        site.kind == "noised"
        and unwrap(site.distribution).factor.schedule is PRIOR_LEVELS
    ):
        root = rewrite_leaves(
            root, lambda leaf: eqx.tree_at(lambda f: f.factor.schedule, leaf, known)
        )
    for e in evidence:
        if dependencies[e.name]:
            raise DoublyIntractableError(
                f"The factor {e.name!r} at site {site.name!r} depends on the unobserved latent "
                f"{', '.join(map(repr, sorted(dependencies[e.name])))}: its normaliser, which is not known, would "
                "depend on it too.",
                where=e.where,
                fix="give its conditions data; what depends on a latent is a distribution: cp.sample it.",
            )
    roots = [_evidence_root(e, site) for e in evidence]
    parts = [root, *(found for found in roots if found is not None)]
    return Product(
        factors=tuple(parts), numbers=(1.0,) * len(parts), event_shape=root.event_shape
    )


def _evidence_root(evidence: Statement, site: Statement) -> Factor | None:
    """A factor at a site; where plates are about them, a copy at each of their members
    with the conditions that belong to it. None where a mask leaves no member."""
    shape, factor, keep = tuple(jnp.shape(site.value)), scaled(evidence), mask(evidence)
    about = plates(evidence, site)
    batch, size = tuple(about.values()), math.prod(factor.event_shape)
    inner, count = shape[: len(shape) - len(factor.event_shape)], math.prod(batch)
    kept = np.flatnonzero(np.broadcast_to(keep, batch))
    if not kept.size:
        return None
    if not batch:
        return placed(factor, Place(shape))
    running = set[str]()

    def rows(value: Array, lead: int) -> Array:
        each = jnp.broadcast_to(value, (*batch, *jnp.shape(value)[lead:]))
        flat = jnp.reshape(each, (count, *jnp.shape(value)[lead:]))
        return (
            flat[kept] if len(kept) > 1 else flat[kept[0]]
        )  # one member alone is no plate

    def members(leaf: LeafFactor) -> LeafFactor:
        each = {
            n: rows(leaf.fixed[n], lead)
            for n, lead in plate_axes(evidence, leaf, about).items()
            if lead
        }
        running.update(each)
        return leaf.holding({**leaf.fixed, **each}) if each else leaf

    cells = np.arange(math.prod(inner) * size).reshape(*inner, size)
    cells = np.broadcast_to(cells, (*batch, size)).reshape(count, size)[kept]
    region = Cells.from_array(cells if len(kept) > 1 else cells[0])
    each = rewrite_leaves(factor, members)
    plate = (
        Plate((SETS, *sorted(running)), len(kept), evidence.block)
        if len(kept) > 1
        else None
    )
    return placed(
        Window(factor=each, event_shape=shape, region=region, plate=plate), Place(shape)
    )


def _from_latents(
    root: Factor, statement: Statement, parents: frozenset[str]
) -> Factor:
    """The same expression, its leaves numbered as in the statement's factor (anew for
    each copy in a plate)."""
    count, size = itertools.count(), len(factor_leaves(statement.factor))

    def number(leaf: Leaf) -> Leaf:
        return replace(
            leaf,
            conditions=tuple(sorted(parents)),
            latent=(statement.name, next(count) % size),
        )

    return rewrite_leaves(root, number)


@dataclass(frozen=True)
class Place:
    """Where a node stands: its site's shape, the region that it sees (None for all of
    it), the plates that it stands in."""

    shape: tuple[int, ...]
    region: Region | Cells | None = None
    plates: tuple[Plate, ...] = ()


placed_of = Pass[Factor]("placed")
"""Rules (node, `Place`) for the node with every leaf at its place."""


def placed(node: Factor, at: Place) -> Factor:
    """A user's expression at its place in a site."""
    return placed_of.rule_for(node)(node, at)


@placed_of.rule(LeafFactor)
def _leaf(factor: LeafFactor, at: Place) -> Leaf:
    plates = tuple(
        plate
        for plate in at.plates
        if plate.cells or set(plate.names) & set(factor.traits.conditions)
    )
    running = {
        name: f"{name}_{index(depth)}"
        for depth, plate in enumerate(at.plates)
        for name in plate.names
    }
    given = tuple(
        f"{name}={running.get(name, value)}"
        for name, value in factor.shown_conditions.items()
    )
    return Leaf(
        factor=factor,
        event_shape=at.shape,
        region=at.region,
        label=factor.label,
        conditions=given,
        plates=plates,
    )


@placed_of.rule(Combination)
def _combination(node: Combination, at: Place) -> Factor:
    inner = replace(at, plates=(*at.plates, node.plate)) if node.plate else at
    return replace(
        node,
        factors=tuple(placed(part, inner) for part in node.factors),
        event_shape=at.shape,
    )


@placed_of.rule(CalibratedExpression)
def _calibrated(node: CalibratedExpression, at: Place) -> Product:
    factors = placed(node.factor, at), placed(Normaliser(node), at)
    return Product(
        factors=factors, numbers=(1.0, 1.0), event_shape=at.shape, calibrated=True
    )


@placed_of.rule(Window)
def _window(node: Window, at: Place) -> Factor:
    if isinstance(node.region, Region):
        whole = (
            node.event_shape == node.factor.event_shape
        )  # a window over the whole canvas changes nothing
        return placed(
            node.factor,
            at
            if whole
            else replace(at, region=_inside(at.region, node.region, node.entries)),
        )
    cells, depth = node.entries, sum(plate.cells for plate in at.plates)
    shown = (
        listed(cells)
        if node.plate is None and not depth
        else f"cells_{index(len(at.plates))}"
    )
    outer = at.region
    if not isinstance(outer, Cells):
        entries = (
            np.arange(math.prod(at.shape)) if outer is None else outer.entries(at.shape)
        )
        outer = Cells.from_array(entries)
    inner = replace(at, region=outer.pick(cells, shown))
    if node.plate is None:
        return placed(node.factor, inner)
    plate = replace(
        node.plate,
        names=(f"{SETS} {depth + 1}" if depth else SETS, *node.plate.names[1:]),
    )
    part = placed(node.factor, replace(inner, plates=(*at.plates, plate)))
    return Product(
        factors=(part,), numbers=(1.0,) * plate.count, event_shape=at.shape, plate=plate
    )


def _inside(
    outer: Region | Cells | None, window: Region, seen: np.ndarray
) -> Region | Cells:
    """The region of a window, which sees these entries of what sits in a region itself:
    offsets and blocks compose."""
    if outer is None:
        return window
    if isinstance(outer, Cells):
        return outer.pick(seen, outer.shown)
    lead = len(outer.offset) - len(
        window.extent
    )  # axes of plates, in front of the event's
    offset = outer.offset[:lead] + tuple(
        o + w * b
        for o, w, b in zip(
            outer.offset[lead:], window.offset, outer.block[lead:], strict=True
        )
    )
    scaled = tuple(
        e * b for e, b in zip(window.extent, outer.block[lead:], strict=True)
    )
    block = tuple(w * b for w, b in zip(window.block, outer.block[lead:], strict=True))
    return Region(offset, outer.extent[:lead] + scaled, outer.block[:lead] + block)
