"""Checks of factors: bounds of their distributions, and Python's operators that factors
do not have."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
import numpyro.distributions as dist

from composeprob.errors import MEANT, InvalidValueError, WrongTypeError

Value = TypeVar("Value")


def check_bounds(distribution: dist.Distribution, what: str) -> None:
    """Refuse a distribution whose upper bound is not above its lower one, unless they
    are traced."""
    bounds = [getattr(distribution, name, None) for name in ("low", "high")]
    if any(bound is None or isinstance(bound, jax.core.Tracer) for bound in bounds):
        return
    low, high = map(np.asarray, bounds)
    if not np.all(low < high):
        raise InvalidValueError(
            f"{what} is {type(distribution).__name__} from {low} to {high}, between "
            "which nothing lies.",
            fix="the lower bound comes first, such as dist.Uniform(0.0, 1.0).",
        )


OR = "for f or g write a mixture, cp.mixture([f, g], weights=[0.5, 0.5])"
AND = "for f and g write f * g"
INSTEAD = {
    "+": f"{OR}; {AND}",
    "-": "for f but not g write f / g, and for 1/f alone f ** -1.0",
    "~": "for the negation of f write 1/f, f ** -1.0, times a factor that is proper "
    "without it: g / f",
    "|": OR,
    "&": AND,
    "The truth of ": f"Python's `and`, `or` and `if` take one of two: {AND}, for f or "
    "g cp.mixture([f, g], weights=[0.5, 0.5]), and for a factor that may be missing "
    "test `is None`",
    "@": AND,
    "[…]": "index the value that cp.sample returns, such as x[0]",
    "(…)": MEANT["Factor"]["log_prob"].rstrip("."),
}
"""Advice in place of an operator that factors do not have."""


def refuse(
    symbol: str, factor: object, other: object, *, reflected: bool = False
) -> NoReturn:
    """Raise the `WrongTypeError` for ``factor symbol other``, for ``other symbol
    factor`` where that is reflected, or for ``-factor`` where there is no other."""
    expression = _expression(symbol, factor, other, reflected)
    raise WrongTypeError(
        f"{expression} means nothing here: factors have only f * g, f / g and f ** w.",
        fix=f"{_instead(symbol, other, reflected)}.",
    )


def _expression(symbol: str, factor: object, other: object, reflected: bool) -> str:
    """Format the refused expression with types for values: ``Diffusion + 2.0``."""
    left = type(factor).__name__
    if symbol in ("[…]", "(…)"):
        return f"{left}{symbol}"
    if other is None:
        return f"{symbol}{left}"
    right = type(other).__name__
    # NumPy's float64 is a float whose repr is longer than the number.
    if isinstance(other, (int, float)) and not isinstance(other, np.generic):
        right = repr(other)
    if reflected:
        return f"{right} {symbol} {left}"
    return f"{left} {symbol} {right}"


def _instead(symbol: str, other: object, reflected: bool) -> str:
    """Advice in place of a refused expression."""
    is_number = isinstance(other, (numbers.Number, np.generic, np.ndarray, jax.Array))
    if isinstance(other, dist.Distribution):
        return (
            "make the distribution a factor: "
            f"cp.Analytic(dist.{type(other).__name__}(…), schedule)"
        )
    if symbol in INSTEAD:
        return INSTEAD[symbol]
    if reflected and symbol in ("/", "**") and is_number:
        return "for 1/f write f ** -1.0, for a power f ** 2.0"
    if is_number:
        return (
            "leave the number out, as densities are known up to a constant; for a "
            "power write f ** 2.0, for shares cp.mixture([f, g], weights=[0.7, 0.3]), "
            "for a weight that depends on latents cp.factor"
        )
    return (
        "wrap it: cp.Diffusion for a network, cp.Analytic for a distribution, "
        "cp.Energy for a function"
    )


def refused(
    symbol: str, *, reflected: bool = False, alone: bool = False
) -> Callable[..., NoReturn]:
    """Return a method for an operator that factors do not have; ``alone`` where it
    takes no other operand."""
    if alone:
        return lambda factor: refuse(symbol, factor, None)
    return lambda factor, other: refuse(symbol, factor, other, reflected=reflected)
