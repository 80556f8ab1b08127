"""Stated errors of default runs beside their true errors, on thirteen exact posteriors.

    python -m benchmarks coverage

`cp.infer(density, key, num_chains=1000)` and nothing else, 20 keys each, and 100 of the
six programs of which the share of nominal 90 % intervals that hold the exact value is
judged. Exact values are sums over a grid, or of Gaussians. Exits with 1 if more than 2
% of all estimates are more than three of their own standard errors off, if estimates of
any quantity spread more than 1.3 times (with what chance does to a spread over so many
keys) as far as they say, or if one of the judged intervals covers in fewer than 85 % of
the keys. ``--keys N`` takes fewer, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from exact.case import single
from exact.right import unknown_scale, walled
from report import publish
from scipy import stats

import composeprob as cp

N, KEYS, MANY = 1000, 20, 100
LEVEL, LEAST = 0.9, 0.85
JUDGED = (
    "f AND g",
    "f AND g, x > 0.3",
    "f OR g",
    "y = x² + ε",
    "8 observations",
    "soft tail",
)
SCHEDULE = cp.Schedule.log_snr(60)
WEIGHTS = np.array([0.25, 0.45, 0.3])
CENTRES = np.array([-2.0, 0.5, 2.5])
WIDTH = 0.4
GRID = np.linspace(-8.0, 8.0, 160_001)
RATIO = 1.3
TAIL = 3.6
"""Start of the soft tail: 2.75 widths above the highest mode, which 0.1 % of the prior
exceed."""
SEEN = np.array([0.9, -0.3, 1.4, 0.2, 0.8, 1.1, -0.1, 0.6])
ERROR = 1.0
"""Eight observations of x with this error."""


class Case(NamedTuple):
    """A program with what is known of its posterior: log Z, and a mean, a probability
    or a quantile by name.

    Each is what a result is asked for, and its exact value.
    """

    density: cp.AnnealedDensity
    log_evidence: float
    asked: dict[str, tuple[Callable[[cp.Result], Any], float]]


def normal(x: Any, mean: Any, sd: Any) -> Any:
    """The density of N(mean, sd²)."""
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def mixture(x: Any) -> Any:
    """The density of the prior with three modes."""
    return sum(w * normal(x, m, WIDTH) for w, m in zip(WEIGHTS, CENTRES, strict=True))


def mean(fn: Callable[[Any], Any]) -> Callable[[cp.Result], Any]:
    """Asks a result for the mean of a function."""
    return lambda result: result.mean(fn)


def on_line(
    density: cp.AnnealedDensity, values: np.ndarray, beyond: float = -0.9
) -> Case:
    """A case of one number x, from values of its unnormalised density on the grid."""
    share = values / values.sum()
    below = bool(beyond < 0)
    inside = beyond > GRID if below else beyond < GRID
    event = (lambda s: s["x"] < beyond) if below else (lambda s: s["x"] > beyond)
    asked = {
        "share": (lambda result: result.probability(event), float(share[inside].sum())),
        "mean": (mean(lambda s: s["x"]), float(share @ GRID)),
        "quartile": (
            lambda result: result.quantile(lambda s: s["x"], 0.75),
            float(GRID[np.cumsum(share) > 0.75][0]),
        ),
    }
    return Case(density, float(np.log(values.sum() * (GRID[1] - GRID[0]))), asked)


@cp.program
def squared(f, y, anneal=None):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x**2, 0.5), y, anneal=anneal)


@cp.program
def far_out(f):
    x = cp.sample("x", f)
    cp.factor("beyond", jax.nn.log_sigmoid((x - TAIL) / 0.1))


def cases() -> dict[str, Case]:
    """Every program by name."""
    parts = dist.Normal(jnp.asarray(CENTRES), WIDTH)
    f = cp.Analytic(
        dist.MixtureSameFamily(dist.Categorical(jnp.asarray(WEIGHTS)), parts), SCHEDULE
    )
    g, wide, near = (
        cp.Analytic(dist.Normal(m, s), SCHEDULE)
        for m, s in ((0.8, 1.6), (0.0, 2.5), (-0.5, 1.2))
    )
    p = mixture(GRID)
    q = normal(GRID, 0.8, 1.6)
    either = cp.mixture([f, g], weights=[0.3, 0.7])
    seen = p * normal(3.0, GRID**2, 0.5)
    return {
        "f AND g": on_line(cp.compile(single, f * g), p * q),
        "f²": on_line(cp.compile(single, f**2), p**2),
        "g² AND f NOT h": on_line(
            cp.compile(single, g * g * f / wide), q**2 * p / normal(GRID, 0.0, 2.5)
        ),
        "(f OR g) AND h": on_line(
            cp.compile(single, either * near),
            (0.3 * p + 0.7 * q) * normal(GRID, -0.5, 1.2),
        ),
        "y = x² + ε": on_line(cp.compile(squared, f, 3.0), seen),
        "y = x² + ε, denoised": on_line(cp.compile(squared, f, 3.0, "denoised"), seen),
        "x > 0.3": on_line(cp.compile(walled, g), q * (GRID > 0.3), beyond=1.5),
        "f AND g, x > 0.3": on_line(
            cp.compile(walled, f * g), p * q * (GRID > 0.3), beyond=1.5
        ),
        "unknown scale": with_scale(f),
        "8 dimensions, f AND g": in_eight(),
        "f OR g": on_line(cp.compile(single, either), 0.3 * p + 0.7 * q),
        "8 observations": on_line(*tall(), beyond=0.5),
        "soft tail": on_line(
            cp.compile(far_out, f), p / (1 + np.exp(-(GRID - TAIL) / 0.1)), beyond=TAIL
        ),
    }


def posterior(x: Any, log_snr: Any, y: Any) -> Any:
    """The score of the noised posterior N(y/(1 + e²), e²/(1 + e²)) of x ~ N(0, 1) under
    one observation y."""
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    noise = jax.nn.sigmoid(-log_snr)
    shrunk = 1 / (1 + ERROR**2)
    return -(x - alpha * y * shrunk) / (alpha**2 * ERROR**2 * shrunk + noise)


def tall() -> tuple[cp.AnnealedDensity, np.ndarray]:
    """The posterior of eight observations, from the scores of that of one: prior × Π_i
    posterior(·|y_i)/prior."""
    prior = cp.Analytic(dist.Normal(0.0, 1.0), SCHEDULE)
    one = cp.Diffusion(
        posterior,
        SCHEDULE,
        event_shape=(),
        parameterization="score",
        time="log_snr",
        conditions=("y",),
    )
    density = cp.compile(single, prior * cp.product(one / prior, over={"y": SEEN}))
    # Of level 0 as it is, with what noise it has: the evidence is known to more digits
    # than that changes.
    alpha, sigma = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
    shrunk = 1 / (1 + ERROR**2)
    width = np.sqrt(alpha**2 * ERROR**2 * shrunk + sigma**2)
    values = normal(GRID, 0.0, 1.0)
    for y in SEEN:
        values = (
            values * normal(GRID, alpha * y * shrunk, width) / normal(GRID, 0.0, 1.0)
        )
    return density, values


def with_scale(f: cp.Factor) -> Case:
    """Three measurements of x with an unknown error, summed over a grid of both."""
    y = np.array([1.2, 1.6, 0.2])
    log_s = np.linspace(-2.8, 1.4, 421)
    x = np.linspace(-8.0, 8.0, 3201)
    across, along = np.meshgrid(x, log_s, indexing="ij")
    values = mixture(across) * normal(along, -0.7, 0.4)
    for one in y:
        values = values * normal(one, across, np.exp(along))
    log_evidence = float(np.log(values.sum() * (x[1] - x[0]) * (log_s[1] - log_s[0])))
    share = values / values.sum()
    asked = {
        "mean": (mean(lambda s: s["x"]), float((share * across).sum())),
        "scale": (mean(lambda s: s["s"]), float((share * np.exp(along)).sum())),
    }
    return Case(cp.compile(unknown_scale, f, jnp.asarray(y)), log_evidence, asked)


def in_eight() -> Case:
    """Three Gaussians of width 0.5 in 8 dimensions times one of width 0.8: a mixture of
    three again."""
    centres = np.zeros((3, 8))
    centres[:, :2] = [[1.0, 0.5], [-1.0, 0.0], [0.0, -1.5]]
    weights = np.array([0.2, 0.5, 0.3])
    parts = dist.Normal(jnp.asarray(centres), 0.5).to_event(1)
    f = cp.Analytic(
        dist.MixtureSameFamily(dist.Categorical(jnp.asarray(weights)), parts), SCHEDULE
    )
    g = cp.Analytic(dist.Normal(jnp.full(8, 0.2), 0.8).to_event(1), SCHEDULE)
    logs = np.log(weights) + stats.norm(0.2, np.sqrt(0.25 + 0.64)).logpdf(centres).sum(
        1
    )
    log_evidence = float(np.logaddexp.reduce(logs))
    moved = jnp.asarray((centres / 0.25 + 0.2 / 0.64) / (1 / 0.25 + 1 / 0.64))

    def first(sample: Any) -> Any:
        return jnp.argmin(jnp.sum((sample["x"] - moved) ** 2, axis=-1)) == 0

    asked = {
        "share": (
            lambda result: result.probability(first),
            float(np.exp(logs[0] - log_evidence)),
        )
    }
    return Case(cp.compile(single, f * g), log_evidence, asked)


class Measured(NamedTuple):
    """Estimates, their errors and their intervals of every key, (keys, quantities), log
    Z first; and each status."""

    values: np.ndarray
    errors: np.ndarray
    low: np.ndarray
    high: np.ndarray
    codes: list[str]


def measured(case: Case, keys: int) -> Measured:
    """Runs a case under every key."""
    rows, codes = [], []
    for k in range(keys):
        result = cp.infer(
            case.density, jax.random.key(1000 + k), num_chains=N, progress=False
        )
        row = [
            (
                result.log_evidence,
                result.log_evidence_error,
                *result.log_evidence_interval(LEVEL),
            )
        ]
        estimates = [ask(result) for ask, _ in case.asked.values()]
        rows.append(
            [*row, *((e.value, e.error, *e.interval(LEVEL)) for e in estimates)]
        )
        codes.append(str(result.status.code))
    return Measured(*np.moveaxis(np.array(rows, float), -1, 0), codes)


def chance(keys: int) -> float:
    """Excess of a spread over keys that chance reaches once in 1,000, as a ratio."""
    return float(np.sqrt(stats.chi2.ppf(0.999, keys - 1) / (keys - 1)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--keys", type=int, help="keys of every program; the numbers are not written"
    )
    parser.add_argument(
        "--only", nargs="+", help="only these programs; the numbers are not written"
    )
    asked = parser.parse_args(arguments)
    rows, details, beyond, told = [], {}, 0, 0
    worst, least = ("", 0.0), ("", 1.0)
    for name, case in cases().items():
        if asked.only is not None and name not in asked.only:
            continue
        keys = asked.keys or (MANY if name in JUDGED else KEYS)
        found = measured(case, keys)
        values, errors = found.values, found.errors
        names = ["log Z", *case.asked]
        exact = np.array([case.log_evidence, *(m for _, m in case.asked.values())])
        covers = (found.low <= exact) & (exact <= found.high)
        for i, quantity in enumerate(names):
            known = np.isfinite(errors[:, i])
            off = np.abs(values[known, i] - exact[i]) / errors[known, i]
            spread = values[:, i].std(ddof=1)
            stated = float(np.sqrt(np.mean(errors[known, i] ** 2)))
            beyond = beyond + int((off > 3).sum())
            told = told + int(known.sum())
            worst = max(
                worst,
                (f"{quantity} of {name}", spread / stated / chance(keys)),
                key=lambda pair: pair[1],
            )
            covered = float(covers[known, i].mean())
            if name in JUDGED:
                least = min(
                    least, (f"{quantity} of {name}", covered), key=lambda pair: pair[1]
                )
            numbers = [exact[i], values[:, i].mean(), spread, stated]
            shown = [
                *(f"{number:.4f}" for number in numbers),
                f"{spread / stated:.2f}",
                f"{off.max():.1f}",
            ]
            ok = f"{found.codes.count('ok')} of {keys}"
            rows.append([name, quantity, *shown, f"{covered:.0%} of {known.sum()}", ok])
            print("  ".join(rows[-1]), flush=True)
        details[name] = {
            "exact": exact.tolist(),
            **{k: v.tolist() for k, v in found._asdict().items() if k != "codes"},
        }
        details[name]["codes"] = found.codes
    checks = {
        f"at most 2 % of {told} estimates are off by more than 3 of their standard "
        f"errors ({beyond} are)": (beyond <= 0.02 * told),
        f"spread over keys ≤ {RATIO} × stated, with what chance does to it (worst: "
        f"{worst[1]:.2f}, {worst[0]})": (worst[1] <= RATIO),
        f"intervals of {LEVEL:.0%} cover in ≥ {LEAST:.0%} of the keys of "
        f"{', '.join(JUDGED)} (least: {least[1]:.0%}, {least[0]})": least[1] >= LEAST,
    }
    columns = [
        "program",
        "quantity",
        "exact",
        "mean",
        "spread",
        "stated ±",
        "ratio",
        "worst, in ±",
        "90 % covers",
        "status ok",
    ]
    notes = f"{N} chains, keys from 1000 on, `cp.infer` with its defaults."
    title = "What the ± of a default run is worth"
    whole = asked.keys is None and asked.only is None
    return publish(
        "coverage", title, columns, rows, checks, details, notes, write=whole
    )


if __name__ == "__main__":
    sys.exit(main())
