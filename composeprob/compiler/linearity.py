"""What a traced function is of some of its inputs, x: free of it, linear, or neither; and which slopes can be non-zero.

Both are read off the function's equations. Numbers cannot show them: the derivative of a step is 0 everywhere, and
``where(z > 3, x, 0)`` depends on x at few draws of z only.

The slopes of a linear function are polynomials, or quotients of such, in values that depend on latents. Here each
function of latents that is none itself (a comparison, an exponential) has random numbers for its values. A slope that
is 0 then is 0 whatever the latents are, but for a chance of rounding (Schwartz 1980, "Fast probabilistic algorithms for
verification of polynomial identities"); the converse does not hold.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import PyTree

from composeprob.compiler.influence import CALLS
from composeprob.factors.precision import rebind

Aval = jax.ShapeDtypeStruct


class Kind(enum.IntEnum):
    """What a value is, from the simplest on: a function of others is at least what they are."""

    KNOWN = 0
    LATENT = 1
    LINEAR = 2
    OTHER = 3


@dataclass(frozen=True)
class Value:
    """A value in a trace.

    Attributes:
        kind: whether it is the same whatever the latents are, depends on latents alone, is A·x + b with A and b free of
            x, or is another function of x.
        array: the value itself; random numbers in its place, None where it is no floating-point number; slopes along a
            leading axis of the entries of x; None.
        why: of another function, the name of the primitive that made it one.
    """

    kind: Kind
    array: PyTree = None
    why: str = ""


TERMS: Mapping[str, slice] = {
    **dict.fromkeys(("add", "sub", "add_any", "neg", "real", "imag", "complex", "conj"), slice(None)),
    **dict.fromkeys(("convert_element_type", "reduce_sum", "cumsum", "reduce_window_sum", "fft"), slice(None)),
    **dict.fromkeys(("concatenate", "pad", "reshape", "squeeze", "expand_dims", "transpose", "rev"), slice(None)),
    **dict.fromkeys(("slice", "broadcast_in_dim", "split", "stack", "unstack", "tile"), slice(None)),
    **dict.fromkeys(("div", "gather", "dynamic_slice", "scatter-mul"), slice(0, 1)),
    "dynamic_update_slice": slice(0, 2),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub"), slice(0, 3, 2)),
    "select_n": slice(1, None),
    "triangular_solve": slice(1, 2),
    "tridiagonal_solve": slice(3, 4),
}
"""Of primitives that are linear in some operands together, given the others: in which ones."""


class Linearity:
    """An evaluation of equations by kinds.

    Args:
        size: the number of entries of x.
        rng: what draws random numbers.
        loops: the lengths of the loops that stand around, and the index in each.
    """

    def __init__(self, size: int, rng: np.random.Generator, loops: tuple[tuple[int, Array], ...] = ()):
        self.size, self.rng, self.loops = size, rng, loops

    def any_latent(self, like: Aval) -> Value:
        """A function of latents with random numbers for its values, others in every pass of a loop."""
        if not jnp.issubdtype(like.dtype, jnp.inexact):
            return Value(Kind.LATENT)
        return Value(Kind.LATENT, self._random(like))

    def evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Array],
        given: Sequence[Value | None],
        copies: Mapping[Var, Var] | None = None,
    ) -> dict[Var, Value]:
        """The value of every variable.

        Args:
            jaxpr, consts: the equations.
            given: the values of its inputs; None for one that is a copy.
            copies: variables whose values are those of inputs, ``{variable: input}``.
        """
        known: dict[Var, Value] = dict(zip(jaxpr.constvars, (Value(Kind.KNOWN, c) for c in consts), strict=True))
        known |= {v: value for v, value in zip(jaxpr.invars, given, strict=True) if value is not None}
        for eqn in jaxpr.eqns:
            found = self._equation(eqn, [value_of(known, v) for v in eqn.invars])
            known.update(zip(eqn.outvars, found, strict=True))
            known.update({copies[v]: known[v] for v in eqn.outvars if v in copies} if copies else {})
        return known

    def _inner(self, closed: PyTree, given: Sequence[Value]) -> list[Value]:
        jaxpr = getattr(closed, "jaxpr", closed)
        known = self.evaluate(jaxpr, getattr(closed, "consts", ()), given)
        return [value_of(known, v) for v in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        name, avals = eqn.primitive.name, _avals(eqn)
        kind = max((v.kind for v in given), default=Kind.KNOWN)
        if kind == Kind.KNOWN:
            return [Value(kind, array) for array in rebind(eqn, [v.array for v in given])]
        if name in ("optimization_barrier", "device_put", "copy", "copy_p", "sharding_constraint"):
            return given
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        no_derivative = name == "custom_vjp_call" and kind > Kind.LATENT
        if name in CALLS and inner is not None and not no_derivative:
            return self._inner(inner, given)
        if kind > Kind.LATENT and name in ("scan", "while"):
            return self._scan(eqn, given) if name == "scan" else self._while(eqn, given)
        if kind == Kind.OTHER:
            return [next(v for v in given if v.kind == kind)] * len(avals)
        if kind == Kind.LINEAR and name == "cond":
            each = [self._inner(branch, given[1:]) for branch in eqn.params["branches"]]
            return [self._either(cases, aval) for cases, aval in zip(zip(*each, strict=True), avals, strict=True)]
        if name == "cholesky" and kind == Kind.LATENT:
            return [Value(kind, array) for array in rebind(eqn, [self._any_covariance(given[0].array)])]
        terms = _terms(eqn, given)
        if terms is None or any(v.kind == Kind.LINEAR for i, v in enumerate(given) if i not in terms):
            return [self.any_latent(a) if kind == Kind.LATENT else Value(Kind.OTHER, why=name) for a in avals]
        if name == "select_n" and given[0].array is None:
            return [self._either(given[1:], avals[0])]
        varied = name == "custom_linear_solve" and any(
            v.kind == Kind.LATENT for i, v in enumerate(given) if i not in terms
        )
        if varied or any(v.array is None for v in given):
            return [self.any_latent(a) if kind == Kind.LATENT else self._anywhere(given, a) for a in avals]
        if kind == Kind.LATENT:
            return [Value(kind, array) for array in rebind(eqn, [v.array for v in given])]
        slopes = [v.array if v.kind == kind else None for v in given]

        def along(slopes: list[Array | None]) -> list[Array]:
            others = [jnp.zeros_like(v.array) if i in terms else v.array for i, v in enumerate(given)]
            return list(rebind(eqn, [b if a is None else a for a, b in zip(slopes, others, strict=True)]))

        return [Value(kind, array) for array in jax.vmap(along)(slopes)]

    def _random(self, like: Aval | Array) -> Array:
        shape = (*(length for length, _ in self.loops), *like.shape)
        drawn = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1.0, 1.0], shape)
        phase = np.exp(1j * drawn) if jnp.issubdtype(like.dtype, jnp.complexfloating) else 1.0
        array = jnp.asarray(drawn * phase, like.dtype)
        for _, index in self.loops:
            array = array[index]
        return array

    def _any_covariance(self, like: Array) -> Array:
        """A random positive definite matrix whose entries are 0 where those of ``like`` are."""
        there = (like != 0) | (jnp.swapaxes(like, -1, -2) != 0)
        drawn = self._random(like)
        drawn = jnp.where(there, drawn + jnp.conj(jnp.swapaxes(drawn, -1, -2)), 0.0)
        return drawn + 4.0 * like.shape[-1] * jnp.eye(like.shape[-1], dtype=like.dtype)

    def _either(self, cases: Sequence[Value], like: Aval) -> Value:
        """One of several values, and it depends on latents which."""
        kind = max(v.kind for v in cases)
        if kind == Kind.OTHER:
            return next(v for v in cases if v.kind == kind)
        if kind < Kind.LINEAR and any(v.array is None for v in cases):
            return self.any_latent(like)
        arrays = [v.array for v in cases if kind < Kind.LINEAR or v.kind == kind]
        if not jnp.issubdtype(like.dtype, jnp.inexact):
            return Value(Kind.LATENT)
        return Value(max(kind, Kind.LATENT), sum(self._random(like) * a for a in arrays))

    def _anywhere(self, given: Sequence[Value], like: Aval) -> Value:
        """A linear function of what is given, which may depend on any entry of it."""
        slopes = [v.array for v in given if v.kind == Kind.LINEAR and v.array is not None]
        mask = sum(jnp.any(a.reshape(self.size, -1) != 0, 1) for a in slopes)
        mask = jnp.asarray(mask, like.dtype).reshape(self.size, *[1] * len(like.shape))
        return Value(Kind.LINEAR, mask * self._random(like))

    def _raised(self, value: Value, to: Value, like: Aval) -> Value:
        """A value as one of a kind that is not simpler."""
        if value.kind == to.kind:
            return value
        if to.kind == Kind.LATENT:
            return Value(to.kind, value.array if jnp.issubdtype(like.dtype, jnp.inexact) else None)
        if to.kind == Kind.LINEAR:
            return Value(to.kind, jnp.zeros((self.size, *like.shape), like.dtype))
        return Value(to.kind, why=to.why)

    def _fixed_point(
        self, step: Callable[[list[Value]], list[Value]], carry: list[Value], avals: list[Aval]
    ) -> list[Value]:
        """What a loop carries, of the kinds that it keeps. ``step`` may return more than what is carried."""
        while True:
            found: list[Value] = []

            def kinds(arrays: list[Array | None], carry: list[Value] = carry, found: list[Value] = found) -> None:
                found.extend(Value(v.kind, why=v.why) for v in step(_with(carry, arrays)))

            jax.eval_shape(kinds, [v.array for v in carry])
            raised = [
                self._raised(v, max(v, to, key=lambda each: each.kind), aval)
                for v, to, aval in zip(carry, found, avals, strict=False)
            ]
            if [v.kind for v in raised] == [v.kind for v in carry]:
                return carry
            carry = raised

    def _scan(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        body, length, first = eqn.params["jaxpr"], eqn.params["length"], eqn.params["num_consts"]
        end = first + eqn.params["num_carry"]
        consts, rows, avals = given[:first], given[end:], _avals(eqn)
        if eqn.params["length"] == 0:
            return [*given[first:end], *(Value(Kind.KNOWN, jnp.zeros(a.shape, a.dtype)) for a in avals[end - first :])]
        leading = [jnp.moveaxis(v.array, 1, 0) if v.kind == Kind.LINEAR else v.array for v in rows]

        def step(carry: list[Value], index: Array, arrays: list[Array | None]) -> list[Value]:
            nested = Linearity(self.size, self.rng, (*self.loops, (length, index)))
            return nested._inner(body, [*consts, *carry, *_with(rows, arrays)])

        start = jnp.zeros((), int), [None if a is None else a[0] for a in leading]
        carry = self._fixed_point(lambda carry: step(carry, *start), given[first:end], avals)
        out: list[Value] = []

        def once(
            arrays: list[Array | None], row: tuple[Array, list[Array | None]]
        ) -> tuple[list[PyTree], list[PyTree]]:
            found = step(_with(carry, arrays), *row)
            kept = [self._raised(v, to, a) for v, to, a in zip(found, carry, avals, strict=False)]
            out[:] = [*kept, *found[len(kept) :]]
            return [v.array for v in kept], [v.array for v in found[len(kept) :]]

        start_of, over = [v.array for v in carry], (jnp.arange(length), leading)
        last, stacked = jax.lax.scan(once, start_of, over, length, eqn.params["reverse"])
        stacked = [
            jnp.moveaxis(a, 0, 1) if v.kind == Kind.LINEAR else a
            for v, a in zip(out[len(carry) :], stacked, strict=True)
        ]
        return _with(out, [*last, *stacked])

    def _while(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        """The number of passes is not asked for: what is linear may depend on whatever the loop is given."""
        first, end = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        avals, body = _avals(eqn), eqn.params["body_jaxpr"]
        carry = self._fixed_point(lambda carry: self._inner(body, [*given[first:end], *carry]), given[end:], avals)
        (going,) = self._inner(eqn.params["cond_jaxpr"], [*given[:first], *carry])
        if going.kind > Kind.LATENT:
            return [Value(Kind.OTHER, why="while")] * len(avals)
        simple = {
            Kind.KNOWN: self.any_latent,
            Kind.LATENT: self.any_latent,
            Kind.LINEAR: lambda a: self._anywhere(given, a),
        }
        return [v if v.kind == Kind.OTHER else simple[v.kind](a) for v, a in zip(carry, avals, strict=True)]


def value_of(known: Mapping[Var, Value], variable: Var | Literal) -> Value:
    """The value of a variable or a literal."""
    if isinstance(variable, Literal):
        return Value(Kind.KNOWN, jnp.asarray(variable.val, variable.aval.dtype))  # type: ignore[attr-defined]
    return known[variable]


def _with(values: Sequence[Value], arrays: Sequence[Array | None]) -> list[Value]:
    """Values of the same kinds with these arrays."""
    return [Value(v.kind, a, v.why) for v, a in zip(values, arrays, strict=True)]


def _avals(eqn: JaxprEqn) -> list[Aval]:
    """The shapes and types of an equation's outputs."""
    return [v.aval for v in eqn.outvars]  # type: ignore[misc]


def _terms(eqn: JaxprEqn, given: Sequence[Value]) -> set[int] | None:
    """Which operands an equation is linear in together; None where it is not, or is not known to be."""
    name, places = eqn.primitive.name, range(len(given))
    if name in ("mul", "dot_general", "conv_general_dilated", "bcoo_dot_general"):  # linear in either
        linear = [i for i, v in enumerate(given) if v.kind == Kind.LINEAR]
        return set(linear[:1])
    if name == "custom_linear_solve":
        return set(places[sum(eqn.params["const_lengths"]) :])
    if name == "integer_pow" and eqn.params["y"] == 1:
        return {0}
    if name == "convert_element_type" and not _holds(eqn.params["new_dtype"]):
        return None
    return set(places[TERMS[name]]) if name in TERMS else None


def _holds(dtype: np.dtype) -> bool:
    """Whether numbers of a type are those of a line but for rounding: no integers, and none of fewer than 16 bits."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def entries(shapes: Sequence[tuple[str, tuple[int, ...]]], avals: Mapping[str, Aval]) -> tuple[int, dict[str, Value]]:
    """The size of x, all entries of these sites one after another, and each site as a linear function of it."""
    size, before, found = sum(math.prod(shape) for _, shape in shapes), 0, {}
    for name, shape in shapes:
        slopes = jnp.eye(size, math.prod(shape), -before, avals[name].dtype)
        found[name] = Value(Kind.LINEAR, slopes.reshape(size, *shape))
        before += math.prod(shape)
    return size, found
