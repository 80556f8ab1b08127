"""Hierarchies of trained posteriors of one subject: a default run beside quadrature.

NUTS runs beside them too.

    python -m benchmarks hierarchy-estimators [--part a] [--subjects 8 64 512]

Part a, exact: subjects η_j of two numbers around a group with mean mu, scales tau and
correlation rho, each seen through the score of its posterior q(η | x_j) under a broad
prior, in closed form: right, or wrong by a fixed amount in the noise that it predicts,
as a network's would be (ε̂ = ε + error·net(η, x, t), that of `tall-data`). The
reference is quadrature of the written hierarchy, x_j ~ N(η_j, 0.5²): subjects and mean
in closed form, tau and rho on a grid. NUTS runs on the written likelihood. Each number
of subjects is a process of its own, whose first run's processor seconds are with
compilation; those that are done are kept in out/, so that the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from report import kept, publish
from tall.instances import Instance, gaussian, mistake, time_of

import composeprob as cp

CHAINS = 300
CHANCE = 3 / np.sqrt(CHAINS)
"""Chains of a run, and what so many draws may be off by, in sd, beside what the checks
allow."""
BROAD, NOISE = 3.0, 0.5
"""Standard deviations of the prior that the posteriors of one subject were made under,
and of a subject's data."""
CLEAR = 1 / (BROAD**-2 + NOISE**-2)
LEVELS = cp.Schedule.log_snr(60)
SHORTER = cp.Schedule.log_snr(60, max=5.0)
NAMES = ("mu₁", "mu₂", "tau₁", "tau₂", "rho")
CASES = ((0.0, LEVELS), (1e-3, LEVELS), (1e-2, LEVELS), (1e-2, SHORTER))
"""Sizes of errors, and the levels that are run: the shorter ones end at a noise of
0.08."""
GRID = 90


class Posterior(eqx.Module):
    """ε̂ of q(η | x)."""

    net: Instance

    def __call__(self, eta: Any, log_snr: Any, x: Any) -> Any:
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        exact = (
            sigma * (eta - alpha * CLEAR / NOISE**2 * x) / (alpha**2 * CLEAR + sigma**2)
        )
        return exact + mistake(self.net, eta, x, time_of(log_snr))


def posterior(error: float, schedule: cp.Schedule) -> cp.Diffusion:
    net = jax.tree.map(jnp.asarray, gaussian(2, 1, error, seed=0))
    return cp.Diffusion(
        Posterior(net),
        schedule,
        event_shape=(2,),
        parameterization="epsilon",
        time=("log_snr"),
        conditions=("x",),
        label="posterior",
    )


def group() -> tuple[Any, Any]:
    """Mean and covariance of the subjects, under their priors; any sites function
    serves."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    rho = numpyro.sample("rho", dist.Uniform(-1.0, 1.0))
    return mu, tau[:, None] * tau * (jnp.eye(2) + rho * (1 - jnp.eye(2)))


@cp.program
def study(posterior: Any, prior: Any, xs: Any) -> None:
    mu, covariance = group()
    with numpyro.plate("subjects", len(xs)):
        eta = cp.sample("eta", dist.MultivariateNormal(mu, covariance))
        cp.factor("x", posterior.given(x=xs) / prior, at=eta)


def written(xs: Any) -> None:
    """The same with its likelihood, the subjects not centred."""
    mu, covariance = group()
    with numpyro.plate("subjects", len(xs)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        eta = mu + z @ jnp.linalg.cholesky(covariance).T
        numpyro.sample("x", dist.Normal(eta, NOISE).to_event(1), obs=xs)


def data(subjects: int) -> np.ndarray:
    """(subjects, 2)."""
    rng = np.random.default_rng([0, subjects])
    mu = np.array([0.7, -0.5])
    tau = np.array([0.7, 0.4])
    rho = 0.6
    covariance = tau[:, None] * tau * np.array([[1.0, rho], [rho, 1.0]])
    eta = rng.multivariate_normal(mu, covariance, subjects)
    return (eta + NOISE * rng.standard_normal((subjects, 2))).astype(np.float32)


class Reference(NamedTuple):
    """The group's posterior by quadrature.

    Attributes:
        weights: of the grid of (tau₁, tau₂, rho), (G,).
        grid: its points, (G, 3).
        mean, width: of mu given these, (G, 2).
    """

    weights: np.ndarray
    grid: np.ndarray
    mean: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, xs: np.ndarray) -> Reference:
        """Given tau and rho the data are N(mu, V), V = Σ + 0.5²·I, and mu ~ N(0, I):
        both integrals are closed."""
        number = len(xs)
        centre = xs.mean(0, dtype=float)
        scatter = (xs - centre).T.astype(float) @ (xs - centre)
        middle = (np.arange(GRID) + 0.5) / GRID
        grid = np.stack(
            np.meshgrid(3 * middle, 3 * middle, 2 * middle - 1, indexing="ij"), -1
        ).reshape(-1, 3)
        for _ in range(2):  # the first grid finds where the second belongs
            tau = grid[:, :2]
            rho = grid[:, 2]
            v = (
                tau[:, :, None]
                * tau[:, None]
                * (np.eye(2) + rho[:, None, None] * (1 - np.eye(2)))
            )
            v = v + NOISE**2 * np.eye(2)
            inverse = np.linalg.inv(v)
            beside = np.linalg.inv(np.eye(2) + v / number)
            log_p = -0.5 * (tau**2).sum(1) - (number - 1) / 2 * np.log(np.linalg.det(v))
            log_p += -0.5 * (inverse * scatter).sum((1, 2)) + 0.5 * np.log(
                np.linalg.det(beside)
            )
            log_p -= 0.5 * np.einsum("i,gij,j->g", centre, beside, centre)
            weights = np.exp(log_p - log_p.max())
            weights /= weights.sum()
            found = cls(
                weights,
                grid,
                beside @ centre,
                np.sqrt(1 - np.diagonal(beside, axis1=1, axis2=2)),
            )
            mean, sd = found.moments
            low = np.maximum(mean[2:] - 7 * sd[2:], [0.0, 0.0, -1.0])
            high = np.minimum(mean[2:] + 7 * sd[2:], [np.inf, np.inf, 1.0])
            sides = [a + (b - a) * middle for a, b in zip(low, high, strict=True)]
            grid = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
        return found

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each of `NAMES`."""
        values = np.concatenate([self.mean, self.grid], axis=1)
        inner = np.concatenate([self.width**2, np.zeros_like(self.grid)], axis=1)
        mean = self.weights @ values
        return mean, np.sqrt(self.weights @ (values**2 + inner) - mean**2)

    def draws(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """(number, 5); within a cell of the grid uniform."""
        at = rng.choice(len(self.weights), number, p=self.weights)
        cell = np.array([np.diff(np.unique(side))[0] for side in self.grid.T])
        rest = self.grid[at] + cell * rng.uniform(-0.5, 0.5, (number, 3))
        return np.concatenate(
            [self.mean[at] + self.width[at] * rng.standard_normal((number, 2)), rest],
            axis=1,
        )


def compared(
    draws: np.ndarray, reference: Reference, exact: np.ndarray
) -> dict[str, list[float]]:
    """Errors of draws for each of `NAMES`.

    They are the distance of the mean in standard deviations, the ratio of these, and
    the share of the exact posterior, by draws of it, within the interval that holds the
    central 90 % of the draws.
    """
    mean, sd = reference.moments
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    inside = ((exact > low) & (exact < high)).mean(0)
    return {
        "off": ((draws.mean(0) - mean) / sd).tolist(),
        "ratio": (draws.std(0) / sd).tolist(),
        "inside": inside.tolist(),
    }


def stacked(samples: Any) -> np.ndarray:
    """(draws, 5) of `NAMES`."""
    parts = (
        np.asarray(samples["mu"]),
        np.asarray(samples["tau"]),
        np.asarray(samples["rho"])[:, None],
    )
    return np.concatenate(parts, axis=1).astype(float)


def subjects_rows(subjects: int) -> list[dict[str, Any]]:
    """Every run of one number of subjects, in this process."""
    xs = data(subjects)
    reference = Reference.of(xs)
    rng = np.random.default_rng(1)
    exact = reference.draws(200_000, rng)
    prior = cp.Analytic(
        dist.Normal(jnp.zeros(2), BROAD).to_event(1), LEVELS, label="prior"
    )
    found: list[dict[str, Any]] = []

    def add(
        by: str,
        draws: np.ndarray,
        seconds: float = 0.0,
        status: str = "",
        evaluations: int = 0,
    ) -> None:
        row = {
            "by": by,
            "seconds": seconds,
            "status": status,
            "evaluations": evaluations,
        }
        found.append(row | compared(draws, reference, exact))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)

    add(f"{CHAINS} exact draws", reference.draws(CHAINS, rng))
    for error, schedule in CASES:
        began = time.process_time()
        density = cp.compile(
            study, posterior(error, schedule), prior, jnp.asarray(xs), schedule=schedule
        )
        result = cp.infer(
            density, jax.random.key(subjects), num_chains=CHAINS, progress=False
        )
        code = str(result.status.code)
        draws = stacked(result.unweighted())
        by = f"cp.infer, error {error:g}" + ", levels to λ = 5" * (schedule is SHORTER)
        add(by, draws, time.process_time() - began, code, result.evaluations)
    began = time.process_time()
    chains = MCMC(
        NUTS(written),
        num_warmup=500,
        num_samples=500,
        num_chains=4,
        chain_method=("vectorized"),
        progress_bar=False,
    )
    chains.run(jax.random.key(0), jnp.asarray(xs))
    add(
        "NUTS on the written likelihood",
        stacked(chains.get_samples()),
        time.process_time() - began,
    )
    return found


def apart(subjects: int) -> list[dict[str, Any]]:
    """`subjects_rows` in a process of its own, which finds nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import json, hierarchy_estimators as h; "
            f"print(json.dumps(h.subjects_rows({subjects})))"
        )
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def part_a(numbers: list[int]) -> int:
    rows: list[list[str]] = []
    checks: dict[str, bool] = {}
    details: dict[str, Any] = {}
    for subjects in numbers:
        found = kept(
            "hierarchy_estimators", f"{subjects} subjects", partial(apart, subjects)
        )
        details[str(subjects)] = found
        for row in found:
            off, ratio, inside = (
                np.array(row[name]) for name in ("off", "ratio", "inside")
            )
            rows.append(
                [
                    str(subjects),
                    row["by"],
                    " ".join(f"{value:+.2f}" for value in off),
                    " ".join(f"{value:.2f}" for value in ratio),
                    f"{inside.min():.2f}–{inside.max():.2f}",
                    row["status"],
                    f"{row['evaluations'] or ''}",
                    f"{row['seconds'] or 0:.0f}",
                ]
            )
        right = found[1]
        near = np.max(np.abs(right["off"])) < 0.2 + CHANCE
        near = near and np.max(np.abs(np.array(right["ratio"]) - 1)) < 0.15 + CHANCE
        checks[
            f"{subjects} subjects, right scores: means within 0.2 sd, spreads within "
            "15 %, status ok"
        ] = bool(near and right["status"] == "ok")
        wrong = [
            row["by"]
            for row in found
            if row["status"] == "ok" and np.max(np.abs(row["off"])) > 0.5 + CHANCE
        ]
        checks[
            f"{subjects} subjects: no run with a mean off by more than 0.5 sd has the "
            "status ok"
        ] = not wrong
    columns = [
        "subjects",
        "by",
        f"mean off by, sd: {' '.join(NAMES)}",
        "spread ratio: the same",
        "exact posterior in the 90 % intervals",
        "status",
        "evaluations",
        "processor s",
    ]
    notes = (
        f"{CHAINS} chains of cp.infer, by default; NUTS: 4 chains of 500 draws after "
        "as many, NumPyro's defaults. For each number of subjects the first run of "
        "cp.infer compiles for the others; NUTS compiles too. Checks allow "
        f"{CHANCE:.2f} more than they state, three standard errors of as many draws. "
        "Wrong scores are compared with the posterior of right ones. We found no "
        "published numbers for these problems; arXiv 2505.14429 reports that "
        "composed scores in hierarchies are unstable above some hundred groups."
    )
    title = "Hierarchies over posteriors of one subject, in closed form"
    return publish(
        "hierarchy_estimators", title, columns, rows, checks, {"runs": details}, notes
    )


PARTS = {"a": part_a}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), default="a")
    parser.add_argument("--subjects", type=int, nargs="+", default=[8, 64, 512])
    options = parser.parse_args()
    return PARTS[options.part](options.subjects)


if __name__ == "__main__":
    sys.exit(main())
