"""Ring of eight narrow Gaussians, as a score."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.ring(0.03)


RECIPE = two_dimensional.score(
    reference(), deviation=0.355, finest=0.03, **two_dimensional.SHARP
)
