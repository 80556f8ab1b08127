"""Which of a program's arguments are data, and which shape the program itself.

A program with observations is run again inside compiled code. Its array arguments are data: they are traced there, so
that new data reuse the code. One whose value the program's Python asks for (a power, a mixture weight, the condition of
an ``if``) must be a number when the program is run, and another value compiles anew. Python's own numbers, floats too,
are settings: they are never traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from numpy.typing import ArrayLike

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""``(args, kwargs)`` of a program."""


class Concrete:
    """An array argument that stays a NumPy array in compiled code; another value compiles anew."""

    def __init__(self, array: ArrayLike):
        self.array = np.asarray(array)
        self._key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Concrete) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def join(arguments: Arguments) -> Arguments:
    """``(args, kwargs)`` as the program's function takes them."""
    return jax.tree.map(lambda leaf: leaf.array if isinstance(leaf, Concrete) else leaf, arguments)


def is_data(leaf: object) -> bool:
    """Whether a leaf of the arguments is an array."""
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)


def name_of(function: Callable[..., object], path: tuple[Any, ...]) -> str:
    """The parameter of ``function`` that holds a leaf, by the leaf's path in ``(args, kwargs)``."""
    where, which = path[0].idx, path[1]
    if where == 1:
        return str(which.key)
    parameters = list(inspect.signature(function).parameters)
    return parameters[min(which.idx, len(parameters) - 1)]
