"""Plain hierarchies: default runs of programs of NumPyro latents alone, beside
quadrature.

    python -m benchmarks plain-hierarchies [--keys 3] [--members 5 50 100 300]
        [--chains 64 1000]

mu ~ N(0, 2), tau ~ HalfNormal(1), theta_j ~ N(mu, tau) and y_j ~ N(theta_j, 0.5), j = 1
… J, with data whose members differ by 0.05: a posterior whose tau comes near 0. Written
centred and non-centred. Given mu and tau the members are integrated in closed form, and
given tau mu is Gaussian, so that one grid of log tau gives the exact moments.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from report import publish
from scipy.stats import norm

import composeprob as cp

NOISE, SPREAD = 0.5, 0.05
"""Standard deviations of a datum given its member, and of the members."""

FAR = 3.0
"""Standard deviations from the exact mean beyond which chains are counted."""


@cp.program
def centred(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("members", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, NOISE), obs=y)


@cp.program
def non_centred(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("members", len(y)):
        xi = numpyro.sample("xi", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * xi, NOISE), obs=y)


FORMS = {"centred": centred, "non-centred": non_centred}


class Law(NamedTuple):
    """Mean and variance of a marginal posterior, and its mass beyond `FAR`."""

    mean: float
    variance: float
    far: float


def data(members: int) -> np.ndarray:
    """Return one datum of each member."""
    rng = np.random.default_rng(members)
    theta = 0.4 + SPREAD * rng.standard_normal(members)
    return theta + NOISE * rng.standard_normal(members)


def quadrature(y: np.ndarray) -> dict[str, Law]:
    """Return the exact laws of mu and log tau."""
    log_tau = np.linspace(-10.0, 3.0, 8001)
    tau = np.exp(log_tau)
    variance = tau**2 + NOISE**2  # of a datum given mu and tau
    precision = len(y) / variance + 1 / 2.0**2  # of mu given tau
    mean = y.sum() / variance / precision
    log_weight = (
        -0.5 * len(y) * np.log(variance)
        - 0.5 * (y**2).sum() / variance
        + 0.5 * precision * mean**2
        - 0.5 * np.log(precision)
        - 0.5 * tau**2
        + log_tau
    )
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()

    mean_of_mu = weight @ mean
    variance_of_mu = weight @ (1 / precision + (mean - mean_of_mu) ** 2)
    bound = FAR * np.sqrt(variance_of_mu)
    above = norm.sf((mean_of_mu + bound - mean) * np.sqrt(precision))
    below = norm.cdf((mean_of_mu - bound - mean) * np.sqrt(precision))
    mu = Law(float(mean_of_mu), float(variance_of_mu), float(weight @ (above + below)))

    mean_of_log = weight @ log_tau
    variance_of_log = weight @ (log_tau - mean_of_log) ** 2
    far = np.abs(log_tau - mean_of_log) > FAR * np.sqrt(variance_of_log)
    return {
        "mu": mu,
        "log tau": Law(float(mean_of_log), float(variance_of_log), weight[far].sum()),
    }


def beside(values: np.ndarray, exact: Law) -> dict[str, float]:
    """Return a population's second moment about the exact mean over the exact one, its
    mean's distance in standard deviations, and its share beyond `FAR`."""
    away = np.asarray(values, float) - exact.mean
    deviation = np.sqrt(exact.variance)
    return {
        "variance": float(np.mean(away**2) / exact.variance),
        "mean": float(away.mean() / deviation),
        "far": float(np.mean(np.abs(away) > FAR * deviation)),
    }


def one(density: Any, laws: dict[str, Law], key: int, chains: int) -> dict[str, Any]:
    """Return the figures of one default run."""
    began = time.monotonic()
    result = cp.infer(density, jax.random.key(key), num_chains=chains, progress=False)
    seconds = time.monotonic() - began
    return {
        "mu": beside(result["mu"], laws["mu"]),
        "log tau": beside(np.log(result["tau"]), laws["log tau"]),
        "status": str(result.status.code),
        "evaluations": result.evaluations,
        "seconds": seconds,
    }


def is_wrong(run: dict[str, Any], chains: int, laws: dict[str, Law]) -> bool:
    """Return whether a mean is off by more than four standard errors of independent
    chains, or there are four times as many far chains as chance allows."""
    for name, law in laws.items():
        if abs(run[name]["mean"]) > 4 / np.sqrt(chains):
            return True
        most = law.far + 4 * np.sqrt(law.far / chains) + 1 / chains
        if run[name]["far"] > most:
            return True
    return False


def listed(runs: list[dict[str, Any]], name: str, figure: str, digits: int) -> str:
    return " ".join(f"{run[name][figure]:.{digits}f}" for run in runs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--members", type=int, nargs="+", default=[5, 50, 100, 300])
    parser.add_argument("--chains", type=int, nargs="+", default=[64, 1000])
    options = parser.parse_args()

    rows: list[list[str]] = []
    found: dict[str, Any] = {}
    silent: list[str] = []
    named: list[str] = []
    for members in options.members:
        y = data(members)
        laws = quadrature(y)
        for form, program in FORMS.items():
            density = cp.compile(program, jnp.asarray(y, jnp.float32))
            for chains in options.chains:
                label = f"{form}, {members} members, {chains} chains"
                runs = []
                for key in range(options.keys):
                    run = one(density, laws, key, chains)
                    runs.append(run)
                    wrong = is_wrong(run, chains, laws)
                    if wrong and run["status"] == "ok":
                        silent.append(f"{label}, key {key}")
                    if not wrong and run["status"] != "ok":
                        named.append(f"{label}, key {key}")
                found[label] = runs
                row = [form, str(members), str(chains)]
                for name, law in laws.items():
                    row.append(listed(runs, name, "variance", 2))
                    row.append(f"{listed(runs, name, 'far', 4)} ({law.far:.4f})")
                row.append(" ".join(run["status"] for run in runs))
                row.append(" ".join(f"{run['evaluations']:,}" for run in runs))
                rows.append(row)
                print("  ".join(row), flush=True)
    total = sum(len(runs) for runs in found.values())
    checks = {
        f"no run is wrong and OK ({len(silent)} of {total})": not silent,
        f"at most one right run of eight is named ({len(named)} of {total})": (
            len(named) <= total / 8
        ),
    }
    columns = [
        "form",
        "members",
        "chains",
        "Var mu over the exact one",
        "P(mu beyond 3 sd) (exact)",
        "Var log tau over the exact one",
        "P(log tau beyond 3 sd) (exact)",
        "status",
        "evaluations",
    ]
    notes = (
        "A run is wrong where the mean of mu or log tau is off by more than four "
        "standard errors of independent chains, or the share beyond 3 sd is over the "
        "exact one by more than four of its standard errors and one chain. Variances "
        "are about the exact means; one number for each key."
    )
    details = {"runs": found, "wrong and OK": silent, "right and named": named}
    title = "Plain hierarchies: default runs beside quadrature"
    return publish("plain_hierarchies", title, columns, rows, checks, details, notes)


if __name__ == "__main__":
    raise SystemExit(main())
