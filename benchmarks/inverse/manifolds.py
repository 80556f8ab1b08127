r"""Three sources on random curves in R⁵, and what three views of them say: the recipe
of DDPRISM's `rand_manifolds`.

A source is x = f(u) + s·ε, u uniform on points of (0, 1). Each entry of f is Σᵢ aᵢ·(i +
1)^{−β}·sin(2π(i·bᵢ·u + cᵢ)) with smoothness β and a, b and c uniform, scaled to mean 0
and variance 1; s is the noise of level 0, which priors of diffusion have. View n is a
random matrix (3, 5), entries N(0, 1)/√5, times the sum of the first n sources, plus
noise of 0.01.

References:
    Zenke and Vogels 2021 for the curves. DDPRISM, Multi-view source separation by
        diffusion models, for the views.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

SMOOTHNESS = (3.0, 4.0, 5.0)
FEATURES, SEEN, NOISE, PRECISION = 5, 3, 0.01, 1e-3
"""Numbers of a source and of a view, the noise of a view, and the least amplitude of a
wave that is kept."""
GRID = (np.arange(4000) + 0.5) / 4000
"""u: as many points are closer on a curve than the noise of level 0 is wide."""
COARSE = GRID[4::8]
"""For a law of fewer points, whose score is cheap."""


class Waves(NamedTuple):
    """A curve: amplitudes, frequencies and phases of its waves, each (5, waves), its
    mean and standard deviation."""

    a: NDArray
    b: NDArray
    c: NDArray
    mean: NDArray
    sd: NDArray

    @classmethod
    def random(cls, rng: np.random.Generator, smoothness: float) -> Waves:
        """One of a smoothness."""
        count = int(np.ceil(PRECISION ** (-1 / smoothness)))
        a, b, c = rng.uniform(size=(3, FEATURES, count))
        falling = a / (np.arange(count) + 1.0) ** smoothness
        points = _waves(falling, b, c, GRID, np)
        return cls(falling, b, c, points.mean(0), points.std(0))

    def __call__(self, u: Any) -> Any:
        """f(u), (…, 5)."""
        return (
            _waves(self.a, self.b, self.c, jnp.asarray(u), jnp) - self.mean
        ) / self.sd


def _waves(a: NDArray, b: NDArray, c: NDArray, u: Any, using: Any) -> Any:
    """Sums of sines by NumPy, or by what is like it."""
    i = np.arange(a.shape[1])
    return using.sum(a * using.sin(2 * np.pi * (i * b * u[..., None, None] + c)), -1)


def curves(seed: int = 0) -> list[Waves]:
    """The three."""
    rng = np.random.default_rng(seed)
    return [Waves.random(rng, smoothness) for smoothness in SMOOTHNESS]


def draw(curve: Waves, key: Array, n: int) -> Array:
    """n points of a curve, (n, 5)."""
    return curve(jax.random.uniform(key, (n,)))


def views(seed: int) -> NDArray:
    """The matrix of all views, (9, 15)."""
    each = np.random.default_rng(seed).normal(
        size=(len(SMOOTHNESS), SEEN, FEATURES)
    ) / np.sqrt(FEATURES)
    return np.block(
        [
            [each[n] * (i <= n) for i in range(len(SMOOTHNESS))]
            for n in range(len(SMOOTHNESS))
        ]
    )


def posterior(
    known: list[Waves],
    points: NDArray,
    matrix: NDArray,
    y: NDArray,
    first: float,
    rng: np.random.Generator,
    n: int,
) -> NDArray:
    """n exact draws of the three sources (n, 15), with noise of variance ``first`` on
    them.

    Given u the views are Gaussian, and view n depends on u₁ … u_n: the whitened
    residual's blocks do so too. So u₁, u₂ and u₃ are drawn one after another from
    ``points``, and weighed by what each view says of those before it.
    """
    grids = [np.asarray(curve(points), float) for curve in known]
    noise = NOISE**2 * np.eye(len(y)) + first * matrix @ matrix.T
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    m = whiten @ matrix
    many = 8 * n
    residual = np.tile(whiten @ y, (many, 1))
    x = np.zeros((many, 0))
    log_w = np.zeros(many)
    for i, grid in enumerate(grids):
        seen = slice(SEEN * i, SEEN * (i + 1))
        shifts = grid @ m[:, FEATURES * i : FEATURES * (i + 1)].T
        left = residual[:, seen]
        squares = (
            (left**2).sum(1)[:, None]
            - 2 * left @ shifts[:, seen].T
            + (shifts[:, seen] ** 2).sum(1)
        )
        logs = -0.5 * squares
        top = logs.max(1, keepdims=True)
        shares = np.exp(logs - top).cumsum(1)
        log_w += np.log(shares[:, -1]) + top[:, 0]
        at = (shares < (rng.uniform(size=many) * shares[:, -1])[:, None]).sum(1)
        residual = residual - shifts[at]
        x = np.concatenate([x, grid[at]], 1)
        # Those that later views contradict make room at once.
        w = np.exp(log_w - log_w.max())
        chosen = rng.choice(many, many, p=w / w.sum())
        residual = residual[chosen]
        x = x[chosen]
        log_w = np.zeros(many)
    # The noise of level 0 given what is left: N(first·Aᵀ·C⁻¹·r, first·I −
    # first²·Aᵀ·C⁻¹·A).
    gain = first * np.linalg.solve(noise, matrix).T
    spread = first * np.eye(x.shape[1]) - gain @ matrix * first
    left = y - x @ matrix.T
    e = rng.multivariate_normal(np.zeros(x.shape[1]), spread, many)
    return (x + left @ gain.T + e)[rng.permutation(many)[:n]]
