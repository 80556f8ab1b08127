"""Square, as a score."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.box(0.7)


RECIPE = two_dimensional.score(reference(), deviation=0.4, finest=0.0, iterations=8000)
