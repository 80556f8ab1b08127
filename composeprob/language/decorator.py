"""`@program`: a Python function whose statements declare a density."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jax import Array

from composeprob.errors import ProgramError, WrongTypeError, place
from composeprob.factors.factor import Factor, LeafFactor
from composeprob.language.statements import active_handlers, sample

PAUSED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
"""Flags of functions that return before their statements run."""


class Program:
    """A generative program. `cp.compile` turns it into a density; inside another
    program it is called like a function.

    Attributes:
        function: the decorated function.
        name: its name.
        where: the place of its definition, ``"file.py:line"`` or ``"In[3], line 2"``.
    """

    def __init__(self, function: Callable[..., object]):
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise _not_a_function(type(function).__name__)
        code = function.__code__
        if code.co_flags & PAUSED:
            raise _not_a_function("one with yield or async")
        functools.update_wrapper(self, function)
        self.function = function
        self.name: str = function.__name__
        self.where = place(code.co_filename, code.co_firstlineno)

    def __reduce__(self) -> str:
        # A program is pickled as a function is, by its name.
        return self.function.__qualname__

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the statements as part of the program that is being compiled.

        Raises:
            ProgramError: no program is being compiled, nor does one of NumPyro's
                handlers give the statements their values.
        """
        # Such as the compiler's.
        if not active_handlers():
            raise ProgramError(
                f"Program '{self.name}' was called, but its statements mean something "
                "only in a program that is being compiled.",
                fix=f"write density = cp.compile({self.name}, …), then "
                "cp.infer(density, key, num_chains=…).",
            )
        return self.function(*args, **kwargs)

    def check_arguments(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Refuse arguments that the function does not take."""
        signature = inspect.signature(self.function)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise WrongTypeError(
                f"Program '{self.name}' cannot be called with these arguments: "
                f"{error}.",
                fix="pass them to compile after the program: "
                f"cp.compile({self.name}, …); it takes {signature}.",
            ) from None

    def names_of(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> list[tuple[LeafFactor, str]]:
        """The leaf factors in the variables of the program's author, with the
        variables' names."""
        variables = inspect.getclosurevars(self.function)
        bound = inspect.signature(self.function).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        named: list[tuple[LeafFactor, str]] = []
        # The innermost scope first, as Python looks names up.
        for scope in (bound.arguments, variables.nonlocals, variables.globals):
            for name, value in scope.items():
                if isinstance(value, LeafFactor):
                    named.append((value, name))
        return named

    def __repr__(self) -> str:
        return f"<program {self.name} ({self.where})>"


def _not_a_function(got: str) -> WrongTypeError:
    """The error for something that cannot be a program."""
    return WrongTypeError(
        f"@cp.program decorates a function; got {got}.",
        fix="write @cp.program above def scene(prior, y): …, with nothing between; "
        "jax.jit and random keys are for cp.infer, and NumPyro's handlers go into the "
        "function: with numpyro.handlers.…:",
    )


def program(function: Callable[..., object]) -> Program:
    """Declare a function to be a program.

    Its statements state which densities multiply, mix and condition::

        π_k(x, z) ∝ p(z) · F_k(x; z) · Π_j L_{j,k}(y_j | x, z)

    F is the algebra of factors at the noised sites, p(z) the priors of NumPyro's
    latents, L the observations. The levels above 0 are the path that leads to level 0,
    which alone is the promise.

    Example:
        >>> import composeprob as cp, numpyro.distributions as dist
        >>> schedule = cp.Schedule.log_snr(60)
        >>> ring = cp.Analytic(dist.Normal([0.0, 0.0], [1.0, 1.0]), schedule)
        >>> bar = cp.Analytic(dist.Normal([0.0, 0.0], [0.1, 1.0]), schedule)
        >>> @cp.program
        ... def both(f, g):
        ...     return cp.sample("x", f * g)
        >>> density = cp.compile(both, ring, bar)
        >>> density.num_levels
        60
    """
    return Program(function)


@program
def single(factor: Factor) -> Array:
    """A program whose one site, x, has one factor."""
    return sample("x", factor)
