"""What a traced function is of some of its inputs, x: free of it, linear, or neither;
and which slopes can be non-zero.

Both are read off the function's equations. Numbers cannot show them: the derivative of
a step is 0 everywhere, and ``where(z > 3, x, 0)`` depends on x at few draws of z only.

The slopes of a linear function are polynomials, or quotients of such, in values that
depend on latents. Here each function of latents that is none itself (a comparison, an
exponential) has random numbers for its values. A slope that is 0 then is 0 whatever the
latents are, but for a chance of rounding (Schwartz 1980, "Fast probabilistic algorithms
for verification of polynomial identities"); the converse does not hold.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import JaxprEqn, Primitive
from jaxtyping import PyTree

from composeprob.factors.equations import (
    CALLS,
    Aval,
    Walk,
    aval,
    bind,
    fixed_point,
    rebind,
    scanned,
)


class Kind(enum.IntEnum):
    """What a value is, from the simplest on: a function of others is at least what they
    are."""

    KNOWN = 0
    LATENT = 1
    LINEAR = 2
    OTHER = 3


class Value(eqx.Module):
    """A value in a trace.

    Attributes:
        kind: whether it is the same whatever the latents are, depends on latents alone,
            is A·x + b with A and b free of x, or is another function of x.
        array: the value itself; random numbers in its place, None where it is no
            floating-point number; slopes along a leading axis of the entries of x;
            None.
        why: of another function, the name of the primitive that made it one.
    """

    kind: Kind = eqx.field(static=True)
    array: PyTree = None
    why: str = eqx.field(static=True, default="")


RATIONAL = {
    "mul",
    "div",
    "dot_general",
    "conv_general_dilated",
    "bcoo_dot_general",
    "scatter-mul",
} | {
    "triangular_solve",
    "tridiagonal_solve",
}
"""Primitives that are polynomials, or quotients of such, of several operands
together."""


class Linearity(Walk[Value]):
    """An evaluation of equations by kinds, with x of ``size`` entries. ``loops`` are
    the lengths of the loops that stand around, and the index in each."""

    def __init__(
        self,
        size: int,
        rng: np.random.Generator,
        loops: tuple[tuple[int, Array], ...] = (),
    ):
        self.size, self.rng, self.loops = size, rng, loops

    def any_latent(self, like: Aval) -> Value:
        """A function of latents with random numbers for its values, others in every
        pass of a loop."""
        if not jnp.issubdtype(like.dtype, jnp.inexact):
            return Value(Kind.LATENT)
        return Value(Kind.LATENT, self._random(like))

    def constant(self, value: Array, like: Aval) -> Value:
        return Value(Kind.KNOWN, jnp.asarray(value, like.dtype))

    def equation(self, eqn: JaxprEqn, given: list[Value]) -> Sequence[Value]:
        if _kind(given) == Kind.KNOWN:
            return [
                Value(Kind.KNOWN, array)
                for array in rebind(eqn, [v.array for v in given])
            ]
        return super().equation(eqn, given)

    def otherwise(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        kind, avals = _kind(given), list(map(aval, eqn.outvars))
        if kind == Kind.OTHER:
            return [next(v for v in given if v.kind == kind)] * len(avals)
        places = [i for i, v in enumerate(given) if v.kind == kind]
        linear = _is_linear(eqn, places) or (
            kind == Kind.LATENT and eqn.primitive.name in RATIONAL
        )
        if not linear:
            other = Value(Kind.OTHER, why=eqn.primitive.name)
            return [self.any_latent(a) if kind == Kind.LATENT else other for a in avals]
        if any(v.array is None for v in given):
            return [
                self.any_latent(a) if kind == Kind.LATENT else self._anywhere(given, a)
                for a in avals
            ]
        if kind == Kind.LATENT:
            return [
                Value(kind, array) for array in rebind(eqn, [v.array for v in given])
            ]

        def applied(terms: list[Array]) -> list[Array]:
            operands = dict(zip(places, terms, strict=True))
            return rebind(eqn, [operands.get(i, v.array) for i, v in enumerate(given)])

        slopes = [given[i].array for i in places]
        origin = [jnp.zeros(a.shape[1:], a.dtype) for a in slopes]
        moved = jax.vmap(lambda along: jax.jvp(applied, (origin,), (along,))[1])(slopes)
        return [Value(kind, array) for array in moved]

    def _same(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        return given

    def _known_power(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        return given if eqn.params["y"] == 1 else None

    def _own_derivative(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        return None if _kind(given) > Kind.LATENT else self.enter(eqn, given)

    def _root(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        if _kind(given) > Kind.LATENT:
            return None
        return [
            Value(Kind.LATENT, array)
            for array in rebind(eqn, [self._any_covariance(given[0].array)])
        ]

    def _solution(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        """With random numbers in its matrix it would have none."""
        count = sum(eqn.params["const_lengths"])
        if (_kind(given[:count]), _kind(given[count:])) != (Kind.LATENT, Kind.LINEAR):
            return None
        return [self._anywhere(given, aval(v)) for v in eqn.outvars]

    def _selected(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        which, *cases = given
        return (
            [self._either(cases, aval(eqn.outvars[0]))]
            if which.kind == Kind.LATENT
            else None
        )

    def _branches(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        if _kind(given) != Kind.LINEAR:
            return None
        each = [self.outputs(branch, given[1:]) for branch in eqn.params["branches"]]
        return [
            self._either(cases, aval(v))
            for *cases, v in zip(*each, eqn.outvars, strict=True)
        ]

    def _random(self, like: Aval | Array) -> Array:
        shape = (*(length for length, _ in self.loops), *like.shape)
        drawn = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1.0, 1.0], shape)
        phase = (
            np.exp(1j * drawn)
            if jnp.issubdtype(like.dtype, jnp.complexfloating)
            else 1.0
        )
        array = jnp.asarray(drawn * phase, like.dtype)
        for _, index in self.loops:
            array = array[index]
        return array

    def _any_covariance(self, like: Array) -> Array:
        """A random positive definite matrix whose entries are 0 where those of ``like``
        are."""
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
        return Value(
            max(kind, Kind.LATENT), sum(self._random(like) * a for a in arrays)
        )

    def _anywhere(self, given: Sequence[Value], like: Aval) -> Value:
        """A linear function of what is given, which may depend on any entry of it."""
        slopes = [
            v.array for v in given if v.kind == Kind.LINEAR and v.array is not None
        ]
        mask = sum(jnp.any(a.reshape(self.size, -1) != 0, 1) for a in slopes)
        mask = jnp.asarray(mask, like.dtype).reshape(self.size, *[1] * len(like.shape))
        return Value(Kind.LINEAR, mask * self._random(like))

    def _raised(self, value: Value, to: Value, like: Aval) -> Value:
        """A value as one of a kind that is not simpler."""
        if value.kind == to.kind:
            return Value(value.kind, value.array, to.why)
        if to.kind == Kind.LATENT:
            return Value(
                to.kind,
                value.array if jnp.issubdtype(like.dtype, jnp.inexact) else None,
            )
        if to.kind == Kind.LINEAR:
            return Value(to.kind, jnp.zeros((self.size, *like.shape), like.dtype))
        return Value(to.kind, why=to.why)

    def _carried(
        self,
        step: Callable[[list[Value]], Sequence[Value]],
        carry: Sequence[Value],
        avals: Sequence[Aval],
    ) -> list[Value]:
        """What a loop carries, of the kinds that it keeps. ``step`` may return more
        than what is carried."""

        def raised(kinds: list[Value]) -> list[Value]:
            return [
                self._raised(v, to, like)
                for v, to, like in zip(carry, kinds, avals, strict=False)
            ]

        def found(kinds: list[Value]) -> list[Value]:
            return [
                Value(v.kind, why=v.why) for v in jax.eval_shape(step, raised(kinds))
            ]

        kinds = [Value(v.kind, why=v.why) for v in carry]
        return raised(
            fixed_point(
                found, kinds, lambda a, b: max(a, b, key=lambda each: each.kind)
            )
        )

    def _scan(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        if _kind(given) <= Kind.LATENT:
            return None
        body, length, avals = (
            eqn.params["jaxpr"],
            eqn.params["length"],
            list(map(aval, eqn.outvars)),
        )
        consts, begin, rows = scanned(eqn, given)
        if length == 0:
            return [
                *begin,
                *(
                    Value(Kind.KNOWN, jnp.zeros(a.shape, a.dtype))
                    for a in avals[len(begin) :]
                ),
            ]

        def step(carry: list[Value], row: tuple[Array, list[Value]]) -> list[Value]:
            nested = Linearity(self.size, self.rng, (*self.loops, (length, row[0])))
            return nested.outputs(body, [*consts, *carry, *row[1]])

        over = jnp.arange(length), _swapped(rows)
        carry = self._carried(
            lambda carry: step(carry, jax.tree.map(lambda a: a[0], over)), begin, avals
        )

        def once(
            carry: list[Value], row: tuple[Array, list[Value]]
        ) -> tuple[list[Value], list[Value]]:
            found = step(carry, row)
            kept = [
                self._raised(v, to, a)
                for v, to, a in zip(found, carry, avals, strict=False)
            ]
            return kept, found[len(kept) :]

        last, stacked = jax.lax.scan(once, carry, over, length, eqn.params["reverse"])
        return [*last, *_swapped(stacked)]

    def _while(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        """The number of passes is not asked for: what is linear may depend on whatever
        the loop is given."""
        if _kind(given) <= Kind.LATENT:
            return None
        first, end = (
            eqn.params["cond_nconsts"],
            eqn.params["cond_nconsts"] + eqn.params["body_nconsts"],
        )
        avals, body = list(map(aval, eqn.outvars)), eqn.params["body_jaxpr"]
        carry = self._carried(
            lambda carry: self.outputs(body, [*given[first:end], *carry]),
            given[end:],
            avals,
        )
        (going,) = self.outputs(eqn.params["cond_jaxpr"], [*given[:first], *carry])
        if going.kind > Kind.LATENT:
            return [Value(Kind.OTHER, why="while")] * len(avals)
        simple = {
            Kind.KNOWN: self.any_latent,
            Kind.LATENT: self.any_latent,
            Kind.LINEAR: lambda a: self._anywhere(given, a),
        }
        return [
            v if v.kind == Kind.OTHER else simple[v.kind](a)
            for v, a in zip(carry, avals, strict=True)
        ]

    rules = {  # noqa: RUF012
        **CALLS,
        **dict.fromkeys(
            (
                "optimization_barrier",
                "device_put",
                "copy",
                "copy_p",
                "sharding_constraint",
            ),
            _same,
        ),
        "custom_vjp_call": _own_derivative,
        "integer_pow": _known_power,
        "cholesky": _root,
        "custom_linear_solve": _solution,
        "select_n": _selected,
        "cond": _branches,
        "scan": _scan,
        "while": _while,
    }


def _kind(values: Sequence[Value]) -> Kind:
    return max((v.kind for v in values), default=Kind.KNOWN)


def _swapped(rows: Sequence[Value]) -> list[Value]:
    """Slopes with the axis of a loop in front of that of x's entries, or back."""
    return [
        Value(v.kind, jnp.moveaxis(v.array, 1, 0), v.why)
        if v.kind == Kind.LINEAR
        else v
        for v in rows
    ]


def _is_linear(eqn: JaxprEqn, places: Sequence[int]) -> bool:
    """Whether an equation is linear, up to a constant, in these operands together,
    given the others.

    It is where JAX transposes it with respect to these, and a number comes out as it is
    but for rounding.
    """
    params = dict(eqn.params)
    if eqn.primitive.name == "reduce_precision" or not all(
        _holds(aval(v).dtype) for v in eqn.outvars
    ):
        return False
    if (
        eqn.primitive.name == "scatter"
    ):  # it is linear where one place is written twice, too
        params["unique_indices"] = True
    question = (
        eqn.primitive,
        tuple(params.items()),
        tuple(map(aval, eqn.invars)),
        tuple(places),
    )
    try:
        return _transposes(*question)
    except TypeError:  # a parameter has no hash
        return _transposes.__wrapped__(*question)


@functools.lru_cache(maxsize=1024)
def _transposes(
    primitive: Primitive,
    params: tuple[tuple[str, object], ...],
    avals: tuple[Aval, ...],
    places: tuple[int, ...],
) -> bool:
    def transposed(operands: Sequence[Array]) -> Array:
        def applied(*terms: Array) -> list[Array]:
            each = dict(zip(places, terms, strict=True))
            return bind(
                primitive,
                [each.get(i, operand) for i, operand in enumerate(operands)],
                dict(params),
            )

        shapes = [avals[i] for i in places]
        cotangents = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(applied, *shapes)
        )
        found: Array = jax.linear_transpose(applied, *shapes)(cotangents)
        return found

    try:
        jax.eval_shape(transposed, avals)
    except Exception:  # whatever it is, as each primitive refuses in its own way
        return False
    return True


def _holds(dtype: np.dtype) -> bool:
    """Whether numbers of a type are those of a line but for rounding: no integers, and
    none of fewer than 16 bits."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def entries(
    shapes: Sequence[tuple[str, tuple[int, ...]]], avals: Mapping[str, Aval]
) -> tuple[int, dict[str, Value]]:
    """The size of x, all entries of these sites one after another, and each site as a
    linear function of it."""
    size, before, found = sum(math.prod(shape) for _, shape in shapes), 0, {}
    for name, shape in shapes:
        slopes = jnp.eye(size, math.prod(shape), -before, avals[name].dtype)
        found[name] = Value(Kind.LINEAR, slopes.reshape(size, *shape))
        before += math.prod(shape)
    return size, found
