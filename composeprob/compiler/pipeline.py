"""`compile`: run the passes in order, verifying the IR after each; `prior`: what is
left without observations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.compiler.align import align
from composeprob.compiler.anneal import Likelihood, anneal
from composeprob.compiler.build import build
from composeprob.compiler.check import capabilities, check, node_capabilities
from composeprob.compiler.experts import experts
from composeprob.compiler.grow import grow, grows
from composeprob.compiler.lower import Evaluator, lower
from composeprob.compiler.normalise import normalise
from composeprob.compiler.proper import check_growth
from composeprob.compiler.share import share
from composeprob.compiler.top import site_top
from composeprob.compiler.trace import changed_since
from composeprob.density.annealed import AnnealedDensity, SiteInfo, TopLaw
from composeprob.density.described import Described
from composeprob.errors import ComposeProbError, WrongTypeError
from composeprob.factors.equations import fingerprint
from composeprob.factors.networks import closures
from composeprob.factors.nodes import at_noise
from composeprob.factors.precision import check_precision, in_precision
from composeprob.ir.leaves import Graph, leaves
from composeprob.ir.render import describe
from composeprob.ir.verify import verify
from composeprob.language.decorator import Program
from composeprob.schedule import Schedule
from composeprob.settings import usual


def compile(
    program: Program,
    *args: object,
    schedule: Schedule | None = None,
    precision: str | None = None,
    **kwargs: object,
) -> AnnealedDensity:
    """Lower a program to one time-annealed unnormalised density.

    What the program and its factors' functions read beside their arguments (globals,
    variables around them) counts as it is at this call. After it has changed, compile
    again: this density keeps to the old values, or is refused.

    Args:
        program: a function decorated with `program`.
        args, kwargs: the program's arguments: factors, data, settings. Arrays are data:
            they become leaves of the density, and the same program with others of the
            same shapes reuses compiled code. Where the program's Python asks an array
            for its numbers (by ``if``, ``float`` or NumPy), these are compiled in, and
            the printed density reports it, with the line. Python's numbers, floats too,
            strings and booleans are settings: they may decide what the program does,
            and another value compiles anew.
        schedule: the levels to use; left out, those of the program's factors. Factors
            trained on other levels are evaluated where the log-SNR is the same.
        precision: ``"bfloat16"``: matrix products and convolutions inside of networks
            round what they multiply to that, for the units that multiply it fastest.
            Weights, positions, log-densities and accept tests stay as they are, and so
            does the program's author's own arithmetic. Left out, networks are evaluated
            as they are.

    Returns:
        The density; printing it shows the program as mathematics and what each pass
            did.

    Raises:
        ComposeProbError: anything that cannot be sampled, with its place in the program
            and how to fix it.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> wide = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(30))
        >>> @cp.program
        ... def narrow(f):
        ...     return cp.sample("x", f ** 2)
        >>> density = cp.compile(narrow, wide)
        >>> round(float(density.score({"x": 1.0}, 0)["x"]), 3)
        -2.0
    """
    traced = any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))
    )
    with usual():
        try:
            return lowered(program, args, kwargs, schedule, precision)
        except (ValueError, jax.errors.JAXTypeError) as error:
            if isinstance(error, ComposeProbError) or not traced:
                raise
            raise WrongTypeError(
                "compile got arguments inside of jax.jit, jax.vmap or jax.grad, which have no values there.",
                fix="compile outside, for each data set: what XLA makes for one serves all of the same shapes.",
            ) from error


def lowered(
    program: Program,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    schedule: Schedule | None = None,
    precision: str | None = None,
    networks: bool = True,
    growing: bool = True,
) -> AnnealedDensity:
    """`compile`, with what networks return looked at or, as for those that are still
    being trained, not; and with exponents that grow as noise falls or, as for the
    normalisers of an expression, constant ones."""
    if not isinstance(program, Program):
        raise WrongTypeError(
            f"compile takes a program; got {type(program).__name__}.",
            fix="decorate the function: @cp.program above def scene(…): cp.sample('x', factor).",
        )
    program.check_arguments(args, kwargs)
    check_precision(precision)
    graph, traced = build(program, args, kwargs)
    graph = verify(_rounded(graph, precision), "build")
    graph = verify(normalise(graph), "normalise")
    graph = verify(align(graph, schedule), "align")
    graph = verify(share(graph), "share")
    graph = verify(grow(graph) if growing else graph, "grow")
    graph = verify(check(graph, networks), "check")
    graph, likelihood = anneal(graph, traced)
    verify(graph, "anneal")
    evaluator = lower(graph, likelihood, precision)
    sites = {
        site.name: SiteInfo("noised", site.shape, site.plates) for site in graph.sites
    }
    sites |= {
        s.name: SiteInfo("held" if s.name in graph.held else "static", s.coordinate)
        for s in graph.statics
    }
    offered = capabilities(graph)
    # For each leaf its name, its site's place and what it offers, so that a sampler can
    # name what it misses.
    offers = tuple(
        (leaf.name, s.where, node_capabilities(leaf))
        for s in graph.sites
        for leaf in leaves(s.root)
    )
    described = Described(
        graph,
        describe(graph, sorted(offered)),
        graph.where,
        offers,
        _pictures(graph),
        experts(graph)[0],
    )
    top = _top_law(
        graph, all("normalised" in capabilities for *_, capabilities in offers)
    )
    density = AnnealedDensity(graph.levels, evaluator, top, sites, offered, described)
    density = jax.tree.map(
        lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, density
    )

    def anew(other: Schedule) -> AnnealedDensity:
        again = lowered(program, args, kwargs, other, precision, networks, growing)
        if _read(again) != _read(density):
            raise changed_since(program)
        return again

    if networks:
        check_growth(density, graph)
    object.__setattr__(
        density, "_anew", anew
    )  # no field: a copy with other arrays must not have it
    return density


def prior(density: AnnealedDensity) -> AnnealedDensity:
    """The same program without its observations and soft evidence: p(z)·F_k(x; z).

    Sampled by `infer` it gives draws from the program's prior, and `Result.predictive`
    of these the prior predictive.

    Args:
        density: from `compile`.

    Returns:
        A density with the same sites. It keeps the observations' statements, so that it
            can predict data.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> @cp.program
        ... def weighing(f, y):
        ...     x = cp.sample("x", f)
        ...     cp.observe("y", dist.Normal(x, 0.5), y)
        >>> f = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(20))
        >>> density = cp.compile(weighing, f, 3.0)
        >>> [round(float(d.score({"x": 1.0}, 0)["x"]), 1) for d in (density, cp.prior(density))]
        [7.0, -1.0]
    """
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            f"prior takes a compiled density; got {type(density).__name__}.",
            fix="compile the program first: cp.prior(cp.compile(program, …)).",
        )
    graph, evaluator = density.graph, density.evaluator
    assert isinstance(graph, Graph)
    assert isinstance(evaluator, Evaluator)
    if not graph.observations:
        return density
    notes = tuple(
        note for note in graph.notes if note[0] != "anneal"
    )  # of observations alone
    without = dataclasses.replace(graph, observations=(), notes=notes).noted(
        "prior", "without observations"
    )
    silent = dataclasses.replace(
        evaluator, likelihood=Likelihood(evaluator.likelihood.traced, {})
    )
    offered = capabilities(without)
    described = dataclasses.replace(
        density.described, graph=without, text=describe(without, sorted(offered))
    )
    return dataclasses.replace(
        density, evaluator=silent, capabilities=offered, described=described
    )


def _read(density: AnnealedDensity) -> set[str]:
    """What the program and its functions read beside their arguments, as digests."""
    evaluator = density.evaluator
    assert isinstance(evaluator, Evaluator)
    found = {
        fingerprint(each.code.jaxpr, each.constants, objects=False)
        for each in closures(evaluator)
    }
    traced = evaluator.likelihood.traced
    return found if traced is None else found | {traced.code.fingerprint(objects=False)}


def _rounded(graph: Graph, precision: str | None) -> Graph:
    """Before the passes, where it is asked for: networks with rounded products take the
    place of the program's own."""
    if precision is None:
        return graph
    graph = graph.map_roots(lambda root, site: in_precision(root, precision))
    return graph.noted("precision", f"networks multiply in {precision}")


def _pictures(graph: Graph) -> dict[str, Callable[[object], np.ndarray]]:
    """What makes images of each site whose factors agree on it; a factor that knows of
    none is left out."""
    found = {
        s.name: {
            p
            for leaf in leaves(s.root)
            if (p := leaf.factor.traits.pictures) is not None
        }
        for s in graph.sites
    }
    return {name: next(iter(ways)) for name, ways in found.items() if len(ways) == 1}


def _top_law(graph: Graph, normalised: bool) -> TopLaw:
    """The distribution of the levels that are noise alone; of every level where
    exponents grow from one to the next."""
    float_ = np.dtype(jnp.result_type(float))
    noise = (
        np.asarray(graph.levels.sigma, np.float64)
        / np.asarray(graph.levels.alpha, np.float64)
    ) ** 2

    def law(variance: float) -> TopLaw:
        tops = {
            s.name: site_top(at_noise(s.root, variance), s.shape) for s in graph.sites
        }
        power: Any = {name: np.asarray(top.power, float_) for name, top in tops.items()}
        each = [(top.degree, top.constant, top.entries) for top in tops.values()]
        sums: Any = [
            np.asarray(sum(terms), float_)
            for terms in zip((0.0, 0.0, 0.0), *each, strict=True)
        ]
        degree, constant, entries = sums
        return TopLaw(
            power,
            degree,
            constant,
            entries,
            all(top.exact for top in tops.values()),
            normalised,
        )

    if not any(grows(site.root) for site in graph.sites):
        return law(noise[-1])
    laws = [law(variance) for variance in noise]
    exact = all(
        each.exact for each in laws
    )  # a mixture's parts may have equal powers at level 0 alone
    laws = [dataclasses.replace(each, exact=exact) for each in laws]
    stacked: TopLaw = jax.tree.map(lambda *levels: np.stack(levels), *laws)
    return dataclasses.replace(stacked, stacked=True)
