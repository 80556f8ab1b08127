"""Checks of what users hand in: conditions, parameters, data, and Python's operators
that factors do not have."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
from jax import Array

from composeprob.errors import MEANT, InvalidValueError, WrongTypeError

Value = TypeVar("Value")


def as_condition(name: str, value: object) -> Array:
    """A condition as an array, or a `WrongTypeError`; NaN is refused."""
    try:
        array = jax.numpy.asarray(value)
    except (TypeError, ValueError) as error:
        raise WrongTypeError(
            f"Condition {name!r} must be a number or an array; got {type(value).__name__}.",
            fix="encode it first (an index, a one-hot vector, an embedding).",
        ) from error
    return check_finite(array, f"Condition {name!r}")


def check_bounds(distribution: dist.Distribution, what: str) -> None:
    """Refuses a distribution between bounds of which the upper one is not above the
    lower, where they are known."""
    bounds = [getattr(distribution, name, None) for name in ("low", "high")]
    if any(bound is None or isinstance(bound, jax.core.Tracer) for bound in bounds):
        return
    low, high = map(np.asarray, bounds)
    if not np.all(low < high):
        raise InvalidValueError(
            f"{what} is {type(distribution).__name__} from {low} to {high}, between which nothing lies.",
            fix="the lower bound comes first, such as dist.Uniform(0.0, 1.0).",
        )


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Refuses what is not among the known names."""
    if value not in (names := tuple(known)):
        raise InvalidValueError(
            f"Unknown {what} {value!r}.", fix=f"use one of: {', '.join(names)}."
        )


def check_finite(value: Value, what: str) -> Value:
    """``value`` itself, or an `InvalidValueError` that names ``what`` where a concrete
    float is NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, jax.core.Tracer) or not eqx.is_inexact_array_like(leaf):
            continue
        if not np.all(
            np.isfinite(np.asarray(leaf))
        ):  # NumPy: this may run inside a trace
            place = jax.tree_util.keystr(path)
            raise InvalidValueError(
                f"{what} holds NaN or infinite numbers"
                + (f" at {place}." if place else "."),
                fix="check where it was computed or loaded; numpy.isfinite finds the entries.",
            )
    return value


def refuse(
    symbol: str, factor: object, other: object, *, reflected: bool = False
) -> NoReturn:
    """The `WrongTypeError` for ``factor symbol other``, or ``other symbol factor``
    where that is reflected, or ``-factor`` where there is no other."""
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
    expression = (
        f"{first} {symbol} {second}" if other is not None else f"{symbol}{first}"
    )
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
    raise WrongTypeError(
        f"{expression} means nothing here: factors have only f * g, f / g and f ** w.",
        fix=f"{fix}.",
    )


def refused(
    symbol: str, *, reflected: bool = False, alone: bool = False
) -> Callable[..., NoReturn]:
    """A method for an operator that factors do not have; alone it takes no other."""
    if alone:
        return lambda factor: refuse(symbol, factor, None)
    return lambda factor, other: refuse(symbol, factor, other, reflected=reflected)
