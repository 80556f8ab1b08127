"""The settings of JAX that the library's own code needs, whatever else a process was started with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_warned: ContextVar[set[object] | None] = ContextVar("seen", default=None)


@contextmanager
def usual() -> Iterator[None]:
    """Types and ranks are promoted, and neither NaN, here for what is not known, nor infinity, here for log 0, raises.

    With ``jax_debug_nans``, ``jax_numpy_rank_promotion="raise"`` or ``jax_numpy_dtype_promotion="strict"`` users look
    for mistakes in code of their own; where a network gives a NaN in a run, `Result.status` reports it.
    """
    warned = _warned.set(set()) if _warned.get() is None else None
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        try:
            yield
        finally:
            if warned is not None:
                _warned.reset(warned)


def once_a_call(thing: object) -> bool:
    """Whether it is the first time that this is asked of a thing within one `usual`; outside of it always."""
    warned = _warned.get()
    if warned is None:
        return True
    known = thing in warned
    warned.add(thing)
    return not known
