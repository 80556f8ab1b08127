"""Arguments of `infer` that miss what was meant: what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import WrongTypeError
from composeprob.kernels.base import Kernel
from composeprob.samplers.base import Sampler

P = ParamSpec("P")
R = TypeVar("R")

SAMPLERS = "cp.SMC(), cp.AnnealedMCMC(cp.MALA(), steps_per_level=10) or cp.Ancestral()"


def by_name(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for functions of a density, with arguments that must be named: refuses others with an example.

    Raises:
        WrongTypeError: an argument is missing, unknown or not named; or the first one is a program, say, with whose
            arguments the call would be a mistake of another kind.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                if args and not isinstance(args[0], AnnealedDensity):
                    raise not_compiled(args[0]) from None
                name = function.__name__
                raise WrongTypeError(
                    f"{name} cannot be called with these arguments: {error}.",
                    fix=f"name them: {example}; the names are {', '.join(signature.parameters)}.",
                ) from None
            return function(*args, **kwargs)

        return checked

    return decorate


def not_compiled(given: object) -> WrongTypeError:
    """The error for what was passed as ``density``."""
    return WrongTypeError(
        f"infer takes a compiled density; got {type(given).__name__}.",
        fix="call cp.compile(program, …) first, with what the program takes, and pass what that returns.",
    )


def not_a_sampler(given: object) -> WrongTypeError:
    """The error for what was passed as ``sampler``."""
    if isinstance(given, type) and issubclass(given, Sampler):
        found = f"the class {given.__name__}"
        fix = f"make a sampler of it by calling it, with its settings if any: {SAMPLERS}"
    elif isinstance(given, Kernel) or (isinstance(given, type) and issubclass(given, Kernel)):
        found = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        fix = "a kernel needs a driver around it: cp.AnnealedMCMC(kernel, steps_per_level=10) or cp.SMC(kernel)"
    else:
        found = repr(given) if isinstance(given, str) else type(given).__name__
        fix = f"pass {SAMPLERS}, or leave it out, and one is chosen"
    return WrongTypeError(f"sampler must be a sampler; got {found}.", fix=f"{fix}.")
