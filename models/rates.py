"""Learning rates of the zoo's recipes.

Optax is imported when a model is trained, and not when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def cosine(rate: float) -> Callable[[int], Any]:
    """Return `optax.cosine_decay_schedule` from ``rate`` to 0 at the last step."""

    def cosine(steps: int) -> Any:
        import optax

        return optax.cosine_decay_schedule(rate, steps)

    return cosine
