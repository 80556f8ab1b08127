"""Vertical bar with a floor, as a score."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.soft((0.2, 1.0), inside=0.99)


RECIPE = two_dimensional.score(
    reference(), deviation=0.42, finest=0.0, **two_dimensional.SHARP
)
