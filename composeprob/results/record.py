"""What a run leaves: weighted samples, and the facts and diagnostics of the run that made them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from jax import Array

from composeprob.density.annealed import AnnealedDensity
from composeprob.errors import InvalidValueError, UnknownSiteError
from composeprob.json_data import JSONObject
from composeprob.results.estimates import Families, systematic
from composeprob.results.later import Later
from composeprob.results.status import Status
from composeprob.results.store import Stored

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


def _no_factor(record: Record) -> dict[str, float]:
    """The curl of a run that relied on no score's being a gradient."""
    return {}


@dataclass(frozen=True, repr=False, eq=False)
class Record:
    """A `Record` is what every part of a `Result` knows of it; `Result` says what each field is."""

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
    def num_chains(self) -> int:
        """The number of chains, N."""
        return int(self.log_weights.shape[0])

    @property
    def weights(self) -> np.ndarray:
        """Normalised weights, shape (N,), summing to 1."""
        shifted = np.exp(self.log_weights - np.max(self.log_weights))
        return shifted / shifted.sum()

    @property
    def families(self) -> Families:
        """Groups the chains by the first chain that they descend from; groups are independent of each other."""
        assert self.first_ancestors is not None  # filled in where it was left out
        return Families.from_ancestors(self.weights, self.first_ancestors)

    def pooled(self, name: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns one site's samples and their weights, draws of all chains in one axis: shapes (M, …) and (M,).

        Args:
            name: the site.
            most: read no more than about so many numbers: every k-th draw.
        """
        values, n = self[name], self.num_chains
        if self.draws is None:
            return np.asarray(values), self.weights
        size = n * self.draws * math.prod(values.shape[2:])
        step = 1 if most is None else min(max(1, -(-size // most)), self.draws)
        some = np.asarray(values[:, ::step])
        weights = np.repeat(self.weights, some.shape[1])
        return some.reshape(-1, *some.shape[2:]), weights / weights.sum()

    def unweighted(self, most: int | None = None) -> dict[str, np.ndarray]:
        """Returns samples of equal weight, ``{name: (M, …)}``.

        They are those of the run where the weights are equal, else they are resampled systematically (with offset ½, so
        the answer is always the same). Draws of all chains are in one axis; ``most`` limits how many of each site are
        read, as in `pooled`.
        """
        weights = self.weights
        n = self.num_chains
        if self.draws is not None:
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
        facts: JSONObject = {name: getattr(self, name) for name in FACTS}
        facts["sites"] = list(self.samples)  # safetensors sorts by name
        facts["dims"] = self.dims
        facts["status"] = [(code.value, message) for code, message in self.status.findings]
        return {name: getattr(self, name) for name in ARRAYS}, facts
