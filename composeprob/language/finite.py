"""Discrete latents: distributions over finitely many whole numbers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from numpyro.distributions import Distribution


class Values(NamedTuple):
    """Values low, low + 1, …, low + number − 1 of an entry of a discrete latent."""

    low: int
    number: int


def is_discrete(distribution: Distribution) -> bool:
    """Return whether a distribution has discrete values."""
    support = distribution.support
    return support is not None and support.is_discrete


def values_of(distribution: Distribution) -> Values | None:
    """Return the values of a discrete distribution's entries; None where there are
    infinitely many, where they are not known before the program runs, or where they
    differ from entry to entry."""
    support = distribution.support
    # Event dimensions wrap the constraint of their entries.
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not distribution.has_enumerate_support:
        return None
    low = _number(getattr(support, "lower_bound", None), default=0)
    high = _number(getattr(support, "upper_bound", None), default=1)
    if low is None or high is None:
        return None
    return Values(low, high - low + 1)


def _number(bound: object, default: int) -> int | None:
    """Return a bound of a support as one number; None where it is not one. A support
    without bounds is that of 0 and 1."""
    if bound is None:
        return default
    if isinstance(bound, jax.core.Tracer):
        return None
    numbers = np.unique(np.asarray(bound))
    return int(numbers[0]) if numbers.size == 1 else None
