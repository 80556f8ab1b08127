"""How factors print: one line in the words of the algebra, such as ``ring2d * bar2d **
2``, without any array."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

MAX_ENTRIES = 6
"""Entries of a product or mixture that are shown; of more, their number is."""


def formula(terms: Sequence[tuple[str, float]]) -> str:
    """A product of powers, given as what is multiplied and to which power: ``a ** 2 * b
    / c``."""
    text = ""
    for name, w in terms[:MAX_ENTRIES]:
        sign = "" if not text else " / " if w < 0 else " * "
        shown = abs(w) if text else w
        text += sign + name + ("" if shown == 1 else f" ** {shown:.3g}")
    return clipped(text + _count_note(len(terms), "factors"))


def mixture(parts: Sequence[str], shares: str) -> str:
    """``mixture(a, b; weights 0.3, 0.7)``."""
    return clipped(
        f"mixture({', '.join(parts[:MAX_ENTRIES])}{_count_note(len(parts), 'parts')}; {shares})"
    )


def weights(what: str, weights: Sequence[float]) -> str:
    """``weights 0.3, 0.7``, or ``equal weights``."""
    numbers = ", ".join(f"{w:.3g}" for w in weights[:MAX_ENTRIES]) + (
        ", …" if len(weights) > MAX_ENTRIES else ""
    )
    return f"equal {what}" if len(set(weights)) == 1 else f"{what} {numbers}"


def named(label: str, conditions: dict[str, str]) -> str:
    """A leaf with the conditions given to it, as they are shown:
    ``digits(label=3)``."""
    given = ", ".join(f"{name}={value}" for name, value in conditions.items())
    return clipped(" ".join(label.split()), 60) + (
        f"({clipped(given, 60)})" if given else ""
    )


def shape(event: tuple[int, ...] | None) -> str:
    """An event's shape as one speaks of it: ``28×28``."""
    if event is None:
        return "events of any shape"
    return "×".join(map(str, event)) or "a number"


def short(value: Array) -> str:
    """A condition's value: a few numbers as they are, an array by its shape."""
    if isinstance(value, jax.core.Tracer) or jnp.size(value) > 4:
        return "array" + str(list(jnp.shape(value)))
    numbers = ", ".join(f"{float(v):.3g}" for v in jnp.ravel(value))
    return numbers if jnp.ndim(value) == 0 else f"[{numbers}]"


def clipped(text: str, longest: int = 160) -> str:
    """The text, or its beginning."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _count_note(count: int, what: str) -> str:
    return "" if count <= MAX_ENTRIES else f" … ({count} {what})"
