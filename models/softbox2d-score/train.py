"""Small square with a floor, as a score."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.soft((0.3, 0.3), inside=0.95)


RECIPE = two_dimensional.score(reference(), deviation=0.22, finest=0.0, iterations=8000)
