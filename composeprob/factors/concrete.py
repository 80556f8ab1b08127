"""User code that wants a number where there is none yet: JAX's error in the user's
terms."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import jax

from composeprob.errors import NetworkError, caller, is_library

Returned = TypeVar("Returned")
NOT_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""What JAX raises where Python or NumPy asks a traced value for its number (by ``if``:
a kind of the first)."""


def number_request(error: Exception) -> tuple[str, str, str | None]:
    """What the user's code does behind one of the errors `NOT_CONCRETE`, a verb with
    its object, to be followed by the value; what to write instead; and the user's
    line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = None if trace is None else caller(trace.tb_frame)
    if isinstance(error, jax.errors.TracerBoolConversionError):
        found = "decides by `if`, `and`, `or`, `not` or `while` on"
        fix = "write jnp.where(condition, a, b), and for one density or another cp.mixture([f, g], weights=…)."
    elif isinstance(error, jax.errors.TracerArrayConversionError):
        found = "calls NumPy on"
        fix = "use jax.numpy, which has the same functions: `import jax.numpy as jnp`, and jnp.sin for np.sin."
    elif isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        found = "takes the entries of an array that are chosen by"
        fix = "write jnp.where(mask, array, 0.0), whose shape does not depend on the mask."
    else:
        found = "makes a Python number (by float, int, .item(), an index, or a size) of"
        fix = (
            "leave it an array, which jax.numpy takes as it is; index an array, jnp.stack(items)[i], and not a list; "
            "choose by jnp.where, or between densities by cp.mixture; sizes must be known beforehand."
        )
    return found, fix, where


def requested_by_library(error: Exception) -> bool:
    """Whether it is this library's own code that wants the number, as for a power, and
    not the user's."""
    modules = [
        str(frame.f_globals.get("__name__"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    ours = [
        module.startswith("composeprob.")
        for module in modules
        if not is_library(module)
    ]
    return bool(ours) and ours[-1]


def called(
    who: str, how: str, call: Callable[[], Returned], fix: str, advice: str = ""
) -> Returned:
    """What a user's function ``who`` returns where it is called as ``how``; a
    `NetworkError` with ``fix`` where it cannot be, or with ``advice`` where it wants a
    number."""
    try:
        return call()
    except NOT_CONCRETE as error:
        found, instead, where = number_request(error)
        raise NetworkError(
            f"{who} {found} a value that is known only in compiled code: the event, the level or a condition.",
            where=where,
            fix=instead + advice,
        ) from error
    except Exception as error:
        raise NetworkError(
            f"{who} cannot be called as {how}: {type(error).__name__}: {error}", fix=fix
        ) from error
