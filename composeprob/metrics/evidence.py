"""Bounds of log Z from both sides: annealing from the top, and its reversal from exact draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import equinox as eqx
import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob.arguments import check_count, check_key
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import CapabilityError
from composeprob.metrics.likelihood import as_positions, chains_at_once, in_batches, reduced
from composeprob.metrics.paths import Path, forward_walk, frozen, reverse_walk
from composeprob.samplers.sampler import Sampler
from composeprob.text import printable


@dataclass(frozen=True, repr=False, eq=False)
class EvidenceBounds:
    """`EvidenceBounds` holds a stochastic lower and upper bound of log Z; ``print`` it.

    Attributes:
        lower: mean of log ŵ over forward runs: its expectation is at most log Z.
        lower_error: its standard error.
        upper: mean of log f₀ − log p̂ over exact points: its expectation is at least log Z.
        upper_error: its standard error.
        log_evidence: log of the mean of the same ŵ, which estimates log Z itself and lies above ``lower``.
        log_evidence_error: its standard error, by the delta method; not to be trusted where it exceeds 0.3.
        lower_values: log ŵ of each forward run, (n,).
        upper_values: log f₀ − log p̂ of each point, (n,).
    """

    lower: float
    lower_error: float
    upper: float
    upper_error: float
    log_evidence: float
    log_evidence_error: float
    lower_values: np.ndarray
    upper_values: np.ndarray

    @property
    def width(self) -> float:
        """The gap upper − lower, in nats: how far the sampler's path is from exact annealing, at least 0 on average."""
        return self.upper - self.lower

    def contains(self, log_z: float, errors: float = 4.0) -> bool:
        """Returns whether log Z lies between the bounds, each widened by this many standard errors."""
        return bool(self.lower - errors * self.lower_error <= log_z <= self.upper + errors * self.upper_error)

    def __repr__(self) -> str:
        return printable(
            f"EvidenceBounds({self.lower:.3f} ± {self.lower_error:.3f} ≤ log Z ≤ {self.upper:.3f} ± "
            f"{self.upper_error:.3f}; forward estimate {self.log_evidence:.3f} ± {self.log_evidence_error:.3f})"
        )


def evidence_bounds(
    density: AnnealedDensity,
    exact_points: ArrayLike | Mapping[str, ArrayLike],
    key: Array,
    *,
    sampler: Sampler,
    num_chains: int = 16,
    step_size: ArrayLike | None = None,
    chunk: int | None = None,
) -> EvidenceBounds:
    r"""Bounds log Z = log ∫f₀, with f₀ = exp(density.log_density(·, 0)), from below and from above.

    Annealed importance sampling down the sampler's path has weights w with E w = Z, so that E log ŵ ≤ log Z for ŵ the
    mean of num_chains of them. The reversed path from an *exact* draw of π₀ has E p̂(x) the sampler's density
    (`raise_log_likelihood`), so that E[log f₀(x) − log p̂(x)] ≥ log Z. The two meet where the path is exact.

    `SMC`'s moves are taken without its weights and resampling.

    Args:
        density: with an energy; without static sites.
        exact_points: independent draws of π₀, ``{site: (n, …)}`` or (n, …). From another distribution the upper bound
            is none.
        key: typed random key.
        sampler: whose path to take: `AnnealedMCMC`, `SMC`, or `Ancestral` (η = 1).
        num_chains: chains that each of the n forward runs, and each point, averages over; more close in from both
            sides.
        step_size: ``result.step_size`` of a run; needed where the kernel's is `Adaptive`.
        chunk: chains evaluated at once; left out, as many as suit the positions' size.

    Raises:
        CapabilityError: no energy, static sites, an adaptive step size without ``step_size``, or a kernel that does
            not know how its moves are reversed.
        ShapeError, InvalidValueError, WrongTypeError: a bad argument.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> density = cp.compile(single, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40)))
        >>> points = jax.random.normal(jax.random.key(0), (500,))
        >>> sampler = cp.AnnealedMCMC(cp.MALA(lambda s: 0.5 * s.sigma**2), steps_per_level=2)
        >>> cp.metrics.evidence_bounds(density, points, jax.random.key(1), sampler=sampler).contains(0.0)
        True

    References:
        Grosse, Ghahramani and Adams 2015, *Sandwiching the marginal likelihood using bidirectional Monte Carlo*.
        Neal 2001, *Annealed importance sampling*.
    """
    check_key(key)
    count = check_count(num_chains, "num_chains")
    sampler = frozen(sampler, density, step_size)
    if "energy" not in density.capabilities:
        raise CapabilityError(
            "Evidence is the integral of a log-density, but a factor here offers only its score.",
            where=density.described.where,
            fix="use raise_log_likelihood, which needs scores only, or models with an energy.",
        )
    points = as_positions(exact_points, density)
    path = Path.of_sampler(sampler, density, weighted=False)
    down, up, level0 = _both_ways(path, key, points, count, chains_at_once(density, chunk))
    lower, _, _ = reduced(np.asarray(down, np.float64).reshape(-1, count), sampler)
    below, _, _ = reduced(np.asarray(up, np.float64).reshape(-1, count), sampler)
    upper = np.asarray(level0, np.float64) - below
    pooled, pooled_error, _ = reduced(np.asarray(down, np.float64)[None], sampler)
    return EvidenceBounds(
        lower=float(lower.mean()),
        lower_error=_error(lower),
        upper=float(upper.mean()),
        upper_error=_error(upper),
        log_evidence=float(pooled[0]),
        log_evidence_error=float(pooled_error[0]),
        lower_values=lower,
        upper_values=upper,
    )


@eqx.filter_jit
def _both_ways(
    path: Path, key: Array, points: dict[str, Array], count: int, at_once: int
) -> tuple[Array, Array, Array]:
    n = jax.tree.leaves(points)[0].shape[0]
    down_key, up_key = jax.random.split(key)

    def down(i: Array) -> Array:
        return forward_walk(path, jax.random.fold_in(down_key, i))

    def up(i: Array) -> Array:
        point = jax.tree.map(lambda x: x[i // count], points)
        return reverse_walk(path, jax.random.fold_in(up_key, i), point)

    def log_density(i: Array) -> Array:
        value = path.density.evaluator(jax.tree.map(lambda x: x[i], points), 0).log_density
        assert value is not None
        return value

    return (
        in_batches(down, n * count, at_once),
        in_batches(up, n * count, at_once),
        in_batches(log_density, n, at_once),
    )


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan
