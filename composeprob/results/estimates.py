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

    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """Returns the ends of an interval that holds the true value in a share
        ``level`` of all runs.

        It is value ± t·error·√((ν − 2)/ν), with t the quantile of Student's t with ν
        degrees of freedom, where `ends` do not give another. Ends have the shape of the
        value; NaN where the error is withheld.

        Args:
            level: of confidence, between 0 and 1.

        Raises:
            InvalidValueError: a level outside of (0, 1).
        """
        t, known = student(level, self.degrees), ~np.isnan(self.error)
        if self.ends is not None:
            low, high = (plain(np.where(known, end, np.nan)) for end in self.ends(t))
            return low, high
        half = t * np.asarray(self.error)
        half = half * (
            1.0
            if math.isinf(self.degrees)
            else math.sqrt(max(self.degrees - 2, 0.0) / self.degrees)
        )
        return plain(np.asarray(self.value) - half), plain(
            np.asarray(self.value) + half
        )

    def __str__(self) -> str:
        if np.ndim(self.value):
            return "\n".join(
                str(Estimate(v, e)) for v, e in zip(self.value, self.error, strict=True)
            )
        return printable(with_error(float(self.value), float(self.error)))


def plain(value: float | np.ndarray) -> Any:
    """A number of Python's, which prints as it is, where there is one alone."""
    return np.asarray(value) if np.ndim(value) else float(value)


def student(level: float, degrees: float) -> float:
    """Returns t such that Student's t with these degrees of freedom is within ±t in a
    share ``level`` of all cases."""
    if not (np.ndim(level) == 0 and 0 < level < 1):
        raise InvalidValueError(
            f"A level of confidence lies between 0 and 1; got {level!r}.",
            fix="for 90 % pass 0.9: interval(0.9).",
        )
    share = 0.5 + level / 2
    return float(
        special.ndtri(share) if math.isinf(degrees) else special.stdtrit(degrees, share)
    )


def with_error(value: float, error: float) -> str:
    """Formats a number with as many digits as its error has: ``0.312 ± 0.014``."""
    if not (math.isfinite(error) and math.isfinite(value)):
        return f"{value:.4g} (error withheld)"
    if error == 0.0:
        return f"{value:.4g} ± 0"
    digits = 1 - math.floor(math.log10(error))
    return (
        f"{value:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}"
        if digits < 8
        else f"{value:.4g} ± {error:.1e}"
    )


@dataclass(frozen=True, eq=False)
class Families:
    """`Families` groups chains by the first chain that they descend from; families are
    independent of each other.

    Args:
        weights: normalised, (N,).
        index: the family of each chain, (N,) of 0 … F − 1.
    """

    weights: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]

    @classmethod
    def from_ancestors(cls, weights: ArrayLike, ancestors: ArrayLike) -> Families:
        """Groups chains with these weights and first ancestors, both (N,)."""
        weights = np.asarray(weights, np.float64)
        return cls(
            weights / weights.sum(),
            np.unique(np.asarray(ancestors), return_inverse=True)[1],
        )

    @classmethod
    def from_log_weights(
        cls, log_weights: np.ndarray, ancestors: ArrayLike | None = None
    ) -> Families:
        """The same of log-weights up to a constant; without ancestors each chain is a
        family."""
        weights = np.exp(log_weights - np.max(log_weights))
        return cls.from_ancestors(
            weights, np.arange(len(weights)) if ancestors is None else ancestors
        )

    @property
    def effective(self) -> float:
        """The effective number of families, 1/Σ W_e², with W_e the weight of family
        e."""
        return 1.0 / float(np.sum(np.bincount(self.index, self.weights) ** 2))

    @property
    def pareto_k(self) -> float:
        """Pareto k̂ of the weights that the first chains have come to have, with those
        of all their descendants.

        Above 0.7 a few of them decide, and errors are too small. By ArviZ (Vehtari et
        al. 2024); NaN where all weigh the same, or too few differ.
        """
        weights = np.bincount(
            self.index, self.weights, minlength=len(self.weights)
        )  # 0 of those without descendants
        if np.ptp(weights) < 1e-9 * weights.max():
            return math.nan
        arviz, since_1 = quiet_arviz()
        with np.errstate(divide="ignore"):
            if not since_1:
                k = float(arviz.psislw(np.log(weights))[1])
            else:
                from arviz_stats.base import array_stats

                try:  # it takes log-likelihoods, whose weights are 1/likelihood
                    k = float(array_stats.psislw(-np.log(weights))[1])
                except ValueError:  # "All tail values are the same"
                    k = math.nan
        return k if math.isfinite(k) else math.nan

    def variance(
        self, values: Shaped[np.ndarray, " n *event"]
    ) -> Float[np.ndarray, "*event"]:
        r"""Estimates the variance of the weighted mean of values, (N, …) → (…).

        $$\hat V = \sum_e \Big(\sum_{i \in e} w_i (\varphi_i - \hat\varphi)\Big)^2,$$

        over families e. Members of a family that are alike count as one, and members
        that transitions have made independent count as their number.

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


def quiet_arviz() -> tuple[ModuleType, bool]:
    """ArviZ, and whether it is its version 1.0 (of Python 3.12) or later."""
    with warnings.catch_warnings():
        # Once a day it tells who imports it that 1.0 differs: whoever asked for a
        # summary cannot act on that.
        warnings.filterwarnings(
            "ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning
        )
        import arviz
    return arviz, int(arviz.__version__.partition(".")[0]) >= 1


def systematic(weights: Float[np.ndarray, " m"], n: int) -> Int[np.ndarray, " {n}"]:
    """Returns the indices of n samples of equal weight, by systematic resampling with
    offset ½ (no random number)."""
    return np.minimum(
        np.searchsorted(np.cumsum(weights), (np.arange(n) + 0.5) / n), len(weights) - 1
    )


def effective_chains(
    families: Families, values: list[Shaped[np.ndarray, "n ..."]]
) -> float:
    """Returns the number of independent chains whose means would have the same errors:
    the least sd²/V̂ over sites' numbers, (N, …) each; a site of many counts by the mean
    ratio over them."""
    n, e = len(families.weights), families.effective
    if e < 1.0 + 1e-6:
        return 1.0
    found, correction = (
        float(n),
        (n / max(n - 1, 1)) * (e - 1) / e,
    )  # both variances without bias
    for flat in map(_finite_columns, values):
        spread = families.weights @ (flat - families.weights @ flat) ** 2
        moved = spread > 1e-12 * (1e-30 + families.weights @ flat**2)
        if moved.any():
            ratios = families.variance(flat[:, moved]) / spread[moved]
            ratio = float(np.max(ratios) if len(ratios) <= 16 else np.mean(ratios))
            found = min(found, correction / max(ratio, 1e-30))
        elif flat.size:
            found = min(found, e)  # all values are equal: only the ancestors differ
    return found


def known_chains(
    families: Families, values: list[Shaped[np.ndarray, "n ..."]]
) -> float:
    """Returns how many independent chains these are worth at least: the effective
    number e of their families, or more where these are few, but their members have
    forgotten one another.

    That is Σσ²/ΣV̂ over a site's entries, the least over sites, less a standard error:
    V̂ of one entry has e − 1 degrees of freedom, and those of all have (e − 1)·D with D
    = (tr C)²/tr C², C their covariance.
    """
    n, e = len(families.weights), families.effective
    if not 2.0 < e < tuning.ERRORS.fewest_families:
        return e
    found = float(n)
    for flat in map(_finite_columns, values):
        rows = np.sqrt(families.weights)[:, None] * (flat - families.weights @ flat)
        total, square = (
            np.sum(rows**2),
            np.sum((rows @ rows.T if n < rows.shape[1] else rows.T @ rows) ** 2),
        )
        if square > 0:
            sure = max(1 - math.sqrt(2 * square / ((e - 1) * total**2)), 0.0)
            found = min(
                found, sure * total * (e - 1) / (e * families.variance(flat).sum())
            )
    return max(e, found)


def _finite_columns(values: Shaped[np.ndarray, "n ..."]) -> Float[np.ndarray, "n d"]:
    """The numbers of events that are finite in all chains."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    return flat[:, np.isfinite(flat).all(0)]


def wilson(
    share: ArrayLike, size: ArrayLike, t: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns Wilson's interval of a share seen in so many independent samples, ``t``
    standard errors wide."""
    share, size = np.asarray(share), np.asarray(size)
    square = t**2 / size
    middle = (share + square / 2) / (1 + square)
    half = t / (1 + square) * np.sqrt(share * (1 - share) / size + square / (4 * size))
    return np.asarray(np.clip(middle - half, 0.0, 1.0)), np.asarray(
        np.clip(middle + half, 0.0, 1.0)
    )


def quantile(values: np.ndarray, cumulative: np.ndarray, q: float) -> float:
    """Returns the smallest of sorted values whose cumulative weight reaches q."""
    return float(
        values[min(int(np.searchsorted(cumulative, q - 1e-12)), len(values) - 1)]
    )


def evaluated(name: str, fn: Any, samples: Mapping[str, np.ndarray]) -> np.ndarray:
    """``fn`` of every sample, ``{site: (N, draws, …)}`` → (N, draws, …), for the method
    of this name."""
    if not callable(fn):
        site = fn if isinstance(fn, str) and fn in samples else next(iter(samples))
        raise WrongTypeError(
            f"{name} takes a function of one sample; got {fn!r}.",
            fix=f"for example result.{name}(lambda s: s[{site!r}]).",
        )
    lead = next(iter(samples.values())).shape[:2]
    whole = {
        site: value.reshape(-1, *value.shape[2:]) for site, value in samples.items()
    }
    first = {site: value[0] for site, value in whole.items()}
    try:
        one = np.asarray(value := fn(first))
    except ComposeProbError:
        raise
    except Exception as error:
        raise InvalidValueError(
            f"The function failed on one sample, a dict of {', '.join(whole)}: {type(error).__name__}: {error}",
            fix="write it for ONE sample, without an axis of chains: lambda s: s['x'][0] > 0.",
        ) from error
    if one.dtype.kind in "OUSc":
        raise WrongTypeError(
            f"The function of {name} must return real numbers; of one sample it returned {a_kind(value)}.",
            fix=f"return one of them or an array: result.{name}(lambda s: s[{next(iter(whole))!r}]).",
        )
    values = np.asarray(_over_all(fn, whole)).astype(np.float64)
    return values.reshape(*lead, *values.shape[1:])


def _over_all(
    fn: Callable[[dict[str, Array]], ArrayLike], samples: Mapping[str, np.ndarray]
) -> ArrayLike:
    try:
        return jax.jit(jax.vmap(fn))(dict(samples))
    except (
        jax.errors.JAXTypeError,
        TypeError,
        ValueError,
    ):  # NumPy or Python's `if` in it: one sample after another
        count = len(next(iter(samples.values())))
        return np.stack(
            [
                np.asarray(fn({name: value[i] for name, value in samples.items()}))
                for i in range(count)
            ]
        )
