"""The exact law of a task in the plane, and how far samples are from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import composeprob as cp

CLEAN = cp.Schedule.from_arrays(np.ones(40), np.geomspace(1e-4, 80.0, 40))
"""Level 0 is as good as free of noise."""
FLOOR = -20.0
"""The least log-density that one sample counts with: beyond a hard edge it would be
−∞."""
BANDWIDTH = 0.2
"""Bandwidth of the MMD's kernel: about the distance of neighbouring modes, and fixed,
so that rows can be compared."""
POINTS, CHUNK = 1500, 50_000


@dataclasses.dataclass(frozen=True)
class Truth:
    """A density on a grid over the square |x₁|, |x₂| < half_width.

    Attributes:
        log_density: normalised log p of points (n, 2) → (n,).
        grid: the grid's points (points², 2).
        mass: what each of them holds, (points²,), summing to 1.
        spacing: of the grid.
        centres: a mode is all that is nearest to one of these, (M, 2).
        shares: the mass of each mode, (M,).
        covariances: of each mode, (M, 2, 2).
    """

    log_density: Callable[[Any], np.ndarray]
    grid: np.ndarray
    mass: np.ndarray
    spacing: float
    centres: np.ndarray
    shares: np.ndarray
    covariances: np.ndarray

    def draw(self, key: jax.Array, n: int) -> np.ndarray:
        """n exact draws: a grid point by its mass, and a uniform shift within its
        cell."""
        pick, shift = jax.random.split(key)
        uniform = np.sort(np.asarray(jax.random.uniform(pick, (n,))))
        chosen = self.grid[np.searchsorted(np.cumsum(self.mass), uniform)]
        return chosen + self.spacing * np.asarray(
            jax.random.uniform(shift, (n, 2), minval=-0.5, maxval=0.5)
        )

    def judge(self, samples: np.ndarray, draws: np.ndarray) -> dict[str, float]:
        """Distances of samples (n, 2) from the exact law; ``draws`` are as many exact
        ones.

        Returns:
            ``log_likelihood``: mean log p, each sample's floored at −20; ``tv``: total
                variation of the modes' shares;
            ``mmd``: MMD², bandwidth 0.2; ``w2``: 2-Wasserstein; ``covariance``:
                relative error, averaged over modes.
        """
        return {
            "log_likelihood": float(
                np.mean(np.maximum(self.log_density(samples), FLOOR))
            ),
            "tv": cp.metrics.total_variation(
                cp.metrics.mode_weights(samples, self.centres), self.shares
            ),
            "mmd": float(cp.metrics.mmd(samples, draws, bandwidth=BANDWIDTH)),
            "w2": float(cp.metrics.wasserstein(samples, draws)),
            "covariance": self._covariance_error(samples),
        }

    def _covariance_error(self, samples: np.ndarray) -> float:
        # The other modes get too few samples for a covariance.
        heavy = self.shares > 0.02
        errors = cp.metrics.covariance_error(samples, self.centres, self.covariances)
        return float(np.mean(np.asarray(errors)[heavy]))


def truth_of(
    density: Any, half_width: float, centres: np.ndarray, points: int = POINTS
) -> Truth:
    """The level-0 law of a density, on a grid of ``points`` along each axis."""
    side = (np.arange(points) + 0.5) / points * 2 * half_width - half_width
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)

    @jax.jit
    def chunk(points: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: density.log_density({"x": x}, 0))(points)

    def log_f(points: Any) -> np.ndarray:
        points = jnp.asarray(points, jnp.float32)
        parts = [
            np.asarray(chunk(points[i : i + CHUNK]))
            for i in range(0, len(points), CHUNK)
        ]
        return np.concatenate(parts).astype(np.float64)

    values = log_f(grid)
    spacing = float(side[1] - side[0])
    log_z = np.log(np.sum(np.exp(values - values.max())) * spacing**2) + values.max()
    mass = np.exp(values - log_z) * spacing**2
    nearest = ((grid[:, None] - centres) ** 2).sum(-1).argmin(1)
    shares = np.bincount(nearest, mass, len(centres))
    covariances = np.zeros((len(centres), 2, 2))
    for m in range(len(centres)):
        if shares[m] > 0:
            covariances[m] = np.cov(
                grid[nearest == m].T, aweights=mass[nearest == m], ddof=0
            )
    return Truth(
        lambda x: log_f(x) - log_z,
        grid,
        mass / mass.sum(),
        spacing,
        centres,
        shares,
        covariances,
    )
