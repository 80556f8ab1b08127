"""Ring of eight Gaussians, as an energy that knows the depth of its modes."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.ring()


RECIPE = two_dimensional.depth(
    reference(), deviation=0.36, finest=0.075, iterations=8000
)
