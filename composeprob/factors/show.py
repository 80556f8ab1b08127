"""Printing of factors: one line in the words of the algebra, such as ``ring2d * bar2d
** 2``, without any array."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.text import clipped

MAX_ENTRIES = 6
"""The most entries of a product or mixture that are shown, before their number is."""


def formula(terms: Sequence[tuple[str, float]]) -> str:
    """Format a product of powers, given as (name, power) pairs: ``a ** 2 * b / c``."""
    text = ""
    for name, power in terms[:MAX_ENTRIES]:
        shown_power = power
        # The first factor has no sign before it, so its power keeps its own.
        if text:
            text += " / " if power < 0 else " * "
            shown_power = abs(power)
        text += name
        if shown_power != 1:
            text += f" ** {shown_power:.3g}"
    return clipped(text + _count_note(len(terms), "factors"))


def mixture(parts: Sequence[str], shares: str) -> str:
    """Format a mixture: ``mixture(a, b; weights 0.3, 0.7)``."""
    listed = ", ".join(parts[:MAX_ENTRIES]) + _count_note(len(parts), "parts")
    return clipped(f"mixture({listed}; {shares})")


def weights(what: str, weights: Sequence[float]) -> str:
    """Format weights: ``weights 0.3, 0.7``, or ``equal weights``."""
    if len(set(weights)) == 1:
        return f"equal {what}"
    numbers = ", ".join(f"{w:.3g}" for w in weights[:MAX_ENTRIES])
    if len(weights) > MAX_ENTRIES:
        numbers += ", …"
    return f"{what} {numbers}"


def named(label: str, conditions: dict[str, str]) -> str:
    """Format a leaf with the conditions given to it: ``digits(label=3)``."""
    leaf = clipped(" ".join(label.split()), 60)
    if not conditions:
        return leaf
    given = ", ".join(f"{name}={value}" for name, value in conditions.items())
    return f"{leaf}({clipped(given, 60)})"


def short(value: Array) -> str:
    """Format a condition's value: a few numbers as they are, an array by its shape."""
    if isinstance(value, jax.core.Tracer) or jnp.size(value) > 4:
        return "array" + str(list(jnp.shape(value)))
    numbers = ", ".join(f"{float(v):.3g}" for v in jnp.ravel(value))
    return numbers if jnp.ndim(value) == 0 else f"[{numbers}]"


def _count_note(count: int, what: str) -> str:
    return "" if count <= MAX_ENTRIES else f" … ({count} {what})"
