"""Python's operators that factors do not have: what each was probably meant for, and how that is written."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
import numpyro.distributions as dist

from composeprob.errors import WrongTypeError
from composeprob.names import MEANT


def refuse(symbol: str, factor: object, other: object, *, reflected: bool = False) -> NoReturn:
    """The `WrongTypeError` for ``factor symbol other``, or ``other symbol factor`` where that is reflected, or
    ``-factor`` where there is no other."""
    meant = {
        "+": "for f or g write a mixture, cp.mixture([f, g], weights=[0.5, 0.5]); for f and g write f * g",
        "-": "for f but not g write f / g, and for 1/f alone f ** -1.0",
        "~": "for what f is not write 1/f, f ** -1.0, times a factor that is proper without it: g / f",
        "|": "for f or g write a mixture, cp.mixture([f, g], weights=[0.5, 0.5])",
        "&": "for f and g write f * g",
        "The truth of ": "Python's `and`, `or` and `if` take one of two: for f and g write f * g, for f or g "
        "cp.mixture([f, g], weights=[0.5, 0.5]), and of one that may be missing ask `is None`",
        "@": "for f and g write f * g",
        "[…]": "a site's entries are those of what cp.sample returns, such as x[0]",
        "(…)": MEANT["Factor"]["log_prob"].rstrip("."),
    }
    plain = isinstance(other, (int, float)) and not isinstance(other, np.generic)
    pair = [type(factor).__name__, repr(other) if plain else type(other).__name__]
    first, second = reversed(pair) if reflected else pair
    expression = f"{first} {symbol} {second}" if other is not None else f"{symbol}{first}"
    is_number = isinstance(other, (numbers.Number, np.generic, np.ndarray, jax.Array))
    if symbol in ("[…]", "(…)"):
        expression = f"{type(factor).__name__}{symbol}"
    if isinstance(other, dist.Distribution):
        fix = f"make the distribution a factor: cp.Analytic(dist.{type(other).__name__}(…), schedule)"
    elif symbol in meant:
        fix = meant[symbol]
    elif reflected and symbol in ("/", "**") and is_number:
        fix = "for 1/f write f ** -1.0, for a power f ** 2.0"
    elif is_number:
        fix = (
            "leave the number out, as densities are known up to a constant; for a power write f ** 2.0, for shares "
            "cp.mixture([f, g], weights=[0.7, 0.3]), for a weight that depends on latents cp.factor"
        )
    else:
        fix = "wrap it: cp.Diffusion for a network, cp.Analytic for a distribution, cp.Energy for a function"
    raise WrongTypeError(f"{expression} means nothing here: factors have only f * g, f / g and f ** w.", fix=f"{fix}.")


def refused(symbol: str, *, reflected: bool = False, alone: bool = False) -> Callable[..., NoReturn]:
    """A method for an operator that factors do not have; alone it takes no other."""
    if alone:
        return lambda factor: refuse(symbol, factor, None)
    return lambda factor, other: refuse(symbol, factor, other, reflected=reflected)
