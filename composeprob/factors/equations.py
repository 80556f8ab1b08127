"""One walk over the equations of a traced function; an analysis is a table of rules for
it.

Kildall 1973, "A unified approach to global program optimization": values of whatever an
analysis is about go from equation to equation, and what a loop carries is followed
until it changes no more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jaxtyping import PyTree

Aval = jax.core.ShapedArray
Fact = TypeVar("Fact")


Rule = Callable[[Any, JaxprEqn, list[Any]], Sequence[Any] | None]


class Walk(Generic[Fact]):
    """An analysis: what it knows of each value in a traced function, a Fact, from what
    it knows of the inputs.

    Attributes:
        rules: by a primitive's name, what is known of its outputs: a function of the
            walk, the equation and what is known of its operands. None from a rule
            leaves the equation to `otherwise`.
    """

    rules: ClassVar[Mapping[str, Rule]] = {}

    @abstractmethod
    def constant(self, value: Any, like: Aval) -> Fact:
        """What is known of a number, of this shape and type."""

    def value_of(self, known: Mapping[Var, Fact], variable: Var | Literal) -> Fact:
        """What is known of a variable or a literal."""
        return (
            self.constant(variable.val, aval(variable))
            if isinstance(variable, Literal)
            else known[variable]
        )

    @abstractmethod
    def otherwise(self, eqn: JaxprEqn, given: list[Fact]) -> Sequence[Fact]:
        """What is known of the outputs of an equation that no rule is about."""

    def equation(self, eqn: JaxprEqn, given: list[Fact]) -> Sequence[Fact]:
        """What is known of an equation's outputs."""
        rule = self.rules.get(eqn.primitive.name)
        found = None if rule is None else rule(self, eqn, given)
        return self.otherwise(eqn, given) if found is None else found

    def evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[object],
        given: Sequence[Fact | None],
        copies: Mapping[Var, Var] | None = None,
    ) -> dict[Var, Fact]:
        """What is known of every variable, from what is known of the inputs; None for
        an input that is the copy of a variable, ``copies`` being ``{variable:
        input}``."""
        known = {
            v: self.constant(c, aval(v))
            for v, c in zip(jaxpr.constvars, consts, strict=True)
        }
        known.update(
            (v, value)
            for v, value in zip(jaxpr.invars, given, strict=True)
            if value is not None
        )
        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [self.value_of(known, v) for v in eqn.invars])
            known.update(zip(eqn.outvars, found, strict=True))
            known.update(
                {copies[v]: known[v] for v in eqn.outvars if v in copies}
                if copies
                else {}
            )
        return known

    def outputs(self, traced: ClosedJaxpr | Jaxpr, given: Sequence[Fact]) -> list[Fact]:
        """What is known of the outputs of a function."""
        jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
        known = self.evaluate(jaxpr, getattr(traced, "consts", ()), given)
        return [self.value_of(known, v) for v in jaxpr.outvars]

    def enter(self, eqn: JaxprEqn, given: list[Fact]) -> list[Fact] | None:
        """The rule for a call: what is known of the outputs of the function that is
        called."""
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        return None if inner is None else self.outputs(inner, given)


CALLS: Mapping[str, Rule] = dict.fromkeys(
    (
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "checkpoint",
        "remat2",
    ),
    Walk.enter,
)
"""Rules that look into primitives whose one inner function has their inputs and
outputs."""


def aval(variable: Any) -> Aval:
    """The shape and type of a variable or a literal."""
    found: Aval = variable.aval
    return found


def scanned(
    eqn: JaxprEqn, values: Sequence[Fact]
) -> tuple[Sequence[Fact], Sequence[Fact], Sequence[Fact]]:
    """The operands of a scan: its constants, what it carries first, and what it takes a
    row of at each pass."""
    first = eqn.params["num_consts"]
    end = first + eqn.params["num_carry"]
    return values[:first], values[first:end], values[end:]


def fixed_point(
    step: Callable[[list[Fact]], Sequence[Fact]],
    carry: Sequence[Fact],
    join: Callable[[Fact, Fact], Fact],
) -> list[Fact]:
    """What is known of what a loop carries, in every pass; ``step`` may return more
    than that."""
    carry = list(carry)
    while (
        longer := [join(a, b) for a, b in zip(carry, step(carry), strict=False)]
    ) != carry:
        carry = longer
    return carry


def rebind(
    eqn: JaxprEqn, operands: Sequence[Array], params: dict[str, object] | None = None
) -> list[Array]:
    """The outputs of a traced equation for other operands, and where they are given for
    other parameters."""
    return bind(eqn.primitive, operands, eqn.params if params is None else params)


def bind(
    primitive: Primitive, operands: Sequence[Array], params: dict[str, object]
) -> list[Array]:
    """What a primitive with an equation's parameters makes of operands."""
    bound = primitive.get_bind_params(params)
    functions, params = (
        bound if isinstance(bound, tuple) else ((), bound)
    )  # a pair in older versions of JAX
    out = primitive.bind(*functions, *operands, **params)
    return list(out) if primitive.multiple_results else [out]


class Evaluation(Walk[Array]):
    """The values themselves."""

    def constant(self, value: Array, like: object) -> Array:
        return value

    def otherwise(self, eqn: JaxprEqn, given: list[Array]) -> list[Array]:
        return rebind(eqn, given)


class Influence(Walk[frozenset[str]]):
    """By the names of inputs, which of them each value depends on.

    Calls and scans are looked into; of any other primitive every output depends on
    every input.
    """

    def constant(self, value: object, like: object) -> frozenset[str]:
        return frozenset()

    def otherwise(
        self, eqn: JaxprEqn, given: list[frozenset[str]]
    ) -> list[frozenset[str]]:
        return [frozenset[str]().union(*given)] * len(eqn.outvars)

    def scan(self, eqn: JaxprEqn, given: list[frozenset[str]]) -> list[frozenset[str]]:
        """Of a loop, whose carry depends on what it depended on in the step before."""
        consts, carry, rows = scanned(eqn, given)

        def step(carry: list[frozenset[str]]) -> list[frozenset[str]]:
            return self.outputs(eqn.params["jaxpr"], [*consts, *carry, *rows])

        return step(fixed_point(step, carry, frozenset.union))

    rules = {**CALLS, "scan": scan}  # noqa: RUF012


def equations(within: object, closed: Collection[str] = ()) -> Iterator[JaxprEqn]:
    """Every equation in a traced function and in the functions that are parameters of
    its equations, loops' and branches' among them; or of each in a tuple. Primitives
    named in ``closed`` are left out with all that is inside."""
    if isinstance(within, ClosedJaxpr):
        within = within.jaxpr
    if isinstance(within, Jaxpr):
        for eqn in within.eqns:
            if eqn.primitive.name not in closed:
                yield eqn
                yield from equations(tuple(eqn.params.values()), closed)
    elif isinstance(within, tuple | list):
        for each in within:
            yield from equations(each, closed)


def fingerprint(*values: object, objects: bool = True) -> str:
    """A digest of computations, arrays, numbers, and containers of these; equal where
    they compute the same.

    Traced arrays count by their shapes. Of functions counts their code, and of other
    objects that hold no numbers only the type. Precisions and the devices that arrays
    are on count nothing: they are settings of JAX's own. With ``objects`` functions
    that are called back when the computation runs (`jax.debug.callback`) must be the
    same objects, as compiled code holds them, and not only of the same code.
    """
    reader = _Reader(objects)
    reader.read(values)
    return reader.digest.hexdigest()


class _Number(int):
    """Of a variable, by which traces of the same equations agree whatever objects their
    variables are."""


class _Reader(Walk[PyTree]):
    """Of each value in a trace it knows the number of its variable, or the literal
    itself."""

    def __init__(self, objects: bool) -> None:
        self.objects = objects
        self.digest = hashlib.blake2b(digest_size=16)
        self.numbers = map(_Number, itertools.count())

    def write(self, *words: object) -> None:
        self.digest.update("\0".join(map(str, words)).encode() + b"\1")

    def read(self, value: PyTree) -> None:
        if isinstance(value, _Number):
            self.write("variable", value)
        elif isinstance(value, ClosedJaxpr):
            self.jaxpr(value.jaxpr)
            self.read(value.consts)
        elif isinstance(value, Jaxpr):
            self.jaxpr(value)
        elif isinstance(value, jax.core.Tracer):
            self.write("traced", value.aval.str_short())
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            self.array(value)
        elif isinstance(
            value, str | int | float | complex | bool | bytes | np.dtype | None
        ):
            self.write(type(value).__name__, repr(value))
        elif isinstance(value, Mapping):
            self.read(sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, tuple | list | frozenset | set):
            entries: Iterable[PyTree] = (
                sorted(value, key=str) if isinstance(value, frozenset | set) else value
            )
            self.write("(")
            self.each(entries)
            self.write(")")
        elif isinstance(value, CodeType):
            self.digest.update(value.co_code)
            self.read((value.co_consts, value.co_names))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.write(type(value).__qualname__)
            self.read(
                [getattr(value, field.name) for field in dataclasses.fields(value)]
            )
        elif hasattr(value, "__code__"):
            self.write(value.__qualname__)
            self.read(value.__code__)
        else:
            self.write(type(value).__qualname__)

    def each(self, values: Iterable[PyTree]) -> None:
        for value in values:
            self.read(value)

    def array(self, value: PyTree) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        self.write("array", array.shape, array.dtype)
        self.digest.update(array.tobytes())

    def jaxpr(self, jaxpr: Jaxpr) -> None:
        self.write("inputs")
        numbers = self.bound([*jaxpr.constvars, *jaxpr.invars])
        count = len(jaxpr.constvars)
        known = self.evaluate(jaxpr, numbers[:count], numbers[count:])
        self.each(self.value_of(known, v) for v in jaxpr.outvars)

    def constant(self, value: PyTree, like: object) -> PyTree:
        return value

    def otherwise(self, eqn: JaxprEqn, given: list[PyTree]) -> list[PyTree]:
        self.write(eqn.primitive.name)
        self.each(given)
        how = "precision", "sharding", "out_sharding"  # to compute, and not what
        self.read(
            {name: value for name, value in eqn.params.items() if name not in how}
        )
        if self.objects and "callback" in eqn.primitive.name:
            self.called(eqn.params["callback"])
        return self.bound(eqn.outvars)

    def called(self, value: PyTree) -> None:
        """The user's function in JAX's wrappers around it, which are new in every
        trace."""
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.called(getattr(value, field.name))
        elif (
            isinstance(value, FunctionType)
            and value.__module__.partition(".")[0] == "jax"
        ):
            for cell in value.__closure__ or ():
                self.called(cell.cell_contents)
        elif callable(value):
            self.write(
                id(getattr(value, "__self__", value)),
                id(getattr(value, "__func__", value)),
            )

    def bound(self, variables: Sequence[Var]) -> list[_Number]:
        self.write(*(aval(v).str_short() for v in variables))
        return list(itertools.islice(self.numbers, len(variables)))
