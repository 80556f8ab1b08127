"""Compiled functions that run once, for which optimisation would take longer than it
saves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA with which it compiles in a third of the time."""


def once(
    function: Callable[Arguments, Returned], options: Mapping[str, object] | None = None
) -> Callable[Arguments, Returned]:
    """`equinox.filter_jit` with little optimisation, or as usual where this version of
    XLA does not know an option.

    Args:
        function: the function to compile.
        options: XLA's options; left out, `QUICK`.
    """
    if options is None:
        options = QUICK
    quick: Callable[Arguments, Returned] = eqx.filter_jit(
        function, compiler_options=options
    )  # type: ignore[call-overload]
    usual = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        try:
            return quick(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            # XLA renames and drops its options without notice.
            if "compile option" not in str(error):
                raise
            return usual(*args, **kwargs)

    return call
