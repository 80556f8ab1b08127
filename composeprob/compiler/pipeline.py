"""`compile`: run the passes in order, verifying the IR after each; `prior`: the same
program without its observations."""

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
from composeprob.compiler.check import (
    capabilities,
    check,
    node_capabilities,
    site_parts,
)
from composeprob.compiler.experts import experts
from composeprob.compiler.grow import grow, grows, tracks
from composeprob.compiler.lower import Evaluator, lower
from composeprob.compiler.normalise import normalise
from composeprob.compiler.proper import check_growth
from composeprob.compiler.share import share
from composeprob.compiler.tokens import has_tokens, lower_tokens, without_tokens_given
from composeprob.compiler.top import Top, site_top
from composeprob.compiler.trace import changed_since
from composeprob.density.annealed import AnnealedDensity, NoisePower, SiteInfo, TopLaw
from composeprob.density.categorical import TokenDensity
from composeprob.density.described import Described
from composeprob.errors import (
    CapabilityError,
    ComposeProbError,
    ProgramError,
    WrongTypeError,
)
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

LABELLED = frozenset({"pandas", "polars", "xarray"})
"""Libraries whose columns and arrays are taken as data, without their labels."""

TABLES = frozenset({"DataFrame", "Dataset", "LazyFrame"})
"""Classes of these libraries that hold several columns by name."""


def compile(
    program: Program,
    *args: object,
    schedule: Schedule | None = None,
    precision: str | None = None,
    **kwargs: object,
) -> AnnealedDensity:
    """Lower a program to one time-annealed unnormalised density.

    Values that the program and its factors' functions read besides their arguments
    (globals, variables around them) count as they are at this call. After they have
    changed, compile again: this density keeps to the old values, or is refused.

    Args:
        program: a function decorated with `program`.
        args, kwargs: the program's arguments: factors, data, settings. Arrays are data,
            of pandas, polars and xarray too: they become leaves of the density, and the
            same program with others of the same shapes reuses compiled code. Where the
            program's Python asks an array for its numbers (by ``if``, ``float`` or
            NumPy), these are compiled in, and the printed density reports it, with the
            line. Python's numbers, floats too, strings and booleans are settings: they
            may decide what the program does, and another value compiles anew.
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
            if str(error).startswith("Reverse-mode differentiation does not work"):
                raise _without_gradient(program) from error
            if isinstance(error, ComposeProbError) or not traced:
                raise
            # JAX's own error would name a tracer, where the user has written jit.
            raise WrongTypeError(
                "compile got arguments inside of jax.jit, jax.vmap or jax.grad, which "
                "have no values there.",
                fix="compile outside, for each data set: the code that XLA makes for "
                "one serves all of the same shapes.",
            ) from error


def _without_gradient(program: Program) -> ProgramError:
    """Return the error for a loop that has no gradient."""
    return ProgramError(
        f"Program '{program.name}', or a factor in it, loops as long as a condition "
        "holds (jax.lax.while_loop, or fori_loop with bounds that are computed). JAX "
        "has no gradient of such loops, and chains follow gradients.",
        where=program.where,
        fix="write jax.lax.scan, or fori_loop with numbers of Python as bounds; of "
        "solvers take those with gradients, such as diffrax.diffeqsolve.",
    )


def lowered(
    program: Program,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    schedule: Schedule | None = None,
    precision: str | None = None,
    networks: bool = True,
    growing: bool = True,
    tracking: bool = True,
) -> AnnealedDensity:
    """Compile as `compile` does, with switches for its other callers.

    Args:
        program, args, kwargs, schedule, precision: as for `compile`.
        networks: whether outputs of networks are examined, which those that are being
            trained are not ready for.
        growing: whether exponents may grow as noise falls; the normalisers of an
            expression need constant ones.
        tracking: whether they may grow where chains must carry the log-density of a
            factor.
    """
    if not isinstance(program, Program):
        raise WrongTypeError(
            f"compile takes a program; got {type(program).__name__}.",
            fix="decorate the function: @cp.program above def scene(…): "
            "cp.sample('x', factor).",
        )
    args, kwargs = jax.tree.map(_as_argument, (args, kwargs))
    program.check_arguments(args, kwargs)
    check_precision(precision)
    graph, traced = build(program, args, kwargs)
    # Each pass hands on a graph that satisfies the invariants of its stage.
    graph = verify(_rounded(graph, precision), "build")
    if has_tokens(graph):
        if precision is not None:
            raise CapabilityError(
                f"precision={precision!r} rounds the products of networks of real "
                "numbers, and this program has tokens.",
                where=graph.where,
                fix="leave precision= out; a network of tokens may round within "
                "itself.",
            )
        return lower_tokens(graph, traced, schedule, networks)
    graph = verify(normalise(graph), "normalise")
    graph = verify(align(graph, schedule), "align")
    graph = verify(share(graph), "share")
    if growing:
        graph = grow(graph, tracking)
    graph = verify(graph, "grow")
    graph = verify(check(graph, networks), "check")
    graph, likelihood = anneal(graph, traced)
    verify(graph, "anneal")
    evaluator = lower(graph, likelihood, precision)

    described = _described(graph)
    normalised = all("normalised" in offered for *_, offered in described.offers)
    density = AnnealedDensity(
        graph.levels,
        evaluator,
        _top_law(graph, normalised),
        _site_infos(graph),
        capabilities(graph),
        described,
        tracks=tracks(graph),
    )

    # NumPy arrays that the passes left would be constants of compiled code.
    def on_device(leaf: object) -> object:
        return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    density = jax.tree.map(on_device, density)

    def anew(other: Schedule, tracking: bool = tracking) -> AnnealedDensity:
        # The program runs again, and must read the values that it read here.
        options = (precision, networks, growing, tracking)
        again = lowered(program, args, kwargs, other, *options)
        if _values_read(again) != _values_read(density):
            raise changed_since(program)
        return again

    if networks:
        check_growth(density, graph)
    # Not a field: a copy with other arrays is not the program's density any more, and
    # must not have it.
    object.__setattr__(density, "_anew", anew)
    object.__setattr__(density, "_in_double", jax.config.jax_enable_x64)
    return density


def _site_infos(graph: Graph) -> dict[str, SiteInfo]:
    """The kind and shape of every latent site."""
    infos = {}
    for site in graph.sites:
        infos[site.name] = SiteInfo("noised", site.shape, site.plates)
    for static in graph.statics:
        if static.summed:
            continue
        kind = "static"
        if static.name in graph.given:
            kind = "given"
        elif static.name in graph.held:
            kind = "held"
        elif static.num_values:
            kind = "discrete"
        infos[static.name] = SiteInfo(
            kind, static.coordinate, num_values=static.num_values
        )
    return infos


def _as_argument(value: object) -> object:
    """Return labelled data as a NumPy array, and other values as they are; refuse
    tables, and values that are neither data nor settings."""
    kind = type(value).__name__
    library = type(value).__module__.partition(".")[0]
    if library in LABELLED and kind in TABLES:
        raise WrongTypeError(
            f"A program takes arrays; got a {kind} of {library}.",
            fix="pass the columns, each as an argument or in a dict: "
            "{name: table[name].to_numpy()}.",
        )
    if library in LABELLED and hasattr(value, "__array__"):
        return np.asarray(value)
    if hasattr(value, "dtype"):
        return value
    try:
        hash(value)
    except TypeError:
        # Settings are told apart by their hash, and arrays in them would be none.
        fix = "pass its arrays as arguments, or as a dict."
        if dataclasses.is_dataclass(value):
            fix = (
                "pass its arrays as arguments, or make the class a pytree: "
                f"jax.tree_util.register_dataclass({kind})."
            )
        raise WrongTypeError(
            f"A program takes arrays, settings and pytrees of them; got an object of "
            f"{kind}, which is none of them.",
            fix=fix,
        ) from None
    return value


def _described(graph: Graph) -> Described:
    """The program's IR and its text, for messages and print-outs."""
    # Name, place and capabilities of each leaf: a sampler names the leaf that lacks
    # what it needs.
    offers = tuple(
        (leaf.name, site.where, node_capabilities(leaf))
        for site in graph.sites
        for leaf in leaves(site.root)
    )
    text = describe(graph, sorted(capabilities(graph)))
    expert_descriptions, _ = experts(graph)
    return Described(
        graph,
        text,
        graph.where,
        offers,
        _pictures(graph),
        expert_descriptions,
        graph.rewards,
    )


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
        >>> for d in (density, cp.prior(density)):
        ...     print(round(float(d.score({"x": 1.0}, 0)["x"]), 1))
        7.0
        -1.0
    """
    if not isinstance(density, AnnealedDensity):
        raise WrongTypeError(
            f"prior takes a compiled density; got {type(density).__name__}.",
            fix="compile the program first: cp.prior(cp.compile(program, …)).",
        )
    graph = density.graph
    evaluator = density.evaluator
    assert isinstance(graph, Graph)
    if isinstance(density, TokenDensity):
        return without_tokens_given(density)
    assert isinstance(evaluator, Evaluator)
    if not graph.observations and not graph.rewards:
        return density
    # The notes of `anneal` are about observations alone.
    notes = tuple(note for note in graph.notes if note[0] != "anneal")
    graph = dataclasses.replace(graph, observations=(), rewards=(), notes=notes)
    graph = graph.noted("prior", "without observations")
    # The program is still run for its static sites, under no policy.
    likelihood = Likelihood(evaluator.likelihood.traced)
    offered = capabilities(graph)
    text = describe(graph, sorted(offered))
    described = density.described
    without = dataclasses.replace(
        density,
        evaluator=dataclasses.replace(evaluator, likelihood=likelihood),
        capabilities=offered,
        described=dataclasses.replace(described, graph=graph, text=text, rewards=()),
    )
    recompile = getattr(density, "_anew", None)
    if recompile is not None:

        def anew(*options: object) -> AnnealedDensity:
            return prior(recompile(*options))

        object.__setattr__(without, "_anew", anew)
    return without


def _values_read(density: AnnealedDensity) -> set[str]:
    """Digests of the values that the program and its functions read besides their
    arguments."""
    evaluator = density.evaluator
    assert isinstance(evaluator, Evaluator)
    digests = {
        fingerprint(function.code.jaxpr, function.constants, objects=False)
        for function in closures(evaluator)
    }
    traced = evaluator.likelihood.traced
    if traced is not None:
        digests.add(traced.code.fingerprint(objects=False))
    return digests


def _rounded(graph: Graph, precision: str | None) -> Graph:
    """The graph, with networks that multiply in ``precision`` if one is given.

    This precedes the other passes, so that they share the rounded networks.
    """
    if precision is None:
        return graph
    graph = graph.map_roots(lambda root, site: in_precision(root, precision))
    return graph.noted("precision", f"networks multiply in {precision}")


def _pictures(graph: Graph) -> dict[str, Callable[[object], np.ndarray]]:
    """The function that makes images of each site, if those of its factors that have
    one agree."""
    pictures = {}
    for site in graph.sites:
        functions = {leaf.factor.traits.pictures for leaf in leaves(site.root)}
        functions.discard(None)
        if len(functions) == 1:
            (function,) = functions
            assert function is not None
            pictures[site.name] = function
    return pictures


def _top_law(graph: Graph, normalised: bool) -> TopLaw:
    """The distribution of the levels that are noise alone; of every level if exponents
    grow from level to level."""
    sigma = np.asarray(graph.levels.sigma, np.float64)
    alpha = np.asarray(graph.levels.alpha, np.float64)
    variances = (sigma / alpha) ** 2
    if not any(grows(site.root) for site in graph.sites):
        return _law_at(graph, variances[-1], normalised)
    laws = [_law_at(graph, variance, normalised) for variance in variances]
    # The parts of a mixture may have equal powers at level 0 alone.
    exact = all(law.exact for law in laws)
    laws = [dataclasses.replace(law, exact=exact) for law in laws]
    stacked: TopLaw = jax.tree.map(lambda *levels: np.stack(levels), *laws)
    return dataclasses.replace(stacked, stacked=True)


def _law_at(graph: Graph, variance: float, normalised: bool) -> TopLaw:
    """The distribution of F and G at a level of noise alone, with the exponents at this
    σ²/α²."""
    tops = {}
    tops_of_potential = {}
    for site in graph.sites:
        root = at_noise(site.root, variance)
        tops[site.name] = site_top(root, site.shape)
        _, of_values = site_parts(root)
        if of_values is not None:
            tops_of_potential[site.name] = site_top(of_values, site.shape)

    potential = None
    if any(np.any(top.power) for top in tops_of_potential.values()):
        potential = _noise_power(tops_of_potential)
    whole = _noise_power(tops)
    return TopLaw(
        whole.power,
        whole.degree,
        whole.constant,
        _number(sum(top.entries for top in tops.values())),
        exact=all(top.exact for top in tops.values()),
        normalised=normalised,
        potential=potential,
    )


def _noise_power(tops: dict[str, Top]) -> NoisePower:
    """The product of the forms of all sites, which are independent there."""
    return NoisePower(
        {name: _number(top.power) for name, top in tops.items()},
        _number(sum(top.degree for top in tops.values())),
        _number(sum(top.constant for top in tops.values())),
    )


def _number(value: float | np.ndarray) -> Any:
    """The value in the precision of runs, on the host."""
    return np.asarray(value, np.dtype(jnp.result_type(float)))
