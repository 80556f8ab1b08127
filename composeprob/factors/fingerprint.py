"""A digest of a traced computation: of its equations and the numbers in them, not of the objects that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FunctionType

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jaxtyping import PyTree

from composeprob.factors.equations import Walk, aval


def fingerprint(*values: object, objects: bool = True) -> str:
    """A digest of computations, arrays, numbers, and containers of these; equal where they compute the same.

    Traced arrays count by their shapes. Of functions counts their code, and of other objects that hold no numbers only
    the type. Precisions and the devices that arrays are on count nothing: they are settings of JAX's own. With
    ``objects`` functions that are called back when the computation runs (`jax.debug.callback`) must be the same
    objects, as compiled code holds them, and not only of the same code.
    """
    reader = _Reader(objects)
    reader.read(values)
    return reader.digest.hexdigest()


class _Number(int):
    """Of a variable, by which traces of the same equations agree whatever objects their variables are."""


class _Reader(Walk[PyTree]):
    """Of each value in a trace it knows the number of its variable, or the literal itself."""

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
        elif isinstance(value, str | int | float | complex | bool | bytes | np.dtype | None):
            self.write(type(value).__name__, repr(value))
        elif isinstance(value, Mapping):
            self.read(sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, tuple | list | frozenset | set):
            entries: Iterable[PyTree] = sorted(value, key=str) if isinstance(value, frozenset | set) else value
            self.write("(")
            self.each(entries)
            self.write(")")
        elif isinstance(value, CodeType):
            self.digest.update(value.co_code)
            self.read((value.co_consts, value.co_names))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.write(type(value).__qualname__)
            self.read([getattr(value, field.name) for field in dataclasses.fields(value)])
        elif hasattr(value, "__code__"):
            self.write(value.__qualname__)
            self.read(value.__code__)
        else:
            self.write(type(value).__qualname__)

    def each(self, values: Iterable[PyTree]) -> None:
        for value in values:
            self.read(value)

    def array(self, value: PyTree) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
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
        self.read({name: value for name, value in eqn.params.items() if name not in how})
        if self.objects and "callback" in eqn.primitive.name:
            self.called(eqn.params["callback"])
        return self.bound(eqn.outvars)

    def called(self, value: PyTree) -> None:
        """The user's function in JAX's wrappers around it, which are new in every trace."""
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.called(getattr(value, field.name))
        elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] == "jax":
            for cell in value.__closure__ or ():
                self.called(cell.cell_contents)
        elif callable(value):
            self.write(id(getattr(value, "__self__", value)), id(getattr(value, "__func__", value)))

    def bound(self, variables: Sequence[Var]) -> list[_Number]:
        self.write(*(aval(v).str_short() for v in variables))
        return list(itertools.islice(self.numbers, len(variables)))
