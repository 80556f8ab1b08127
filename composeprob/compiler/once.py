"""Compiled functions that run once: making them fast would take longer than running
them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def once(
    function: Callable[Arguments, Returned], options: Mapping[str, object] | None = None
) -> Callable[Arguments, Returned]:
    """`equinox.filter_jit` with little optimisation, or as usual where this version of
    XLA does not know an option."""
    if options is None:  # of XLA, which compiles in a third of the time with these
        options = {
            "xla_backend_optimization_level": 0,
            "xla_cpu_use_fusion_emitters": False,
            "xla_cpu_parallel_codegen_split_count": 1,
        }
    quick: Callable[Arguments, Returned] = eqx.filter_jit(
        function, compiler_options=options
    )  # type: ignore[call-overload]
    usual = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        try:
            found: Returned = quick(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):
                raise
            return usual(*args, **kwargs)
        return found

    return call
