"""Left bar, as an energy."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.bar(-0.5)


RECIPE = two_dimensional.energy(
    reference(), deviation=0.55, finest=0.0, iterations=8000
)
