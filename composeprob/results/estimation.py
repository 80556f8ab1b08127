"""What a result estimates of functions of a sample: means, probabilities and quantiles, each with its error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.errors import ComposeProbError, InvalidValueError, WrongTypeError
from composeprob.results.estimates import (
    Estimate,
    effective_chains,
    known_chains,
    of_chains,
    plain,
    student,
)
from composeprob.results.record import Record


@dataclass(frozen=True)
class Probability(Estimate):
    """A `Probability` is an estimated share, whose interval is Wilson's, within [0, 1].

    Args:
        size: number of independent samples that would have this error, of the value's shape.

    References:
        Wilson 1927, *Probable inference, the law of succession, and statistical inference*.
    """

    size: float | np.ndarray = math.inf

    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """Returns the ends of Wilson's interval for `size` independent samples; see `Estimate.interval`."""
        low, high = wilson(np.asarray(self.value), np.asarray(self.size), student(level, self.degrees))
        known = np.isfinite(self.error)
        return plain(np.where(known, low, np.nan)), plain(np.where(known, high, np.nan))


@dataclass(frozen=True, eq=False)
class Quantile(Estimate):
    """A `Quantile` is an estimated quantile, whose interval lies between two other quantiles of the samples.

    Where F̂ is the share of samples below the estimate and [a, b] the interval of that share, the quantile's interval
    goes from the quantile at a to the quantile at b.

    Args:
        q: its level.
        size: number of independent samples that would have the error of F̂, of the value's shape.
        columns: sorted samples and their cumulative weights, one pair for each number of the value.

    References:
        Woodruff 1952, *Confidence intervals for medians and other position measures*.
    """

    q: float = 0.5
    size: float | np.ndarray = math.inf
    columns: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """Returns the ends of Woodruff's interval, infinite where too few samples lie beyond; see `Estimate`."""
        t, known = student(level, self.degrees), np.ravel(~np.isnan(self.error))
        ends = []
        for column, size, told in zip(self.columns, np.ravel(self.size), known, strict=True):
            low, high = (float(end) for end in wilson(np.asarray(self.q), np.asarray(size), t))
            below = -math.inf if low * size < 0.5 else quantile(*column, low)
            above = math.inf if (1 - high) * size < 0.5 else quantile(*column, high)
            ends.append((below, above) if told else (math.nan, math.nan))
        lows, highs = (plain(np.reshape(end, np.shape(self.value))) for end in zip(*ends, strict=True))
        return lows, highs


def wilson(share: np.ndarray, size: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns Wilson's interval of a share seen in so many independent samples, ``t`` standard errors wide."""
    square = t**2 / size
    middle = (share + square / 2) / (1 + square)
    half = t / (1 + square) * np.sqrt(share * (1 - share) / size + square / (4 * size))
    return np.clip(middle - half, 0.0, 1.0), np.clip(middle + half, 0.0, 1.0)


def quantile(values: np.ndarray, cumulative: np.ndarray, q: float) -> float:
    """Returns the smallest of sorted values whose cumulative weight reaches q."""
    return float(values[min(int(np.searchsorted(cumulative, q - 1e-12)), len(values) - 1)])


class Estimating(Record):
    """`Estimating` is the part of a `Result` that estimates functions of a sample, with standard errors."""

    @property
    def effective_chains(self) -> float:
        """The number of independent chains whose means would have the same errors, at most N.

        The least, over the sites, of sd²/V̂ with V̂ the variance of the site's mean that the genealogy shows (Lee and
        Whiteley 2018). N for samplers that never copy a chain.
        """
        return effective_chains(
            self.families, [of_chains(values, self.about.draws) for values in self.samples.values()]
        )

    def log_evidence_interval(self, level: float = 0.9) -> tuple[float, float]:
        """Returns the ends of an interval of the log-evidence; see `Estimate.interval`. NaN where there is no error."""
        value, error = self.log_evidence, self.log_evidence_error
        if value is None or error is None:
            return math.nan, math.nan
        low, high = Estimate(value, error).interval(level)
        return float(low), float(high)

    def mean(self, fn: Callable[[dict[str, Array]], ArrayLike]) -> Estimate:
        """Estimates the mean of a function of one sample, with its standard error.

        Args:
            fn: takes ONE sample, ``{site: value}``, without an axis of chains; returns a number, a truth value or an
                array.

        Returns:
            ``.value``, ``.error`` and ``.interval(0.9)``. The error is that of the sampling. It comes from the
            genealogy of the chains; of fewer than twelve chains with draws it is ArviZ's error of autocorrelated draws
            (MCSE). NaN where the status withholds it, and without draws where three independent ancestors or fewer are
            left.

        Raises:
            WrongTypeError, InvalidValueError: no function of one sample.

        Example:
            >>> import composeprob as cp, jax, jax.numpy as jnp, numpyro.distributions as dist
            >>> f = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), cp.Schedule.log_snr(10))
            >>> density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
            >>> result = cp.infer(density, jax.random.key(0), num_chains=500, progress=False)
            >>> right = result.mean(lambda s: s["x"][0] > 0)
            >>> abs(right.value - 0.5) < 4 * right.error
            True
        """
        return self.mean_of(evaluated("mean", fn, self.samples, self.about.draws))

    def mean_of(self, values: np.ndarray) -> Estimate:
        """Estimates the mean of values of every sample, (N, …), or (N, draws, …) of a result with draws."""
        of_chains = values if self.about.draws is None else values.mean(1)
        mean = np.tensordot(self.families.weights, of_chains, 1)
        variance, degrees = self._variance(values)
        error = np.sqrt(variance * (degrees / (degrees - 2) if 2 < degrees < math.inf else 1.0))
        error = np.where(self.status.withholds, np.nan, error)
        return Estimate(_plain(mean), _plain(error), degrees)

    def probability(self, event: Callable[[dict[str, Array]], ArrayLike]) -> Probability:
        """Estimates the probability of an event, with its standard error.

        Args:
            event: takes ONE sample, ``{site: value}``; returns a truth value, or an array of them.

        Returns:
            ``.value``, ``.error`` and ``.interval(0.9)``, which lies in [0, 1] and says something where no sample, or
            every one, is in the event. Errors as for `mean`.

        Raises:
            WrongTypeError, InvalidValueError: no function of one sample, or one with other values than 0 and 1.
        """
        values = evaluated("probability", event, self.samples, self.about.draws)
        if not np.isin(values, (0.0, 1.0)).all():
            raise InvalidValueError(
                "An event is true or false; this function returns other numbers.",
                fix="compare with something: result.probability(lambda s: s['x'][0] > 0). The mean of a number is "
                "result.mean(fn).",
            )
        mean = self.mean_of(values)
        axes = (0,) if self.about.draws is None else (0, 1)
        least, most = values.min(axes), values.max(axes)
        share = np.clip(mean.value, least, most)  # weights add up to 1 but for rounding
        size = self._size(values, share)
        # Where no sample, or every one, is in the event, the spread over chains is 0, and that of few may nearly be: by
        # the rule of succession.
        seen = (share * size + 1) / (size + 2)
        rare = ((least == most) | (size < tuning.ERRORS.fewest_families)) & np.isfinite(mean.error)
        error = np.where(rare, np.maximum(np.sqrt(seen * (1 - seen) / (size + 2)), mean.error), mean.error)
        return Probability(_plain(share), _plain(error), mean.degrees, _plain(size))

    def quantile(self, fn: Callable[[dict[str, Array]], ArrayLike], q: float) -> Quantile:
        """Estimates a quantile of a function of one sample: the least value that a share q of samples does not exceed.

        Args:
            fn: takes ONE sample, ``{site: value}``; returns a number or an array.
            q: between 0 and 1.

        Returns:
            ``.value``, ``.error`` and ``.interval(0.9)``. The error is that of a normal distribution with this
            interval.

        Raises:
            WrongTypeError, InvalidValueError: no function of one sample, or no such q.
        """
        if not (np.ndim(q) == 0 and 0 < q < 1):
            raise InvalidValueError(f"A quantile has a level between 0 and 1; got {q!r}.", fix="pass 0.5 for a median.")
        values = evaluated("quantile", fn, self.samples, self.about.draws)
        lead = 1 if self.about.draws is None else 2
        weights = np.broadcast_to(self.families.weights[(...,) + (None,) * (lead - 1)], values.shape[:lead])
        event, weights = values.shape[lead:], weights.ravel() / weights.sum()
        columns, found, told, sizes = [], [], [], []
        for column in np.moveaxis(values.reshape(*values.shape[:lead], -1), -1, 0):
            order = np.argsort(column.ravel(), kind="stable")
            columns.append((column.ravel()[order], np.cumsum(weights[order])))
            found.append(quantile(*columns[-1], q))
            below = (column <= found[-1]).astype(float)
            told.append(self.mean_of(below).error)
            sizes.append(float(self._size(below, np.asarray(q))))
        value, size = (_plain(np.reshape(a, event)) for a in (found, sizes))
        degrees = self._variance(below)[1]
        made = Quantile(value, _plain(np.reshape(told, event)), degrees, q, size, tuple(columns))
        low, high = made.interval(0.9)  # wide enough to see a gap between modes
        return dataclasses.replace(made, error=(high - low) / 2 / student(0.9, degrees))

    def _size(self, indicators: np.ndarray, share: np.ndarray) -> np.ndarray:
        """How many independent samples would tell a share as well as these."""
        variance, _ = self._variance(indicators)
        most = float(len(self.families.weights) * (self.about.draws or 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            size = share * (1 - share) / variance
        return np.where(np.isfinite(size) & (size > 0), np.minimum(size, most), self.families.effective)

    def _variance(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """The variance of the mean of values of every sample, without bias, and its degrees of freedom."""
        families = self.families
        e = families.effective
        if self.about.draws is None or e >= tuning.ERRORS.fewest_families:
            of_chains = values if self.about.draws is None else values.mean(1)
            known = e if self.about.draws else known_chains(families, list(self.samples.values()))
            if known <= tuning.ERRORS.fewest_ancestors:
                return np.full(of_chains.shape[1:], np.nan), max(known - 1, 0.5)
            variance = families.variance(of_chains) * e / (e - 1)
            if e < tuning.ERRORS.fewest_families:  # too few to tell how far one number spreads: all have a say
                centred = of_chains - np.tensordot(families.weights, of_chains, 1)
                variance = np.maximum(variance, np.tensordot(families.weights, centred**2, 1) / known)
            return variance, known - 1
        if self.about.draws < tuning.ERRORS.fewest_draws:
            return np.full(values.shape[2:], np.nan), 1.0
        from composeprob.results.arviz_versions import mean_error

        flat = values.reshape(*values.shape[:2], -1)
        errors = [0.0 if np.ptp(c) == 0 else mean_error(c) for c in np.moveaxis(flat, -1, 0)]
        return np.reshape(errors, values.shape[2:]) ** 2, math.inf


def _plain(value: np.ndarray | float) -> Any:
    """A number as Python's, an array as it is."""
    return np.asarray(value) if np.ndim(value) else float(value)


def evaluated(
    name: str, fn: Callable[[dict[str, Array]], ArrayLike], samples: Mapping[str, np.ndarray], draws: int | None
) -> np.ndarray:
    """Evaluates ``fn`` on every sample: (N, …), or (N, draws, …) with draws.

    Args:
        name: of the method that asks.
        fn: takes one sample, ``{site: value}``.
        samples: ``{site: (N, …)}``, or ``(N, draws, …)``.
        draws: their number; None without draws.

    Raises:
        WrongTypeError: no function.
        InvalidValueError: a function that fails on one sample.
    """
    if not callable(fn):
        site = fn if isinstance(fn, str) and fn in samples else next(iter(samples))
        raise WrongTypeError(
            f"{name} takes a function of one sample; got {fn!r}.",
            fix=f"for example result.{name}(lambda s: s[{site!r}]).",
        )
    whole = {site: np.asarray(value) for site, value in samples.items()}
    if draws is not None:
        whole = {site: value.reshape(-1, *value.shape[2:]) for site, value in whole.items()}
    first = {site: value[0] for site, value in whole.items()}
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
    return values if draws is None else values.reshape(-1, draws, *values.shape[1:])


def _over_all(fn: Callable[[dict[str, Array]], ArrayLike], samples: Mapping[str, np.ndarray]) -> ArrayLike:
    try:
        return jax.jit(jax.vmap(fn))(dict(samples))
    except (jax.errors.JAXTypeError, TypeError, ValueError):  # NumPy or Python's `if` in it: one sample after another
        count = len(next(iter(samples.values())))
        return np.stack([np.asarray(fn({name: value[i] for name, value in samples.items()})) for i in range(count)])
