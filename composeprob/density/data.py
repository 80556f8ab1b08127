"""What data say at many positions at once: their log-likelihood, and whether they are finer than level 0."""

from __future__ import annotations

import jax
import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.evaluation import Position


def log_likelihood(density: AnnealedDensity, positions: Position) -> np.ndarray:
    """log p of all that is observed at positions of chains, (N, …) → (N,)."""
    values = density.log_likelihood(jax.vmap(density.to_samples)(positions)).values()
    return np.sum([np.asarray(value, float).reshape(len(value), -1).sum(1) for value in values], axis=0)


def lost_to_noise(density: AnnealedDensity, positions: Position | None = None) -> float:
    """How many nats of log-likelihood level 0's own noise once more, σ/α, takes from each number seen: ½·(σ/α)²/s² of
    an instrument whose noise is s. It is the median over positions, (N, …); where none are given, over 16 draws of that
    noise around 0."""
    seen = sum(np.size(y) for y in density.observed().values())
    if not seen:
        return 0.0
    if positions is None:
        positions = {name: np.zeros((16, *site.shape), np.float32) for name, site in density.sites.items()}
    rng, sigma = np.random.default_rng(0), float(np.asarray(density.schedule.sigma)[0])
    noised = {name: sigma * (density.sites[name].kind == "noised") for name in positions}
    noise = {name: (noised[name] * rng.standard_normal(x.shape)).astype(x.dtype) for name, x in positions.items()}
    # There and back, so that the slope cancels.
    here, *near = (
        log_likelihood(density, jax.tree.map(lambda x, e, way=way: x + way * e, positions, noise)) for way in (0, 1, -1)
    )
    return float(np.median(here - (near[0] + near[1]) / 2)) / seen
