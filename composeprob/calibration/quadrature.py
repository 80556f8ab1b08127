"""Integrals in one or two dimensions, on a grid that follows the mass along levels.

In the coordinates y = x/α a level is the next noisier one with some noise taken away,
so its mass lies inside of the other's: the grid goes from the noisiest level to the
cleanest. The midpoint rule on cells of width h converges faster than any power of h
once h is as fine as the density's features. Hence halving h until nothing changes is
cheap, and the change by the last halving is a safe bound of the error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from composeprob.core import AnnealedDensity, log_densities
from composeprob.errors import ImproperError, InvalidValueError

RINGS = 100
"""Rings of cells by which the region may grow at one level."""

TOLERANCE = 1e-5
"""Change of log Z, in nats, at which halving ends."""

MOST_CELLS = 400_000
"""Cells at which halving ends, as memory is limited."""


class Grid(NamedTuple):
    """Cells of a grid by their integer corners, and the width of a cell."""

    cells: Int[np.ndarray, "n dims"]
    step: float

    @property
    def middles(self) -> Float[np.ndarray, "n dims"]:
        """Middles of the cells."""
        return self.step * (self.cells + 0.5)


LogDensity = Callable[[Grid], Float[np.ndarray, " n"]]
"""Grid → log f at the middles of its cells."""


def integrals(
    density: AnnealedDensity, samples: Float[np.ndarray, "n ..."] | None = None
) -> tuple[Float[np.ndarray, " levels"], Float[np.ndarray, " levels"]]:
    """Integrate a density of one noised site ``x`` of one or two entries.

    ``samples`` are clean draws (n, \\*event), in units of x/α, of a factor that is a
    noised marginal. With them the integral is confined to points that noise can reach
    from some draw: elsewhere a network was not trained, and its energy may be low.

    Returns log ∫F_k at every level, and the change of each by the last refinement. A
    log F that is NaN or +∞, or does not decay, is refused.
    """
    dimension = int(np.prod(density.sites["x"].shape))
    alpha = np.asarray(density.schedule.alpha, np.float64)
    sigma = np.asarray(density.schedule.sigma, np.float64)
    power = np.asarray(density.top.power["x"], np.float64).min()
    width = 1.0 / np.sqrt(power)
    # At the noisiest level the density is about N(0, σ²/power): half of its deviation
    # is fine enough to begin with.
    step = 0.5 * width * sigma[-1] / alpha[-1]
    # 8 standard deviations on either side.
    cells = np.array(list(itertools.product(range(-16, 16), repeat=dimension)))
    grid = Grid(cells, step)
    reach = None if samples is None else _Reach(samples.reshape(-1, dimension))
    log_z = np.zeros(density.num_levels)
    errors = np.zeros(density.num_levels)
    for level in reversed(range(density.num_levels)):
        log_f = _log_density(density, reach, level)
        log_z[level], errors[level], grid = _level(log_f, grid, level)
    return log_z, errors


class _Reach:
    """Region that noise can reach from some clean draw."""

    def __init__(self, draws: Float[np.ndarray, "n dims"]):
        from scipy.spatial import cKDTree

        self.tree = cKDTree(draws)
        # Draws are finitely many: half of their standard deviation is added.
        self.margin = 0.5 * float(np.sqrt(draws.var(0).mean()))

    def contains(
        self, points: Float[np.ndarray, "n dims"], noise: float
    ) -> Bool[np.ndarray, " n"]:
        """Return the points within 6 standard deviations of noise from some draw."""
        farthest = 6.0 * noise + self.margin
        distance, _ = self.tree.query(points, distance_upper_bound=farthest)
        return np.isfinite(distance)


def _log_density(
    density: AnnealedDensity, reach: _Reach | None, level: int
) -> LogDensity:
    """Return log f at a level in the coordinates y; −∞ out of reach."""
    shape = density.sites["x"].shape
    dimension = int(np.prod(shape))
    alpha = float(np.asarray(density.schedule.alpha, np.float64)[level])
    sigma = float(np.asarray(density.schedule.sigma, np.float64)[level])

    def log_f(grid: Grid) -> Float[np.ndarray, " n"]:
        points = grid.middles
        near = np.ones(len(points), bool)
        if reach is not None:
            near = reach.contains(points, sigma / alpha)
        values = np.full(len(points), -np.inf)
        x = alpha * points[near].reshape(-1, *shape)
        if len(x):
            positions = {"x": x.astype(jnp.result_type(float))}
            log_x = log_densities(density, positions, level, 4096)
            # dx = αᵈ dy
            values[near] = log_x + dimension * np.log(alpha)
        return values

    return log_f


def _level(log_f: LogDensity, grid: Grid, level: int) -> tuple[float, float, Grid]:
    """Return a level's log-integral, its error, and the next level's first grid."""
    grid, values = _spread(log_f, grid, level)
    dimension = grid.cells.shape[1]
    corners = np.array(list(itertools.product((0, 1), repeat=dimension)))
    kept = -np.inf  # log of the mass of cells that are not refined any further
    total = _log_sum(values, dimension, grid.step)
    while True:
        heavy = _heavy(values)
        # Neighbours of heavy cells are refined with them: their mass may be at the
        # common border.
        neighbours = _code(_neighbours(grid.cells[heavy]))
        refined = heavy | np.isin(_code(grid.cells), neighbours)
        kept = np.logaddexp(kept, _log_sum(values[~refined], dimension, grid.step))
        # The next level starts from this grid: one refinement less than the last.
        coarse = Grid(grid.cells[refined], grid.step)
        halves = 2 * coarse.cells[:, None, :] + corners[None]
        grid = Grid(halves.reshape(-1, dimension), 0.5 * coarse.step)
        values = _finite(log_f(grid), level)
        finer = np.logaddexp(kept, _log_sum(values, dimension, grid.step))
        change = abs(finer - total)
        if change < TOLERANCE or len(grid.cells) * 2**dimension > MOST_CELLS:
            return float(finer), float(change), coarse
        total = finer


def _spread(
    log_f: LogDensity, grid: Grid, level: int
) -> tuple[Grid, Float[np.ndarray, " n"]]:
    """Add cells until those at the border do not matter; return log f as well."""
    cells, step = grid
    values = _finite(log_f(grid), level, some=True)
    # Neighbours of older cells are there already.
    fresh = np.ones(len(cells), bool)
    for _ in range(RINGS):
        around = _neighbours(cells[fresh & _heavy(values)])
        codes, first = np.unique(_code(around), return_index=True)
        missing = around[first[~np.isin(codes, _code(cells))]]
        if not len(missing):
            return Grid(cells, step), values
        old = np.zeros(len(cells), bool)
        fresh = np.concatenate([old, np.ones(len(missing), bool)])
        cells = np.concatenate([cells, missing])
        added = _finite(log_f(Grid(missing, step)), level)
        values = np.concatenate([values, added])
    farthest = step * np.abs(cells).max()
    raise ImproperError(
        f"At level {level} the density does not decay: cells as far as "
        f"{farthest:.3g} from the origin, in units of the clean event, still matter.",
        fix="check that the energy grows with the distance from the data.",
    )


def _heavy(values: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Return the cells above e^−30 of the greatest density; others stay coarse."""
    return values > values.max() - 30.0


def _neighbours(cells: Int[np.ndarray, "n dims"]) -> Int[np.ndarray, "m dims"]:
    """Return the cells that touch some of the cells, with themselves."""
    offsets = np.array(list(itertools.product((-1, 0, 1), repeat=cells.shape[1])))
    return (cells[:, None, :] + offsets[None]).reshape(-1, cells.shape[1])


def _code(cells: Int[np.ndarray, "n dims"]) -> Int[np.ndarray, " n"]:
    """Number the cells: one integer for each."""
    # Coordinates are shifted to be positive, and packed into 31 bits each.
    weights = (1 << 31) ** np.arange(cells.shape[1])
    return (cells.astype(np.int64) + (1 << 30)) @ weights.astype(np.int64)


def _log_sum(values: Float[np.ndarray, " n"], dimension: int, step: float) -> float:
    """Return log Σ exp(values)·h^d."""
    log_sum = float(np.logaddexp.reduce(values, initial=-np.inf))
    return log_sum + dimension * np.log(step)


def _finite(
    values: Float[np.ndarray, " n"], level: int, some: bool = False
) -> Float[np.ndarray, " n"]:
    """Return the values; refuse NaN and +∞, and with ``some`` −∞ everywhere."""
    finite = np.isfinite(values)
    if not np.all(finite | (values == -np.inf)) or (some and not finite.any()):
        raise InvalidValueError(
            f"The log-density is not finite at level {level}: {np.sum(~finite)} of "
            f"{len(values)} points gave NaN or infinity.",
            fix="look for overflow in the energy; −∞ is allowed where the density is "
            "0, but not everywhere.",
        )
    return values
