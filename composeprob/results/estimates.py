"""Estimates with standard errors, from chains that may descend from common
ancestors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike
from scipy import special

from composeprob import tuning
from composeprob.arguments import with_call_errors
from composeprob.errors import (
    ComposeProbError,
    InvalidValueError,
    WrongTypeError,
    a_kind,
)
from composeprob.text import printable


@dataclass(frozen=True)
class Estimate:
    """An `Estimate` is an estimated number, or an array of them, with its standard
    error.

    Args:
        value: the estimate.
        error: its standard error, of the same shape; NaN where it is withheld.
        degrees: degrees of freedom that the error is estimated with, ν: the estimate's
            distribution is Student's t with this standard deviation. Infinite for a
            normal distribution.
        ends: of intervals that are not symmetric, by t, the quantile of Student's t
            with ν degrees of freedom.

    Example:
        >>> from composeprob.results.estimates import Estimate
        >>> found = Estimate(0.3123, 0.014)
        >>> print(found)
        0.312 ± 0.014
        >>> [round(end, 3) for end in found.interval(0.9)]
        [0.289, 0.335]
    """

    value: Any
    error: Any
    degrees: float = math.inf
    ends: Callable[[float], tuple[Any, Any]] | None = field(
        default=None, repr=False, compare=False
    )

    @with_call_errors
    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """Return the ends of an interval that holds the true value in a share ``level``
        of all runs.

        It is value ± t·error·√((ν − 2)/ν), with t the quantile of Student's t with ν
        degrees of freedom, where `ends` do not give another. Ends have the shape of the
        value; NaN where the error is withheld.

        Args:
            level: of confidence, between 0 and 1.

        Raises:
            InvalidValueError: a level outside of (0, 1).
        """
        t = student(level, self.degrees)
        if self.ends is not None:
            stated = ~np.isnan(self.error)
            low, high = self.ends(t)
            low = as_python(np.where(stated, low, np.nan))
            high = as_python(np.where(stated, high, np.nan))
            return low, high
        # Student's t has the variance ν/(ν − 2); its scale is less than its error.
        scale = 1.0
        if not math.isinf(self.degrees):
            scale = math.sqrt(max(self.degrees - 2, 0.0) / self.degrees)
        half = t * np.asarray(self.error) * scale
        value = np.asarray(self.value)
        return as_python(value - half), as_python(value + half)

    def __float__(self) -> float:
        """The value of an estimate of one number."""
        if np.ndim(self.value):
            raise WrongTypeError(
                f"This estimate has {np.size(self.value)} numbers.",
                fix="take one of them: float(estimate.value[0]).",
            )
        return float(self.value)

    def __str__(self) -> str:
        if np.ndim(self.value):
            rows = zip(self.value, self.error, strict=True)
            return "\n".join(str(Estimate(value, error)) for value, error in rows)
        return printable(with_error(float(self.value), float(self.error)))


def as_python(value: float | np.ndarray) -> Any:
    """A Python number, which prints as it is, for a single one; else the array."""
    return np.asarray(value) if np.ndim(value) else float(value)


def student(level: float, degrees: float) -> float:
    """Return t such that Student's t with these degrees of freedom is within ±t in a
    share ``level`` of all cases."""
    if isinstance(level, str) or not (np.ndim(level) == 0 and 0 < level < 1):
        raise InvalidValueError(
            f"A level of confidence lies between 0 and 1; got {level!r}.",
            fix="for 90 % pass 0.9: interval(0.9).",
        )
    below = 0.5 + level / 2
    if math.isinf(degrees):
        return float(special.ndtri(below))
    return float(special.stdtrit(degrees, below))


def with_error(value: float, error: float) -> str:
    """Format a number with as many digits as its error has: ``0.312 ± 0.014``."""
    if not (math.isfinite(error) and math.isfinite(value)):
        return f"{value:.4g} (error withheld)"
    if error == 0.0:
        return f"{value:.4g} ± 0"
    digits = max(1 - math.floor(math.log10(error)), 0)
    if digits >= 8:
        return f"{value:.4g} ± {error:.1e}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


@dataclass(frozen=True, eq=False)
class Genealogy:
    """A `Genealogy` holds the ancestor of each chain, the first chain that it descends
    from (its Eve index), and its weight.

    Chains of different ancestors are independent of each other.

    Args:
        weights: normalised, (N,).
        index: the ancestor of each chain, (N,) of 0 … E − 1 for E ancestors that have
            descendants.
        repeated: the weights that a repetition of the run gives the same chains,
            normalised, (N,); None where there was none, or errors need none.
    """

    weights: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    repeated: Float[np.ndarray, " n"] | None = None

    @classmethod
    def from_ancestors(cls, weights: ArrayLike, ancestors: ArrayLike) -> Genealogy:
        """Number the ancestors of chains with these weights, both (N,)."""
        weights = np.asarray(weights, np.float64)
        _, index = np.unique(np.asarray(ancestors), return_inverse=True)
        return cls(weights / weights.sum(), index)

    @classmethod
    def from_log_weights(
        cls, log_weights: np.ndarray, ancestors: ArrayLike | None = None
    ) -> Genealogy:
        """The same from log-weights up to a constant; without ancestors each chain is
        its own."""
        weights = np.exp(log_weights - np.max(log_weights))
        if ancestors is None:
            ancestors = np.arange(len(weights))
        return cls.from_ancestors(weights, ancestors)

    @property
    def effective(self) -> float:
        """The effective number of ancestors, 1/Σ W_e², with W_e the weight of all
        descendants of ancestor e."""
        return 1.0 / float(np.sum(np.bincount(self.index, self.weights) ** 2))

    @property
    def pareto_k(self) -> float:
        """Pareto k̂ of the weights of the first chains, each with those of all its
        descendants.

        Above 0.7 a few of them decide, and errors are too small. By ArviZ (Vehtari et
        al. 2024), who fit the largest fifth of the weights; NaN where these are too few
        (fewer than five, with some versions six), all are equal, or too few differ.
        """
        # 0 for first chains without descendants
        weights = np.bincount(self.index, self.weights, minlength=len(self.weights))
        if len(weights) < 25 or np.ptp(weights) < 1e-9 * weights.max():
            return math.nan
        with np.errstate(divide="ignore"):
            k = _pareto_k(np.log(weights))
        return k if math.isfinite(k) else math.nan

    def variance(
        self, values: Shaped[np.ndarray, " n *event"]
    ) -> Float[np.ndarray, "*event"]:
        r"""Estimate the variance of the weighted mean of values, (N, …) → (…).

        $$\hat V = \sum_e \Big(\sum_{i \in e} w_i (\varphi_i - \hat\varphi)\Big)^2,$$

        over ancestors e. Equal descendants of an ancestor count as one, and those that
        transitions have made independent count as their number.

        References:
            Chan and Lai 2013, *A general theory of particle filters in hidden Markov
            models and some applications*; Lee and Whiteley 2018, *Variance estimation
            in the particle filter*.
        """
        flat = np.asarray(values, np.float64).reshape(len(self.weights), -1)
        deviations = self.weights[:, None] * (flat - self.weights @ flat)
        total = np.zeros((int(self.index.max()) + 1, flat.shape[1]))
        np.add.at(total, self.index, deviations)
        return (total**2).sum(0).reshape(np.shape(values)[1:])

    def departure(
        self, values: Shaped[np.ndarray, " n *event"]
    ) -> Float[np.ndarray, "*event"]:
        """Return by how much the repetition's weights move the mean of values, (N, …) →
        (…); 0 without a repetition."""
        if self.repeated is None:
            return np.zeros(np.shape(values)[1:])
        change = self.repeated - self.weights
        return np.asarray(np.tensordot(change, np.asarray(values, np.float64), 1))


def _pareto_k(log_weights: np.ndarray) -> float:
    """Pareto k̂ by the function that ArviZ's version has for it."""
    try:
        # The part of ArviZ 1.0 that is needed: all of it takes twice as long to import.
        from arviz_stats.base import array_stats
    except ImportError:
        arviz, _ = quiet_arviz()
        return float(arviz.psislw(log_weights)[1])
    try:
        # It takes log-likelihoods, whose importance weights are 1/likelihood.
        return float(array_stats.psislw(-log_weights)[1])
    except ValueError:  # "All tail values are the same"
        return math.nan


def quiet_arviz() -> tuple[ModuleType, bool]:
    """ArviZ, imported without its warning, and whether its version is 1.0 or later."""
    with warnings.catch_warnings():
        # Once a day it tells its importer that 1.0 differs: a user who asked for a
        # summary cannot act on that.
        warnings.filterwarnings(
            "ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning
        )
        import arviz
    return arviz, int(arviz.__version__.partition(".")[0]) >= 1


def systematic(weights: Float[np.ndarray, " m"], n: int) -> Int[np.ndarray, " {n}"]:
    """Return the indices of n samples of equal weight, by systematic resampling with
    offset ½ (no random number)."""
    quantiles = (np.arange(n) + 0.5) / n
    index = np.searchsorted(np.cumsum(weights), quantiles)
    return np.minimum(index, len(weights) - 1)  # sums of weights may round below 1


def effective_chains(
    genealogy: Genealogy, values: list[Shaped[np.ndarray, "n ..."]]
) -> float:
    """Return the number of independent chains whose means would have the same errors.

    That is the least sd²/V̂ over the entries of a site, (N, …) each, with V̂ the variance
    of the mean by the genealogy; a site of many entries counts by the mean ratio.
    """
    n = len(genealogy.weights)
    e = genealogy.effective
    if e < 1.0 + 1e-6:
        return 1.0
    least = float(n)
    # n/(n − 1) and e/(e − 1) make the two variances unbiased.
    correction = (n / max(n - 1, 1)) * (e - 1) / e
    for flat in map(_finite_columns, values):
        spread = genealogy.weights @ (flat - genealogy.weights @ flat) ** 2
        varies = spread > 1e-12 * (1e-30 + genealogy.weights @ flat**2)
        if varies.any():
            ratios = genealogy.variance(flat[:, varies]) / spread[varies]
            # The maximum of many estimated ratios is large by chance.
            ratio = np.max(ratios) if len(ratios) <= 16 else np.mean(ratios)
            least = min(least, correction / max(float(ratio), 1e-30))
        elif flat.size:
            least = min(least, e)  # all values are equal: only the ancestors differ
    return least


def effective_chains_bound(
    genealogy: Genealogy, values: list[Shaped[np.ndarray, "n ..."]]
) -> float:
    """Return a lower bound on the number of independent chains that these are worth.

    It is the effective number e of ancestors, or more where e is small, but descendants
    of one ancestor have forgotten one another: Σσ²/ΣV̂ over a site's entries, the least
    over sites, less a standard error. V̂ of one entry has e − 1 degrees of freedom, and
    those of all have (e − 1)·D with D = (tr C)²/tr C², C their covariance.
    """
    n = len(genealogy.weights)
    e = genealogy.effective
    if not 2.0 < e < tuning.ERRORS.fewest_families:
        return e
    least = float(n)
    for flat in map(_finite_columns, values):
        centred = flat - genealogy.weights @ flat
        rows = np.sqrt(genealogy.weights)[:, None] * centred
        # tr C² is that of the smaller of the two products.
        product = rows @ rows.T if n < rows.shape[1] else rows.T @ rows
        trace = np.sum(rows**2)
        trace_of_square = np.sum(product**2)
        if trace_of_square > 0:
            relative_error = math.sqrt(2 * trace_of_square / ((e - 1) * trace**2))
            less_error = max(1 - relative_error, 0.0)
            variance = e * genealogy.variance(flat).sum()
            least = min(least, less_error * trace * (e - 1) / variance)
    return max(e, least)


def _finite_columns(values: Shaped[np.ndarray, "n ..."]) -> Float[np.ndarray, "n d"]:
    """The entries of events that are finite in all chains."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    return flat[:, np.isfinite(flat).all(0)]


def wilson(
    share: ArrayLike, size: ArrayLike, t: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of a share seen in ``size`` independent samples, ``t``
    standard errors wide."""
    share = np.asarray(share)
    size = np.asarray(size)
    t = np.asarray(t)
    square = t**2 / size
    middle = (share + square / 2) / (1 + square)
    half = t / (1 + square) * np.sqrt(share * (1 - share) / size + square / (4 * size))
    low = np.clip(middle - half, 0.0, 1.0)
    high = np.clip(middle + half, 0.0, 1.0)
    return np.asarray(low), np.asarray(high)


def quantile(values: np.ndarray, cumulative: np.ndarray, q: float) -> float:
    """Return the smallest of sorted values whose cumulative weight reaches q."""
    index = int(np.searchsorted(cumulative, q - 1e-12))  # but for rounding
    return float(values[min(index, len(values) - 1)])


def quantiles_of_runs(
    values: np.ndarray, cumulative: np.ndarray, q: float, size: float, degrees: float
) -> Float[np.ndarray, " runs"]:
    """Return what a quantile may be in other runs, at even probabilities.

    In another run the value at which the cumulative weight reaches q has a share here
    that differs from q by chance, as a share of ``size`` samples does.

    Args:
        values: sorted.
        cumulative: their cumulative weights.
        q: level of the quantile.
        size: number of independent samples that tell this share as well.
        degrees: of freedom that it is known with.
    """
    number = tuning.QUANTILE_RUNS
    below = (np.arange(number) + 0.5) / number
    if math.isinf(degrees):
        t = special.ndtri(below)
    else:
        t = special.stdtrit(degrees, below)
    low, high = wilson(q, size, np.abs(t))
    shares = np.where(t < 0, low, high)
    return np.array([quantile(values, cumulative, share) for share in shares])


def evaluated(name: str, fn: Any, samples: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return ``fn`` of every sample, ``{site: (N, draws, …)}`` → (N, draws, …).

    Args:
        name: of the method of `Result` that was called, for errors.
        fn: the user's function of one sample.
        samples: of every site.

    Raises:
        WrongTypeError, InvalidValueError: not a function of one sample.
    """
    if not callable(fn):
        site = fn if isinstance(fn, str) and fn in samples else next(iter(samples))
        raise WrongTypeError(
            f"{name} takes a function of one sample; got {fn!r}.",
            fix=f"for example result.{name}(lambda s: s[{site!r}]).",
        )
    lead = next(iter(samples.values())).shape[:2]
    pooled = {
        site: value.reshape(-1, *value.shape[2:]) for site, value in samples.items()
    }
    _check_one_sample(name, fn, {site: value[0] for site, value in pooled.items()})
    values = np.asarray(_over_all(fn, pooled)).astype(np.float64)
    return values.reshape(*lead, *values.shape[1:])


def _check_one_sample(name: str, fn: Any, sample: dict[str, Any]) -> None:
    """Refuse a function that fails on one sample or returns no real numbers."""
    try:
        value = fn(sample)
        array = np.asarray(value)
    except ComposeProbError:
        raise
    except Exception as error:
        raise InvalidValueError(
            f"The function failed on one sample, a dict of {', '.join(sample)}: "
            f"{type(error).__name__}: {error}",
            fix="write it for ONE sample, without an axis of chains: "
            "lambda s: s['x'][0] > 0.",
        ) from error
    if array.dtype.kind in "OUSc":
        site = next(iter(sample))
        raise WrongTypeError(
            f"The function of {name} must return real numbers; "
            f"of one sample it returned {a_kind(value)}.",
            fix="return a real number or an array of them: "
            f"result.{name}(lambda s: s[{site!r}]).",
        )


def _over_all(
    fn: Callable[[dict[str, Array]], ArrayLike], samples: Mapping[str, np.ndarray]
) -> ArrayLike:
    """Map a function over samples, compiled if JAX can trace it."""
    try:
        return jax.jit(jax.vmap(fn))(dict(samples))
    # NumPy or Python's `if` in the function: one sample after another.
    except (jax.errors.JAXTypeError, TypeError, ValueError):
        count = len(next(iter(samples.values())))
        values = []
        for i in range(count):
            sample = {name: value[i] for name, value in samples.items()}
            values.append(np.asarray(fn(sample)))
        return np.stack(values)
