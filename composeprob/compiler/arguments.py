"""Which of a program's arguments are data, and which shape the program itself.

A program with observations is run again inside compiled code. Its array arguments are then traced, so that new data
reuse the code; but one that becomes a power or a mixture weight must be a number when the algebra is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from composeprob.compiler.build import draw
from composeprob.language.interpret import run


class Concrete:
    """An array argument that stays a NumPy array in compiled code; another value compiles anew."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)
        self._key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Concrete) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def split(function: Callable[..., Any], arguments: Any) -> Any:
    """``(args, kwargs)`` with every array that the program cannot take as a tracer wrapped in `Concrete`."""
    leaves, treedef = jax.tree.flatten(arguments)
    arrays = [i for i, leaf in enumerate(leaves) if eqx.is_array(leaf) or isinstance(leaf, np.ndarray)]

    def traceable(indices: list[int]) -> bool:
        def trace(values: list[Any]) -> None:
            filled = list(leaves)
            for i, value in zip(indices, values, strict=True):
                filled[i] = value
            args, kwargs = jax.tree.unflatten(treedef, filled)
            run(function, args, kwargs, draw(jax.random.key(0)))

        try:
            jax.eval_shape(trace, [leaves[i] for i in indices])
        except Exception:  # the program ran with numbers: whatever fails now fails because of a tracer
            return False
        return True

    if not traceable(arrays):
        for i in arrays:
            if not traceable([i]):
                leaves[i] = Concrete(leaves[i])
    return jax.tree.unflatten(treedef, leaves)


def join(arguments: Any) -> Any:
    """``(args, kwargs)`` as the program's function takes them."""
    return jax.tree.map(lambda leaf: leaf.array if isinstance(leaf, Concrete) else leaf, arguments)
