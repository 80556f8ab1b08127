"""One image of each of many densities."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

import composeprob as cp


class Drawn(NamedTuple):
    """One image of each density, and how they were made.

    Attributes:
        images: shape (n, *event_shape).
        acceptance: the mean over levels and densities; None where nothing is tested.
        evaluations: of the composed density, for one image.
        seconds: of one image, without the first, which compiles.
    """

    images: np.ndarray
    acceptance: float | None
    evaluations: int
    seconds: float


def draw(densities: Iterable[Any], sampler: Any, chains: int = 1) -> Drawn:
    """One image of each density, of the site x: density i with random key i.

    Of several chains one is taken, drawn by its weight.
    """
    images: list[np.ndarray] = []
    acceptance = []
    evaluations = 0
    start = time.monotonic()
    for i, density in enumerate(densities):
        run = cp.infer(
            density,
            jax.random.key(i),
            num_chains=chains,
            sampler=sampler,
            progress=False,
        )
        images.append(run.unweighted()["x"][0])
        acceptance.append(run.acceptance)
        evaluations = run.evaluations
        if i == 0:
            start = time.monotonic()
    seconds = (time.monotonic() - start) / max(1, len(images) - 1)
    accepted = np.asarray(acceptance, float)
    tested = accepted[np.isfinite(accepted)]
    mean = float(tested.mean()) if tested.size else None
    return Drawn(np.stack(images), mean, evaluations, seconds)
