"""A program as one traced computation: the values of its statements under any data and
any values of its latents.

The compiler runs a program once with numbers and once with tracers, and answers its
questions from that trace. Array arguments are data: they are traced. One whose value
the program's Python asks for (a power, the condition of an ``if``) is a constant, and
another value compiles anew; Python's own numbers, floats too, are settings and never
traced.

The run evaluates a program by running its Python function again inside of compiled
code. What that reads beside its arguments (globals, variables around it) has no place
among the density's arrays: it is part of what is compiled, and must be what it was when
the program was compiled.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.extend.core import ClosedJaxpr, Var
from jax.scipy.linalg import block_diag
from numpy.typing import ArrayLike
from numpyro.distributions import Distribution

from composeprob.compiler.evidence import of_one_member
from composeprob.compiler.linearity import Kind, Linearity, Value, entries
from composeprob.errors import ComposeProbError, ProgramError
from composeprob.factors.concrete import (
    NOT_CONCRETE,
    number_request,
    requested_by_library,
)
from composeprob.factors.equations import (
    Evaluation,
    Fact,
    Influence,
    Walk,
    aval,
    fingerprint,
)
from composeprob.factors.factor import Factor, LeafFactor, is_factor
from composeprob.factors.networks import closed, closures, has_functions
from composeprob.factors.nodes import leaves as factor_leaves
from composeprob.factors.nodes import plate_of
from composeprob.factors.whitening import whitener
from composeprob.ir.leaves import first
from composeprob.language.decorator import Program
from composeprob.language.interpret import (
    Provide,
    Redraw,
    Statement,
    masked,
    run,
    unwrap,
)
from composeprob.settings import once_a_call, usual

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""``(args, kwargs)`` of a program."""
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Sites with their shapes, in order."""
Sites = dict[str, Array]
"""Values of sites by their names."""
Moments = Callable[[Sites], list[tuple[Array, Array]]]
"""(residual, covariance) of every observation, given the noised sites."""
Replay = Callable[[Sites, Sites, Array | int], tuple[dict[str, Statement], Array]]
"""`Likelihood.replay`: a program's statements, and more, given its noised and static
sites and the level."""


class Concrete:
    """An array argument that stays a NumPy array in compiled code; another value
    compiles anew."""

    def __init__(self, array: ArrayLike):
        self.array = np.asarray(array)
        self._key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Concrete) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@dataclass(frozen=True, eq=False)
class Code:
    """The trace of a program, and all that was read in it; equal to another of the same
    program and values.

    Attributes:
        program: the program.
        jaxpr: a function of its arrays, the latents and a key.
        shapes: what that function returns.
        latents: the latents among its inputs, in their order.
        reasons: why each observation's noise is not Gaussian, as far as its
            distribution shows, None where it is.
        fixed: what of the statements are not arrays.
        again: traces the program anew.
        settings: JAX's, under which it was traced.
        identity: its `fingerprint` of then; empty of a trace that is only looked at.
    """

    program: Program
    jaxpr: ClosedJaxpr
    shapes: TracedStatements
    latents: list[str]
    reasons: dict[str, str | None]
    fixed: list[object]
    again: Callable[[], Code]
    settings: tuple[object, ...]
    identity: str = ""

    @property
    def places(self) -> dict[str, Var]:
        """The latents' variables among the trace's inputs, of which the last is a
        key."""
        inputs = self.jaxpr.jaxpr.invars
        return dict(zip(self.latents, inputs[-1 - len(self.latents) : -1], strict=True))

    def fingerprint(self, objects: bool = True) -> str:
        """A digest of it and of all that was read in it."""
        return fingerprint(self.jaxpr, self.fixed, objects=objects)

    def check(self) -> None:
        """Refuse to run a program that reads something else by now."""
        if self.settings != _settings() or not once_a_call(
            self
        ):  # another precision traces everything otherwise
            return
        with usual():
            if self.again().fingerprint(objects=False) != self.fingerprint(
                objects=False
            ):
                raise changed_since(self.program)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def changed_since(program: Program) -> ProgramError:
    """The error for a program that is not what it was."""
    return ProgramError(
        f"Program '{program.name}' reads something beside its arguments that has changed since cp.compile: a global, a "
        "variable around it, or random numbers of Python's or NumPy's own.",
        where=program.where,
        fix="compile it again; or pass what changes as an argument of the program, which needs no new compilation.",
    )


def _settings() -> tuple[object, ...]:
    return jnp.result_type(float), jax.config.jax_disable_jit  # type: ignore[attr-defined]  # one of its settings


class TracedStatements(eqx.Module):
    """Values of a program's statements at given latents.

    Attributes:
        draws: of each static site a draw of its prior.
        log_likelihoods: log p of each observation.
        moments: (residual, covariance) of each observation whose noise is Gaussian.
        parts: the arrays in each statement's distribution and in an observation's
            value; of a noised site those in each leaf of its factor first.
    """

    draws: Sites
    log_likelihoods: Sites
    moments: dict[str, tuple[Array, Array]]
    parts: dict[str, list[list[Array]]]


class Traced(eqx.Module):
    """A program with its arguments: to be run again, or to be asked by its trace.

    Attributes:
        function: the program's function.
        arguments: ``(args, kwargs)``; arrays are leaves but for those wrapped in
            `Concrete`.
        eager: whether what depends on no data and no latent is computed at once, as the
            program asks for its value.
        noised: the sites of NumPyro priors that evidence looks at.
        known_code: its trace; None while that is being made.
        standardised: the static sites whose coordinate is relative to their prior's
            location and scale.
        placed: the static sites whose prior has a location and a scale that other
            static ones give it, in the program's order.
    """

    function: Callable[..., object] = eqx.field(static=True)
    arguments: Arguments
    eager: bool = eqx.field(static=True)
    noised: frozenset[str] = eqx.field(static=True)
    known_code: Code | None = eqx.field(static=True, default=None)
    standardised: frozenset[str] = eqx.field(static=True, default=frozenset())
    placed: tuple[str, ...] = eqx.field(static=True, default=())

    @property
    def code(self) -> Code:
        """The trace, once it is made."""
        assert self.known_code is not None
        return self.known_code

    def run(
        self, provide: Provide, level: Array | int = 0, redraw: Redraw | None = None
    ) -> dict[str, Statement]:
        """Its statements; see `interpret.run`. Refused if it reads something else than
        when it was compiled."""
        if self.known_code is not None:
            self.known_code.check()
        args, kwargs = jax.tree.map(
            lambda leaf: leaf.array if isinstance(leaf, Concrete) else leaf,
            self.arguments,
        )
        with jax.ensure_compile_time_eval() if self.eager else nullcontext():
            return run(self.function, args, kwargs, provide, level, redraw, self.noised)

    def statements_at(self, latents: Sites, key: Array) -> TracedStatements:
        """Values of the statements at these latents: noised sites in the data's units,
        static ones constrained. Static ones that are left out are draws, as of `draw`
        with this key."""
        return self._walk(Evaluation(), _arrays(self.arguments), dict(latents), key)

    def draw(self, key: Array, xs: Sites) -> Sites:
        """All latents but those whose coordinate is `standardised`: the noised ones as
        given, static ones drawn from their priors one after the other. With the same
        key `statements_at` draws those left out at the same coordinate, whatever the
        other latents are, as z = μ + s·u with u from the key alone."""
        latents = dict(xs)
        self._walk(Evaluation(), _arrays(self.arguments), latents, key)
        return {
            name: value
            for name, value in latents.items()
            if name not in self.standardised
        }

    def dependencies(
        self,
    ) -> tuple[dict[str, frozenset[str]], dict[str, list[frozenset[str]]]]:
        """The latents that each statement's distribution depends on, and of noised
        sites each leaf of their factor."""
        none = frozenset[str]()
        latents = {name: frozenset({name}) for name in self.code.latents}
        found = self._walk(
            Influence(), [none] * len(_arrays(self.arguments)), latents, none
        ).parts
        by_leaf = {
            name: [none.union(*part) for part in parts] for name, parts in found.items()
        }
        return {name: none.union(*parts) for name, parts in by_leaf.items()}, by_leaf

    def sizes(self, names: tuple[str, ...]) -> list[int]:
        """How many numbers each of these Gaussian observations has."""
        return [self.code.shapes.moments[name][0].size for name in names]

    def moments_at(self, names: tuple[str, ...], xs: Sites, key: Array) -> Moments:
        """(residual, covariance) of Gaussian observations at noised sites; those left
        out are as in ``xs``."""
        latents = self.draw(key, xs)

        def at_sites(at: Sites) -> list[tuple[Array, Array]]:
            found = self.statements_at({**latents, **at}, key).moments
            return [found[name] for name in names]

        return at_sites

    def linearity(
        self, shapes: Sequence[tuple[str, tuple[int, ...]]]
    ) -> dict[str, tuple[Value, Value]]:
        """For each observation whose noise is Gaussian, what its residual and
        covariance are of the entries of these sites. Static sites whose coordinate is
        `standardised` keep a fixed coordinate, as in `statements_at`."""
        avals = {name: aval(variable) for name, variable in self.code.places.items()}
        size, coordinates = entries(shapes, avals)
        walk = Linearity(size, np.random.default_rng(0))
        given = [name for name in avals if name not in self.standardised]
        latents = {
            name: coordinates.get(name) or walk.any_latent(avals[name])
            for name in given
        }
        data = [Value(Kind.KNOWN, array) for array in _arrays(self.arguments)]
        return self._walk(walk, data, latents, Value(Kind.LATENT)).moments

    def _walk(
        self,
        walk: Walk[Fact],
        data: Sequence[Fact],
        latents: dict[str, Fact],
        key: Fact,
    ) -> Any:
        """What an analysis knows of the trace's outputs, in the form of
        `TracedStatements`, from what it knows of the inputs. A latent that is left out
        is what its draw is, and is put into ``latents``."""
        code, places = self.code, self.code.places
        outputs: Any = jax.tree.unflatten(
            jax.tree.structure(code.shapes), code.jaxpr.jaxpr.outvars
        )
        drawn = {
            name: variable
            for name, variable in outputs.draws.items()
            if name not in latents
        }
        copies = {variable: places[name] for name, variable in drawn.items()}
        inputs = [*data, *map(latents.get, places), key]
        known = walk.evaluate(code.jaxpr.jaxpr, code.jaxpr.consts, inputs, copies)
        latents.update({name: known[places[name]] for name in drawn})
        return jax.tree.map(lambda variable: walk.value_of(known, variable), outputs)


def trace(
    program: Program,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    latents: Sites,
    noised: frozenset[str] = frozenset(),
) -> tuple[Traced, list[str]]:
    """The trace of a program, and what its Python has asked of its data, as sentences.
    Every array among the arguments is traced; those whose number the program asks for
    are not when it is run once more. A program that asks for the number of a latent is
    refused."""
    function = program.function
    paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    arrays = [i for i, (_, leaf) in enumerate(paths) if is_data(leaf)]
    factors = [
        f for f in jax.tree.leaves((args, kwargs), is_leaf=is_factor) if is_factor(f)
    ]
    inside = {id(array) for array in jax.tree.leaves(factors)}
    outside = {i for i in arrays if id(paths[i][1]) not in inside}
    concrete, eager, asks = set[int](), False, list[str]()
    while True:
        wrapped = [
            Concrete(leaf) if i in concrete else leaf
            for i, (_, leaf) in enumerate(paths)
        ]
        traced = Traced(function, jax.tree.unflatten(treedef, wrapped), eager, noised)
        try:
            code = _code(program, traced, latents, latents)
            return replace(
                traced, known_code=replace(code, identity=code.fingerprint())
            ), asks
        # the program has run with numbers: what fails now fails because of a tracer
        except Exception as error:
            abstract = [i for i in arrays if i not in concrete]
            named = {abstract[i] for i in _named(error)}
            by_mask = any(
                isinstance(e, jax.errors.NonConcreteBooleanIndexError)
                for e in _chain(error)
            )
            if not named and (eager or by_mask):  # JAX does not report which
                named = outside - concrete or set(abstract)
            if not named and eager:
                better = _latent_error(error, program, traced, latents)
                raise better from (error if better is not error else error.__cause__)
            concrete, eager = concrete | named, True
            asks += _asks(
                error, sorted({_name_of(function, paths[i][0]) for i in named})
            )


def _code(
    program: Program, untraced: Traced, latents: Sites, moved: Iterable[str]
) -> Code:
    """The trace with the latents ``moved`` as inputs."""
    reasons: dict[str, str | None] = {}
    names = sorted(moved)
    fixed: list[object] = []

    def call(arrays: list[Array], values: list[Array], key: Array) -> TracedStatements:
        given = {**latents, **dict(zip(names, values, strict=True))}
        draws: Sites = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "static":
                drawn = distribution.sample(jax.random.fold_in(key, len(draws)))
                draws[name] = jax.lax.optimization_barrier(
                    drawn
                )  # a value of its own, also where that is a constant
            return given[name]

        others = iter(arrays)
        arguments = jax.tree.map(
            lambda leaf: next(others) if _is_input(leaf) else leaf, untraced.arguments
        )
        statements = replace(untraced, arguments=arguments).run(provide)
        observed = {s.name: s for s in statements.values() if s.kind == "observed"}
        reasons.update({name: not_gaussian(s) for name, s in observed.items()})
        parts = {s.name: _parts(s, statements) for s in statements.values()}
        fixed.extend(
            _fixed(s, [*itertools.chain(*parts[s.name])]) for s in statements.values()
        )
        return TracedStatements(
            draws,
            {name: s.log_prob() for name, s in observed.items()},
            {name: moments(s) for name, s in observed.items() if reasons[name] is None},
            {
                name: [list(filter(_is_traced, part)) for part in each]
                for name, each in parts.items()
            },
        )

    # The key's type alone: a key would be made in whatever code is traced while the
    # program is checked.
    key = jax.eval_shape(jax.random.key, 0)
    inputs = _arrays(untraced.arguments), [latents[name] for name in names], key
    jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(*inputs)
    bare, values = jax.tree.map(
        lambda a: jax.typeof(a) if is_data(a) else a, (untraced, latents)
    )
    again = partial(_code, program, bare, values, names)
    return Code(program, jaxpr, shapes, names, reasons, fixed, again, _settings())


def _parts(
    statement: Statement, statements: dict[str, Statement]
) -> list[list[object]]:
    """What each leaf of its factor is made of, with functions closed; then its
    distribution, an observation's value."""
    if statement.kind == "observed":
        return [jax.tree.leaves((statement.distribution, statement.value))]
    if statement.kind not in ("noised", "evidence"):
        return [jax.tree.leaves(statement.distribution)]
    try:
        looked_at = statements.get(statement.site)
        leaves = closed_leaves(
            statement.factor
            if looked_at is None
            else of_one_member(statement, looked_at)
        )
    except ComposeProbError as error:
        raise type(error)(
            error.found, where=error.where or statement.where, fix=error.fix
        ) from error
    codes = [function.code.jaxpr for function in closures(leaves)]
    return [
        *map(jax.tree.leaves, leaves),
        [*jax.tree.leaves(statement.distribution), *codes],
    ]


def closed_leaves(node: Factor, runs: tuple[str, ...] = ()) -> list[LeafFactor]:
    """The leaves of an expression as it was written, with their functions closed;
    ``runs`` are the conditions that run over data around it. Refuses a function that
    cannot be called with the conditions that its leaf has."""
    if node.children:
        plate = plate_of(node)
        below = runs if plate is None else (*runs, *plate.names)
        return [leaf for child in node.children for leaf in closed_leaves(child, below)]
    (leaf,) = factor_leaves(node)
    if not has_functions(leaf):
        return [leaf]
    single = leaf.holding(first(leaf.fixed, Counter(runs)))
    try:
        return [closed(single, single.call_conditions())]
    except Exception:
        single.check_network()  # has the better message
        raise


def _fixed(statement: Statement, parts: list[object]) -> list[object]:
    """What of a statement shows in no equation of the trace, and yet when the program
    is run again."""
    if statement.kind in ("noised", "evidence") and not any(map(_is_traced, parts)):
        return []  # a factor of no latent is not asked of the program again
    if statement.kind == "static":
        statement.log_prob()  # now its equations are in the trace
    return [
        str(jax.typeof(p)) if _is_traced(p) else p for p in [*parts, statement.value]
    ]


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
    """Why an observation's mean is no linear measurement, and the primitive of JAX's
    that is not linear."""
    return "its mean is not a linear function of what it measures" + (
        f" (JAX's `{primitive}`)" if primitive else ""
    )


def moments(statement: Statement) -> tuple[Array, Array]:
    """value − mean, (m,), and covariance, (m, m), of a Gaussian observation."""
    residual, noise, diagonal = _residual(statement)
    if diagonal:
        return residual.ravel(), jnp.diag(noise.ravel())
    return residual.ravel(), block_diag(*noise.reshape(-1, *noise.shape[-2:]))


def whitened(statement: Statement) -> tuple[Array, Array]:
    """L⁻¹·(value − mean), (m,), and log det L of a Gaussian observation of covariance
    L·Lᵀ."""
    residual, noise, diagonal = _residual(statement)
    if diagonal:
        scale = jnp.sqrt(noise)
        return (residual / scale).ravel(), jnp.sum(jnp.log(scale))
    root = whitener(noise)
    log_det = -jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)))
    return jnp.einsum("...ij,...j->...i", root, residual).ravel(), log_det


def _residual(statement: Statement) -> tuple[Array, Array, bool]:
    """value − mean, its variances or its covariances (…, n, n), and whether they are
    variances."""
    distribution, inner = statement.distribution, unwrap(statement.distribution)
    residual = jnp.asarray(statement.value, jnp.result_type(float)) - distribution.mean
    if type(inner) is dist.Normal:
        return residual, jnp.broadcast_to(distribution.variance, residual.shape), True
    return (
        residual,
        jnp.broadcast_to(
            inner.covariance_matrix, (*residual.shape, residual.shape[-1])
        ),
        False,
    )


def is_data(leaf: object) -> bool:
    """Whether a leaf of the arguments is an array."""
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)


def _name_of(function: Callable[..., object], path: tuple[Any, ...]) -> str:
    """The parameter of ``function`` that holds a leaf, by the leaf's path in ``(args,
    kwargs)``."""
    where, which = path[0].idx, path[1]
    if where == 1:
        return str(which.key)
    parameters = list(inspect.signature(function).parameters)
    return parameters[min(which.idx, len(parameters) - 1)]


def _arrays(arguments: Arguments) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(arguments) if _is_input(leaf)]


def _is_input(leaf: object) -> bool:
    """Whether a leaf of the arguments is traced: an array, or the shape of one."""
    return is_data(leaf) or isinstance(leaf, jax.core.ShapedArray)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _named(error: Exception) -> set[int]:
    """Which of the traced arrays' numbers were asked for: JAX names the inputs that a
    value depends on."""
    found = [e for e in _chain(error) if isinstance(e, NOT_CONCRETE)]
    return {int(n) for e in found for n in re.findall(r"\barrays\[(\d+)\]", str(e))}


def _asks(error: Exception, names: list[str]) -> list[str]:
    """The note about a program that asks for numbers of these arguments; nothing where
    the library asks, as for powers, which are numbers by their nature."""
    found = next((e for e in _chain(error) if isinstance(e, NOT_CONCRETE)), None)
    if not names or not isinstance(found, Exception) or requested_by_library(found):
        return []
    does, _, where = number_request(found)
    return [
        f"{where} {does} {' and '.join(names)}: what it holds is compiled in as a constant"
    ]


def _latent_error(
    error: Exception, program: Program, untraced: Traced, latents: Sites
) -> Exception:
    """The error for a program that asks for the number of a latent, or the error itself
    where it is another."""
    for name in latents:
        try:
            _code(program, untraced, latents, [name])
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
