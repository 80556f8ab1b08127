"""Checks of the numbers that users hand in: conditions, parameters, data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jax import Array
from numpyro.distributions import Distribution

from composeprob.errors import InvalidValueError, WrongTypeError

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


def check_bounds(distribution: Distribution, what: str) -> None:
    """Refuses a distribution between bounds of which the upper one is not above the lower, where they are known."""
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
        raise InvalidValueError(f"Unknown {what} {value!r}.", fix=f"use one of: {', '.join(names)}.")


def check_finite(value: Value, what: str) -> Value:
    """``value`` itself, or an `InvalidValueError` that names ``what`` where a concrete float is NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, jax.core.Tracer) or not eqx.is_inexact_array_like(leaf):
            continue
        if not np.all(np.isfinite(np.asarray(leaf))):  # NumPy: this may run inside a trace
            place = jax.tree_util.keystr(path)
            raise InvalidValueError(
                f"{what} holds NaN or infinite numbers" + (f" at {place}." if place else "."),
                fix="check where it was computed or loaded; numpy.isfinite finds the entries.",
            )
    return value
