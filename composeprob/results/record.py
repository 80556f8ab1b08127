"""What a run leaves: weighted samples, and the facts and diagnostics of the run that made them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError, UnknownSiteError
from composeprob.json_data import JSONObject
from composeprob.results.estimates import Families, of_samples, systematic
from composeprob.results.later import Later
from composeprob.results.status import Status
from composeprob.results.store import Stored

if TYPE_CHECKING:
    import xarray

DIAGNOSTICS = ("acceptance", "step_size", "ess", "ancestors", "non_finite", "quadrature_error", "swaps")
ARRAYS = ("log_weights", "families", "log_snr", *DIAGNOSTICS)
FACTS = ("log_evidence", "log_evidence_error", "evaluations")


def _no_factor(about: About) -> dict[str, float]:
    """The curl of a run that relied on no score's being a gradient."""
    return {}


@dataclass(frozen=True, eq=False)
class About:
    """`About` holds the facts of a run.

    Args:
        sampler: the sampler and its kernel, as text.
        reason: why this sampler was chosen.
        seconds: wall-clock time, compilation included.
        draws: number of draws of each chain, None for a run that took none beside its last positions. With draws, all
            of which weigh the same, samples have shape ``(N, draws, …)``; of a run with a ``store`` they are on disk,
            and indexing reads what is asked for.
        thin: transitions between two draws.
        devices: how many devices the chains were spread over.
        blocks: the sites of each block of a `Gibbs` kernel, such as ``("x", "mu, sigma")``; empty elsewhere.
        dims: the plates along the axes of each statement's value, ``{name: (plate or None, …)}``, without N.
        round_trips: how many replicas came from the noisiest level to level 0 in the draws of one chain, on average;
            None without replicas.
        global_acceptance: mean probability with which global moves were accepted; None of a run that made none.
        curl: relative curl at level 0 of every factor that does not promise that its score is a gradient,
            ``{factor: value}`` (see `metrics.curl`); measured where a `LineIntegral` relies on it, else empty. NaN
            where JAX cannot differentiate the network.
        key: the random key of the run, as code.
        versions: of what it ran on, ``{name: version}``.
    """

    sampler: str = ""
    reason: str = ""
    seconds: float = 0.0
    draws: int | None = None
    thin: int = 1
    devices: int = 1
    blocks: tuple[str, ...] = ()
    dims: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    round_trips: float | None = None
    global_acceptance: float | None = None
    curl: dict[str, float] = Later(_no_factor)  # type: ignore[assignment]  # noqa: RUF009 - a descriptor
    key: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def by_level(log_snr: np.ndarray, blocks: tuple[str, ...] = (), **diagnostics: np.ndarray) -> xarray.Dataset:
    """Labels diagnostics by ``level``, and by ``block`` under a kernel of blocks; those left out are NaN."""
    import xarray

    unknown = np.full(len(log_snr), np.nan)
    arrays = {name: np.asarray(diagnostics.get(name, unknown)) for name in DIAGNOSTICS}
    labels = {"block": list(blocks)} if blocks else {}
    return xarray.Dataset(
        {name: (("level", "block")[: values.ndim], values) for name, values in arrays.items()},
        {"level": np.arange(len(log_snr)), "log_snr": ("level", np.asarray(log_snr)), **labels},
    )


def columns(levels: xarray.Dataset, name: str, title: str) -> dict[str, np.ndarray]:
    """One diagnostic's values by level, (K,), by its title, or one for each block; without those that are all NaN."""
    values = levels[name]
    found = {title: values.to_numpy()}
    if "block" in values.dims:
        found = {f"{title} of {block}": values.sel(block=block).to_numpy() for block in levels["block"].to_numpy()}
    return {label: column for label, column in found.items() if np.isfinite(column).any()}


@dataclass(frozen=True, repr=False, eq=False)
class Record:
    """A `Record` is what every part of a `Result` knows of it; `Result` says what each field is."""

    samples: dict[str, np.ndarray]
    log_weights: np.ndarray
    log_evidence: float | None
    evaluations: int
    levels: xarray.Dataset
    about: About
    status: Status = Later()  # type: ignore[assignment]  # noqa: RUF009 - a descriptor
    log_evidence_error: float | None = Later(None)  # type: ignore[assignment]
    families: Families = None  # type: ignore[assignment]  # filled in where it is left out
    density: AnnealedDensity | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # the way to normalise a frozen dataclass's fields
        samples = {
            name: value if isinstance(value, Stored) else np.asarray(value) for name, value in self.samples.items()
        }
        put(self, "samples", samples)
        put(self, "log_weights", np.asarray(self.log_weights))
        if self.families is None:
            weights = np.exp(self.log_weights - np.max(self.log_weights))
            put(self, "families", Families.from_ancestors(weights, np.arange(len(weights))))

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the samples of one site, shape (N, …), or (N, draws, …).

        Raises:
            UnknownSiteError: the program has no site of that name; a KeyError too.
        """
        if name not in self.samples:
            has = ", ".join(repr(n) for n in self.samples)
            raise UnknownSiteError(f"This result has no site {name!r}.", fix=f"its sites are: {has}.")
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
        """How many of the first chains have descendants, after resampling, (K,); NaN without resampling."""
        return np.asarray(self.levels["ancestors"])

    def pooled(self, name: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns one site's samples and their weights, draws of all chains in one axis: shapes (M, …) and (M,).

        Args:
            name: the site.
            most: read no more than about so many numbers: every k-th draw.
        """
        some, weights = of_samples(self[name], self.about.draws, most), self.families.weights
        if self.about.draws is None:
            return some, weights
        weights = np.repeat(weights, some.shape[1])
        return some.reshape(-1, *some.shape[2:]), weights / weights.sum()

    def unweighted(self, most: int | None = None) -> dict[str, np.ndarray]:
        """Returns samples of equal weight, ``{name: (M, …)}``.

        They are those of the run where the weights are equal, else they are resampled systematically (with offset ½, so
        the answer is always the same). Draws of all chains are in one axis; ``most`` limits how many of each site are
        read, as in `pooled`.
        """
        weights, n = self.families.weights, len(self.log_weights)
        if self.about.draws is not None:
            return {name: self.pooled(name, most)[0] for name in self.samples}
        if np.allclose(weights * n, 1.0, rtol=1e-5):
            return {name: np.asarray(value) for name, value in self.samples.items()}
        chosen = systematic(weights, n)
        return {name: np.asarray(value)[chosen] for name, value in self.samples.items()}

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

    def parts(self) -> tuple[dict[str, np.ndarray], JSONObject]:
        """Returns all but the samples and the density, as they are written to disk: arrays, and what JSON can hold."""
        levels = self.levels.reset_coords("log_snr")
        arrays = {"log_weights": self.log_weights, "families": self.families.index}
        arrays |= {name: levels[name].to_numpy() for name in ("log_snr", *DIAGNOSTICS)}
        facts = {name: getattr(self, name) for name in FACTS} | asdict(self.about)
        facts["sites"] = list(self.samples)  # safetensors sorts by name
        facts["status"] = [(code.value, message) for code, message in self.status.findings]
        return arrays, facts
