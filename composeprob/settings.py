"""The settings of JAX that the library's own code needs, whatever else a process was started with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def usual() -> Iterator[None]:
    """Types and ranks are promoted, and neither NaN, here for what is not known, nor infinity, here for log 0, raises.

    With ``jax_debug_nans``, ``jax_numpy_rank_promotion="raise"`` or ``jax_numpy_dtype_promotion="strict"`` users look
    for mistakes in code of their own; where a network gives a NaN in a run, `Result.status` says so.
    """
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield
