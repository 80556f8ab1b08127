"""Linearity of a traced function in some of its inputs, x: whether it is free of x,
linear or neither, and which slopes can be non-zero.

Both are read off the function's equations. Numbers cannot show them: the derivative of
a step is 0 everywhere, and ``where(z > 3, x, 0)`` depends on x at few draws of z only.

The slopes of a linear function are polynomials, or quotients of polynomials, in values
that depend on latents. A function of latents that is not such a quotient itself (a
comparison, an exponential) gets random numbers for its values. A slope that is 0 then
is 0 whatever the latents are, but for a chance of rounding (Schwartz 1980, "Fast
probabilistic algorithms for verification of polynomial identities"); the converse does
not hold.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """The kind of a value, from simple to complex: a function of several values is at
    least of the kind of each."""

    KNOWN = 0
    LATENT = 1
    LINEAR = 2
    OTHER = 3


class Value(eqx.Module):
    """A value in a trace.

    Attributes:
        kind: KNOWN if it is the same whatever the latents are; LATENT if it depends on
            latents alone; LINEAR if it is A·x + b with A and b free of x; OTHER if it
            is another function of x.
        array: of a KNOWN value, itself; of a LATENT one, random numbers in its place,
            None where it is not a floating-point number; of a LINEAR one, slopes along
            a leading axis of the entries of x; else None.
        why: of an OTHER value, the name of the primitive that made it one.
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
        self.size = size
        self.rng = rng
        self.loops = loops

    def any_latent(self, like: Aval) -> Value:
        """A function of latents, with random numbers for its values: different numbers
        in every pass of a loop."""
        if not jnp.issubdtype(like.dtype, jnp.inexact):
            return Value(Kind.LATENT)
        return Value(Kind.LATENT, self._random(like))

    def constant(self, value: Array, like: Aval) -> Value:
        return Value(Kind.KNOWN, jnp.asarray(value, like.dtype))

    def equation(self, eqn: JaxprEqn, given: list[Value]) -> Sequence[Value]:
        # Known operands are computed with, so rules see at least one latent or x.
        if _kind(given) == Kind.KNOWN:
            return _values(Kind.KNOWN, rebind(eqn, [v.array for v in given]))
        return super().equation(eqn, given)

    def otherwise(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        """The rule of primitives without a rule.

        An operand's kind is kept if the primitive is linear in it; random numbers stand
        for a nonlinear function of latents.
        """
        kind = _kind(given)
        avals = [aval(variable) for variable in eqn.outvars]
        if kind == Kind.OTHER:
            return [next(v for v in given if v.kind == kind)] * len(avals)
        places = [i for i, v in enumerate(given) if v.kind == kind]
        if kind == Kind.LATENT:
            keeps = _is_linear(eqn, places) or eqn.primitive.name in RATIONAL
            if not keeps or any(v.array is None for v in given):
                return [self.any_latent(a) for a in avals]
            return _values(kind, rebind(eqn, [v.array for v in given]))
        if not _is_linear(eqn, places):
            return [Value(Kind.OTHER, why=eqn.primitive.name) for _ in avals]
        if any(v.array is None for v in given):
            return [self._anywhere(given, a) for a in avals]

        def applied(terms: list[Array]) -> list[Array]:
            operands = dict(zip(places, terms, strict=True))
            return rebind(eqn, [operands.get(i, v.array) for i, v in enumerate(given)])

        # Slopes of the result: the derivative along the slopes of the operands, one
        # entry of x at a time. It is the same at every point, so it is taken at 0.
        slopes = [given[i].array for i in places]
        origin = [jnp.zeros(a.shape[1:], a.dtype) for a in slopes]

        def derivative(along: list[Array]) -> list[Array]:
            _, tangent = jax.jvp(applied, (origin,), (along,))
            return tangent

        return _values(kind, jax.vmap(derivative)(slopes))

    def _same(self, eqn: JaxprEqn, given: list[Value]) -> list[Value]:
        return given

    # x¹ is linear, and what JAX makes of ``x ** 1``.
    def _known_power(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        return given if eqn.params["y"] == 1 else None

    # The derivative of such a function is the user's own, and need not be its slope.
    def _own_derivative(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        return None if _kind(given) > Kind.LATENT else self.enter(eqn, given)

    def _root(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        if _kind(given) > Kind.LATENT:
            return None
        # Random numbers have no root: they must make a covariance.
        covariance = self._any_covariance(given[0].array)
        return _values(Kind.LATENT, rebind(eqn, [covariance]))

    def _solution(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        """A triangular or other solve whose matrix depends on latents: a linear
        function of its right side.

        Random numbers in the matrix would leave the equation without a solution, so no
        slope is computed.
        """
        count = sum(eqn.params["const_lengths"])
        if (_kind(given[:count]), _kind(given[count:])) != (Kind.LATENT, Kind.LINEAR):
            return None
        return [self._anywhere(given, aval(v)) for v in eqn.outvars]

    def _selected(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        # Chosen by x it is a step, which the general rule finds not to be linear.
        which, *cases = given
        if which.kind != Kind.LATENT:
            return None
        return [self._either(cases, aval(eqn.outvars[0]))]

    def _branches(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        if _kind(given) != Kind.LINEAR:
            return None
        by_branch = [
            self.outputs(branch, given[1:]) for branch in eqn.params["branches"]
        ]
        by_output = zip(*by_branch, strict=True)
        return [
            self._either(cases, aval(variable))
            for cases, variable in zip(by_output, eqn.outvars, strict=True)
        ]

    def _random(self, like: Aval | Array) -> Array:
        """Random numbers of modulus 0.5 to 1.5, so never near 0: different numbers in
        every pass of the loops around."""
        shape = (*(length for length, _ in self.loops), *like.shape)
        drawn = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1.0, 1.0], shape)
        phase: Any = 1.0
        if jnp.issubdtype(like.dtype, jnp.complexfloating):
            phase = np.exp(1j * drawn)
        array = jnp.asarray(drawn * phase, like.dtype)
        # One number for each pass, of which this is the one with the loops' indices.
        for _, index in self.loops:
            array = array[index]
        return array

    def _any_covariance(self, like: Array) -> Array:
        """A random positive definite matrix whose entries are 0 where those of ``like``
        are."""
        pattern = (like != 0) | (jnp.swapaxes(like, -1, -2) != 0)
        drawn = self._random(like)
        symmetric = drawn + jnp.conj(jnp.swapaxes(drawn, -1, -2))
        # Entries are at most 3, so 4·n on the diagonal outweighs their row.
        size = like.shape[-1]
        diagonal = 4.0 * size * jnp.eye(size, dtype=like.dtype)
        return jnp.where(pattern, symmetric, 0.0) + diagonal

    def _either(self, cases: Sequence[Value], like: Aval) -> Value:
        """One of several values, chosen by latents."""
        kind = max(v.kind for v in cases)
        if kind == Kind.OTHER:
            return next(v for v in cases if v.kind == kind)
        if kind < Kind.LINEAR and any(v.array is None for v in cases):
            return self.any_latent(like)
        arrays = [v.array for v in cases if kind < Kind.LINEAR or v.kind == kind]
        if not jnp.issubdtype(like.dtype, jnp.inexact):
            return Value(Kind.LATENT)
        # The pattern of any case may be the one that is chosen.
        mixed = sum(self._random(like) * array for array in arrays)
        return Value(max(kind, Kind.LATENT), mixed)

    def _anywhere(self, given: Sequence[Value], like: Aval) -> Value:
        """A linear function of the operands, which may depend on any entry of them."""
        slopes = [
            v.array for v in given if v.kind == Kind.LINEAR and v.array is not None
        ]
        # The entries of x that an operand depends on.
        mask = sum(jnp.any(a.reshape(self.size, -1) != 0, 1) for a in slopes)
        mask = jnp.asarray(mask, like.dtype).reshape(self.size, *[1] * len(like.shape))
        return Value(Kind.LINEAR, mask * self._random(like))

    def _raised(self, value: Value, to: Value, like: Aval) -> Value:
        """The value, as one of a kind that is at least as complex."""
        if value.kind == to.kind:
            return Value(value.kind, value.array, to.why)
        if to.kind == Kind.LATENT:
            if jnp.issubdtype(like.dtype, jnp.inexact):
                return Value(to.kind, value.array)
            return Value(to.kind)
        # A value free of x is linear with slopes of 0.
        if to.kind == Kind.LINEAR:
            return Value(to.kind, jnp.zeros((self.size, *like.shape), like.dtype))
        return Value(to.kind, why=to.why)

    def _carried(
        self,
        step: Callable[[list[Value]], Sequence[Value]],
        carry: Sequence[Value],
        avals: Sequence[Aval],
    ) -> list[Value]:
        """The values that a loop carries, of the kinds that its step keeps. ``step``
        may return more than the carry."""

        def raised(kinds: list[Value]) -> list[Value]:
            return [
                self._raised(v, to, like)
                for v, to, like in zip(carry, kinds, avals, strict=False)
            ]

        def kinds_after(kinds: list[Value]) -> list[Value]:
            values = jax.eval_shape(step, raised(kinds))
            return [_without_array(v) for v in values]

        def higher(a: Value, b: Value) -> Value:
            return max(a, b, key=lambda value: value.kind)

        # Kinds only rise, so they settle after a few passes.
        start = [_without_array(v) for v in carry]
        return raised(fixed_point(kinds_after, start, higher))

    def _scan(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        if _kind(given) <= Kind.LATENT:
            return None
        body = eqn.params["jaxpr"]
        length = eqn.params["length"]
        avals = [aval(variable) for variable in eqn.outvars]
        consts, begin, rows = scanned(eqn, given)
        if length == 0:
            empty = [jnp.zeros(a.shape, a.dtype) for a in avals[len(begin) :]]
            return [*begin, *_values(Kind.KNOWN, empty)]

        def step(carry: list[Value], row: tuple[Array, list[Value]]) -> list[Value]:
            index, operands = row
            loops = (*self.loops, (length, index))
            nested = Linearity(self.size, self.rng, loops)
            return nested.outputs(body, [*consts, *carry, *operands])

        # Rows of slopes: the loop's axis leads in each pass's operands.
        over = (jnp.arange(length), _swapped(rows))

        def first_step(carry: list[Value]) -> list[Value]:
            return step(carry, jax.tree.map(lambda a: a[0], over))

        carry = self._carried(first_step, begin, avals)

        def once(
            carry: list[Value], row: tuple[Array, list[Value]]
        ) -> tuple[list[Value], list[Value]]:
            values = step(carry, row)
            kept = [
                self._raised(v, to, a)
                for v, to, a in zip(values, carry, avals, strict=False)
            ]
            return kept, values[len(kept) :]

        last, stacked = jax.lax.scan(once, carry, over, length, eqn.params["reverse"])
        return [*last, *_swapped(stacked)]

    def _while(self, eqn: JaxprEqn, given: list[Value]) -> list[Value] | None:
        """The rule of a while loop: the number of passes is unknown, so a linear value
        may depend on every input of the loop."""
        if _kind(given) <= Kind.LATENT:
            return None
        first = eqn.params["cond_nconsts"]
        end = first + eqn.params["body_nconsts"]
        body = eqn.params["body_jaxpr"]
        avals = [aval(variable) for variable in eqn.outvars]

        def step(carry: list[Value]) -> list[Value]:
            return self.outputs(body, [*given[first:end], *carry])

        carry = self._carried(step, given[end:], avals)
        (going,) = self.outputs(eqn.params["cond_jaxpr"], [*given[:first], *carry])
        # A loop that x ends is not linear in it.
        if going.kind > Kind.LATENT:
            return [Value(Kind.OTHER, why="while")] * len(avals)
        values = []
        for value, like in zip(carry, avals, strict=True):
            if value.kind == Kind.OTHER:
                values.append(value)
            elif value.kind == Kind.LINEAR:
                values.append(self._anywhere(given, like))
            else:
                values.append(self.any_latent(like))
        return values

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


def _values(kind: Kind, arrays: Sequence[Array]) -> list[Value]:
    return [Value(kind, array) for array in arrays]


def _without_array(value: Value) -> Value:
    return Value(value.kind, why=value.why)


def _swapped(rows: Sequence[Value]) -> list[Value]:
    """Slopes with a loop's axis moved in front of the axis of x's entries, or back."""
    swapped = []
    for row in rows:
        if row.kind == Kind.LINEAR:
            row = Value(row.kind, jnp.moveaxis(row.array, 1, 0), row.why)
        swapped.append(row)
    return swapped


def _is_linear(eqn: JaxprEqn, places: Sequence[int]) -> bool:
    """Return whether an equation is linear in these operands jointly, up to a constant,
    with the others given.

    It is where JAX transposes it with respect to these, and a number comes out as it is
    but for rounding.
    """
    name = eqn.primitive.name
    if name == "reduce_precision":
        return False
    if not all(_holds(aval(variable).dtype) for variable in eqn.outvars):
        return False
    params = dict(eqn.params)
    if name == "scatter":
        # JAX transposes it for unique indices alone. It is linear for others too.
        params["unique_indices"] = True
    question = (
        eqn.primitive,
        tuple(params.items()),
        tuple(aval(variable) for variable in eqn.invars),
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
    """Return whether JAX transposes a primitive with respect to these operands."""

    def transposed(operands: Sequence[Array]) -> Array:
        def applied(*terms: Array) -> list[Array]:
            by_place = dict(zip(places, terms, strict=True))
            inputs = [by_place.get(i, operand) for i, operand in enumerate(operands)]
            return bind(primitive, inputs, dict(params))

        shapes = [avals[i] for i in places]
        cotangents = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(applied, *shapes)
        )
        cotangents_in: Array = jax.linear_transpose(applied, *shapes)(cotangents)
        return cotangents_in

    try:
        jax.eval_shape(transposed, avals)
    except Exception:  # each primitive refuses in its own way
        return False
    return True


def _holds(dtype: np.dtype) -> bool:
    """Return whether a type's numbers behave like real numbers but for rounding;
    integers, and types of fewer than 16 bits, do not."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def entries(
    shapes: Sequence[tuple[str, tuple[int, ...]]], avals: Mapping[str, Aval]
) -> tuple[int, dict[str, Value]]:
    """The size of x, all entries of these sites one after another, and each site as a
    linear function of it."""
    size = sum(math.prod(shape) for _, shape in shapes)
    before = 0
    sites = {}
    for name, shape in shapes:
        # Ones at the site's own entries of x.
        slopes = jnp.eye(size, math.prod(shape), -before, avals[name].dtype)
        sites[name] = Value(Kind.LINEAR, slopes.reshape(size, *shape))
        before += math.prod(shape)
    return size, sites
