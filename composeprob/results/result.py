"""The result of `infer`: its samples, their weights, and the diagnostics of the run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from jax import Array

from composeprob.errors import InvalidValueError, unknown_name
from composeprob.json_data import JSONObject
from composeprob.results.estimation import Estimating
from composeprob.results.later import Later
from composeprob.results.shown import Shown
from composeprob.results.status import Status
from composeprob.results.store import Stored
from composeprob.results.weighted import Weighted

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity
    from composeprob.results.comparison import Comparison

PER_LEVEL = ("acceptance", "step_size", "ess", "ancestors", "non_finite", "quadrature_error", "log_snr", "swaps")
ARRAYS = ("log_weights", "first_ancestors", *PER_LEVEL)
FACTS = (
    "log_evidence",
    "log_evidence_error",
    "evaluations",
    "seconds",
    "sampler",
    "reason",
    "curl",
    "blocks",
    "draws",
    "thin",
    "devices",
    "round_trips",
    "global_acceptance",
    "key",
    "versions",
)


def _no_factor(result: Result) -> dict[str, float]:
    """The curl of a run that relied on no score's being a gradient."""
    return {}


@dataclass(frozen=True, repr=False, eq=False)
class Result(Weighted, Estimating, Shown):
    """A `Result` holds N weighted samples of a program, and the diagnostics of the run that made them, level by level.

    Arrays over levels have K entries, entry k belonging to level k; a level that was not visited, or a quantity that
    the sampler does not have, is NaN. What takes a compilation of its own (``curl``, and what ``status`` says of
    factors that do not agree) is computed when it is first asked for, and kept. Under a `Gibbs` kernel of B blocks
    acceptance, step size and quadrature error have shape (K, B), with a column for each of ``blocks``.

    Args:
        samples: constrained values of every site and deterministic, ``{name: (N, …)}``: chains lead, draws follow where
            there are any.
        log_weights: log of each chain's weight, up to a constant, shape (N,). All equal except after `SMC`, and of
            independent chains whose shares the weights of their paths mend.
        log_evidence: estimate of log Z of the program, for samplers that give one. Where a factor's constant is
            unknown (a learned energy) it is relative to that constant.
        log_evidence_error: its standard error: that of the weights, from the genealogy of the chains; that of the
            levels' distance, a third of what leaving out every other level changes (unless ``check_levels=False``); and
            what data of unit size leave at the noisiest level, where a run takes noise for all there is. NaN where the
            status withholds it.
        evaluations: evaluations of the composed density per chain, warm-up included. One evaluation is one
            value-and-score of every factor.
        acceptance: mean acceptance probability, shape (K,).
        step_size: step size, averaged over the steps of the level, shape (K,).
        ess: effective sample size relative to N, before resampling, shape (K,).
        ancestors: how many of the first chains have descendants, after resampling, shape (K,); NaN without resampling.
        first_ancestors: the first chain that each chain descends from, shape (N,); its own number without
            resampling, and after global moves.
        swaps: mean probability of swaps with the next noisier level, shape (K,); NaN without `ReplicaExchange`.
        round_trips: how many replicas came from the noisiest level to level 0 in the draws of one chain, on average;
            None without replicas.
        global_acceptance: mean probability with which global moves were accepted; None of a run that made none.
        non_finite: number of proposals, over all chains, whose density, score or position was not finite, shape (K,).
        status: what went wrong, at which levels, and what to try.
        seconds: wall-clock time, compilation included.
        sampler: the sampler and its kernel, as text.
        reason: why this sampler was chosen.
        log_snr: log-SNR of the levels, shape (K,).
        quadrature_error: mean error, as estimated, of the log-ratios of the accepted moves where a `LineIntegral` gives
            them, shape (K,): compare with 1. 0 for kernels that need no quadrature, NaN where it has no estimate.
        curl: relative curl at level 0 of every factor that does not promise that its score is a gradient,
            ``{factor: value}`` (see `metrics.curl`); measured where a `LineIntegral` relies on it, else empty. NaN
            where JAX cannot differentiate the network.
        draws: number of draws of each chain, None for a run that took none beside its last positions. With draws, all
            of which weigh the same, samples have shape ``(N, draws, …)``; of a run with a ``store`` they are on disk,
            and indexing reads what is asked for.
        thin: transitions between two draws.
        devices: how many devices the chains were spread over.
        dims: the plates along the axes of each statement's value, ``{name: (plate or None, …)}``, without N.
        blocks: the sites of each block of a `Gibbs` kernel, such as ``("x", "mu, sigma")``; empty elsewhere.
        key: the random key of the run, as code.
        versions: of what it ran on, ``{name: version}``.
        density: the compiled density; None after `load`.
    """

    samples: dict[str, np.ndarray]
    log_weights: np.ndarray
    log_evidence: float | None
    evaluations: int
    acceptance: np.ndarray
    step_size: np.ndarray
    ess: np.ndarray
    non_finite: np.ndarray
    seconds: float
    sampler: str
    reason: str
    log_snr: np.ndarray
    status: Status = Later()  # type: ignore[assignment]  # noqa: RUF009 - a descriptor
    quadrature_error: np.ndarray | None = None
    ancestors: np.ndarray | None = None
    first_ancestors: np.ndarray | None = None
    swaps: np.ndarray | None = None
    round_trips: float | None = None
    global_acceptance: float | None = None
    log_evidence_error: float | None = Later(None)  # type: ignore[assignment]
    curl: dict[str, float] = Later(_no_factor)  # type: ignore[assignment]  # noqa: RUF009
    dims: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    draws: int | None = None
    thin: int = 1
    devices: int = 1
    key: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    density: AnnealedDensity | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # the way to normalise a frozen dataclass's fields
        samples = {
            name: value if isinstance(value, Stored) else np.asarray(value) for name, value in self.samples.items()
        }
        put(self, "samples", samples)
        if self.quadrature_error is None:
            put(self, "quadrature_error", np.full(np.shape(self.acceptance), np.nan))
        if self.ancestors is None:
            put(self, "ancestors", np.full(np.shape(self.log_snr), np.nan))
        if self.swaps is None:
            put(self, "swaps", np.full(np.shape(self.log_snr), np.nan))
        if self.first_ancestors is None:
            put(self, "first_ancestors", np.arange(np.shape(self.log_weights)[0]))
        for name in ARRAYS:
            put(self, name, np.asarray(getattr(self, name)))

    if not TYPE_CHECKING:  # a type checker that saw this would believe in every name

        def __getattr__(self, name: str) -> NoReturn:
            sites = {site: f"write result[{site!r}]." for site in self.__dict__.get("samples", ())}
            raise unknown_name("Result", name, dir(self), sites)

    def predictive(self, key: Array) -> dict[str, np.ndarray]:
        """Draws data from the program under these samples.

        That is the posterior predictive, or for a result on `prior(density)` the prior predictive.

        Each of the equally weighted samples of `unweighted` gives one draw of every observed site; of the data
        themselves nothing is used. See `AnnealedDensity.predict`.

        Args:
            key: a random key.

        Returns:
            ``{observed site: (N, …)}``.

        Raises:
            InvalidValueError: the result was loaded from a file, which holds no density.
            CapabilityError: the program observes nothing.
        """
        if self.density is None:
            raise InvalidValueError(
                "A result that was loaded from a file has no density to predict with.",
                fix="compile the program and call density.predict(key, result.unweighted()).",
            )
        return {name: np.asarray(v) for name, v in self.density.predict(key, self.unweighted()).items()}

    def to_arviz(
        self,
        *,
        dims: Mapping[str, Sequence[str | None]] | None = None,
        coords: Mapping[str, Sequence[object] | np.ndarray] | None = None,
        predictive: Array | None = None,
    ) -> Any:
        """Converts to ArviZ's groups of arrays: (chain=1, draw=N, …), or with draws (chain=N, draw=draws, …).

        That is an `arviz.InferenceData`, and with ArviZ 1.0 and later an `xarray.DataTree`.

        Without draws the chains of an annealed sampler are one draw each, independent or exchangeable, and not N long
        chains: ArviZ therefore sees one chain of N draws, and its R-hat between chains does not apply. ArviZ knows no
        weights, so
        ``posterior`` holds the equally weighted samples of `unweighted`, and so do the groups that follow from them;
        ``sample_stats`` keeps the log-weights that the run ended with, and ``constant_data`` what is known per level.
        While the density is at hand (not after `load`), ``observed_data`` and the pointwise ``log_likelihood``, of
        which `arviz.loo` and `arviz.compare` are made, are there too.

        Args:
            dims: names of a site's axes, N left out, ``{site: (name or None, …)}``; axes that run over a plate have
                the plate's name.
            coords: labels along the axes, ``{axis name: labels}``.
            predictive: a random key adds ``posterior_predictive``, from `predictive`.

        Raises:
            InvalidValueError, CapabilityError: ``predictive`` for a result that cannot predict.

        Example:
            >>> import composeprob as cp, jax, numpyro, numpyro.distributions as dist
            >>> @cp.program
            ... def schools(y):
            ...     with numpyro.plate("school", 2):
            ...         theta = cp.sample("theta", dist.Normal(0.0, 1.0))
            ...         cp.observe("y", dist.Normal(theta, 1.0), y)
            >>> density = cp.compile(schools, jax.numpy.array([1.0, -1.0]))
            >>> sampler = cp.AnnealedMCMC(cp.MALA(0.5), 5)
            >>> result = cp.infer(density, jax.random.key(0), num_chains=8, sampler=sampler, progress=False)
            >>> data = result.to_arviz(coords={"school": ["A", "B"]})
            >>> data.posterior["theta"].dims, data.log_likelihood["y"].sel(school="B").shape
            (('chain', 'draw', 'school'), (1, 8))
        """
        from composeprob.results.arviz_data import as_dict, to_arviz

        return to_arviz(self, as_dict(dims, "dims"), as_dict(coords, "coords"), predictive)

    def compare(self, other: Result) -> Comparison:
        """Compares with a run of the same program under another key: has either missed a mode that the other found?

        Two that miss the same mode cannot tell by their samples; where factors can be drawn from, such draws can, and
        `modes_unreached` of either run is reported. A sample whose nearest ones in both runs, its own family left out,
        are all of its own run is where the other has nothing. Shares of such samples are held against random labels'.

        Returns:
            The shares, with a ``.status`` that has the finding `modes_missing` where one is above 0.05, and by chance
            in fewer than one of 100 cases.

        Raises:
            WrongTypeError, ShapeError, InvalidValueError: no result, one of another program, or too few samples.
        References:
            Schilling 1986, *Multivariate two-sample tests based on nearest neighbors*.
        """
        from composeprob.results.comparison import compare

        return compare(self, other)

    def numbers(self) -> JSONObject:
        """Returns every number of the run but the samples, ready for `json.dump`: what is not finite becomes None."""
        from composeprob.results.saving import numbers

        return numbers(self)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes everything except ``density`` to one safetensors file; returns its path, which ends in
        ``.safetensors`` (added where missing).

        Raises:
            WrongTypeError, InvalidValueError: no path, or one that cannot be written to.
        """
        from composeprob.results.saving import save

        return save(self, path)

    def parts(self) -> tuple[dict[str, np.ndarray], JSONObject]:
        """Returns all but the samples and the density, as they are written to disk: arrays, and what JSON can hold."""
        facts: JSONObject = {name: getattr(self, name) for name in FACTS}
        facts["sites"] = list(self.samples)  # safetensors sorts by name
        facts["dims"] = self.dims
        facts["status"] = [(code.value, message) for code, message in self.status.findings]
        return {name: getattr(self, name) for name in ARRAYS}, facts

    @classmethod
    def load(cls, path: str | os.PathLike) -> Result:
        """Reads what `save` wrote, or opens the folder that was `infer`'s ``store``, whose samples stay on disk until
        they are indexed; ``density`` is None.

        Raises:
            LoadError: no such file or folder, one written by something else, or by a run that has not ended, or one
                whose arrays and facts do not fit together.
        """
        from composeprob.results.saving import load

        return load(path)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {value.shape}" for name, value in self.samples.items())
        return (
            f"Result({sites}; {self.sampler}; {self.evaluations} evaluations per chain; "
            f"status {self.status.code.name}; {self.seconds:.1f} s)"
        )
