"""Dataflow analyses of traced functions: one walk over their equations, and a table of
rules for each analysis.

Kildall 1973, "A unified approach to global program optimization": an analysis passes
facts about values from equation to equation, and repeats the body of a loop until the
facts about its carry change no more.
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
    """An analysis: a Fact about each value in a traced function, derived from facts
    about the inputs.

    Attributes:
        rules: by a primitive's name, a function of the walk, the equation and the facts
            about its operands, which returns the facts about its outputs. None from a
            rule leaves the equation to `otherwise`.
    """

    rules: ClassVar[Mapping[str, Rule]] = {}

    @abstractmethod
    def constant(self, value: Any, like: Aval) -> Fact:
        """Return the fact about a number of this shape and type."""

    def value_of(self, facts: Mapping[Var, Fact], variable: Var | Literal) -> Fact:
        """Return the fact about a variable or a literal."""
        if isinstance(variable, Literal):
            return self.constant(variable.val, aval(variable))
        return facts[variable]

    @abstractmethod
    def otherwise(self, eqn: JaxprEqn, given: list[Fact]) -> Sequence[Fact]:
        """Return the facts about the outputs of an equation without a rule."""

    def equation(self, eqn: JaxprEqn, given: list[Fact]) -> Sequence[Fact]:
        """Return the facts about an equation's outputs."""
        rule = self.rules.get(eqn.primitive.name)
        if rule is not None:
            outputs = rule(self, eqn, given)
            if outputs is not None:
                return outputs
        return self.otherwise(eqn, given)

    def evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[object],
        given: Sequence[Fact | None],
        copies: Mapping[Var, Var] | None = None,
    ) -> dict[Var, Fact]:
        """Return the facts about every variable, from the ``given`` ones about inputs.

        An input that is the copy of a variable, ``copies`` being ``{variable: input}``,
        is given as None.
        """
        facts = {
            v: self.constant(c, aval(v))
            for v, c in zip(jaxpr.constvars, consts, strict=True)
        }
        for variable, fact in zip(jaxpr.invars, given, strict=True):
            if fact is not None:
                facts[variable] = fact
        for eqn in jaxpr.eqns:
            operands = [self.value_of(facts, v) for v in eqn.invars]
            outputs = self.equation(eqn, operands)
            for variable, fact in zip(eqn.outvars, outputs, strict=True):
                facts[variable] = fact
                if copies and variable in copies:
                    facts[copies[variable]] = fact
        return facts

    def outputs(self, traced: ClosedJaxpr | Jaxpr, given: Sequence[Fact]) -> list[Fact]:
        """Return the facts about a function's outputs, from those about its inputs."""
        jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
        facts = self.evaluate(jaxpr, getattr(traced, "consts", ()), given)
        return [self.value_of(facts, v) for v in jaxpr.outvars]

    def enter(self, eqn: JaxprEqn, given: list[Fact]) -> list[Fact] | None:
        """Rule of a call: the facts about the outputs of the called function."""
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
"""Rules that enter primitives whose one inner function has their inputs and
outputs."""


def aval(variable: Any) -> Aval:
    """Return the shape and type of a variable or a literal."""
    abstract_value: Aval = variable.aval
    return abstract_value


def scanned(
    eqn: JaxprEqn, values: Sequence[Fact]
) -> tuple[Sequence[Fact], Sequence[Fact], Sequence[Fact]]:
    """Split the operands of a scan: its constants, its initial carry, and the arrays
    that it takes a row of at each pass."""
    if "ft_in" in eqn.params:  # since JAX 0.12
        first, count, _ = (len(list(group)) for group in eqn.params["ft_in"].unpack())
    else:
        first = eqn.params["num_consts"]
        count = eqn.params["num_carry"]
    end = first + count
    return values[:first], values[first:end], values[end:]


def fixed_point(
    step: Callable[[list[Fact]], Sequence[Fact]],
    carry: Sequence[Fact],
    join: Callable[[Fact, Fact], Fact],
) -> list[Fact]:
    """Return facts about the carry of a loop that hold in every pass; ``step`` may
    return facts about other outputs behind those."""
    # A join only adds to the facts, of which there are finitely many: this ends.
    carry = list(carry)
    while True:
        joined = [join(a, b) for a, b in zip(carry, step(carry), strict=False)]
        if joined == carry:
            return carry
        carry = joined


def rebind(
    eqn: JaxprEqn, operands: Sequence[Array], params: dict[str, object] | None = None
) -> list[Array]:
    """Evaluate a traced equation for other operands, and with other parameters where
    they are given."""
    if params is None:
        params = eqn.params
    return bind(eqn.primitive, operands, params)


def bind(
    primitive: Primitive, operands: Sequence[Array], params: dict[str, object]
) -> list[Array]:
    """Apply a primitive with an equation's parameters to operands."""
    bound = primitive.get_bind_params(params)
    if isinstance(bound, tuple):  # in older versions of JAX
        functions, params = bound
        operands = (*functions, *operands)
    else:
        params = bound
    out = primitive.bind(*operands, **params)
    return list(out) if primitive.multiple_results else [out]


class Evaluation(Walk[Array]):
    """Evaluation: the facts are the values themselves."""

    def constant(self, value: Array, like: object) -> Array:
        return value

    def otherwise(self, eqn: JaxprEqn, given: list[Array]) -> list[Array]:
        return rebind(eqn, given)


class Influence(Walk[frozenset[str]]):
    """Dependence: the names of the inputs that each value depends on.

    Calls and scans are entered; of any other primitive every output depends on every
    input.
    """

    def constant(self, value: object, like: object) -> frozenset[str]:
        return frozenset()

    def otherwise(
        self, eqn: JaxprEqn, given: list[frozenset[str]]
    ) -> list[frozenset[str]]:
        return [frozenset[str]().union(*given)] * len(eqn.outvars)

    def scan(self, eqn: JaxprEqn, given: list[frozenset[str]]) -> list[frozenset[str]]:
        """Rule of a loop, whose carry depends on the carry of the step before."""
        consts, carry, rows = scanned(eqn, given)

        def step(carry: list[frozenset[str]]) -> list[frozenset[str]]:
            return self.outputs(eqn.params["jaxpr"], [*consts, *carry, *rows])

        return step(fixed_point(step, carry, frozenset.union))

    rules = {**CALLS, "scan": scan}  # noqa: RUF012


def equations(within: object, closed: Collection[str] = ()) -> Iterator[JaxprEqn]:
    """Every equation in a traced function, or in each of a tuple of them.

    Functions that are parameters of equations, those of loops and branches among them,
    are entered. Primitives named in ``closed`` are left out with all that is inside.
    """
    if isinstance(within, ClosedJaxpr):
        within = within.jaxpr
    if isinstance(within, Jaxpr):
        for eqn in within.eqns:
            if eqn.primitive.name not in closed:
                yield eqn
                yield from equations(tuple(eqn.params.values()), closed)
    elif isinstance(within, tuple | list):
        for function in within:
            yield from equations(function, closed)


DERIVED = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Primitives of functions with derivatives of their own."""
CALLBACKS = frozenset({"pure_callback", "io_callback"})
"""Primitives that call the host, which have no derivative."""


def without_constants(traced: ClosedJaxpr) -> Jaxpr:
    """Return the equations of a traced function without the arrays that it reads."""
    # Since JAX 0.12 a Jaxpr carries them, if not made anew.
    if isinstance(traced, Jaxpr):
        return ClosedJaxpr(traced, ())
    return traced.jaxpr


def calls_host(within: object) -> bool:
    """Return whether a traced function calls the host where it would be
    differentiated."""
    found = equations(within, DERIVED)
    return any(eqn.primitive.name in CALLBACKS for eqn in found)


def fed_by_host(traced: ClosedJaxpr) -> list[bool]:
    """Return for each output whether it depends on a call of the host."""
    fed: set[object] = set()
    for eqn in traced.jaxpr.eqns:
        calls = eqn.primitive.name in CALLBACKS
        if eqn.primitive.name not in DERIVED:
            calls = calls or calls_host(tuple(eqn.params.values()))
        inputs = [v for v in eqn.invars if isinstance(v, Var)]
        if calls or not fed.isdisjoint(inputs):
            fed.update(eqn.outvars)
    return [isinstance(v, Var) and v in fed for v in traced.jaxpr.outvars]


def fingerprint(*values: object, objects: bool = True) -> str:
    """Return a digest of computations, arrays, numbers, and containers of these; equal
    where they compute the same.

    Traced arrays count by their shapes, functions by their code, and other objects that
    hold no numbers by their type alone. Precisions and the devices that arrays are on
    do not count: they are settings of JAX's own. With ``objects`` functions that are
    called back when the computation runs (`jax.debug.callback`) must be the same
    objects, as compiled code holds them, and not only of the same code.
    """
    reader = _Reader(objects)
    reader.read(values)
    return reader.digest.hexdigest()


class _Number(int):
    """Number of a variable: traces of the same equations agree in it, whatever objects
    their variables are."""


class _Reader(Walk[PyTree]):
    """Digest of a trace: the fact about a value is the number of its variable, or the
    literal itself."""

    def __init__(self, objects: bool) -> None:
        self.objects = objects
        self.digest = hashlib.blake2b(digest_size=16)
        self.numbers = map(_Number, itertools.count())

    def write(self, *words: object) -> None:
        self.digest.update("\0".join(map(str, words)).encode() + b"\1")

    def read(self, value: PyTree) -> None:
        """Add a value to the digest.

        The cases are tried in this order: a variable's number is an int, too, and JAX's
        traced arrays are of the class of its arrays.
        """
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
        elif isinstance(value, Mapping | tuple | list | frozenset | set):
            self.container(value)
        else:
            self.instance(value)

    def container(self, value: PyTree) -> None:
        """Add entries to the digest, those without an order sorted."""
        if isinstance(value, Mapping):
            value = sorted(value.items(), key=lambda item: str(item[0]))
        elif isinstance(value, frozenset | set):
            value = sorted(value, key=str)
        # Brackets keep ((a, b), c) apart from (a, (b, c)).
        self.write("(")
        self.each(value)
        self.write(")")

    def instance(self, value: PyTree) -> None:
        """Add an object to the digest: code, a dataclass by its fields, a function by
        its code, anything else by its type."""
        if isinstance(value, CodeType):
            self.digest.update(value.co_code)
            self.read((value.co_consts, value.co_names))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.write(type(value).__qualname__)
            fields = dataclasses.fields(value)
            self.read([getattr(value, field.name) for field in fields])
        elif hasattr(value, "__code__"):
            self.write(value.__qualname__)
            self.read(value.__code__)
        else:
            self.write(type(value).__qualname__)

    def each(self, values: Iterable[PyTree]) -> None:
        for value in values:
            self.read(value)

    def array(self, value: PyTree) -> None:
        # Typed random keys are not NumPy arrays; their data are.
        if isinstance(value, jax.Array) and jnp.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        self.write("array", array.shape, array.dtype)
        self.digest.update(array.tobytes())

    def jaxpr(self, jaxpr: Jaxpr) -> None:
        # Variables have the numbers of the order in which they appear.
        self.write("inputs")
        numbers = self.bound([*jaxpr.constvars, *jaxpr.invars])
        count = len(jaxpr.constvars)
        facts = self.evaluate(jaxpr, numbers[:count], numbers[count:])
        self.each(self.value_of(facts, v) for v in jaxpr.outvars)

    def constant(self, value: PyTree, like: object) -> PyTree:
        return value

    def otherwise(self, eqn: JaxprEqn, given: list[PyTree]) -> list[PyTree]:
        self.write(eqn.primitive.name)
        self.each(given)
        # These say how to compute a result, and do not change it.
        ignored = ("precision", "sharding", "out_sharding")
        self.read(
            {name: value for name, value in eqn.params.items() if name not in ignored}
        )
        if self.objects and "callback" in eqn.primitive.name:
            self.called(eqn.params["callback"])
        return self.bound(eqn.outvars)

    def called(self, value: PyTree) -> None:
        """Add the identity of a user's function that is wrapped by JAX: the wrappers
        are new in every trace."""
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
