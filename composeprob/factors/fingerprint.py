"""What a traced computation is, told by its equations and the numbers in them, and not by the objects that made it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jaxtyping import PyTree

PLAIN = (str, int, float, complex, bool, bytes, np.dtype, type(None))


def fingerprint(*values: object, objects: bool = True) -> str:
    """A digest of computations, arrays, numbers, and containers of these; equal where they compute the same.

    Traced arrays count by their shapes. Of functions counts their code, and of other objects that hold no numbers only
    the type. Precisions count nothing: they are a setting of JAX's own.

    Args:
        values: what to tell.
        objects: whether functions that are called back when the computation runs (`jax.debug.callback`) must be the
            same objects, as compiled code holds them, and not only of the same code.
    """
    reader = _Reader(objects)
    reader.read(values)
    return reader.digest.hexdigest()


class _Reader:
    def __init__(self, objects: bool) -> None:
        self.objects = objects
        self.digest = hashlib.blake2b(digest_size=16)
        self.names: dict[Var, int] = {}

    def say(self, *words: object) -> None:
        self.digest.update("\0".join(map(str, words)).encode() + b"\1")

    def read(self, value: PyTree) -> None:
        if isinstance(value, ClosedJaxpr):
            self.jaxpr(value.jaxpr)
            self.read(value.consts)
        elif isinstance(value, Jaxpr):
            self.jaxpr(value)
        elif isinstance(value, jax.core.Tracer):
            self.say("traced", value.aval.str_short())
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            self.array(value)
        elif isinstance(value, PLAIN):
            self.say(type(value).__name__, repr(value))
        elif isinstance(value, Mapping):
            self.read(sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, tuple | list | frozenset | set):
            entries: Iterable[PyTree] = sorted(value, key=str) if isinstance(value, frozenset | set) else value
            self.say("(")
            for entry in entries:
                self.read(entry)
            self.say(")")
        elif isinstance(value, CodeType):
            self.digest.update(value.co_code)
            self.read((value.co_consts, value.co_names))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.say(type(value).__qualname__)
            self.read([getattr(value, field.name) for field in dataclasses.fields(value)])
        elif hasattr(value, "__code__"):
            self.say(value.__qualname__)
            self.read(value.__code__)
        else:
            self.say(type(value).__qualname__)

    def array(self, value: PyTree) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        self.say("array", array.shape, array.dtype)
        self.digest.update(array.tobytes())

    def jaxpr(self, jaxpr: Jaxpr) -> None:
        self.say("inputs", *map(self.bound, (*jaxpr.constvars, *jaxpr.invars)))
        for eqn in jaxpr.eqns:
            self.say(eqn.primitive.name)
            self.variables(eqn.invars)
            self.read({name: value for name, value in eqn.params.items() if name != "precision"})
            if self.objects and "callback" in eqn.primitive.name:
                self.called(eqn.params["callback"])
            self.say(*map(self.bound, eqn.outvars))
        self.variables(jaxpr.outvars)

    def called(self, value: PyTree) -> None:
        """The user's function in JAX's wrappers around it, which are new in every trace."""
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.called(getattr(value, field.name))
        elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] == "jax":
            for cell in value.__closure__ or ():
                self.called(cell.cell_contents)
        elif callable(value):
            self.say(id(getattr(value, "__self__", value)), id(getattr(value, "__func__", value)))

    def variables(self, variables: Iterable[PyTree]) -> None:
        for variable in variables:
            if isinstance(variable, Literal):
                self.read(variable.val)
            else:
                self.say("variable", self.names.get(variable))

    def bound(self, variable: Var) -> str:
        self.names[variable] = len(self.names)
        return variable.aval.str_short()
