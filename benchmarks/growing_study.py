"""A study that grows from 20 to 44 subjects, beside one run of all and quadrature.

    python -m benchmarks growing-study [--keys 2] [--chains 1000] [--stride 8]

mu ~ N(0, 2), tau ~ HalfNormal(1), theta_j ~ N(mu, tau) and y_j ~ N(theta_j, 0.5). The
first run has 20 subjects, and `Result.extend` adds ``stride`` of them at a time. Given
mu and tau the subjects are integrated in closed form, and given tau mu is Gaussian: one
grid of log tau gives the exact moments, and the log-evidence of what was added.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from report import publish

import composeprob as cp

NOISE, SPREAD = 0.5, 0.8
"""Standard deviations of a datum given its subject, and of the subjects."""

FIRST, LAST = 20, 44


@cp.program
def study(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, NOISE), obs=y)


class Exact(NamedTuple):
    """Means of mu and tau, and the log-evidence."""

    mu: float
    tau: float
    log_evidence: float


def quadrature(y: np.ndarray) -> Exact:
    """Return exact values, by a grid of log tau."""
    log_tau = np.linspace(-9.0, 3.0, 8001)
    tau = np.exp(log_tau)
    variance = tau**2 + NOISE**2  # of a datum given mu and tau
    precision = len(y) / variance + 1 / 2.0**2  # of mu given tau
    mean = y.sum() / variance / precision
    log_likelihood = -0.5 * len(y) * np.log(2 * np.pi * variance)
    log_likelihood -= 0.5 * (y**2).sum() / variance
    # mu is integrated: N(y; 0, variance·I + 4·11ᵀ).
    log_likelihood += 0.5 * precision * mean**2 - 0.5 * np.log(precision * 2.0**2)
    log_prior = 0.5 * np.log(2 / np.pi) - 0.5 * tau**2 + log_tau
    log_weight = log_likelihood + log_prior
    highest = log_weight.max()
    weight = np.exp(log_weight - highest)
    log_evidence = highest + np.log(weight.sum() * (log_tau[1] - log_tau[0]))
    weight /= weight.sum()
    return Exact(float(weight @ mean), float(weight @ tau), float(log_evidence))


class Run(NamedTuple):
    """Estimates of one way of inference for all subjects."""

    mu: Any
    tau: Any
    added: float
    stated: float
    status: str
    evaluations: int
    seconds: float


def whole(y: np.ndarray, chains: int, seed: int) -> Run:
    """One run of all subjects."""
    began = time.monotonic()
    density = cp.compile(study, jnp.asarray(y, jnp.float32))
    key = jax.random.key(seed)
    result = cp.infer(density, key, num_chains=chains, progress=False)
    return summarised(result, [], began)


def grown(y: np.ndarray, chains: int, seed: int, stride: int) -> Run:
    """A run of the first subjects, which goes on with the others."""
    began = time.monotonic()
    density = cp.compile(study, jnp.asarray(y[:FIRST], jnp.float32))
    key = jax.random.key(100 + seed)
    result = cp.infer(density, key, num_chains=chains, progress=False)
    increments = []
    number = FIRST
    while number < LAST:
        number = min(number + stride, LAST)
        density = cp.compile(study, jnp.asarray(y[:number], jnp.float32))
        key = jax.random.key(1000 * seed + number)
        result = result.extend(density, key)
        # Of a run without a log-evidence the reason alone states the increment.
        found = re.findall(r"log p (\S+) ± ([^\s,]+)", result.reason)
        increments.append([float(text) for text in found[-1]])
    return summarised(result, increments, began)


def summarised(result: Any, increments: list[list[float]], began: float) -> Run:
    added = sum(increment for increment, _ in increments)
    stated = float(np.sqrt(sum(error**2 for _, error in increments)))
    return Run(
        result.mean(lambda sample: sample["mu"]),
        result.mean(lambda sample: sample["tau"]),
        added,
        stated,
        str(result.status.code),
        result.evaluations,
        time.monotonic() - began,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=2)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--stride", type=int, default=8)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    y = 1 + np.hypot(SPREAD, NOISE) * rng.standard_normal(LAST)
    exact = quadrature(y)
    added = exact.log_evidence - quadrature(y[:FIRST]).log_evidence
    rows = [["exact", "-", f"{exact.mu:.3f}", f"{exact.tau:.3f}", f"{added:.2f}"]]
    rows[0] += ["", "", ""]
    found: dict[str, Any] = {"exact": {**exact._asdict(), "added": added}}
    worst = 0.0
    fine = True
    for seed in range(options.keys):
        ways = {
            "one run of 44": whole(y, options.chains, seed),
            f"20, and {options.stride} at a time": grown(
                y, options.chains, seed, options.stride
            ),
        }
        for name, run in ways.items():
            scores = [
                (run.mu.value - exact.mu) / run.mu.error,
                (run.tau.value - exact.tau) / run.tau.error,
            ]
            evidence = ""
            if run.stated:
                scores.append((run.added - added) / run.stated)
                evidence = f"{run.added:.2f} ± {run.stated:.2f}"
            worst = max(worst, *map(abs, scores))
            fine = fine and run.status == "ok"
            row = [name, str(seed), f"{run.mu.value:.3f} ± {run.mu.error:.3f}"]
            row += [f"{run.tau.value:.3f} ± {run.tau.error:.3f}", evidence, run.status]
            row += [f"{run.evaluations:,}", f"{run.seconds:.0f}"]
            rows.append(row)
            found[f"{name}, key {seed}"] = {"scores": scores, **run._asdict()}
            found[f"{name}, key {seed}"].update(
                mu=float(run.mu.value), tau=float(run.tau.value)
            )
            print("  ".join(row), flush=True)
    checks = {
        f"all within four stated errors of quadrature ({worst:.1f})": worst <= 4,
        "every status is OK": fine,
    }
    columns = ["run", "key", "mu", "tau", "log p(added), given the first", "status"]
    columns += ["evaluations", "seconds"]
    title = "A study that grows from 20 to 44 subjects"
    return publish("growing_study", title, columns, rows, checks, found)


if __name__ == "__main__":
    raise SystemExit(main())
