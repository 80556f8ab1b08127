"""User code that needs a concrete number while it is traced: JAX's error in the user's
terms."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax

from composeprob.errors import NetworkError, caller, is_library

Returned = TypeVar("Returned")
NOT_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""Errors of JAX where Python or NumPy needs the number of a traced value (that of
``if`` is a kind of the first)."""


class NumberRequest(NamedTuple):
    """Operation of user code that needs the number of a traced value.

    Attributes:
        operation: a verb with its object, to be followed by the value.
        fix: the code to write instead.
        where: the user's line.
    """

    operation: str
    fix: str
    where: str | None


def number_request(error: Exception) -> NumberRequest:
    """Return the operation behind one of the errors `NOT_CONCRETE`."""
    # The innermost frame, where the number was needed.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = None if trace is None else caller(trace.tb_frame)
    if isinstance(error, jax.errors.TracerBoolConversionError):
        operation = "decides by `if`, `and`, `or`, `not` or `while` on"
        fix = (
            "write jnp.where(condition, a, b), and for one density or another "
            "cp.mixture([f, g], weights=…)."
        )
    elif isinstance(error, jax.errors.TracerArrayConversionError):
        operation = "calls NumPy on"
        fix = (
            "use jax.numpy, which has the same functions: `import jax.numpy as jnp`, "
            "and jnp.sin for np.sin."
        )
    elif isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        operation = "takes the entries of an array that are chosen by"
        fix = (
            "write jnp.where(mask, array, 0.0), whose shape does not depend on the "
            "mask."
        )
    else:
        operation = (
            "makes a Python number (by float, int, .item(), an index, or a size) of"
        )
        fix = (
            "leave it an array, which jax.numpy takes as it is; index an array, "
            "jnp.stack(items)[i], and not a list; choose by jnp.where, or between "
            "densities by cp.mixture; sizes must be known beforehand."
        )
    return NumberRequest(operation, fix, where)


def requested_by_library(error: Exception) -> bool:
    """Return whether this library's own code, such as a power, needs the number, and
    not the user's code."""
    modules = [
        str(frame.f_globals.get("__name__"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    # JAX's own frames, which are a library's, say nothing about who called it.
    callers = [module for module in modules if not is_library(module)]
    return bool(callers) and callers[-1].startswith("composeprob.")


def called(
    who: str, how: str, call: Callable[[], Returned], fix: str, advice: str = ""
) -> Returned:
    """Call a user's function ``who`` as ``how``.

    Raise a `NetworkError` with ``fix`` where it cannot be called so, or with ``advice``
    where it needs the number of a traced value.
    """
    try:
        return call()
    except NOT_CONCRETE as error:
        request = number_request(error)
        raise NetworkError(
            f"{who} {request.operation} a value that is known only in compiled code: "
            "the event, the level or a condition.",
            where=request.where,
            fix=request.fix + advice,
        ) from error
    except Exception as error:
        raise NetworkError(
            f"{who} cannot be called as {how}: {type(error).__name__}: {error}", fix=fix
        ) from error
