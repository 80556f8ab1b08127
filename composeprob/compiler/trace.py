"""A program as one traced computation: the values of its statements under any data and any values of its latents.

The compiler asks many questions of a program. It runs the program once with numbers and once with tracers, and answers
them from that trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.extend.core import ClosedJaxpr, Var
from jax.scipy.linalg import block_diag
from numpyro.distributions import Distribution

from composeprob.compiler.arguments import Arguments, Concrete, is_data, join, name_of
from composeprob.compiler.close import closed_leaves
from composeprob.compiler.evidence import of_one_member
from composeprob.compiler.linearity import Kind, Linearity, Value, entries
from composeprob.compiler.reads import Reads
from composeprob.errors import ComposeProbError, ProgramError
from composeprob.factors.base import is_factor
from composeprob.factors.concrete import NOT_CONCRETE, number_request, requested_by_library
from composeprob.factors.equations import Evaluation, Fact, Influence, Walk, aval
from composeprob.factors.fingerprint import fingerprint
from composeprob.factors.functions import closures
from composeprob.language.interpret import Provide, Redraw, Statement, masked, run, unwrap
from composeprob.language.program import Program

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Sites with their shapes, in order."""


class Source(eqx.Module):
    """A program with its arguments, to be run again.

    Attributes:
        function: the program's function.
        arguments: ``(args, kwargs)``; arrays are leaves but for those wrapped in `Concrete`.
        eager: whether what depends on no data and no latent is computed at once, as the program asks for its value.
        reads: what it reads beside its arguments; None while that is being found out.
        noised: the sites of NumPyro priors that evidence looks at.
    """

    function: Callable[..., object] = eqx.field(static=True)
    arguments: Arguments
    eager: bool = eqx.field(static=True)
    reads: Reads | None = eqx.field(static=True, default=None)
    noised: frozenset[str] = eqx.field(static=True, default=frozenset())

    def run(self, provide: Provide, level: Array | int = 0, redraw: Redraw | None = None) -> dict[str, Statement]:
        """Its statements; see `interpret.run`.

        Raises:
            ProgramError: it reads something else than when it was compiled.
        """
        if self.reads is not None:
            self.reads.check()
        args, kwargs = join(self.arguments)
        with jax.ensure_compile_time_eval() if self.eager else nullcontext():
            return run(self.function, args, kwargs, provide, level, redraw, self.noised)


class _Code:
    """A trace, and what of it are not arrays. All are equal: a `Traced` has beside it what the trace was made of."""

    def __init__(
        self,
        jaxpr: ClosedJaxpr,
        shapes: TracedStatements,
        latents: list[str],
        reasons: dict[str, str | None],
        fixed: list[object],
    ):
        self.jaxpr, self.shapes, self.latents, self.reasons, self.fixed = jaxpr, shapes, latents, reasons, fixed

    @property
    def places(self) -> dict[str, Var]:
        """The latents' variables among the trace's inputs, of which the last is a key."""
        inputs = self.jaxpr.jaxpr.invars
        return dict(zip(self.latents, inputs[-1 - len(self.latents) : -1], strict=True))

    def fingerprint(self, objects: bool = True) -> str:
        """A digest of it and of all that was read in it."""
        return fingerprint(self.jaxpr, self.fixed, objects=objects)

    def outputs(self, flat: Sequence[object]) -> Any:
        """What the trace's outputs are, in the form of `TracedStatements`."""
        return jax.tree.unflatten(jax.tree.structure(self.shapes), flat)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Code)

    def __hash__(self) -> int:
        return hash(_Code)


class TracedStatements(eqx.Module):
    """Values of a program's statements at given latents.

    Attributes:
        draws: of each static site a draw of its prior.
        log_likelihoods: log p of each observation.
        moments: (residual, covariance) of each observation whose noise is Gaussian.
        parts: the arrays in each statement's distribution, and in an observation's value.
        factors: those in each leaf of a noised site's factor.
    """

    draws: dict[str, Array]
    log_likelihoods: dict[str, Array]
    moments: dict[str, tuple[Array, Array]]
    parts: dict[str, list[Array]]
    factors: dict[str, list[list[Array]]]


class Traced(eqx.Module):
    """The trace of a program.

    Attributes:
        source: the program.
        code: its trace, a function of the source's arrays, the latents and a key; and why each observation's noise is
            not Gaussian, as far as its distribution shows, None where it is.
        standardised: the static sites whose coordinate is relative to their prior's location and scale.
    """

    source: Source
    code: _Code = eqx.field(static=True)
    standardised: frozenset[str] = eqx.field(static=True, default=frozenset())

    def statements_at(self, latents: dict[str, Array], key: Array | None = None) -> TracedStatements:
        """Values of the statements at these latents: noised sites in the data's units, static ones constrained. Static
        ones that are left out are draws, as of `draw` with this key."""
        return self._evaluate(dict(latents), jax.random.key(0) if key is None else key)

    def draw(self, key: Array, xs: dict[str, Array]) -> dict[str, Array]:
        """All latents but those whose coordinate is `standardised`: the noised ones as given, static ones drawn from
        their priors one after the other.

        With the same key `statements_at` draws those left out at the same coordinate, whatever the other latents are,
        as z = μ + s·u with u from the key alone.
        """
        latents = dict(xs)
        self._evaluate(latents, key)
        return {name: value for name, value in latents.items() if name not in self.standardised}

    def dependencies(self) -> dict[str, frozenset[str]]:
        """For each statement, the latents that its distribution depends on."""
        return {name: frozenset().union(*parts) for name, parts in self._influences.parts.items()}

    def factor_dependencies(self) -> dict[str, list[frozenset[str]]]:
        """For each noised site, the latents that each leaf of its factor depends on."""
        found = self._influences.factors
        return {name: [frozenset().union(*parts) for parts in leaves] for name, leaves in found.items()}

    @property
    def _influences(self) -> TracedStatements:
        """By the names of latents, what influences each output of the trace."""
        none = frozenset[str]()
        own = {name: frozenset({name}) for name in self.code.latents}
        return self._walk(Influence(), [none] * len(_arrays(self.source.arguments)), own, none)

    def linearity(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[Value, Value]]:
        """For each observation whose noise is Gaussian, what its residual and covariance are of the entries of these
        sites. Static sites whose coordinate is `standardised` keep a fixed coordinate, as in `statements_at`."""
        avals = {name: aval(variable) for name, variable in self.code.places.items()}
        size, coordinates = entries(shapes, avals)
        walk = Linearity(size, np.random.default_rng(0))
        given = [name for name in avals if name not in self.standardised]
        latents = {name: coordinates.get(name) or walk.any_latent(avals[name]) for name in given}
        data = [Value(Kind.KNOWN, array) for array in _arrays(self.source.arguments)]
        return self._walk(walk, data, latents, Value(Kind.LATENT)).moments

    def _evaluate(self, latents: dict[str, Array], key: Array) -> TracedStatements:
        """The statements' values. A latent that is not given becomes its draw as soon as that is known."""
        return self._walk(Evaluation(), _arrays(self.source.arguments), latents, key)

    def _walk(self, walk: Walk[Fact], data: Sequence[Fact], latents: dict[str, Fact], key: Fact) -> Any:
        """What an analysis knows of the trace's outputs, in the form of `TracedStatements`.

        Args:
            walk: the analysis.
            data, latents, key: what it knows of the inputs. A latent that is left out is what its draw is, and is put
                into ``latents``.
        """
        code, places = self.code, self.code.places
        outputs = code.outputs(code.jaxpr.jaxpr.outvars)
        drawn = {name: variable for name, variable in outputs.draws.items() if name not in latents}
        copies = {variable: places[name] for name, variable in drawn.items()}
        inputs = [*data, *map(latents.get, places), key]
        known = walk.evaluate(code.jaxpr.jaxpr, code.jaxpr.consts, inputs, copies)
        latents.update({name: known[places[name]] for name in drawn})
        return jax.tree.map(lambda variable: walk.value_of(known, variable), outputs)


def trace(
    program: Program,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    latents: dict[str, Array],
    noised: frozenset[str] = frozenset(),
) -> tuple[Traced, list[str]]:
    """The trace of a program, and what its Python has asked of its data, as sentences.

    Every array among the arguments is traced; those whose number the program asks for are not when it is run once more.

    Raises:
        ProgramError: the program asks for the number of a latent.
    """
    function = program.function
    paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    arrays = [i for i, (_, leaf) in enumerate(paths) if is_data(leaf)]
    factors = [f for f in jax.tree.leaves((args, kwargs), is_leaf=is_factor) if is_factor(f)]
    inside = {id(array) for array in jax.tree.leaves(factors)}
    outside = {i for i in arrays if id(paths[i][1]) not in inside}
    concrete, eager, asks = set[int](), False, list[str]()
    while True:
        wrapped = [Concrete(leaf) if i in concrete else leaf for i, (_, leaf) in enumerate(paths)]
        source = Source(function, jax.tree.unflatten(treedef, wrapped), eager, noised=noised)
        try:
            code = _code(source, latents, latents)
            return Traced(replace(source, reads=_reads(program, source, latents, code)), code), asks
        except Exception as error:  # the program has run with numbers: what fails now fails because of a tracer
            abstract = [i for i in arrays if i not in concrete]
            named = {abstract[i] for i in _named(error)}
            by_mask = any(isinstance(e, jax.errors.NonConcreteBooleanIndexError) for e in _chain(error))
            if not named and (eager or by_mask):  # JAX does not report which
                named = outside - concrete or set(abstract)
            if not named and eager:
                better = _latent_error(error, program, source, latents)
                raise better from (error if better is not error else error.__cause__)
            concrete, eager = concrete | named, True
            asks += _asks(error, sorted({name_of(function, paths[i][0]) for i in named}))


def _reads(program: Program, source: Source, latents: dict[str, Array], code: _Code) -> Reads:
    """What a program reads beside its arguments, found in its trace."""

    def shape(leaf: object) -> object:
        return jax.typeof(leaf) if is_data(leaf) else leaf

    bare, values = jax.tree.map(shape, (source, latents))
    return Reads(code, lambda: _code(bare, values, values), program.name, program.where)


def _code(source: Source, latents: dict[str, Array], traced: Iterable[str]) -> _Code:
    """The trace with the latents ``traced`` as inputs."""
    reasons: dict[str, str | None] = {}
    names = sorted(traced)
    fixed: list[object] = []

    def call(arrays: list[Array], values: list[Array], key: Array) -> TracedStatements:
        given = {**latents, **dict(zip(names, values, strict=True))}
        draws: dict[str, Array] = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "static":
                drawn = distribution.sample(jax.random.fold_in(key, len(draws)))
                draws[name] = jax.lax.optimization_barrier(drawn)  # a value of its own, also where that is a constant
            return given[name]

        statements = replace(source, arguments=_with_arrays(source.arguments, arrays)).run(provide)
        observed = {s.name: s for s in statements.values() if s.kind == "observed"}
        reasons.update({name: not_gaussian(s) for name, s in observed.items()})
        parts = {s.name: _parts(s, statements) for s in statements.values()}
        fixed.extend(_fixed(s, parts[s.name]) for s in statements.values())
        return TracedStatements(
            draws,
            {name: s.log_prob() for name, s in observed.items()},
            {name: moments(s) for name, s in observed.items() if reasons[name] is None},
            {name: list(filter(_is_traced, leaves)) for name, leaves in parts.items()},
            {s.name: _by_leaf(s) for s in statements.values() if s.kind == "noised"},
        )

    # The key's type alone: a key would be made in whatever code is traced while the program is checked.
    key = jax.eval_shape(jax.random.key, 0)
    inputs = _arrays(source.arguments), [latents[name] for name in names], key
    jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(*inputs)
    return _Code(jaxpr, shapes, names, reasons, fixed)


def _parts(statement: Statement, statements: dict[str, Statement]) -> list[object]:
    """The leaves of its distribution, of an observation's value, and of a factor's leaves with functions closed."""
    if statement.kind == "observed":
        return jax.tree.leaves((statement.distribution, statement.value))
    if statement.kind not in ("noised", "evidence"):
        return jax.tree.leaves(statement.distribution)
    try:
        looked_at = statements.get(statement.site)
        leaves = closed_leaves(statement.factor if looked_at is None else of_one_member(statement, looked_at))
    except ComposeProbError as error:
        raise type(error)(error.found, where=error.where or statement.where, fix=error.fix) from error
    codes = [function.code.jaxpr for function in closures(leaves)]
    return [*jax.tree.leaves((statement.distribution, leaves)), *codes]


def _by_leaf(statement: Statement) -> list[list[Array]]:
    """The traced arrays in each leaf of a noised site's factor."""
    leaves = closed_leaves(statement.factor)
    return [list(filter(_is_traced, jax.tree.leaves(leaf))) for leaf in leaves]


def _fixed(statement: Statement, parts: list[object]) -> list[object]:
    """What of a statement shows in no equation of the trace, and yet when the program is run again."""
    if statement.kind in ("noised", "evidence") and not any(map(_is_traced, parts)):
        return []  # a factor of no latent is not asked of the program again
    if statement.kind == "static":
        statement.log_prob()  # now its equations are in the trace
    return [str(jax.typeof(p)) if _is_traced(p) else p for p in [*parts, statement.value]]


def _is_traced(leaf: object) -> TypeGuard[Array]:
    return isinstance(leaf, jax.core.Tracer)


def not_gaussian(statement: Statement) -> str | None:
    """Why an observation's noise is not Gaussian, as far as its distribution shows."""
    if masked(statement.distribution) or statement.scale is not None:
        return "a handler masks or scales it"
    inner = unwrap(statement.distribution)
    if type(inner) not in (dist.Normal, dist.MultivariateNormal):
        if isinstance(inner, dist.Unit):
            return "it is soft evidence, not a Gaussian measurement"
        return f"its distribution is {type(inner).__name__}, not Normal or MultivariateNormal"
    return None


def not_linear(primitive: str = "") -> str:
    """Why an observation's mean is no linear measurement, and the primitive of JAX's that is not linear."""
    return "its mean is not a linear function of what it measures" + (f" (JAX's `{primitive}`)" if primitive else "")


def moments(statement: Statement) -> tuple[Array, Array]:
    """value − mean, (m,), and covariance, (m, m), of a Gaussian observation."""
    distribution, inner = statement.distribution, unwrap(statement.distribution)
    residual = jnp.asarray(statement.value, jnp.result_type(float)) - distribution.mean
    if type(inner) is dist.Normal:
        return residual.ravel(), jnp.diag(jnp.broadcast_to(distribution.variance, residual.shape).ravel())
    n = residual.shape[-1]
    covariance = jnp.broadcast_to(inner.covariance_matrix, (*residual.shape, n)).reshape(-1, n, n)
    return residual.ravel(), block_diag(*covariance)


def _arrays(arguments: Arguments) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(arguments) if _is_input(leaf)]


def _is_input(leaf: object) -> bool:
    """Whether a leaf of the arguments is traced: an array, or the shape of one."""
    return is_data(leaf) or isinstance(leaf, jax.core.ShapedArray)


def _with_arrays(arguments: Arguments, arrays: list[Array]) -> Arguments:
    """The arguments with others in the places of their arrays."""
    others = iter(arrays)
    return jax.tree.map(lambda leaf: next(others) if _is_input(leaf) else leaf, arguments)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _named(error: Exception) -> set[int]:
    """Which of the traced arrays' numbers were asked for: JAX names the inputs that a value depends on."""
    found = [e for e in _chain(error) if isinstance(e, NOT_CONCRETE)]
    return {int(n) for e in found for n in re.findall(r"\barrays\[(\d+)\]", str(e))}


def _asks(error: Exception, names: list[str]) -> list[str]:
    """The note about a program that asks for numbers of these arguments; nothing where the library asks, as for powers,
    which are numbers by their nature."""
    found = next((e for e in _chain(error) if isinstance(e, NOT_CONCRETE)), None)
    if not names or not isinstance(found, Exception) or requested_by_library(found):
        return []
    does, _, where = number_request(found)
    return [f"{where} {does} {' and '.join(names)}: what it holds is compiled in as a constant"]


def _latent_error(error: Exception, program: Program, source: Source, latents: dict[str, Array]) -> Exception:
    """The error for a program that asks for the number of a latent, or the error itself where it is another."""
    for name in latents:
        try:
            _code(source, latents, [name])
        except NOT_CONCRETE as own:
            does, fix, where = number_request(own)
            return ProgramError(
                f"Program '{program.name}' {does} a value that depends on the site {name!r}, which has many values at "
                "once.",
                where=where,
                fix=fix,
            )
        except Exception as own:
            return own
    return error
