"""Whether the ± of a default run is what its estimates are off by: nine programs with known posteriors, by 20 keys.

    composeprob bench coverage

`cp.infer(density, key, num_chains=1000)` and nothing else. Exact values are sums over a grid, or of Gaussians. Exits
with 1 if more than 2 % of all estimates are more than three of their own standard errors off, or if estimates of any
quantity spread more than 1.3 times (with what chance does to a spread over 20 keys) as far as they say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from report import publish
from scipy import stats

import composeprob as cp

N, KEYS = 1000, 20
SCHEDULE = cp.Schedule.log_snr(60)
WEIGHTS, CENTRES, WIDTH = np.array([0.25, 0.45, 0.3]), np.array([-2.0, 0.5, 2.5]), 0.4
GRID = np.linspace(-8.0, 8.0, 160_001)
RATIO = 1.3
CHANCE = float(np.sqrt(stats.chi2.ppf(0.999, KEYS - 1) / (KEYS - 1)))
"""How much a spread over so many keys exceeds the true one by, once in 1,000."""


class Case(NamedTuple):
    """A program with what is known of its posterior: log Z, and the mean of each function of a sample."""

    density: cp.AnnealedDensity
    log_evidence: float
    means: dict[str, tuple[Callable[[Any], Any], float]]


def normal(x: Any, mean: Any, sd: Any) -> Any:
    """The density of N(mean, sd²)."""
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def mixture(x: Any) -> Any:
    """The density of the prior with three modes."""
    return sum(w * normal(x, m, WIDTH) for w, m in zip(WEIGHTS, CENTRES, strict=True))


def on_line(density: cp.AnnealedDensity, values: np.ndarray, beyond: float = -0.9) -> Case:
    """A case of one number x, from values of its unnormalised density on the grid."""
    share = values / values.sum()
    below = bool(beyond < 0)
    inside = beyond > GRID if below else beyond < GRID
    of_share = (lambda s: 1.0 * (s["x"] < beyond)) if below else (lambda s: 1.0 * (s["x"] > beyond))
    means = {"share": (of_share, float(share[inside].sum())), "mean": (lambda s: s["x"], float(share @ GRID))}
    return Case(density, float(np.log(values.sum() * (GRID[1] - GRID[0]))), means)


@cp.program
def single(f):
    cp.sample("x", f)


@cp.program
def squared(f, y, anneal=None):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x**2, 0.5), y, anneal=anneal)


@cp.program
def walled(f):
    x = cp.sample("x", f)
    cp.factor("inside", jnp.where(x > 0.3, 0.0, -jnp.inf))


@cp.program
def unknown_scale(f, y):
    x = cp.sample("x", f)
    s = cp.sample("s", dist.LogNormal(-0.7, 0.4))
    cp.observe("y", dist.Normal(x, s), y)


def cases() -> dict[str, Case]:
    """Every program by name."""
    parts = dist.Normal(jnp.asarray(CENTRES), WIDTH)
    f = cp.Analytic(dist.MixtureSameFamily(dist.Categorical(jnp.asarray(WEIGHTS)), parts), SCHEDULE)
    g, wide, near = (cp.Analytic(dist.Normal(m, s), SCHEDULE) for m, s in ((0.8, 1.6), (0.0, 2.5), (-0.5, 1.2)))
    p, q = mixture(GRID), normal(GRID, 0.8, 1.6)
    either = cp.mixture([f, g], weights=[0.3, 0.7])
    seen = p * normal(3.0, GRID**2, 0.5)
    return {
        "f AND g": on_line(cp.compile(single, f * g), p * q),
        "f²": on_line(cp.compile(single, f**2), p**2),
        "g² AND f NOT h": on_line(cp.compile(single, g * g * f / wide), q**2 * p / normal(GRID, 0.0, 2.5)),
        "(f OR g) AND h": on_line(cp.compile(single, either * near), (0.3 * p + 0.7 * q) * normal(GRID, -0.5, 1.2)),
        "y = x² + ε": on_line(cp.compile(squared, f, 3.0), seen),
        "y = x² + ε, denoised": on_line(cp.compile(squared, f, 3.0, "denoised"), seen),
        "x > 0.3": on_line(cp.compile(walled, g), q * (GRID > 0.3), beyond=1.5),
        "unknown scale": with_scale(f),
        "8 dimensions, f AND g": in_eight(),
    }


def with_scale(f: cp.Factor) -> Case:
    """Three measurements of x with an unknown error, summed over a grid of both."""
    y, log_s, x = np.array([1.2, 1.6, 0.2]), np.linspace(-2.8, 1.4, 421), np.linspace(-8.0, 8.0, 3201)
    across, along = np.meshgrid(x, log_s, indexing="ij")
    values = mixture(across) * normal(along, -0.7, 0.4)
    for one in y:
        values = values * normal(one, across, np.exp(along))
    log_evidence = float(np.log(values.sum() * (x[1] - x[0]) * (log_s[1] - log_s[0])))
    share = values / values.sum()
    means = {
        "mean": (lambda s: s["x"], float((share * across).sum())),
        "scale": (lambda s: s["s"], float((share * np.exp(along)).sum())),
    }
    return Case(cp.compile(unknown_scale, f, jnp.asarray(y)), log_evidence, means)


def in_eight() -> Case:
    """Three Gaussians of width 0.5 in 8 dimensions times one of width 0.8: a mixture of three again."""
    centres = np.zeros((3, 8))
    centres[:, :2] = [[1.0, 0.5], [-1.0, 0.0], [0.0, -1.5]]
    weights = np.array([0.2, 0.5, 0.3])
    parts = dist.Normal(jnp.asarray(centres), 0.5).to_event(1)
    f = cp.Analytic(dist.MixtureSameFamily(dist.Categorical(jnp.asarray(weights)), parts), SCHEDULE)
    g = cp.Analytic(dist.Normal(jnp.full(8, 0.2), 0.8).to_event(1), SCHEDULE)
    logs = np.log(weights) + stats.norm(0.2, np.sqrt(0.25 + 0.64)).logpdf(centres).sum(1)
    log_evidence = float(np.logaddexp.reduce(logs))
    moved = jnp.asarray((centres / 0.25 + 0.2 / 0.64) / (1 / 0.25 + 1 / 0.64))

    def first(sample: Any) -> Any:
        return 1.0 * (jnp.argmin(jnp.sum((sample["x"] - moved) ** 2, axis=-1)) == 0)

    return Case(cp.compile(single, f * g), log_evidence, {"share": (first, float(np.exp(logs[0] - log_evidence)))})


def measured(case: Case) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Estimates and standard errors of every key, (KEYS, quantities), log Z first; and what each run's status says."""
    values, errors, codes = [], [], []
    for k in range(KEYS):
        result = cp.infer(case.density, jax.random.key(1000 + k), num_chains=N, progress=False)
        means = [result.mean(fn) for fn, _ in case.means.values()]
        values.append([result.log_evidence, *(float(m.value) for m in means)])
        errors.append([result.log_evidence_error, *(float(m.error) for m in means)])
        codes.append(str(result.status.code))
    return np.array(values, float), np.array(errors, float), codes


def main() -> int:
    rows, details, beyond, told = [], {}, 0, 0
    worst = ("", 0.0)
    for name, case in cases().items():
        values, errors, codes = measured(case)
        names, exact = ["log Z", *case.means], np.array([case.log_evidence, *(m for _, m in case.means.values())])
        for i, quantity in enumerate(names):
            known = np.isfinite(errors[:, i])
            off = np.abs(values[known, i] - exact[i]) / errors[known, i]
            spread, stated = values[:, i].std(ddof=1), float(np.sqrt(np.mean(errors[known, i] ** 2)))
            beyond, told = beyond + int((off > 3).sum()), told + int(known.sum())
            worst = max(worst, (f"{quantity} of {name}", spread / stated), key=lambda pair: pair[1])
            numbers = [exact[i], values[:, i].mean(), spread, stated]
            shown = [*(f"{number:.4f}" for number in numbers), f"{spread / stated:.2f}", f"{off.max():.1f}"]
            rows.append([name, quantity, *shown, f"{codes.count('ok')} of {KEYS}"])
            print("  ".join(rows[-1]), flush=True)
        details[name] = {"exact": exact.tolist(), "values": values.tolist(), "errors": errors.tolist(), "codes": codes}
    checks = {
        f"at most 2 % of {told} estimates are off by more than 3 of their standard errors ({beyond} are)": (
            beyond <= 0.02 * told
        ),
        f"spread over keys ≤ {RATIO} × stated, times {CHANCE:.2f} for chance (worst: {worst[1]:.2f}, {worst[0]})": (
            worst[1] <= RATIO * CHANCE
        ),
    }
    columns = ["program", "quantity", "exact", "mean", "spread", "stated ±", "ratio", "worst, in ±", "status ok"]
    notes = f"{N} chains, keys 1000 to {1000 + KEYS - 1}, `cp.infer` with everything left out that can be."
    return publish("coverage", "What the ± of a default run is worth", columns, rows, checks, details, notes)


if __name__ == "__main__":
    sys.exit(main())
