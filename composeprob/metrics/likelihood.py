"""RAISE, the log-likelihood of held-out points under a sampler's output, and bounds of log Z by the same paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count, check_key
from composeprob.density.annealed import AnnealedDensity
from composeprob.density.barriers import log_densities
from composeprob.errors import CapabilityError, InvalidValueError
from composeprob.metrics.distances import as_positions
from composeprob.metrics.paths import Path, forward_walk, frozen, reverse_walk, start_constant
from composeprob.samplers.run import Run, Visits, begin
from composeprob.samplers.sampler import Sampler
from composeprob.text import printable


@dataclass(frozen=True, repr=False, eq=False)
class LogLikelihood:
    """`LogLikelihood` holds what `raise_log_likelihood` found; ``print`` it.

    Attributes:
        values: log p̂ of each point, (n,): expected to lie below log p, by about half the square of its error.
        errors: Monte-Carlo standard error of each value, (n,); NaN with one chain a point.
        ess: effective number of chains of each point relative to their number, (n,): near 1/num_chains, one chain
            decides.
        num_chains: chains a point.
        log_evidence: what was subtracted for `SMC`'s weights; None for other samplers.
        log_evidence_error: its standard error; NaN where it was given, or is None.
    """

    values: np.ndarray
    errors: np.ndarray
    ess: np.ndarray
    num_chains: int
    log_evidence: float | None = None
    log_evidence_error: float = field(default=math.nan)

    @property
    def mean(self) -> float:
        """The mean log-likelihood of a point, in nats."""
        return float(np.mean(self.values))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over points, their Monte-Carlo error included."""
        return _error(self.values)

    @property
    def monte_carlo_error(self) -> float:
        """The part of the mean's standard error that more chains would remove."""
        shared = 0.0 if math.isnan(self.log_evidence_error) else self.log_evidence_error
        return float(np.sqrt(np.sum(self.errors**2) / len(self.values) ** 2 + shared**2))

    def __repr__(self) -> str:
        lost = int(np.sum(~np.isfinite(self.values)))
        text = (
            f"LogLikelihood({self.mean:.3f} ± {self.standard_error:.3f} nats over {len(self.values)} points, "
            f"± {self.monte_carlo_error:.3f} of it from {self.num_chains} chains a point"
        )
        if self.log_evidence is not None:
            text += f"; log-evidence {self.log_evidence:.3f} taken off"
        return printable(text + (f"; {lost} points are not finite)" if lost else ")"))


def raise_log_likelihood(
    density: AnnealedDensity,
    points: ArrayLike | Mapping[str, ArrayLike],
    key: Array,
    *,
    sampler: Sampler,
    num_chains: int = 64,
    log_evidence: float | None = None,
    step_size: ArrayLike | None = None,
    chunk: int | None = None,
) -> LogLikelihood:
    r"""Estimates the log-likelihood of held-out points under the distribution of a sampler's output (RAISE).

    From each point $x_0$ chains walk the sampler's path backwards, level 0 to the top, and

    $$\hat p(x_0) = \mathrm{top}(x_\top) \prod_{\text{transitions}} \frac{T(x' \to x)}{T(x \to x')}
      \prod_k \frac{N(x_k;\, \mu(x_{k+1}), v_k)}{q(x_{k+1} \mid x_k)}$$

    has as its expectation exactly the density that the sampler's chains have at $x_0$, for adjusted and unadjusted
    kernels: what a histogram of infinitely many of them would show, biases included. log p̂, averaged over num_chains
    inside the logarithm, is therefore expected to lie below the truth and grows towards it with num_chains.

    Under `SMC` the distribution is that of its weighted path, ∏G/Z: its output for infinitely many chains, so what
    resampling does to a finite population is not seen. With ``weights="density"`` and adjusted kernels that is π₀/Z
    itself.

    Points belong to level 0: they should carry its noise, as samples do.

    Args:
        density: compiled, without static sites.
        points: ``{site: (n, …)}``, or (n, …) alone where there is one site.
        key: typed random key.
        sampler: `Ancestral` (η = 1), `AnnealedMCMC` or `SMC` with any kernel that reports how its moves are reversed.
        num_chains: reversals of each point.
        log_evidence: of `SMC`'s run, ``result.log_evidence``; left out, four runs of 1024 chains estimate it.
        step_size: ``result.step_size`` of a run; needed where the kernel's is `Adaptive`. The likelihood then is that
            of the sampler with those steps.
        chunk: reversals evaluated at once; left out, as many as suit the positions' size.

    Returns:
        A value for each point, the mean, and its standard errors. The cost is that of n·num_chains chains.

    Raises:
        CapabilityError: static sites; an adaptive step size without ``step_size``; a kernel that does not know how
            its moves are reversed.
        ShapeError, InvalidValueError, WrongTypeError: a bad argument.

    Example:
        >>> import composeprob as cp, jax, numpyro.distributions as dist
        >>> @cp.program
        ... def single(f):
        ...     return cp.sample("x", f)
        >>> density = cp.compile(single, cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40)))
        >>> points = jax.random.normal(jax.random.key(0), (200,))
        >>> found = cp.metrics.raise_log_likelihood(density, points, jax.random.key(1), sampler=cp.Ancestral())
        >>> abs(found.mean + 1.42) < 0.2  # −½·log(2πe)
        True

    References:
        Burda, Grosse and Salakhutdinov 2015, *Accurate and conservative estimates of MRF log-likelihood using reverse
        annealing*. Grosse, Ancha and Roy 2016, *Measuring the reliability of MCMC inference with bidirectional Monte
        Carlo*.
    """
    check_key(key)
    count = check_count(num_chains, "num_chains")
    sampler = frozen(sampler, density, step_size)
    placed = as_positions(points, density)
    path = Path.of_sampler(sampler, density)
    evidence, error = None, math.nan
    if path.weights is not None:
        key, evidence_key = jax.random.split(key)
        evidence = log_evidence
        if evidence is None:
            evidence, error = estimate_evidence(sampler, density, evidence_key)
        if not np.isfinite(evidence):
            raise InvalidValueError(f"The log-evidence is {evidence}.", fix="look at result.status of an SMC run.")
    logs = reverse_walks(path, key, placed, count, chains_at_once(density, chunk))
    values, errors, ess = reduced(np.asarray(logs, np.float64).reshape(-1, count), sampler)
    return LogLikelihood(values - float(evidence or 0.0), errors, ess, count, evidence, error)


def reduced(logs: np.ndarray, sampler: Sampler) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of log-weights (n, c): the log of each row's mean, its standard error, the relative effective sample size."""
    from scipy.special import logsumexp, softmax

    if not np.isfinite(logs).any():
        who = "the sampler" if sampler.kernel is None else f"{sampler.kernel!r}"
        raise CapabilityError(
            f"No reversal has a finite probability: the points lie outside the support, or {who} does not report how "
            "likely its moves are reversed (`Info.log_reversal` is NaN for BlackJAX's unadjusted algorithms).",
            fix="check density.log_density at a point; use ULA, UHMC, MALA or HMC.",
        )
    count = logs.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = logsumexp(logs, axis=1) - math.log(count)
        ess = 1 / (softmax(logs, axis=1) ** 2).sum(1) / count
        errors = np.sqrt((1 / ess - 1) / (count - 1)) if count > 1 else np.full(len(logs), np.nan)
    return values, errors, ess


@eqx.filter_jit
def reverse_walks(path: Path, key: Array, points: dict[str, Array], count: int, at_once: int) -> Array:
    """log p̂ of ``count`` reversals of each of n points, (n·count,)."""

    def walk(i: Array) -> Array:
        return reverse_walk(path, jax.random.fold_in(key, i), jax.tree.map(lambda x: x[i // count], points))

    return in_batches(walk, jax.tree.leaves(points)[0].shape[0] * count, at_once)


@eqx.filter_jit
def forward_walks(path: Path, key: Array, number: int, at_once: int) -> Array:
    """log w of so many chains, (number,)."""
    return in_batches(lambda i: forward_walk(path, jax.random.fold_in(key, i)), number, at_once)


def in_batches(function: Callable[[Array], Array], total: int, at_once: int) -> Array:
    """function(0), …, function(total − 1), ``at_once`` at a time; traced once."""
    size = min(total, at_once)
    batches = -(-total // size)
    index = jnp.minimum(jnp.arange(batches * size), total - 1).reshape(batches, size)
    return jax.lax.map(jax.vmap(function), index).reshape(-1)[:total]


def estimate_evidence(sampler: Sampler, density: AnnealedDensity, key: Array) -> tuple[float, float]:
    """The log-evidence of `SMC`'s path and its standard error, from independent runs."""
    sampler, first = sampler.in_numbers(), sampler.first_level(density)
    visits, keys = Visits.every(first, density.num_levels), jax.random.split(key, tuning.EVIDENCE_RUNS)
    logs = np.array([float(_evidence(sampler, density, begin(k, tuning.EVIDENCE_CHAINS, visits), first)) for k in keys])
    relative = np.exp(logs - logs.max())
    error = relative.std(ddof=1) / relative.mean() / np.sqrt(len(logs))
    return float(logs.max() + np.log(relative.mean())), float(error)


@eqx.filter_jit
def _evidence(sampler: Sampler, density: AnnealedDensity, run: Run, first: int) -> Array:
    run = sampler.start(run, density, first)
    run = eqx.tree_at(lambda r: r.log_evidence, run, start_constant(run.log_evidence))
    return sampler.advance(run, density, first + 1).log_evidence


def chains_at_once(density: AnnealedDensity, chunk: object) -> int:
    """How many chains are evaluated at once."""
    if chunk is not None:
        return check_count(chunk, "chunk")
    size = sum(math.prod(site.shape) for site in density.sites.values())
    return min(8192, max(1, 2**20 // max(size, 1)))  # a million numbers in their positions at most


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
    (down_key, up_key), at_once = jax.random.split(key), chains_at_once(density, chunk)
    number = count * len(jax.tree.leaves(points)[0])
    down = np.asarray(forward_walks(path, down_key, number, at_once), np.float64)
    up = np.asarray(reverse_walks(path, up_key, points, count, at_once), np.float64)
    lower, _, _ = reduced(down.reshape(-1, count), sampler)
    below, _, _ = reduced(up.reshape(-1, count), sampler)
    upper = np.asarray(log_densities(density, points), np.float64) - below
    pooled, pooled_error, _ = reduced(down[None], sampler)
    return EvidenceBounds(
        lower=float(lower.mean()), lower_error=_error(lower), upper=float(upper.mean()), upper_error=_error(upper),
        log_evidence=float(pooled[0]), log_evidence_error=float(pooled_error[0]), lower_values=lower,
        upper_values=upper,
    )  # fmt: skip


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan
