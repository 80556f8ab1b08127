"""Trace a program into the IR: run it, see which sites it has, and what depends on what."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.compiler.coordinates import bijection_of, located
from composeprob.compiler.latents import ancestors, held_for
from composeprob.compiler.trace import Traced, trace
from composeprob.errors import ProgramError
from composeprob.factors import algebra
from composeprob.factors.base import Factor, LeafFactor
from composeprob.factors.calibrated import CalibratedExpression
from composeprob.factors.cells import CellWindow, Indices
from composeprob.factors.over import Over
from composeprob.factors.show import short
from composeprob.factors.window import Window
from composeprob.ir.cells import Cells, listed
from composeprob.ir.nodes import (
    SETS,
    Graph,
    Leaf,
    Mixture,
    Node,
    Observation,
    Plate,
    Product,
    Region,
    Site,
    Static,
    rewrite_leaves,
    same_network,
    walk,
)
from composeprob.ir.normaliser import Normaliser
from composeprob.ir.render import index
from composeprob.language.checks import check_draw
from composeprob.language.interpret import Provide, Statement, run, unwrap
from composeprob.language.policies import Unannealed
from composeprob.language.program import Program

Names = list[tuple[LeafFactor, str]]


def build(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, Traced]:
    """The program as written, not yet simplified, and its trace. The program is run with numbers, and traced.

    Raises:
        ProgramError: the program has no latent site, or asks for the number of one (by ``if``, ``float`` or NumPy).
        DoublyIntractableError: a factor that may not be normalised depends on a latent, and ancestral order is not
            the program's law.
    """
    statements = run(program.function, args, kwargs, draw())
    latents = {s.name: s for s in statements.values() if s.kind in ("noised", "static")}
    if not latents:
        raise ProgramError(
            f"Program '{program.name}' has no site to sample.",
            where=program.where,
            fix="give it at least one cp.sample(name, factor_or_distribution).",
        )
    traced, asks = trace(program, args, kwargs, {name: s.value for name, s in latents.items()})
    dependencies = traced.dependencies()
    names = program.names_of(args, kwargs)
    sites, statics, observations = [], [], []
    held: frozenset[str] = frozenset()
    for s in statements.values():
        if s.kind == "noised":
            root, own = _site_root(s, names), frozenset[str]()
            if dependencies[s.name]:
                own = held_for(s, statements, dependencies)
                root = _from_latents(root, s, dependencies[s.name])
            held |= own
            sites.append(Site(s.name, root, tuple(s.distribution.shape()), s.where, ancestral=bool(own)))
        elif s.kind == "static":
            follows = any(latents[n].kind == "noised" for n in ancestors(s.name, dependencies))
            standardised = follows and located(s.distribution)
            inverse = bijection_of(s.distribution, standardised).inv
            coordinate = jax.eval_shape(inverse, s.value).shape
            kind = describe(s.distribution)
            statics.append(Static(s.name, jnp.shape(s.value), coordinate, kind, s.where, standardised))
        elif s.kind == "observed":
            following = {static.name for static in statics if static.standardised}
            passed = {n: own if n in following else frozenset() for n, own in dependencies.items()}
            seen = frozenset(ancestors(s.name, {**passed, s.name: dependencies[s.name]}))
            looks_at = frozenset(n for n in seen if latents[n].kind == "noised")
            policy, kind = s.anneal if looks_at else Unannealed(), describe(s.distribution)
            observations.append(Observation(s.name, policy, dependencies[s.name], looks_at, kind, s.where))
    for o in observations:
        if not o.depends_on:
            raise ProgramError(
                f"Observation {o.name!r} depends on no site, so it changes nothing.",
                where=o.where,
                fix="let its distribution use the value that cp.sample returned.",
            )
    dims = {s.name: s.dims for s in statements.values()}
    graph = Graph(
        program.name, tuple(sites), tuple(statics), tuple(observations), None, (), (), program.where, dims, held
    )
    for sentence in [*asks, *itertools.chain(*map(_normalised_weights, sites))]:
        graph = graph.noted("build", sentence)
    if held:
        given = ", ".join(site.name for site in sites if site.ancestral)
        graph = graph.noted(
            "build", f"ancestral order: {', '.join(sorted(held))} by the prior, then {given} given that"
        )
    return graph, replace(traced, standardised=frozenset(s.name for s in statics if s.standardised))


def draw() -> Provide:
    """Noised sites get standard normals, static ones a draw of their prior."""
    rng, count = np.random.default_rng(0), itertools.count()

    def provide(kind: str, name: str, distribution: Any) -> Array:
        if kind == "noised":
            return jnp.asarray(rng.standard_normal(distribution.shape()), jnp.result_type(float))
        value = distribution.sample(jax.random.fold_in(jax.random.key(0), next(count)))
        check_draw(name, value)
        return value

    return provide


def describe(distribution: Any) -> str:
    """The name of a distribution, without plates and masks."""
    return type(unwrap(distribution)).__name__


def _normalised_weights(site: Site) -> list[str]:
    """What to say of mixtures whose weights did not sum to 1."""
    totals = {node.total: None for node in walk(site.root) if isinstance(node, Mixture)}
    off = [total for total in totals if abs(total - 1.0) > 1e-6]
    return [f"weights of a mixture at {site.name} sum to {total:.6g}; divided by that to be shares" for total in off]


def _site_root(statement: Statement, names: Names) -> Node:
    """The site's expression; inside plates, one independent copy of the factor for each index."""
    factor = statement.factor
    batch = statement.distribution.batch_shape
    if not batch:
        return _node(factor, None, names, factor.event_shape)
    ones = (1,) * len(batch)
    copies = []
    for place in np.ndindex(*batch):
        offset = place + (0,) * len(factor.event_shape)
        region = Region(offset, ones + factor.event_shape, ones + (1,) * len(factor.event_shape))
        copies.append(_node(factor, region, names, batch + factor.event_shape))
    return Product(tuple(copies), (1.0,) * len(copies))


def _from_latents(root: Node, statement: Statement, parents: frozenset[str]) -> Node:
    """The same expression, its leaves numbered as in the statement's factor (anew for each copy in a plate)."""
    count, given = itertools.count(), ", ".join(sorted(parents))
    size = len(algebra.leaves(statement.factor))

    def number(leaf: Leaf) -> Leaf:
        name = f"{leaf.name.rpartition('(x')[0]}(x | {given})"
        return replace(leaf, name=name, latent=(statement.name, next(count) % size))

    return rewrite_leaves(root, number)


def _node(
    factor: Factor, region: Region | Cells | None, names: Names, shape: tuple[int, ...], plates: tuple[Plate, ...] = ()
) -> Node:
    """The node of a factor that sees a region of a site of this shape, inside of plates."""
    if isinstance(factor, LeafFactor):
        own = tuple(plate for plate in plates if plate.cells or set(plate.names) & set(factor.condition_names))
        return Leaf(factor, region, _name(factor, names, plates), plates=own)
    if isinstance(factor, Window):
        whole = factor.event_shape == factor.factor.event_shape  # a window over the whole canvas changes nothing
        return _node(factor.factor, region if whole else _inside(region, factor), names, shape, plates)
    if isinstance(factor, CellWindow):
        return _of_cells(factor, region, names, shape, plates)
    if isinstance(factor, Over):
        plate = Plate(factor.names, factor.count, factor.block)
        part = (_node(factor.factor, region, names, shape, (*plates, plate)),)
        if factor.shares is None:
            return Product(part, (1.0,) * factor.count, plate=plate)
        return Mixture(part, factor.shares.log_weights, factor.shares.total, plate)
    parts = tuple(_node(part, region, names, shape, plates) for part in factor.children)
    if isinstance(factor, CalibratedExpression):
        constant = Normaliser(factor)
        own = tuple(plate for plate in plates if plate.cells)
        leaf = Leaf(constant, region, f"{constant.label}(x)", plates=own)
        return Product((*parts, leaf), (1.0, 1.0), normalised=True)
    if isinstance(factor, algebra.Mixture):
        return Mixture(parts, factor.log_weights, factor.total)
    assert isinstance(factor, algebra.Product)
    return Product(parts, factor.powers)


def _of_cells(
    window: CellWindow, outer: Region | Cells | None, names: Names, shape: tuple[int, ...], plates: tuple[Plate, ...]
) -> Node:
    cells, depth = window.cells.array, sum(plate.cells for plate in plates)
    shown = listed(cells) if window.count is None and not depth else f"cells_{index(len(plates))}"
    if not isinstance(outer, Cells):
        seen = np.arange(math.prod(shape)) if outer is None else outer.entries(shape)
        outer = Cells(Indices.of(seen), "")
    inner = outer.pick(cells, shown)
    if window.count is None:
        return _node(window.factor, inner, names, shape, plates)
    plate = Plate((f"{SETS} {depth + 1}" if depth else SETS, *window.running), window.count)
    part = (_node(window.factor, inner, names, shape, (*plates, plate)),)
    return Product(part, (1.0,) * window.count, plate=plate)


def _inside(outer: Region | Cells | None, window: Window) -> Region | Cells:
    """The region of a window that itself sits in a region: offsets and blocks compose."""
    extent = tuple(e * b for e, b in zip(window.factor.event_shape, window.block, strict=True))
    if outer is None:
        return Region(window.offset, extent, window.block)
    if isinstance(outer, Cells):
        return outer.pick(Region(window.offset, extent, window.block).entries(window.event_shape), outer.shown)
    lead = len(outer.offset) - len(extent)  # axes of plates, in front of the event's
    offset = outer.offset[:lead] + tuple(
        o + w * b for o, w, b in zip(outer.offset[lead:], window.offset, outer.block[lead:], strict=True)
    )
    scaled = tuple(e * b for e, b in zip(extent, outer.block[lead:], strict=True))
    block = tuple(w * b for w, b in zip(window.block, outer.block[lead:], strict=True))
    return Region(offset, outer.extent[:lead] + scaled, outer.block[:lead] + block)


def _name(factor: LeafFactor, names: Names, plates: tuple[Plate, ...]) -> str:
    """The author's variable name (of the factor before `given`, which makes a new one), else the factor's label."""
    base = next((name for known, name in names if same_network(known, factor)), factor.label)
    conditions = {name: short(value) for name, value in factor.fixed.items() if name in factor.condition_names}
    running = {name: f"{name}_{index(depth)}" for depth, plate in enumerate(plates) for name in plate.names}
    given = ", ".join(f"{name}={running.get(name, value)}" for name, value in conditions.items())
    return f"{base}(x | {given})" if given else f"{base}(x)"
