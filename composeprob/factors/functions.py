"""Plain functions of users inside of factors, and what becomes of them when a program is compiled.

A Python function may read anything: arrays of the module around it, variables of the function that it was made in.
JAX cannot see that these have changed. So compiled code never holds the function itself: `closed` traces it once, and
what it reads become leaves like a network's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import PyTree

from composeprob.factors.base import LeafFactor, abstract_arguments
from composeprob.factors.fingerprint import fingerprint

Leaf = TypeVar("Leaf", bound=LeafFactor)


class PlainFunction(eqx.Module):
    """A function of the user's, which reads what it reads whenever it is called."""

    function: Callable[..., PyTree] = eqx.field(static=True)

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        return self.function(*args, **kwargs)


class Code:
    """A traced function without its constants; equal to another of the same equations."""

    def __init__(self, traced: ClosedJaxpr, takes: PyTree[jax.ShapeDtypeStruct], returns: PyTree):
        self.jaxpr, self.takes = traced.jaxpr, takes
        self.returns = jax.tree.structure(returns)
        self.key = fingerprint(self.jaxpr), jax.tree.structure(takes), self.returns

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Closed(eqx.Module):
    """A function as it was when it was traced.

    Attributes:
        constants: the arrays that it reads beside its arguments.
        code: its equations, for arguments of certain shapes.
    """

    constants: list[Array]
    code: Code = eqx.field(static=True)

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        takes, tree = jax.tree.flatten(self.code.takes)
        given, found = jax.tree.flatten((args, kwargs))
        if (found, *(jnp.shape(value) for value in given)) != (tree, *(shape.shape for shape in takes)):
            raise TypeError(f"A function that was compiled for {self.code.takes} was called with {(args, kwargs)}.")
        cast = [jnp.asarray(value, shape.dtype) for value, shape in zip(given, takes, strict=True)]
        outputs = jaxpr_as_fun(ClosedJaxpr(self.code.jaxpr, self.constants))(*cast)
        return jax.tree.unflatten(self.code.returns, outputs)


class _Record:
    """Traces a function where it is called first."""

    def __init__(self, function: Callable[..., PyTree]):
        self.function = function
        self.closed: Closed | None = None

    def __call__(self, *args: Array, **kwargs: Array) -> PyTree:
        if self.closed is None:
            takes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), (args, kwargs))
            call = lambda args, kwargs: self.function(*args, **kwargs)  # noqa: E731  # new, or JAX knows its trace
            traced, returns = jax.make_jaxpr(call, return_shape=True)(*takes)
            constants: list[PyTree] = [c if isinstance(c, jax.Array) else np.asarray(c) for c in traced.consts]
            self.closed = Closed(constants, Code(traced, takes, returns))
        return self.closed(*args, **kwargs)


def has_functions(leaf: LeafFactor) -> bool:
    """Whether a plain function is in it."""
    return any(map(_is_plain, jax.tree.leaves(leaf, is_leaf=_is_plain)))


def closed(leaf: Leaf, conditions: Mapping[str, Array]) -> Leaf:
    """The leaf with every plain function in it `Closed`; what these read have the values of now. Of the conditions of
    one evaluation only the shapes count."""
    if not has_functions(leaf):
        return leaf
    recorded = jax.tree.map(lambda node: _Record(node.function) if _is_plain(node) else node, leaf, is_leaf=_is_plain)
    x, noise = abstract_arguments(leaf)
    eqx.filter_eval_shape(lambda f, x, n, c: f.evaluate(x, n, c), recorded, x, noise, dict(conditions))

    def traced(node: PyTree) -> PyTree:
        if not isinstance(node, _Record):
            return node
        assert node.closed is not None  # a leaf evaluates all that it has
        return node.closed

    done: Leaf = jax.tree.map(traced, recorded)
    return done


def closures(tree: PyTree) -> list[Closed]:
    """Every function that was closed in a tree."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Closed))
    return [node for node in found if isinstance(node, Closed)]


def _is_plain(node: object) -> bool:
    return isinstance(node, PlainFunction)
