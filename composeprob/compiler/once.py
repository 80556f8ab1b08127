"""Compiled functions that run once: making them fast would take longer than running them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA that make it compile in a third of the time."""
P = ParamSpec("P")
R = TypeVar("R")


def once(function: Callable[P, R]) -> Callable[P, R]:
    """`equinox.filter_jit` with little optimisation, or as usual where this version of XLA does not know an option."""
    quick: Callable[P, R] = eqx.filter_jit(function, compiler_options=QUICK)  # type: ignore[call-overload]
    usual = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            found: R = quick(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):
                raise
            return usual(*args, **kwargs)
        return found

    return call
