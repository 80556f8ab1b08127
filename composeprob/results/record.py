"""The record of a run: weighted samples, the facts and diagnostics of the run that made
them, and estimates from them."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar, cast

import jax
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError, UnknownSiteError
from composeprob.records import REPORTED
from composeprob.results.estimates import (
    Estimate,
    Genealogy,
    as_python,
    effective_chains,
    effective_chains_bound,
    evaluated,
    quantile,
    quantiles_of_runs,
    quiet_arviz,
    systematic,
    wilson,
)
from composeprob.results.status import Status
from composeprob.results.store import Stored
from composeprob.results.trust import Trust
from composeprob.settings import usual

if TYPE_CHECKING:
    import xarray

Value = TypeVar("Value")


class Later:
    """A field of `Result` whose value may be given as a function of the result, which
    is called once."""

    def __init__(self, *default: object):
        self.default = default  # empty without a default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, result: object, owner: type) -> object:
        # `dataclasses.dataclass` reads the class attribute for a default.
        if result is None:
            if not self.default:
                raise AttributeError(self.name)
            return self.default[0]
        value = result.__dict__[self.name]
        if callable(value):
            with usual():
                value = value(result)
            result.__dict__[self.name] = value
        return value

    def __set__(self, result: object, value: object) -> None:
        result.__dict__[self.name] = value


def later(function: Callable[..., Value]) -> Value:
    """Cast a function of the result to the type of the `Later` field it computes."""
    return cast(Value, function)


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, this library and those that it computes with, and
    the kind of device."""
    numbers = {"python": platform.python_version()}
    for name in ("composeprob", "jax", "numpyro", "equinox", "numpy"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:  # run from a folder that is not installed
            numbers[name] = "not installed"
    return numbers | {"device": jax.devices()[0].device_kind}


# The arrays of a file beside `REPORTED`; ancestors still have their former name.
ARRAYS = ("log_weights", "families", "log_snr")
REPEATED = "repeated"  # an array that only runs with a repetition have
FACTS = {
    "log_evidence": float | None,
    "log_evidence_error": float | None,
    "evaluations": int,
    "reason": str,
}
"""The facts that are fields of a result, with their types; the others are `About`'s.

The metadata of a field state the ``least`` value that a file may have, and what it
means if a file lacks it that is older than the field (``in_old_files``).
"""


@dataclass(frozen=True, eq=False)
class About:
    """`About` holds the facts of a run.

    Args:
        sampler: the sampler and its kernel, as text.
        seconds: wall-clock time, compilation included.
        draws: number of draws of each chain; None for a run that kept only its last
            positions. With draws, all of equal weight, samples have shape
            ``(N, draws, …)``; those of a run with a ``store`` are on disk, and indexing
            reads no more than it returns.
        thin: transitions between two draws.
        devices: number of devices that the chains were spread over.
        blocks: the sites of each block of a `Gibbs` kernel, such as ``("x", "mu,
            sigma")``; empty elsewhere.
        dims: the plates along the axes of each statement's value, ``{name: (plate or
            None, …)}``, without N.
        round_trips: number of replicas that came from the noisiest level to level 0 in
            the draws of one chain, on average; None without replicas.
        global_acceptance: mean probability with which global moves were accepted; None
            for a run that made none.
        curl: relative curl at level 0 of every factor that does not promise that its
            score is a gradient, ``{factor: value}`` (see `metrics.curl`); measured
            where a `LineIntegral` relies on it, else empty. NaN where JAX cannot
            differentiate the network.
        calls: of each `Reward` the events that its function was asked for, for each
            chain, ``{name: number}``.
        checks: evaluations for each chain that told errors and status, beside
            ``evaluations``: of the run over every other level, and, once the status is
            asked for, of trained factors at their own samples. Each other question of
            the status takes at most a twentieth of ``evaluations``.
        steps: number of steps of a Markov chain, by ``Result.extend(given=…)``, that
            led to the result.
        extensions: number of times that more data came in, by ``Result.extend``.
        extended_from: the ``reason`` of the result before the first of these steps, or
            without steps before the first extension; that of an extended result begins
            with it.
        key: the random key of the run, as code.
        versions: of the software and the device, ``{name: version}``.
    """

    sampler: str = ""
    seconds: float = field(default=0.0, metadata={"least": 0})
    draws: int | None = field(default=None, metadata={"least": 1})
    thin: int = field(default=1, metadata={"least": 1})
    devices: int = field(default=1, metadata={"least": 1})
    blocks: tuple[str, ...] = ()
    dims: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    round_trips: float | None = None
    global_acceptance: float | None = None
    curl: dict[str, float] = Later(lambda about: {})  # type: ignore[assignment]
    calls: dict[str, int] = field(default_factory=dict, metadata={"in_old_files": {}})
    checks: int = field(default=0, metadata={"least": 0, "in_old_files": 0})
    steps: int = field(default=0, metadata={"least": 0, "in_old_files": 0})
    extensions: int = field(default=0, metadata={"least": 0, "in_old_files": 0})
    extended_from: str = field(default="", metadata={"in_old_files": ""})
    key: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def by_reveals(self) -> bool:
        """True if the levels are reveals of tokens, whose log-SNR is the log-odds of a
        position to be visible."""
        return self.sampler.startswith("Reveal")


def by_level(
    log_snr: Float[np.ndarray, " levels"],
    blocks: tuple[str, ...],
    diagnostics: Mapping[str, ArrayLike],
) -> xarray.Dataset:
    """Label the reported quantities by ``level``, and by ``block`` under a kernel of
    blocks; those left out are NaN."""
    import xarray

    nan = np.full(len(log_snr), np.nan)
    variables = {}
    for name, quantity in REPORTED.items():
        values = np.asarray(diagnostics.get(name, nan))
        dims = quantity.dims[: values.ndim]
        # The names that xarray's plots read.
        attributes = {"long_name": quantity.long_name, "units": quantity.units}
        variables[name] = (dims, values, attributes)
    labels = {"block": list(blocks)} if blocks else {}
    coordinates = {
        "level": np.arange(len(log_snr)),
        "log_snr": ("level", np.asarray(log_snr)),
        **labels,
    }
    return xarray.Dataset(variables, coordinates)


@dataclass(frozen=True, repr=False, eq=False)
class Record:
    """A `Record` holds the fields of a `Result`, which documents them, and estimates
    from them."""

    samples: dict[str, np.ndarray]
    log_weights: np.ndarray
    log_evidence: float | None
    evaluations: int = field(metadata={"least": 0})
    about: About
    # xarray is slow to import.
    levels: xarray.Dataset = Later()  # type: ignore[assignment]
    status: Status = Later()  # type: ignore[assignment]
    log_evidence_error: float | None = Later(None)  # type: ignore[assignment]
    reason: str = ""
    trust: Trust | None = field(default=None, metadata={"in_old_files": None})
    # Filled in where it is left out.
    _genealogy: Genealogy = None  # type: ignore[assignment]
    density: AnnealedDensity | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # a frozen dataclass normalises its fields so
        samples = {}
        for name, value in self.samples.items():
            if not isinstance(value, Stored):
                value = np.asarray(value)
            samples[name] = value
        put(self, "samples", samples)
        put(self, "log_weights", np.asarray(self.log_weights))
        if self._genealogy is None:
            put(self, "_genealogy", Genealogy.from_log_weights(self.log_weights))

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the samples of one site, shape (N, …), or (N, draws, …).

        Raises:
            UnknownSiteError: the program has no site of that name; a KeyError too.
        """
        if name not in self.samples:
            has = ", ".join(repr(n) for n in self.samples)
            raise UnknownSiteError(
                f"This result has no site {name!r}.", fix=f"its sites are: {has}."
            )
        return self.samples[name]

    @property
    def acceptance(self) -> np.ndarray:
        """Mean acceptance probability, (K,), or (K, B) under a kernel of B blocks."""
        return np.asarray(self.levels["acceptance"])

    @property
    def step_size(self) -> np.ndarray:
        """Step size, averaged over the steps of the level, (K,) or (K, B)."""
        return np.asarray(self.levels["step_size"])

    @property
    def ancestors(self) -> np.ndarray:
        """Number of distinct ancestors: first chains that have descendants, after
        resampling, (K,); NaN without resampling."""
        return np.asarray(self.levels["ancestors"])

    def drawn(self, name: str, most: int | None = None) -> np.ndarray:
        """Return one site's samples, (N, draws, …), with one draw of each chain for a
        run without draws.

        With ``most``, every k-th draw is read, so that about so many numbers are.
        """
        values = self[name]
        if self.about.draws is None:
            return np.asarray(values)[:, None]
        step = 1
        if most is not None:
            step = max(1, -(-math.prod(values.shape) // most))
            step = min(step, self.about.draws)
        return np.asarray(values[:, ::step])

    def unweighted(self, most: int | None = None) -> dict[str, np.ndarray]:
        """Return samples of equal weight, ``{name: (M, …)}``.

        They are those of the run where the weights are equal, else they are resampled
        systematically (with offset ½, so the answer is always the same). Draws of all
        chains are in one axis; ``most`` limits how many of each site are read, as in
        `drawn`.
        """
        if self.about.draws is None:
            chosen = self._resampled
            return {
                name: np.asarray(value)[chosen] for name, value in self.samples.items()
            }
        pooled = {}
        for name in self.samples:
            values = self.drawn(name, most)
            pooled[name] = values.reshape(-1, *values.shape[2:])
        return pooled

    @property
    def _resampled(self) -> np.ndarray | slice:
        """The chains whose last positions have equal weights, in the order of
        `unweighted`."""
        weights = self._genealogy.weights
        n = len(self.log_weights)
        if np.allclose(weights * n, 1.0, rtol=1e-5):
            return slice(None)
        return systematic(weights, n)

    @property
    def effective_chains(self) -> float:
        """The number of independent chains whose means would have the same errors, at
        most N.

        The least, over the sites, of sd²/V̂ with V̂ the variance of the site's mean
        that the genealogy shows (Lee and Whiteley 2018). N for samplers that never copy
        a chain.
        """
        means = [self.drawn(name).mean(1) for name in self.samples]
        return effective_chains(self._genealogy, means)

    def log_evidence_interval(self, level: float = 0.9) -> tuple[float, float]:
        """Return the ends of an interval of the log-evidence; see `Estimate.interval`.
        NaN where there is no error."""
        value = self.log_evidence
        error = self.log_evidence_error
        if value is None or error is None:
            return math.nan, math.nan
        low, high = Estimate(value, error).interval(level)
        return float(low), float(high)

    def mean(self, fn: Callable[[dict[str, Array]], ArrayLike]) -> Estimate:
        """Estimate the mean of a function of one sample, with its standard error.

        Args:
            fn: takes ONE sample, ``{site: value}``, without an axis of chains; returns
                a number, a truth value or an array.

        Returns:
            ``.value``, ``.error`` and ``.interval(0.9)``. The error is that of the
            sampling. It comes from the genealogy of the chains; of fewer than twelve
            chains with draws it is ArviZ's error of autocorrelated draws (MCSE). Where
            log-densities cannot be compared between modes, and no finisher moved the
            chains, the distance to the mean of the run's repetition over every other
            level is added in quadrature. NaN where the status withholds it, and without
            draws where three independent ancestors or fewer are left.

        Raises:
            WrongTypeError, InvalidValueError: not a function of one sample.

        Example:
            >>> import composeprob as cp, jax, jax.numpy as jnp
            >>> import numpyro.distributions as dist
            >>> normal = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
            >>> f = cp.Analytic(normal, cp.Schedule.log_snr(10))
            >>> density = cp.compile(cp.program(lambda f: cp.sample("x", f)), f)
            >>> key = jax.random.key(0)
            >>> result = cp.infer(density, key, num_chains=500, progress=False)
            >>> right = result.mean(lambda s: s["x"][0] > 0)
            >>> abs(right.value - 0.5) < 4 * right.error
            True
        """
        return self.mean_of(self._values("mean", fn))

    def mean_of(self, values: np.ndarray, *, even_withheld: bool = False) -> Estimate:
        """Estimate the mean of values of every sample, ordered as those of `drawn`,
        (N, draws, …); with its error ``even_withheld`` by the status, on request."""
        mean = np.tensordot(self._genealogy.weights, values.mean(1), 1)
        variance, degrees = self._variance(values)
        inflation = 1.0
        if 2 < degrees < math.inf:  # the variance of Student's t
            inflation = degrees / (degrees - 2)
        error = np.sqrt(variance * inflation)
        withheld = self.status.withholds and not even_withheld
        error = np.where(withheld, np.nan, error)
        return Estimate(as_python(mean), as_python(error), degrees)

    def probability(self, event: Callable[[dict[str, Array]], ArrayLike]) -> Estimate:
        """Estimate the probability of an event, with its standard error.

        Args:
            event: takes ONE sample, ``{site: value}``; returns a truth value, or an
                array of them.

        Returns:
            ``.value``, ``.error`` and ``.interval(0.9)``, which is Wilson's: it lies in
            [0, 1] and has a width even where no sample, or every one, is in the event.
            Errors as for `mean`, but at least that of Agresti and Coull,
            √(p̃(1 − p̃)/(n + 4)) with p̃ = (pn + 2)/(n + 4), for n effective samples.

        Raises:
            WrongTypeError, InvalidValueError: not a function of one sample, or one with
                other values than 0 and 1.

        References:
            Wilson 1927, *Probable inference, the law of succession, and statistical
            inference*; Agresti and Coull 1998, *Approximate is better than "exact" for
            interval estimation of binomial proportions*.
        """
        values = self._values("probability", event)
        if not np.isin(values, (0.0, 1.0)).all():
            raise InvalidValueError(
                "An event is true or false; this function returns other numbers.",
                fix="compare with something: "
                "result.probability(lambda s: s['x'][0] > 0). The mean of a number is "
                "result.mean(fn).",
            )
        return self.probability_of(values)

    def probability_of(self, values: np.ndarray) -> Estimate:
        """Estimate the probabilities of events, from truth values, 0 or 1, of every
        sample, ordered as those of `drawn`, (N, draws, …)."""
        mean = self.mean_of(values)
        least = values.min((0, 1))
        most = values.max((0, 1))
        share = np.clip(mean.value, least, most)  # weights add up to 1 but for rounding
        size = self._size(values, share)
        # The spread over chains is 0 where no sample, or every one, is in the event,
        # and too small where few are: two samples more on either side mend that.
        added = tuning.ERRORS.added
        more = size + 2 * added
        moderate = (share * size + added) / more
        least_error = np.sqrt(moderate * (1 - moderate) / more)
        error = np.maximum(least_error, mean.error)
        ends = partial(wilson, share, size)
        return Estimate(as_python(share), as_python(error), mean.degrees, ends)

    def quantile(
        self, fn: Callable[[dict[str, Array]], ArrayLike], q: float
    ) -> Estimate:
        """Estimate a quantile of a function of one sample: the least value that a share
        q of samples does not exceed.

        Args:
            fn: takes ONE sample, ``{site: value}``; returns a number or an array.
            q: between 0 and 1.

        Returns:
            ``.value``, ``.error`` and ``.interval(0.9)``, which goes from the quantile
            at a to the quantile at b, with [a, b] the interval of the share of samples
            below the estimate; infinite where too few samples lie beyond. The error is
            the root mean square by which the quantile at a differs from that at q, a
            being what the share comes to in other runs: where it is near that of a
            mode, some of these have the quantile on the other side of the gap.

        Raises:
            WrongTypeError, InvalidValueError: not a function of one sample, or a q
                outside of (0, 1).

        References:
            Woodruff 1952, *Confidence intervals for medians and other position
            measures*.
        """
        if callable(q) or not (np.ndim(q) == 0 and 0 < q < 1):
            raise InvalidValueError(
                f"A quantile has a level between 0 and 1; got {q!r}.",
                fix="write quantile(fn, 0.5) for a median.",
            )
        values = self._values("quantile", fn)
        weights = np.repeat(self._genealogy.weights, values.shape[1])
        weights = weights / weights.sum()
        event = values.shape[2:]
        flat = values.reshape(*values.shape[:2], -1)
        columns = []  # sorted values of each entry, and their cumulative weights
        for column in flat.reshape(len(weights), -1).T:
            order = np.argsort(column, kind="stable")
            columns.append((column[order], np.cumsum(weights[order])))
        value = np.array([quantile(*column, q) for column in columns])
        below = (flat <= value).astype(float)
        share = self.mean_of(below)
        sizes = self._size(below, np.asarray(q))

        def ends(t: float) -> tuple[np.ndarray, np.ndarray]:
            lows = []
            highs = []
            intervals = zip(*wilson(q, sizes, t), strict=True)
            for column, size, (low, high) in zip(
                columns, sizes, intervals, strict=True
            ):
                lower = quantile(*column, low)
                upper = quantile(*column, high)
                # Less than half a sample beyond an end says nothing of where it is.
                if low * size < 0.5:
                    lower = -math.inf
                if (1 - high) * size < 0.5:
                    upper = math.inf
                lows.append(lower)
                highs.append(upper)
            return np.reshape(lows, event), np.reshape(highs, event)

        estimate = Estimate(
            as_python(value.reshape(event)),
            as_python(np.reshape(share.error, event)),
            share.degrees,
            ends,
        )
        errors = []
        for (ordered, cumulative), size, here in zip(
            columns, sizes, value, strict=True
        ):
            there = quantiles_of_runs(
                ordered, cumulative, q, float(size), share.degrees
            )
            errors.append(np.sqrt(np.mean((there - here) ** 2)))
        least, most = estimate.interval(0.9)
        # Infinite, or withheld, where the interval is.
        reach = np.asarray(most) - np.asarray(least)
        error = np.where(np.isfinite(reach), np.reshape(errors, event), reach)
        return dataclasses.replace(estimate, error=as_python(error))

    def _values(
        self, method: str, fn: Callable[[dict[str, Array]], ArrayLike]
    ) -> np.ndarray:
        """A function of every sample, (N, draws, …), for a method."""
        return evaluated(method, fn, {name: self.drawn(name) for name in self.samples})

    def _size(self, indicators: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Number of independent samples that would tell a share as well as these."""
        variance, _ = self._variance(indicators)
        most = float(len(self._genealogy.weights) * (self.about.draws or 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            size = share * (1 - share) / variance
        valid = np.isfinite(size) & (size > 0)
        return np.where(valid, np.minimum(size, most), self._genealogy.effective)

    def _variance(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """The variance of the mean of values of every sample, and its degrees of
        freedom.

        Few chains with draws tell their spread worse than the draws of each do. What
        moves whole modes together, such as levels that are far apart, shows in no
        spread over chains: the distance of a repetition's mean is added.
        """
        of_chains = values.mean(1)
        enough = self._genealogy.effective >= tuning.ERRORS.fewest_families
        if self.about.draws is None or enough:
            variance, degrees = self._variance_over_ancestors(of_chains)
        else:
            variance, degrees = self._variance_over_draws(values)
        return variance + self._genealogy.departure(of_chains) ** 2, degrees

    def _variance_over_ancestors(
        self, of_chains: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Variance, without bias, and degrees of freedom of chains' means, (N, …), by
        their genealogy; NaN where too few ancestors are left."""
        genealogy = self._genealogy
        e = genealogy.effective
        worth = e
        if not self.about.draws:
            worth = effective_chains_bound(genealogy, list(self.samples.values()))
        if worth <= tuning.ERRORS.fewest_ancestors:
            return np.full(of_chains.shape[1:], np.nan), max(worth - 1, 0.5)
        variance = genealogy.variance(of_chains) * e / (e - 1)
        # Few ancestors cannot tell the spread of one number; all chains have a say.
        if e < tuning.ERRORS.fewest_families:
            centred = of_chains - np.tensordot(genealogy.weights, of_chains, 1)
            spread = np.tensordot(genealogy.weights, centred**2, 1)
            variance = np.maximum(variance, spread / worth)
        return variance, worth - 1

    def _variance_over_draws(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """Variance and degrees of freedom by the autocorrelation of each chain's draws
        (ArviZ's MCSE); NaN for too few draws."""
        event = values.shape[2:]
        if (self.about.draws or 0) < tuning.ERRORS.fewest_draws:
            return np.full(event, np.nan), 1.0
        arviz, _ = quiet_arviz()
        flat = values.reshape(*values.shape[:2], -1)
        errors = []
        for entry in np.moveaxis(flat, -1, 0):
            error = 0.0
            if np.ptp(entry) != 0:  # constants have none that ArviZ could estimate
                error = float(arviz.mcse(entry, method="mean"))
            errors.append(error)
        return np.reshape(errors, event) ** 2, math.inf

    def predictive(self, key: Array) -> dict[str, np.ndarray]:
        """Draw data from the program under these samples.

        That is the posterior predictive, or for a result on `prior(density)` the prior
        predictive.

        Each of the equally weighted samples of `unweighted` gives one draw of every
        observed site; the data themselves are not used. See `AnnealedDensity.predict`.

        Args:
            key: a random key.

        Returns:
            ``{observed site: (N, …)}``.

        Raises:
            InvalidValueError: the result was loaded from a file, which holds no
                density.
            CapabilityError: the program observes nothing.
        """
        if self.density is None:
            raise InvalidValueError(
                "A result that was loaded from a file has no density to predict with.",
                fix="compile the program and call "
                "density.predict(key, result.unweighted()).",
            )
        predicted = self.density.predict(key, self.unweighted())
        return {name: np.asarray(values) for name, values in predicted.items()}
