"""A program as one traced computation: the values of its statements under any data and
any values of its latents.

The compiler runs a program once with numbers and once with tracers, and answers its
questions from that trace. Array arguments are data: they are traced. One whose value
the program's Python asks for (a power, the condition of an ``if``) is a constant, and
another value compiles anew; Python's own numbers, floats too, are settings and never
traced.

The run evaluates a program by running its Python function again inside of compiled
code. Whatever that reads besides its arguments (globals, variables around it) has no
place among the density's arrays: it is compiled in, and must not change after the
program was compiled.
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
from typing import Any, NamedTuple, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.extend.core import ClosedJaxpr, Var
from jax.scipy.linalg import block_diag
from jax.tree_util import PyTreeDef
from jaxtyping import Float
from numpy.typing import ArrayLike
from numpyro.distributions import Distribution

from composeprob.compiler.discrete import Summed
from composeprob.compiler.evidence import of_one_member
from composeprob.compiler.linearity import Kind, Linearity, Value, entries
from composeprob.errors import ComposeProbError, ProgramError
from composeprob.factors.equations import (
    Evaluation,
    Fact,
    Influence,
    Walk,
    aval,
    fed_by_host,
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
from composeprob.user_code import (
    NOT_CONCRETE,
    number_request,
    requested_by_library,
)

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""``(args, kwargs)`` of a program."""
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Sites with their shapes, in order."""
Sites = dict[str, Array]
"""Values of sites by their names."""
Moments = Callable[[Sites], list[tuple[Array, Array]]]
"""(residual, covariance) of every observation as a function of the noised sites."""
Replay = Callable[[Sites, Sites, Array | int], tuple[dict[str, Statement], Array]]
"""`Likelihood.replay`: (noised sites, static sites, level) → the program's statements
and the log-Jacobian of its static sites."""


class Concrete:
    """An array argument that stays a NumPy array in compiled code; another value
    compiles anew."""

    def __init__(self, array: ArrayLike):
        self.array = np.asarray(array)
        # Compiled code is looked up by the values, as by every static argument.
        self._key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Concrete) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@dataclass(frozen=True, eq=False)
class Code:
    """The trace of a program, and the values that were read in it; two traces of the
    same program and values are equal.

    Attributes:
        program: the program.
        jaxpr: a function of its arrays, the latents and a key.
        shapes: the shapes of what that function returns.
        latents: the latents among its inputs, in their order.
        reasons: the reason why each observation's noise is not Gaussian, as far as its
            distribution shows; None where it is Gaussian.
        fixed: all of the statements that is not a traced array.
        retrace: traces the program anew.
        settings: JAX's settings under which it was traced.
        identity: its `fingerprint` when it was made; empty for a trace that is only
            examined.
    """

    program: Program
    jaxpr: ClosedJaxpr
    shapes: TracedStatements
    latents: list[str]
    reasons: dict[str, str | None]
    fixed: list[object]
    retrace: Callable[[], Code]
    settings: tuple[object, ...]
    identity: str = ""

    @property
    def places(self) -> dict[str, Var]:
        """The latents' variables among the trace's inputs, of which the last is a
        key."""
        inputs = self.jaxpr.jaxpr.invars
        variables = inputs[-1 - len(self.latents) : -1]
        return dict(zip(self.latents, variables, strict=True))

    def fingerprint(self, objects: bool = True) -> str:
        """A digest of the trace and of all values that were read in it."""
        return fingerprint(self.jaxpr, self.fixed, objects=objects)

    def check(self) -> None:
        """Refuse to run a program that reads other values than when it was compiled."""
        # Under another precision every equation differs, though nothing was changed.
        if self.settings != _settings() or not once_a_call(self):
            return
        # Without the identity of objects: a function that is made anew, with the same
        # equations, is not a change.
        with usual():
            then = self.fingerprint(objects=False)
            now = self.retrace().fingerprint(objects=False)
        if now != then:
            raise changed_since(self.program)

    # Equal by digests, so that programs of the same equations share compiled code.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def changed_since(program: Program) -> ProgramError:
    """The error for a program that reads other values than when it was compiled."""
    return ProgramError(
        f"Program '{program.name}' reads something besides its arguments that has "
        "changed since cp.compile: a global, a variable around it, or random numbers "
        "of Python's or NumPy's own.",
        where=program.where,
        fix="compile it again; or pass the changing value as an argument of the "
        "program, which needs no new compilation.",
    )


def _settings() -> tuple[object, ...]:
    """JAX's settings that decide on the equations of a trace."""
    disable_jit = jax.config.jax_disable_jit
    return jnp.result_type(float), disable_jit


class TracedStatements(eqx.Module):
    """Values of a program's statements at given latents.

    Attributes:
        draws: a draw of each static site's prior.
        log_likelihoods: log p of each observation, a scalar.
        moments: (residual, covariance) of each observation whose noise is Gaussian.
        arrays: the traced arrays in each statement's distribution and in an
            observation's value; of a noised site first those in each leaf of its
            factor, one list a leaf.
    """

    draws: Sites
    log_likelihoods: Sites
    moments: dict[str, tuple[Array, Array]]
    arrays: dict[str, list[list[Array]]]


class Traced(eqx.Module):
    """A program with its arguments, which can be run again, and its trace, from which
    dependencies and linearity are read.

    Attributes:
        function: the program's function.
        arguments: ``(args, kwargs)``; arrays are leaves but for those wrapped in
            `Concrete`.
        eager: whether values that depend on no data and no latent are computed while
            the program is traced, since its Python asks for their numbers.
        noised: the sites of NumPyro priors that evidence looks at.
        known_code: its trace; None while that is being made.
        standardised: the static sites whose coordinate is relative to their prior's
            location and scale.
        placed: the static sites whose prior has a location and a scale that other
            static ones give it, in the program's order.
        summed: the discrete latents that are summed out.
        centred: pairs of a latent and of data whose location is affine in it; see
            `centring.centred_by_data`.
    """

    function: Callable[..., object] = eqx.field(static=True)
    arguments: Arguments
    eager: bool = eqx.field(static=True)
    noised: frozenset[str] = eqx.field(static=True)
    known_code: Code | None = eqx.field(static=True, default=None)
    standardised: frozenset[str] = eqx.field(static=True, default=frozenset())
    placed: tuple[str, ...] = eqx.field(static=True, default=())
    summed: tuple[Summed, ...] = eqx.field(static=True, default=())
    centred: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())

    @property
    def code(self) -> Code:
        """The trace, once it is made."""
        assert self.known_code is not None
        return self.known_code

    def run(
        self, provide: Provide, level: Array | int = 0, redraw: Redraw | None = None
    ) -> dict[str, Statement]:
        """The program's statements by name; see `interpret.run`. Refused if the program
        reads other values than when it was compiled."""
        if self.known_code is not None:
            self.known_code.check()

        def argument(leaf: object) -> object:
            return leaf.array if isinstance(leaf, Concrete) else leaf

        args, kwargs = jax.tree.map(argument, self.arguments)
        with jax.ensure_compile_time_eval() if self.eager else nullcontext():
            return run(self.function, args, kwargs, provide, level, redraw, self.noised)

    def statements_at(self, latents: Sites, key: Array) -> TracedStatements:
        """Values of the statements at these latents: noised sites in the data's units,
        static ones constrained. Static sites that are left out are drawn as `draw`
        does with this key."""
        return self._walk(Evaluation(), _arrays(self.arguments), dict(latents), key)

    def draw(self, key: Array, xs: Sites) -> Sites:
        """All latents but those whose coordinate is `standardised`: the noised ones as
        given, static ones drawn from their priors one after the other. With the same
        key `statements_at` draws those left out at the same coordinate, whatever the
        other latents are, as z = μ + s·u with u from the key alone."""
        latents = dict(xs)
        # The walk puts the draws of static sites into its latents.
        self._walk(Evaluation(), _arrays(self.arguments), latents, key)
        for name in self.standardised:
            latents.pop(name, None)
        return latents

    def dependencies(
        self,
    ) -> tuple[dict[str, frozenset[str]], dict[str, list[frozenset[str]]]]:
        """The latents that each statement's distribution depends on; and for each
        noised site the latents that each leaf of its factor depends on."""
        # An influence is a set of latents: data and the key are under none.
        none = frozenset[str]()
        latents = {name: frozenset({name}) for name in self.code.latents}
        data = [none] * len(_arrays(self.arguments))
        influences = self._walk(Influence(), data, latents, none).arrays
        of_statement = {}
        by_leaf = {}
        for name, leaves in influences.items():
            by_leaf[name] = [none.union(*arrays) for arrays in leaves]
            of_statement[name] = none.union(*by_leaf[name])
        return of_statement, by_leaf

    def calling_host(self) -> list[str]:
        """Names of the observations, and log-weights, that call the host."""
        structure = jax.tree.structure(self.code.shapes)
        fed = jax.tree.unflatten(structure, fed_by_host(self.code.jaxpr))
        return [name for name, calls in fed.log_likelihoods.items() if calls]

    def sizes(self, names: tuple[str, ...]) -> list[int]:
        """The number of entries of each of these Gaussian observations."""
        return [self.code.shapes.moments[name][0].size for name in names]

    def moments_at(self, names: tuple[str, ...], xs: Sites, key: Array) -> Moments:
        """(residual, covariance) of Gaussian observations as a function of noised
        sites; the sites that its argument leaves out keep their values in ``xs``."""
        latents = self.draw(key, xs)

        def at_sites(at: Sites) -> list[tuple[Array, Array]]:
            moments = self.statements_at({**latents, **at}, key).moments
            return [moments[name] for name in names]

        return at_sites

    def linearity(
        self, shapes: Sequence[tuple[str, tuple[int, ...]]]
    ) -> dict[str, tuple[Value, Value]]:
        """The residual and covariance of each observation whose noise is Gaussian, as
        functions of the entries of these sites. Static sites whose coordinate is
        `standardised` keep a fixed coordinate, as in `statements_at`."""
        avals = {name: aval(variable) for name, variable in self.code.places.items()}
        size, coordinates = entries(shapes, avals)
        walk = Linearity(size, np.random.default_rng(0))
        latents = {}
        for name in avals:
            if name in self.standardised:
                continue
            coordinate = coordinates.get(name)
            latents[name] = coordinate or walk.any_latent(avals[name])
        data = [Value(Kind.KNOWN, array) for array in _arrays(self.arguments)]
        return self._walk(walk, data, latents, Value(Kind.LATENT)).moments

    def _walk(
        self,
        walk: Walk[Fact],
        data: Sequence[Fact],
        latents: dict[str, Fact],
        key: Fact,
    ) -> Any:
        """The facts about the trace's outputs that an analysis derives from facts about
        its inputs, in the form of `TracedStatements`.

        A latent that ``latents`` lacks has the fact of its draw, which is put into
        ``latents``.
        """
        code = self.code
        places = code.places
        outputs: Any = jax.tree.unflatten(
            jax.tree.structure(code.shapes), code.jaxpr.jaxpr.outvars
        )
        drawn = {
            name: variable
            for name, variable in outputs.draws.items()
            if name not in latents
        }
        # The input of such a latent takes the fact of its draw as soon as the walk has
        # it, since later equations read the input.
        copies = {variable: places[name] for name, variable in drawn.items()}
        inputs = [*data, *map(latents.get, places), key]
        facts = walk.evaluate(code.jaxpr.jaxpr, code.jaxpr.consts, inputs, copies)
        latents.update({name: facts[places[name]] for name in drawn})
        return jax.tree.map(lambda variable: walk.value_of(facts, variable), outputs)


@dataclass(frozen=True)
class _Leaves:
    """The leaves of a program's arguments, with their paths in ``(args, kwargs)``.

    Attributes:
        data: the indices of the leaves that are arrays.
        outside: the indices of arrays that are not inside of a factor.
    """

    paths: list[tuple[Any, ...]]
    values: list[object]
    structure: PyTreeDef
    data: list[int]
    outside: set[int]

    @classmethod
    def of_arguments(
        cls, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> _Leaves:
        """Return the leaves of a call's arguments."""
        pairs, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
        paths = [path for path, _ in pairs]
        values = [value for _, value in pairs]
        data = [i for i, value in enumerate(values) if is_data(value)]
        # A program's own Python does not read the weights of its factors.
        nodes = jax.tree.leaves((args, kwargs), is_leaf=is_factor)
        of_factors = jax.tree.leaves([node for node in nodes if is_factor(node)])
        inside = {id(array) for array in of_factors}
        outside = {i for i in data if id(values[i]) not in inside}
        return cls(paths, values, structure, data, outside)

    def with_concrete(self, concrete: set[int]) -> Arguments:
        """The arguments, with these leaves wrapped in `Concrete`."""
        wrapped = list(self.values)
        for i in concrete:
            array: Any = self.values[i]
            wrapped[i] = Concrete(array)
        arguments: Arguments = jax.tree.unflatten(self.structure, wrapped)
        return arguments

    def requested(self, error: Exception, concrete: set[int], eager: bool) -> set[int]:
        """The leaves whose numbers the program asked for, according to the error that
        this raised."""
        traced = [i for i in self.data if i not in concrete]
        requested = {traced[number] for number in _requested_arrays(error)}
        if requested:
            return requested
        # JAX does not name the inputs of a boolean mask, and sometimes none at all.
        # Where eager evaluation does not help either, all arrays that are not a
        # factor's become constants.
        by_mask = any(
            isinstance(cause, jax.errors.NonConcreteBooleanIndexError)
            for cause in _causes(error)
        )
        if eager or by_mask:
            return self.outside - concrete or set(traced)
        return set()


def trace(
    program: Program,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    latents: Sites,
    noised: frozenset[str] = frozenset(),
) -> tuple[Traced, list[str]]:
    """The trace of a program, and sentences about the data whose numbers its Python
    asks for.

    Every array among the arguments is traced at first. Arrays whose number the program
    asks for become constants, and the program is traced again. A program that asks for
    the number of a latent is refused.
    """
    function = program.function
    leaves = _Leaves.of_arguments(args, kwargs)
    concrete: set[int] = set()
    eager = False
    sentences: list[str] = []
    while True:
        traced = Traced(function, leaves.with_concrete(concrete), eager, noised)
        try:
            code = _code(program, traced, latents, latents)
            code = replace(code, identity=code.fingerprint())
            return replace(traced, known_code=code), sentences
        # The program has run with numbers: what fails now fails because of a tracer.
        except Exception as error:
            requested = leaves.requested(error, concrete, eager)
            if not requested and eager:
                better = _latent_error(error, program, traced, latents)
                raise better from (error if better is not error else error.__cause__)
            concrete = concrete | requested
            # A value that depends on constants alone is a number from now on.
            eager = True
            names = {_name_of(function, leaves.paths[i]) for i in requested}
            sentences += _request_notes(error, sorted(names))


def _other_sites(program: Program, name: str, latents: Sites) -> ProgramError:
    """The error for a program whose second run has a site that its first had not."""
    names = ", ".join(map(repr, latents)) or "no site"
    return ProgramError(
        f"Program '{program.name}' has the site {name!r} when it runs again, and had "
        f"{names} when it ran first: it reads a value that changes between its runs.",
        where=program.where,
        fix="name sites by the program's arguments alone, such as f'x{i}' in a loop "
        "over range(n); counters outside of the program count its runs.",
    )


def _code(
    program: Program, untraced: Traced, latents: Sites, inputs: Iterable[str]
) -> Code:
    """The trace with these latents as inputs; the others are constants."""
    reasons: dict[str, str | None] = {}
    names = sorted(inputs)
    fixed: list[object] = []

    # `_requested_arrays` finds the name ``arrays`` in JAX's errors.
    def call(arrays: list[Array], values: list[Array], key: Array) -> TracedStatements:
        latents_here = {**latents, **dict(zip(names, values, strict=True))}
        draws: Sites = {}

        def provide(kind: str, name: str, distribution: Distribution) -> Array:
            if kind == "static":
                drawn = distribution.sample(jax.random.fold_in(key, len(draws)))
                # A variable of its own, also where the draw is a constant.
                draws[name] = jax.lax.optimization_barrier(drawn)
            if name not in latents_here:
                raise _other_sites(program, name, latents_here)
            return latents_here[name]

        remaining = iter(arrays)

        def argument(leaf: object) -> object:
            return next(remaining) if _is_input(leaf) else leaf

        arguments = jax.tree.map(argument, untraced.arguments)
        statements = replace(untraced, arguments=arguments).run(provide)
        observed = {s.name: s for s in statements.values() if s.kind == "observed"}
        for name, statement in observed.items():
            reasons[name] = not_gaussian(statement)
        components = {s.name: _components(s, statements) for s in statements.values()}
        for name, statement in statements.items():
            flat = list(itertools.chain(*components[name]))
            fixed.append(_fixed(statement, flat))
        log_likelihoods = {name: s.log_prob() for name, s in observed.items()}
        gaussian = {
            name: moments(s) for name, s in observed.items() if reasons[name] is None
        }
        arrays_of = {
            name: _traced_arrays(leaves) for name, leaves in components.items()
        }
        return TracedStatements(draws, log_likelihoods, gaussian, arrays_of)

    # The key's type alone: a key itself would be made in whatever code is being traced
    # while the program is checked.
    key = jax.eval_shape(jax.random.key, 0)
    arrays = _arrays(untraced.arguments)
    values = [latents[name] for name in names]
    jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(arrays, values, key)

    def type_of(leaf: Any) -> Any:
        return jax.typeof(leaf) if is_data(leaf) else leaf

    # `retrace` holds types, since it lives as long as compiled code.
    types, types_of_latents = jax.tree.map(type_of, (untraced, latents))
    retrace = partial(_code, program, types, types_of_latents, names)
    return Code(program, jaxpr, shapes, names, reasons, fixed, retrace, _settings())


def _components(
    statement: Statement, statements: dict[str, Statement]
) -> list[list[object]]:
    """The leaves of each factor in a statement, with functions closed, then those of
    its distribution and of an observation's value."""
    if statement.kind == "observed":
        return [jax.tree.leaves((statement.distribution, statement.value))]
    if statement.kind not in ("noised", "evidence"):
        return [jax.tree.leaves(statement.distribution)]
    site = statements.get(statement.site)
    try:
        factor = statement.factor
        if site is not None:
            factor = of_one_member(statement, site)
        leaves = closed_leaves(factor)
    except ComposeProbError as error:
        where = error.where or statement.where
        raise type(error)(error.found, where=where, fix=error.fix) from error
    # A function that closes over a latent depends on it: its equations count too.
    codes = [function.code.jaxpr for function in closures(leaves)]
    of_leaves: list[list[object]] = [jax.tree.leaves(leaf) for leaf in leaves]
    return [*of_leaves, [*jax.tree.leaves(statement.distribution), *codes]]


def closed_leaves(node: Factor, running: tuple[str, ...] = ()) -> list[LeafFactor]:
    """The leaves of an expression as it was written, with their functions closed.

    Refuses a function that cannot be called with the conditions that its leaf has.

    Args:
        node: the expression.
        running: the conditions that run over data in plates around it.
    """
    if node.children:
        plate = plate_of(node)
        below = running if plate is None else (*running, *plate.names)
        return [leaf for child in node.children for leaf in closed_leaves(child, below)]
    (leaf,) = factor_leaves(node)
    if not has_functions(leaf):
        return [leaf]
    # Functions are called with the conditions of one member of their plates.
    single = leaf.holding(first(leaf.fixed, Counter(running)))
    try:
        return [closed(single, single.call_conditions())]
    except Exception:
        single.check_network()  # raises the error with the better message
        raise


def _fixed(statement: Statement, components: list[object]) -> list[object]:
    """Values in a statement that no equation of the trace shows, and that running the
    program again depends on."""
    if statement.kind in ("noised", "evidence") and not any(
        map(_is_traced, components)
    ):
        # The density keeps a factor of no latent itself, and does not run for it again.
        return []
    if statement.kind == "static":
        statement.log_prob()  # puts its equations into the trace
    fixed: list[object] = []
    for value in [*components, statement.value]:
        if _is_traced(value):
            fixed.append(str(jax.typeof(value)))
        else:
            fixed.append(value)
    return fixed


def _is_traced(leaf: object) -> TypeGuard[Array]:
    return isinstance(leaf, jax.core.Tracer)


def _traced_arrays(components: list[list[object]]) -> list[list[Array]]:
    """The traced arrays among each leaf's components."""
    return [list(filter(_is_traced, leaf)) for leaf in components]


def not_gaussian(statement: Statement) -> str | None:
    """The reason why an observation's noise is not Gaussian, as far as its distribution
    shows; None where it is."""
    if masked(statement.distribution) or statement.scale is not None:
        return "a handler masks or scales it"
    inner = unwrap(statement.distribution)
    if type(inner) in (dist.Normal, dist.MultivariateNormal):
        return None
    if isinstance(inner, dist.Unit):
        return "it is soft evidence, not a Gaussian measurement"
    name = type(inner).__name__
    return f"its distribution is {name}, not Normal or MultivariateNormal"


def not_linear(primitive: str = "") -> str:
    """The reason why an observation's mean is not linear, with the JAX primitive that
    makes it nonlinear."""
    reason = "its mean is not a linear function of what it measures"
    if primitive:
        reason += f" (JAX's `{primitive}`)"
    return reason


def moments(statement: Statement) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """value − mean and covariance of a Gaussian observation."""
    residual, noise, diagonal = _residual(statement)
    if diagonal:
        return residual.ravel(), jnp.diag(noise.ravel())
    blocks = noise.reshape(-1, *noise.shape[-2:])
    return residual.ravel(), block_diag(*blocks)


def whitened(statement: Statement) -> tuple[Float[Array, " m"], Float[Array, ""]]:
    """L⁻¹·(value − mean) and log det L of a Gaussian observation of covariance L·Lᵀ."""
    residual, noise, diagonal = _residual(statement)
    # The whitener of a covariance is L⁻¹, a triangular matrix.
    if diagonal:
        scale = jnp.sqrt(noise)
        return (residual / scale).ravel(), jnp.sum(jnp.log(scale))
    root = whitener(noise)
    log_det = -jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)))
    return jnp.einsum("...ij,...j->...i", root, residual).ravel(), log_det


class _Residual(NamedTuple):
    """A Gaussian observation's distance from its mean, and its noise.

    Attributes:
        residual: value − mean.
        noise: variances, of the residual's shape, or covariances, (…, n, n).
        diagonal: whether the noise is given by variances.
    """

    residual: Float[Array, ...]
    noise: Float[Array, ...]
    diagonal: bool


def _residual(statement: Statement) -> _Residual:
    distribution = statement.distribution
    inner = unwrap(distribution)
    residual = jnp.asarray(statement.value, jnp.result_type(float)) - distribution.mean
    shape = residual.shape
    if type(inner) is dist.Normal:
        variance = jnp.broadcast_to(distribution.variance, shape)
        return _Residual(residual, variance, True)
    covariance = jnp.broadcast_to(inner.covariance_matrix, (*shape, shape[-1]))
    return _Residual(residual, covariance, False)


def is_data(leaf: object) -> bool:
    """Return whether a leaf of the arguments is an array."""
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)


def _name_of(function: Callable[..., object], path: tuple[Any, ...]) -> str:
    """The parameter of ``function`` that holds a leaf, by the leaf's path in ``(args,
    kwargs)``."""
    half, argument = path[:2]
    if half.idx == 1:
        return str(argument.key)
    parameters = list(inspect.signature(function).parameters)
    return parameters[min(argument.idx, len(parameters) - 1)]


def _arrays(arguments: Arguments) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(arguments) if _is_input(leaf)]


def _is_input(leaf: object) -> bool:
    """Return whether a leaf of the arguments is traced: an array, or the shape of
    one."""
    return is_data(leaf) or isinstance(leaf, jax.core.ShapedArray)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _requested_arrays(error: Exception) -> set[int]:
    """Indices of the traced arrays whose numbers Python asked for: JAX's errors name
    the inputs that a value depends on."""
    requested: set[int] = set()
    for cause in _causes(error):
        if isinstance(cause, NOT_CONCRETE):
            numbers = re.findall(r"\barrays\[(\d+)\]", str(cause))
            requested.update(int(number) for number in numbers)
    return requested


def _request_notes(error: Exception, names: list[str]) -> list[str]:
    """The note about a program that asks for the numbers of these arguments; none
    where the library asks, as for powers, which are numbers by their nature."""
    requests = (e for e in _causes(error) if isinstance(e, NOT_CONCRETE))
    request = next(requests, None)
    if not names or not isinstance(request, Exception) or requested_by_library(request):
        return []
    does, _, where = number_request(request)
    arguments = " and ".join(names)
    return [f"{where} {does} {arguments}, whose value is compiled in as a constant"]


def _latent_error(
    error: Exception, program: Program, untraced: Traced, latents: Sites
) -> Exception:
    """The error for a program that asks for the number of a latent; any other error as
    it is."""
    # With one latent traced at a time, the one that fails is the one that was asked.
    for name in latents:
        try:
            _code(program, untraced, latents, [name])
        except NOT_CONCRETE as request:
            does, fix, where = number_request(request)
            return ProgramError(
                f"Program '{program.name}' {does} a value that depends on the site "
                f"{name!r}, which has many values at once.",
                where=where,
                fix=fix,
            )
        except Exception as other:
            return other
    return error
