"""Integrals in one or two dimensions: a grid that follows the mass from the noisiest
level to the cleanest.

In the coordinates y = x/α a level is the next noisier one with some noise taken away,
so its mass lies inside of the other's. The midpoint rule on cells of width h converges
faster than any power of h once h is as fine as the density's features, hence halving h
until nothing changes is cheap, and what the last halving changed is a safe error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from composeprob.density.annealed import AnnealedDensity
from composeprob.density.points import log_densities
from composeprob.errors import ImproperError, InvalidValueError


def integrals(
    density: AnnealedDensity, samples: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds log ∫F_k at every level, of a density of one noised site ``x`` of one or
    two entries.

    With clean draws (n, \\*event), in units of x/α, of a factor that is a noised
    marginal, only points that some draw could have been noised to count: a network may
    think well of places that it never saw. Returns the log-integrals, and what the last
    refinement changed of each, both (K,). Refuses a log F that is NaN or +∞, or does
    not decay.
    """
    shape = density.sites["x"].shape
    dimension = int(np.prod(shape))
    alpha, sigma = (
        np.asarray(a, np.float64)
        for a in (density.schedule.alpha, density.schedule.sigma)
    )
    width = 1.0 / np.sqrt(np.asarray(density.top.power["x"], np.float64).min())
    step = 0.5 * width * sigma[-1] / alpha[-1]
    cells = np.array(
        list(itertools.product(range(-16, 16), repeat=dimension))
    )  # 8 standard deviations
    tree = None
    if samples is not None:
        from scipy.spatial import cKDTree

        drawn = samples.reshape(-1, dimension)
        tree, margin = cKDTree(drawn), 0.5 * float(np.sqrt(drawn.var(0).mean()))
    found, errors = np.zeros(density.num_levels), np.zeros(density.num_levels)
    for level in reversed(range(density.num_levels)):

        def log_f(cells: np.ndarray, step: float, level: int = level) -> np.ndarray:
            points = step * (cells + 0.5)
            near = np.ones(len(points), bool)
            if tree is not None:
                # 6 standard deviations of the noise, and as draws are finitely many
                # half of one of theirs more.
                farthest = 6.0 * (sigma[level] / alpha[level]) + margin
                near = np.isfinite(tree.query(points, distance_upper_bound=farthest)[0])
            values = np.full(len(points), -np.inf)
            inside = alpha[level] * points[near].reshape(-1, *shape)
            if len(inside):
                positions = {"x": inside.astype(jnp.result_type(float))}
                values[near] = log_densities(
                    density, positions, level, 4096
                ) + dimension * np.log(alpha[level])
            return values

        found[level], errors[level], cells, step = _level(log_f, cells, step, level)
    return found, errors


LogDensity = Callable[[np.ndarray, float], np.ndarray]
"""(cells (n, d), step) → log f at the middles of these cells, (n,)."""


def _level(
    log_f: LogDensity, cells: np.ndarray, step: float, level: int
) -> tuple[float, float, np.ndarray, float]:
    """One level: the log-integral, its error, and the cells and step that the next
    level starts with."""
    dimension = cells.shape[1]
    cells, values = _spread(log_f, cells, step, level)
    kept = -np.inf  # log of the mass of cells that are not refined any further
    total = _log_sum(values, dimension, step)
    while True:
        heavy = _heavy(values)
        important = heavy | np.isin(
            _code(cells), _code(_neighbours(cells[heavy]))
        )  # those that matter, or touch one
        kept = np.logaddexp(kept, _log_sum(values[~important], dimension, step))
        coarse = cells[important], step
        corners = np.array(list(itertools.product((0, 1), repeat=dimension)))
        cells = (2 * cells[important][:, None, :] + corners[None]).reshape(
            -1, dimension
        )
        step = 0.5 * step
        values = _finite(log_f(cells, step), level)
        finer = np.logaddexp(kept, _log_sum(values, dimension, step))
        change = abs(finer - total)
        if (
            change < 1e-5 or len(cells) * 2**dimension > 400_000
        ):  # nats of log Z, or as many cells as memory holds
            return float(finer), float(change), *coarse
        total = finer


def _spread(
    log_f: LogDensity, cells: np.ndarray, step: float, level: int
) -> tuple[np.ndarray, np.ndarray]:
    """Adds cells until those at the border do not matter."""
    values = _finite(log_f(cells, step), level, some=True)
    fresh = np.ones(len(cells), bool)  # the others' neighbours are there already
    for _ in range(100):  # rings of cells, by which the region may grow at one level
        around = _neighbours(cells[fresh & _heavy(values)])
        codes, first = np.unique(_code(around), return_index=True)
        missing = around[first[~np.isin(codes, _code(cells))]]
        if not len(missing):
            return cells, values
        fresh = np.concatenate(
            [np.zeros(len(cells), bool), np.ones(len(missing), bool)]
        )
        cells = np.concatenate([cells, missing])
        values = np.concatenate([values, _finite(log_f(missing, step), level)])
    raise ImproperError(
        f"At level {level} the density does not decay: cells as far as {step * np.abs(cells).max():.3g} from the "
        "origin, in units of the clean event, still matter.",
        fix="check that the energy grows with the distance from the data.",
    )


def _heavy(values: np.ndarray) -> np.ndarray:
    """Returns which cells have more than e^−30 of the greatest density: others are
    refined no further."""
    return values > values.max() - 30.0


def _neighbours(cells: np.ndarray) -> np.ndarray:
    offsets = np.array(list(itertools.product((-1, 0, 1), repeat=cells.shape[1])))
    return (cells[:, None, :] + offsets[None]).reshape(-1, cells.shape[1])


def _code(cells: np.ndarray) -> np.ndarray:
    """Numbers the cells: one integer for each."""
    weights = (1 << 31) ** np.arange(cells.shape[1])
    return (cells.astype(np.int64) + (1 << 30)) @ weights.astype(np.int64)


def _log_sum(values: np.ndarray, dimension: int, step: float) -> float:
    """log Σ exp(values)·h^d."""
    return float(np.logaddexp.reduce(values, initial=-np.inf)) + dimension * np.log(
        step
    )


def _finite(values: np.ndarray, level: int, some: bool = False) -> np.ndarray:
    """Refuses NaN and +∞, and where ``some`` must be finite −∞ everywhere."""
    finite = np.isfinite(values)
    if not np.all(finite | (values == -np.inf)) or (some and not finite.any()):
        raise InvalidValueError(
            f"The log-density is not finite at level {level}: {np.sum(~finite)} of {len(values)} points gave NaN or "
            "infinity.",
            fix="look for overflow in the energy; −∞ is allowed where the density is 0, but not everywhere.",
        )
    return values
