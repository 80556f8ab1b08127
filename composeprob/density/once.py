"""Compiled functions that run once or a few times, for which optimisation would take
longer than it saves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import equinox as eqx
import jax

from composeprob import tuning

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA with which it compiles in a third of the time."""

_unknown = set[str]()  # options that this version of XLA has refused


def once(
    function: Callable[Arguments, Returned], options: Mapping[str, object] | None = None
) -> Callable[Arguments, Returned]:
    """`equinox.filter_jit` with little optimisation.

    XLA renames and drops its options without notice: those that this version does not
    know are left out.

    Args:
        function: the function to compile.
        options: XLA's options; left out, `QUICK`.
    """
    if options is None:
        options = QUICK

    @functools.cache
    def compiled(names: frozenset[str]) -> Callable[Arguments, Returned]:
        chosen = {name: options[name] for name in names}
        jitted: Callable[Arguments, Returned] = eqx.filter_jit(
            function, compiler_options=chosen
        )  # type: ignore[call-overload]
        return jitted

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        while True:
            names = frozenset(options) - _unknown
            try:
                return compiled(names)(*args, **kwargs)
            except jax.errors.JaxRuntimeError as error:
                refused = _refused_option(str(error), names)
                if refused is None:
                    raise
                _unknown.add(refused)

    return call


def compiled_by_size(
    function: Callable[Concatenate[AnnealedDensity, Arguments], Returned],
) -> Callable[Concatenate[AnnealedDensity, Arguments], Returned]:
    """Compile a function of a density and a few thousand positions: as `once` does
    where a position has few numbers, with all optimisations elsewhere.

    Products of networks are calls of a library, which takes as long under either. What
    is between them counts for images.
    """
    in_haste = once(function)
    optimised = eqx.filter_jit(function)

    def call(
        density: AnnealedDensity, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Returned:
        numbers = sum(math.prod(site.shape) for site in density.sites.values())
        if numbers <= tuning.SHARES.in_haste:
            return in_haste(density, *args, **kwargs)
        return optimised(density, *args, **kwargs)

    functools.update_wrapper(call, function)
    return call


def _refused_option(message: str, names: frozenset[str]) -> str | None:
    """Return the option that XLA does not know, by its error's message; None if the
    error is another one."""
    if "compile option" not in message:
        return None
    for name in names:
        if name in message:
            return name
    return None
