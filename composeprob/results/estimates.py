"""Estimates with standard errors, from chains that may descend from common ancestors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike

from composeprob.errors import ComposeProbError, InvalidValueError, WrongTypeError

FEWEST = 3.0
"""Independent ancestors that an error takes, at least: under it the variance of an error is infinite."""


@dataclass(frozen=True)
class Estimate:
    """An `Estimate` is an estimated number, or an array of them, with its standard error.

    Args:
        value: the estimate.
        error: its standard error, of the same shape; NaN where it is withheld.

    Example:
        >>> from composeprob.results.estimates import Estimate
        >>> print(Estimate(0.3123, 0.014))
        0.312 ± 0.014
    """

    value: Any
    error: Any

    def __str__(self) -> str:
        if np.ndim(self.value):
            return "\n".join(str(Estimate(v, e)) for v, e in zip(self.value, self.error, strict=True))
        return with_error(float(self.value), float(self.error))


def with_error(value: float, error: float) -> str:
    """Formats a number with as many digits as its error has: ``0.312 ± 0.014``."""
    if not (math.isfinite(error) and math.isfinite(value)):
        return f"{value:.4g} (error withheld)"
    if error == 0.0:
        return f"{value:.4g} ± 0"
    digits = 1 - math.floor(math.log10(error))
    return f"{value:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}" if digits < 8 else f"{value:.4g} ± {error:.1e}"


@dataclass(frozen=True, eq=False)
class Families:
    """`Families` groups chains by the first chain that they descend from; families are independent of each other.

    Args:
        weights: normalised, (N,).
        index: the family of each chain, (N,) of 0 … F − 1.
    """

    weights: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, weights: ArrayLike, ancestors: ArrayLike) -> Families:
        """Groups chains with these weights and first ancestors, both (N,)."""
        weights = np.asarray(weights, np.float64)
        return cls(weights / weights.sum(), np.unique(np.asarray(ancestors), return_inverse=True)[1])

    @property
    def effective(self) -> float:
        """The effective number of families, 1/Σ W_e², with W_e the weight of family e."""
        return 1.0 / float(np.sum(np.bincount(self.index, self.weights) ** 2))

    def variance(self, values: Shaped[np.ndarray, " n *event"]) -> Float[np.ndarray, "*event"]:
        r"""Estimates the variance of the weighted mean of values, (N, …) → (…).

        $$\hat V = \sum_e \Big(\sum_{i \in e} w_i (\varphi_i - \hat\varphi)\Big)^2,$$

        over families e. Members of a family that are alike count as one, and members that transitions have made
        independent count as their number.

        References:
            Chan and Lai 2013, *A general theory of particle filters in hidden Markov models and some applications*; Lee
            and Whiteley 2018, *Variance estimation in the particle filter*.
        """
        flat = np.asarray(values, np.float64).reshape(len(self.weights), -1)
        deviations = self.weights[:, None] * (flat - self.weights @ flat)
        total = np.zeros((int(self.index.max()) + 1, flat.shape[1]))
        np.add.at(total, self.index, deviations)
        return (total**2).sum(0).reshape(np.shape(values)[1:])

    def error(self, values: Shaped[np.ndarray, " n *event"]) -> Float[np.ndarray, "*event"]:
        """Estimates the standard error of the weighted mean, √(V̂·E/(E − 3)) with E `effective`.

        That is the standard deviation of Student's t at so many families; NaN for three or fewer.
        """
        e = self.effective
        if e <= FEWEST:
            return np.full(np.shape(values)[1:], np.nan)
        return np.asarray(np.sqrt(self.variance(values) * e / (e - FEWEST)))

    def mean(self, values: Shaped[np.ndarray, " n *event"], withheld: bool) -> Estimate:
        """Returns the weighted mean of values, (N, …), and its error unless that is withheld."""
        error = np.where(withheld, np.nan, self.error(values))
        mean = np.tensordot(self.weights, values, 1)
        return Estimate(mean, error) if np.ndim(mean) else Estimate(float(mean), float(error))


def island_variance(log_evidence: Float[np.ndarray, " i"]) -> float:
    """Returns the relative variance of the mean of I independent estimates, Σ (W_i − 1/I)²·I/(I − 1)."""
    shares = np.exp(log_evidence - log_evidence.max())
    shares, count = shares / shares.sum(), len(shares)
    return float(np.sum((shares - 1 / count) ** 2)) * count / (count - 1)


def systematic(weights: Float[np.ndarray, " m"], n: int) -> Int[np.ndarray, " {n}"]:
    """Returns the indices of n samples of equal weight, by systematic resampling with offset ½ (no random number)."""
    return np.minimum(np.searchsorted(np.cumsum(weights), (np.arange(n) + 0.5) / n), len(weights) - 1)


def of_chains(values: Any, draws: int | None, most: int | None = None) -> np.ndarray:
    """Returns one value of a site for every chain, (N, …): its sample, or the mean of its draws.

    Args:
        values: (N, …), or (N, draws, …), which may be on disk.
        draws: their number; None without draws.
        most: read no more than about so many numbers: every k-th draw.
    """
    if draws is None:
        return np.asarray(values)
    size = math.prod(values.shape)
    step = 1 if most is None else min(max(1, -(-size // most)), draws)
    return np.asarray(values[:, ::step]).mean(1)


def effective_chains(families: Families, values: list[Shaped[np.ndarray, "n ..."]]) -> float:
    """Returns the number of independent chains whose means would have the same errors: the least sd²/V̂ over sites.

    Args:
        families: of the chains.
        values: each site's numbers, (N, …); a site of many numbers counts by the mean ratio over them.
    """
    n, e = len(families.weights), families.effective
    if e < 1.0 + 1e-6:
        return 1.0
    found, correction = float(n), (n / max(n - 1, 1)) * (e - 1) / e  # both variances without bias
    for site in values:
        flat = np.asarray(site, np.float64).reshape(n, -1)
        flat = flat[:, np.isfinite(flat).all(0)]
        spread = families.weights @ (flat - families.weights @ flat) ** 2
        moved = spread > 1e-12 * (1e-30 + families.weights @ flat**2)
        if moved.any():
            ratios = families.variance(flat[:, moved]) / spread[moved]
            ratio = float(np.max(ratios) if len(ratios) <= 16 else np.mean(ratios))
            found = min(found, correction / max(ratio, 1e-30))
        elif flat.size:
            found = min(found, e)  # all values are equal: only the ancestors differ
    return found


def evaluated(fn: Any, samples: Mapping[str, Any], draws: int | None) -> np.ndarray:
    """Evaluates ``fn`` on every sample, (N, …); a chain with draws gets the mean over them.

    Args:
        fn: takes one sample, ``{site: value}``.
        samples: ``{site: (N, …)}``, or ``(N, draws, …)``.
        draws: their number; None without draws.

    Raises:
        WrongTypeError: no function.
        InvalidValueError: a function that fails on one sample.
    """
    if not callable(fn):
        raise WrongTypeError(
            f"mean takes a function of one sample; got {fn!r}.", fix="for example result.mean(lambda s: s['x'][0])."
        )
    whole = {name: np.asarray(value) for name, value in samples.items()}
    if draws is not None:
        whole = {name: value.reshape(-1, *value.shape[2:]) for name, value in whole.items()}
    first = {name: value[0] for name, value in whole.items()}
    try:
        fn(first)
    except ComposeProbError:
        raise
    except Exception as error:
        raise InvalidValueError(
            f"The function failed on one sample, a dict of {', '.join(whole)}: {type(error).__name__}: {error}",
            fix="write it for ONE sample, without an axis of chains: lambda s: s['x'][0] > 0.",
        ) from error
    values = np.asarray(_over_all(fn, whole)).astype(np.float64)
    return values if draws is None else values.reshape(-1, draws, *values.shape[1:]).mean(1)


def _over_all(fn: Callable[[Any], Any], samples: Mapping[str, np.ndarray]) -> Any:
    try:
        return jax.jit(jax.vmap(fn))(dict(samples))
    except (jax.errors.JAXTypeError, TypeError, ValueError):  # NumPy or Python's `if` in it: one sample after another
        count = len(next(iter(samples.values())))
        return np.stack([np.asarray(fn({name: value[i] for name, value in samples.items()})) for i in range(count)])
