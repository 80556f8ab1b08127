"""Ring of eight Gaussians, as an energy."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional

RECIPE = two_dimensional.energy(two_dimensional.ring(), deviation=0.36, finest=0.075)


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.ring()
