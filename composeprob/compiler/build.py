"""Trace a program into the IR: run it, see which sites it has, and what depends on what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution

from composeprob.compiler.coordinates import located
from composeprob.compiler.latents import ancestors, held_for
from composeprob.errors import ProgramError
from composeprob.factors import algebra
from composeprob.factors.base import Factor, LeafFactor
from composeprob.factors.calibrated import CalibratedExpression
from composeprob.factors.concrete import NOT_CONCRETE, asked
from composeprob.factors.show import short
from composeprob.factors.window import Window
from composeprob.ir.nodes import (
    Graph,
    Leaf,
    Mixture,
    Node,
    Observation,
    Product,
    Region,
    Site,
    Static,
    rewrite_leaves,
    same_network,
)
from composeprob.ir.normaliser import Normaliser
from composeprob.language.checks import check_draw
from composeprob.language.interpret import Statement, run, unwrap
from composeprob.language.program import Program

Names = list[tuple[LeafFactor, str]]


def build(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """The program as written, not yet simplified.

    Raises:
        ProgramError: the program has no latent site, or asks for the number of one (by ``if``, ``float`` or NumPy).
        DoublyIntractableError: a factor that may not be normalised depends on a latent, and ancestral order is not
            the program's law.
    """
    statements = run(program.function, args, kwargs, draw(jax.random.key(0)))
    latents = {s.name: s for s in statements.values() if s.kind in ("noised", "static")}
    if not latents:
        raise ProgramError(
            f"Program '{program.name}' has no site to sample.",
            where=program.where,
            fix="give it at least one cp.sample(name, factor_or_distribution).",
        )
    dependencies = _dependencies(program, args, kwargs, latents)
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
            statics.append(Static(s.name, jnp.shape(s.value), describe(s.distribution), s.where, standardised))
        elif s.kind == "observed":
            following = {static.name for static in statics if static.standardised}
            passed = {n: own if n in following else frozenset() for n, own in dependencies.items()}
            seen = frozenset(ancestors(s.name, {**passed, s.name: dependencies[s.name]}))
            looks_at = frozenset(n for n in seen if latents[n].kind == "noised")
            policy, kind = s.anneal if looks_at else "static", describe(s.distribution)
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
    if not held:
        return graph
    given = ", ".join(site.name for site in sites if site.ancestral)
    return graph.noted("build", f"ancestral order: {', '.join(sorted(held))} by the prior, then {given} given that")


def draw(key: Array) -> Any:
    """A `Provide`: noised sites get standard normals, static ones a draw of their prior."""
    count = 0

    def provide(kind: str, name: str, distribution: Distribution) -> Array:
        nonlocal count
        count += 1
        own = jax.random.fold_in(key, count)
        if kind == "noised":
            return jax.random.normal(own, distribution.shape())
        value = distribution.sample(own)
        check_draw(name, value)
        return value

    return provide


def describe(distribution: Any) -> str:
    """The name of a distribution, without plates and masks."""
    return type(unwrap(distribution)).__name__


def _dependencies(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], latents: dict[str, Statement]
) -> dict[str, frozenset[str]]:
    """For each statement, the latents that its distribution depends on.

    One latent at a time becomes a batch of two under `jax.vmap`: what then holds a tracer depends on it, and
    everything else stays concrete.
    """
    found: dict[str, set[str]] = {}
    for name in latents:

        def probe(value: Array, name: str = name) -> Array:
            def provide(kind: str, site: str, distribution: Distribution) -> Any:
                return value if site == name else latents[site].value

            for s in run(program.function, args, kwargs, provide).values():
                found.setdefault(s.name, set())
                parts = jax.tree.leaves((s.distribution, s.value if s.kind == "observed" else None))
                if s.name != name and any(isinstance(part, jax.core.Tracer) for part in parts):
                    found[s.name].add(name)
            return value

        value = jnp.asarray(latents[name].value)
        try:
            jax.vmap(probe)(jnp.stack([value, value]))
        except NOT_CONCRETE as error:
            does, fix, where = asked(error)
            raise ProgramError(
                f"Program '{program.name}' {does} a value that depends on the site {name!r}, which has many values at "
                "once.",
                where=where,
                fix=fix,
            ) from error
    return {name: frozenset(others) for name, others in found.items()}


def _site_root(statement: Statement, names: Names) -> Node:
    """The site's expression; inside plates, one independent copy of the factor for each index."""
    factor = statement.factor
    batch = statement.distribution.batch_shape
    if not batch:
        return _node(factor, None, names)
    ones = (1,) * len(batch)
    copies = []
    for index in np.ndindex(*batch):
        offset = index + (0,) * len(factor.event_shape)
        region = Region(offset, ones + factor.event_shape, ones + (1,) * len(factor.event_shape))
        copies.append(_node(factor, region, names))
    return Product(tuple(copies), (1.0,) * len(copies))


def _from_latents(root: Node, statement: Statement, parents: frozenset[str]) -> Node:
    """The same expression, its leaves numbered as in the statement's factor (anew for each copy in a plate)."""
    count, given = itertools.count(), ", ".join(sorted(parents))
    size = len(algebra.leaves(statement.factor))

    def number(leaf: Leaf) -> Leaf:
        name = f"{leaf.name.rpartition('(x')[0]}(x | {given})"
        return replace(leaf, name=name, latent=(statement.name, next(count) % size))

    return rewrite_leaves(root, number)


def _node(factor: Factor, region: Region | None, names: Names) -> Node:
    if isinstance(factor, LeafFactor):
        return Leaf(factor, region, _name(factor, names))
    if isinstance(factor, algebra.Product):
        return Product(tuple(_node(f, region, names) for f in factor.factors), factor.powers)
    if isinstance(factor, CalibratedExpression):
        constant = Normaliser(factor)
        parts = (_node(factor.factor, region, names), Leaf(constant, region, f"{constant.label}(x)"))
        return Product(parts, (1.0, 1.0), normalised=True)
    if isinstance(factor, algebra.Mixture):
        return Mixture(tuple(_node(f, region, names) for f in factor.factors), factor.log_weights)
    assert isinstance(factor, Window)
    if factor.event_shape == factor.factor.event_shape:  # a window over the whole canvas changes nothing
        return _node(factor.factor, region, names)
    return _node(factor.factor, _inside(region, factor), names)


def _inside(outer: Region | None, window: Window) -> Region:
    """The region of a window that itself sits in a region: offsets and blocks compose."""
    extent = tuple(e * b for e, b in zip(window.factor.event_shape, window.block, strict=True))
    if outer is None:
        return Region(window.offset, extent, window.block)
    lead = len(outer.offset) - len(extent)  # axes of plates, in front of the event's
    offset = outer.offset[:lead] + tuple(
        o + w * b for o, w, b in zip(outer.offset[lead:], window.offset, outer.block[lead:], strict=True)
    )
    scaled = tuple(e * b for e, b in zip(extent, outer.block[lead:], strict=True))
    block = tuple(w * b for w, b in zip(window.block, outer.block[lead:], strict=True))
    return Region(offset, outer.extent[:lead] + scaled, outer.block[:lead] + block)


def _name(factor: LeafFactor, names: Names) -> str:
    """The author's variable name (of the factor before `given`, which makes a new one), else the factor's label."""
    base = next((name for known, name in names if same_network(known, factor)), factor.label)
    conditions = {name: value for name, value in factor.fixed.items() if name in factor.condition_names}
    given = ", ".join(f"{name}={short(value)}" for name, value in conditions.items())
    return f"{base}(x | {given})" if given else f"{base}(x)"
