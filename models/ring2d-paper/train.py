"""Ring of eight Gaussians, as in the paper."""

from __future__ import annotations

from typing import Any

from .. import two_dimensional

RECIPE = two_dimensional.paper(two_dimensional.ring())


def reference() -> Any:
    """Return the exact distribution."""
    return two_dimensional.ring()
