"""Common parts of benchmarks A and E: Gaussian mixtures, samplers, and the total
variation of mode shares.

The total variation (TV) of a run is ½·Σ_j |p_j − q_j|, with p_j the share of chains
nearest to mode j and q_j the mass of the exact law of level 0 there. Level 0 still
carries a little noise: its mass differs from that of the noise-free law, which is
listed for comparison. Beside a TV stands its floor, the mean TV of as many exact draws,
and beside log Z its exact value; ± is the standard deviation over keys, that is, of one
run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import stats

import composeprob as cp

N, KEYS = 4000, 5
MANY_KEYS = 30
"""Keys of the default's rows: at five, chance is as large as the pooled TV that they
measure."""


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """A Gaussian mixture in the plane, diagonal covariances: weights (J,), means (J,
    2), variances (J, 2)."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def draw(self, key: jax.Array, n: int) -> np.ndarray:
        """n exact draws."""
        pick, noise = jax.random.split(key)
        j = np.asarray(
            jax.random.choice(
                pick, len(self.weights), (n,), p=jnp.asarray(self.weights)
            )
        )
        return self.means[j] + np.sqrt(self.variances[j]) * np.asarray(
            jax.random.normal(noise, (n, 2))
        )

    def mass(self, centres: np.ndarray, points: int = 1200) -> np.ndarray:
        """The mass nearest to each centre, by quadrature over a grid that covers 7
        standard deviations."""
        reach = 7 * np.sqrt(self.variances)
        low = (self.means - reach).min(0)
        high = (self.means + reach).max(0)
        x, y = (np.linspace(a, b, points) for a, b in zip(low, high, strict=True))
        density = np.zeros((points, points))
        for w, m, v in zip(self.weights, self.means, self.variances, strict=True):
            across = np.exp(-0.5 * (x - m[0]) ** 2 / v[0]) / np.sqrt(v[0])
            along = np.exp(-0.5 * (y - m[1]) ** 2 / v[1]) / np.sqrt(v[1])
            density += w * np.outer(across, along)
        grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1)
        return (
            np.bincount(
                nearest(grid.reshape(-1, 2), centres), density.ravel(), len(centres)
            )
            / density.sum()
        )


def _normalised(alpha: float, sigma: float) -> float:
    """Log-evidence of factors whose product is normalised."""
    return 0.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program's factors on a schedule, and the exact law of its samples at noise (α,
    σ)."""

    compile: Callable[[cp.Schedule], Any]
    law: Callable[[float, float], Gaussians]
    centres: np.ndarray
    log_evidence: Callable[[float, float], float] = _normalised

    def at_level_0(self, schedule: cp.Schedule) -> tuple[Gaussians, np.ndarray]:
        """The exact law of level 0 and its centres."""
        alpha, sigma = float(schedule.alpha[0]), float(schedule.sigma[0])
        return self.law(alpha, sigma), alpha * self.centres


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a sampler on a schedule, and its number of keys.

    The sampler is None for exact draws.
    """

    name: str
    sampler: cp.Sampler | None
    schedule: cp.Schedule
    keys: int = KEYS


@dataclasses.dataclass
class Measured:
    """Results of one row over all keys."""

    name: str
    evaluations: int
    tv: list[float]
    pooled: float
    acceptance: float
    last_acceptance: float
    log_evidence: list[float]
    seconds: list[float]
    status: list[str]
    floor: float
    pooled_floor: float
    exact_log_evidence: float

    @property
    def mean(self) -> float:
        """Mean TV of one run."""
        return float(np.mean(self.tv))


def nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the centre nearest to each point."""
    return ((x[:, None] - centres) ** 2).sum(-1).argmin(1)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """½·Σ|p − q|."""
    return float(0.5 * np.abs(p - q).sum())


def floor(mass: np.ndarray, draws: int) -> float:
    """Mean TV of the shares of n exact draws: ½·Σ_j E|B_j/n − q_j|, B_j binomial."""
    return float(
        sum(
            0.5 * stats.binom(draws, q).expect(lambda k, q=q: np.abs(k / draws - q))
            for q in mass
        )
    )


def smc(weights: str) -> cp.SMC:
    """SMC with tuned moves.

    With Feynman–Kac weights its reverse step is of first order: one evaluation a level.
    """
    step = cp.ReverseStep(order=1) if weights == "feynman_kac" else None
    return cp.SMC(cp.MALA(cp.Adaptive()), weights=weights, step=step)


def samplers() -> dict[str, Callable[[cp.Schedule], Row]]:
    """Every row of the table by name; a function, since samplers hold arrays."""
    grid = cp.Schedule.log_snr(60)
    cosine = cp.Schedule.cosine(100)
    mcmc = cp.AnnealedMCMC

    def tuned_hmc(steps: int) -> cp.Sampler:
        return mcmc(cp.HMC(cp.Adaptive(), num_leapfrog=3), steps)

    rows = [
        Row("exact draws", None, cosine),
        Row("Ancestral", cp.Ancestral(), cosine),
        Row("MALA, paper (0.001), 10 a level", mcmc(cp.MALA(0.001), 10), cosine),
        Row(
            "MALA, tuned to 0.57, 10 a level", mcmc(cp.MALA(cp.Adaptive()), 10), cosine
        ),
        Row(
            "HMC, paper (0.03 × 3), 10 a level",
            mcmc(cp.HMC(0.03, num_leapfrog=3), 10),
            cosine,
        ),
        Row("HMC, tuned to 0.75, 10 a level", tuned_hmc(10), cosine),
        Row("HMC, tuned to 0.75, 3 a level", tuned_hmc(3), cosine),
        Row("HMC, tuned to 0.75, 1 a level", tuned_hmc(1), cosine),
        Row("SMC density, MALA tuned, log-SNR 60", smc("density"), grid),
        Row("SMC Feynman–Kac, MALA tuned, log-SNR 60", smc("feynman_kac"), grid),
        Row("SMC Feynman–Kac, MALA tuned, cosine 100", smc("feynman_kac"), cosine),
        Row("SMC by default, log-SNR 20", cp.SMC(), cp.Schedule.log_snr(20), MANY_KEYS),
        Row("SMC by default, log-SNR 60", cp.SMC(), grid, MANY_KEYS),
    ]
    return {row.name: row for row in rows}


def measure(
    problem: Problem, row: Row, num_chains: int = N, keys: int | None = None
) -> Measured:
    """Run one row over keys 0, 1, …; ``keys=None`` takes the row's own number."""
    keys = row.keys if keys is None else keys
    law, centres = problem.at_level_0(row.schedule)
    exact = law.mass(centres)
    shares, evidence, seconds, status = [], [], [], []
    evaluations = 0
    acceptance = np.full(1, np.nan)
    density = None if row.sampler is None else problem.compile(row.schedule)
    for key in map(jax.random.key, range(keys)):
        if row.sampler is None:
            x = law.draw(key, num_chains)
        else:
            result = cp.infer(
                density, key, num_chains=num_chains, sampler=row.sampler, progress=False
            )
            x = result["x"]
            evaluations = result.evaluations
            acceptance = result.acceptance
            if result.log_evidence is not None:
                evidence.append(result.log_evidence)
            seconds.append(result.about.seconds)
            status.append(str(result.status))
        shares.append(
            np.bincount(nearest(x, centres), minlength=len(centres)) / num_chains
        )
    mean_acceptance = float("nan")
    if np.isfinite(acceptance).any():
        mean_acceptance = float(np.nanmean(acceptance))
    return Measured(
        name=row.name,
        evaluations=evaluations,
        tv=[total_variation(p, exact) for p in shares],
        pooled=total_variation(np.mean(shares, 0), exact),
        acceptance=mean_acceptance,
        last_acceptance=float(acceptance[0]),
        log_evidence=evidence,
        seconds=seconds,
        status=status,
        floor=floor(exact, num_chains),
        pooled_floor=floor(exact, num_chains * keys),
        exact_log_evidence=problem.log_evidence(
            float(row.schedule.alpha[0]), float(row.schedule.sigma[0])
        ),
    )


OVER = f"keys 0 to {KEYS - 1} ({MANY_KEYS - 1} by default)"
SPREAD = (
    "± is the standard deviation over keys; the floor of a TV is the mean TV of as "
    "many exact draws."
)
COLUMNS = [
    "sampler",
    "evaluations",
    "TV of one run",
    "floor",
    "TV pooled",
    "floor pooled",
    "acceptance mean / last",
    "log Z of one run",
    "exact log Z",
    "seconds",
]


def with_spread(values: list[float]) -> str:
    """The mean over keys, ± their standard deviation where there are several."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def as_text(m: Measured) -> list[str]:
    """A row of `COLUMNS`; its seconds leave out the first run, which compiles."""
    acceptance = "–"
    if np.isfinite(m.acceptance):
        acceptance = f"{m.acceptance:.3f} / {m.last_acceptance:.3f}"
    return [
        m.name,
        f"{m.evaluations:,}" if m.evaluations else "–",
        with_spread(m.tv),
        f"{m.floor:.4f}",
        f"{m.pooled:.4f}",
        f"{m.pooled_floor:.4f}",
        acceptance,
        with_spread(m.log_evidence) if m.log_evidence else "–",
        f"{m.exact_log_evidence:.4f}" if m.log_evidence else "–",
        f"{np.mean(m.seconds[1:]):.2f}" if len(m.seconds) > 1 else "–",
    ]


def ring_product() -> Problem:
    """Benchmark A: a ring of 8 Gaussians (radius 0.5, sd 0.075) × N(0, diag(0.2²,
    0.6²))."""
    angle = np.arange(8) * np.pi / 4
    centres = 0.5 * np.stack([np.cos(angle), np.sin(angle)], -1)
    sd_ring = 0.075
    sd_bar = np.array([0.2, 0.6])

    @cp.program
    def both(ring: Any, bar: Any) -> Any:
        return cp.sample("x", ring * bar)

    def compiled(schedule: cp.Schedule) -> Any:
        modes = dist.Normal(jnp.asarray(centres), sd_ring).to_event(1)
        ring = cp.Analytic(
            dist.MixtureSameFamily(dist.Categorical(probs=jnp.full(8, 1 / 8)), modes),
            schedule,
        )
        bar = cp.Analytic(dist.Normal(jnp.zeros(2), jnp.asarray(sd_bar)), schedule)
        return cp.compile(both, ring, bar)

    def law(alpha: float, sigma: float) -> Gaussians:
        ring = (alpha * sd_ring) ** 2 + sigma**2
        bar = (alpha * sd_bar) ** 2 + sigma**2
        log_weights = (-0.5 * (alpha * centres) ** 2 / (ring + bar)).sum(-1)
        weights = np.exp(log_weights - log_weights.max())
        variance = np.broadcast_to(ring * bar / (ring + bar), (8, 2))
        return Gaussians(
            weights / weights.sum(), alpha * centres * bar / (ring + bar), variance
        )

    def log_evidence(alpha: float, sigma: float) -> float:
        variance = (alpha * sd_ring) ** 2 + (alpha * sd_bar) ** 2 + 2 * sigma**2
        terms = (
            -0.5 * (alpha * centres) ** 2 / variance
            - 0.5 * np.log(2 * np.pi * variance)
        ).sum(-1)
        return float(np.log(np.mean(np.exp(terms))))

    return Problem(compiled, law, centres, log_evidence)


def disjoint() -> Problem:
    """Benchmark E: two factors on disjoint coordinates of one event, each a mixture of
    two Gaussians."""
    modes = (np.array([-0.5, 0.5]), np.array([-0.4, 0.6]))
    shares = (np.array([0.35, 0.65]), np.array([0.6, 0.4]))
    sd = 0.1

    @cp.program
    def both(f: Any, g: Any) -> Any:
        return cp.sample("x", cp.window(f, (2,), (0,)) * cp.window(g, (2,), (1,)))

    def compiled(schedule: cp.Schedule) -> Any:
        parts = []
        for mode, share in zip(modes, shares, strict=True):
            component = dist.Normal(jnp.asarray(mode)[:, None], sd).to_event(1)
            mixing = dist.Categorical(probs=jnp.asarray(share))
            parts.append(
                cp.Analytic(dist.MixtureSameFamily(mixing, component), schedule)
            )
        return cp.compile(both, *parts)

    pairs = [(i, j) for i in range(2) for j in range(2)]
    centres = np.array([[modes[0][i], modes[1][j]] for i, j in pairs])
    weights = np.array([shares[0][i] * shares[1][j] for i, j in pairs])

    def law(alpha: float, sigma: float) -> Gaussians:
        return Gaussians(
            weights, alpha * centres, np.full((4, 2), (alpha * sd) ** 2 + sigma**2)
        )

    return Problem(compiled, law, centres)
