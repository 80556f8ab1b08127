"""Functions and classes of users that the library calls: mistakes in them, in the
user's terms."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from composeprob.errors import (
    ComposeProbError,
    NetworkError,
    WrongTypeError,
    caller,
    is_library,
)

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


def is_own(part: object) -> bool:
    """Return whether an object is of a class that a user wrote."""
    return not type(part).__module__.startswith("composeprob.")


def called(
    who: str,
    how: str,
    call: Callable[[], Returned],
    fix: str,
    advice: str = "",
    error: type[ComposeProbError] = NetworkError,
) -> Returned:
    """Call a user's function ``who`` as ``how``.

    Raise an ``error`` with ``fix`` where it cannot be called so, or with ``advice``
    where it needs the number of a traced value.
    """
    try:
        return call()
    except NOT_CONCRETE as cause:
        request = number_request(cause)
        raise error(
            f"{who} {request.operation} a value that is known only in compiled code: "
            "one of its arguments.",
            where=request.where,
            fix=request.fix + advice,
        ) from cause
    except Exception as cause:
        raise error(
            f"{who} cannot be called as {how}: {type(cause).__name__}: {cause}", fix=fix
        ) from cause


def array_from(who: str, how: str, call: Callable[[], Any], shape: Any) -> Any:
    """Call a method of a user's class, and return the array of this shape that it
    returns; refuse anything else."""
    one = "a number" if shape == () else f"an array of shape {shape}"
    fix = f"return {one}."
    returned = called(who, how, call, fix, error=WrongTypeError)
    if isinstance(returned, (bool, int, float, np.generic)):
        returned = np.asarray(returned)
    found = getattr(returned, "shape", None)
    if found is None:
        kind = "None" if returned is None else f"a {type(returned).__name__}"
        raise WrongTypeError(f"{who} returns {kind} from {how}.", fix=fix)
    if found != shape:
        raise WrongTypeError(
            f"{who} returns an array of shape {found} from {how}.", fix=fix
        )
    return returned
