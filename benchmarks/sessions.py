"""One subject in many sessions: BayesFlow's compositional sampler and ours.

Both have the same network.

    KERAS_BACKEND=jax python -m benchmarks sessions

The zoo's `drift-diffusion-posterior` saw one session of 200 trials. All n sessions here
share one θ: the posterior is prior^(1 − n)·∏ p(θ | x_i), which both compose from the
same network with the same noised prior. The reference is the exact posterior by
importance sampling with the likelihood, the series of Navarro and Fuss. A hierarchy is
no problem that BayesFlow can take this network to: its group parameters would need a
network of their own, trained on them.

Needs BayesFlow ≥ 2.1: `pip install bayesflow`. Rows of it are its own code,
`CompositionalEstimator` and its sampler, with this network in the place of the one that
it trains: the sum of scores (Geffner et al. 2023), as it comes, and weighed by
Jacobians (Linhart et al. 2024), both without its clip of denoised values to ±3, which
is for standardised θ.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import bayesflow
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from bayesflow.networks import DiffusionModel
from bayesflow.networks.inference.diffusion.schedules.cosine_noise_schedule import (
    CosineNoiseSchedule,
)
from report import kept, publish

import composeprob as cp
from composeprob.models.worlds import drift_diffusion as world
from composeprob.schedule import Noise

SESSIONS, KEYS, DRAWS, PROPOSALS = (2, 8, 30), 2, 200, 20_000
OURS, SUMMED, WEIGHED = (
    "cp.infer, default",
    "BayesFlow, sum of scores",
    "BayesFlow, weighed by Jacobians",
)
NEAR, WIDTH = 0.2, 0.15
"""Limits: the distance of means from the exact ones in their deviations, and the
relative error of deviations."""


@cp.program
def subject(posterior: Any, prior: Any, xs: Any) -> Any:
    return cp.sample("theta", prior * cp.product(posterior / prior, over={"x": xs}))


class Composed(DiffusionModel):
    """BayesFlow's diffusion model with this network in the place of its own; its calls
    are counted in `events`.

    Where all conditions are 0, BayesFlow asks for the prior's score: it is given the
    exact one, of the noised normal.
    """

    def __init__(self, posterior: Any, prior: Any) -> None:
        low, high = posterior.log_snr_range
        super().__init__(
            noise_schedule=CosineNoiseSchedule(min_log_snr=low, max_log_snr=high)
        )
        self.factors = (posterior, prior)
        self.events = 0

    def _predict_x(
        self,
        xz: Any,
        log_snr_t: Any,
        alpha_t: Any,
        sigma_t: Any,
        conditions: Any,
        *_: Any,
    ) -> Any:
        def score(x: Any, alpha: Any, sigma: Any, given: Any) -> Any:
            noise = Noise(jnp.array(0), alpha, sigma)
            posterior, prior = self.factors
            of_prior = prior.evaluate(x, noise, {})[1]
            of_data = posterior.evaluate(x, noise, {"x": given})[1]
            return jnp.where(jnp.all(given == 0), of_prior, of_data)

        jax.debug.callback(self.count, len(xz))
        scores = jax.vmap(score)(xz, alpha_t[:, 0], sigma_t[:, 0], conditions)
        return (xz + sigma_t**2 * scores) / alpha_t

    def count(self, events: Any) -> None:
        self.events += int(events)


def drawn(number: int, sessions: int) -> tuple[Any, Any]:
    """Response times and choices of all sessions of a subject, (n, 200) each."""
    of_theta, of_trials = jax.random.split(jax.random.key(500 + number))
    theta = jnp.array([1.5, 0.3, -1.2]) + 0.25 * jax.random.normal(of_theta, (3,))
    return world.trials(of_trials, jnp.tile(theta, (sessions, 1)))


def ours(
    posterior: Any, prior: Any, xs: Any, number: int
) -> tuple[np.ndarray, str, int]:
    density = cp.compile(subject, posterior, prior, xs)
    result = cp.infer(density, jax.random.key(number), num_chains=DRAWS, progress=False)
    return (
        np.asarray(result.unweighted()["theta"], float),
        str(result.status.code),
        result.evaluations,
    )


def theirs(
    posterior: Any, prior: Any, xs: Any, use_jac: bool
) -> tuple[np.ndarray, str, int]:
    network = Composed(posterior, prior)
    estimator = bayesflow.estimators.CompositionalEstimator(
        inference_network=network, adapter=bayesflow.Adapter(), standardize=None
    )
    network.build((1, world.SIZE), (1, world.SUMMARIES))
    found = estimator.compositional_sample(
        num_samples=DRAWS,
        conditions={"inference_conditions": np.asarray(xs)[None]},
        use_jac=use_jac,
        clip=None,
    )
    return (
        np.asarray(found["inference_variables"][0], float),
        "",
        round(network.events / (DRAWS * (len(xs) + 1))),
    )


def exact(
    draws: np.ndarray, times: Any, choices: Any
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and deviation of the posterior by importance sampling about these draws, and
    its effective number."""
    proposal = dist.MultivariateStudentT(
        5.0, draws.mean(0), np.linalg.cholesky(1.5 * np.cov(draws.T))
    )
    thetas = proposal.sample(jax.random.key(0), (PROPOSALS,))

    def log_joint(theta: Any) -> Any:
        return world.log_likelihood(
            theta, times.ravel(), choices.ravel()
        ) + world.prior().log_prob(theta)

    log_weights = np.asarray(
        jax.lax.map(log_joint, thetas, batch_size=200) - proposal.log_prob(thetas),
        float,
    )
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    mean = weights @ np.asarray(thetas)
    return (
        mean,
        np.sqrt(weights @ (np.asarray(thetas) - mean) ** 2),
        float(1 / (weights**2).sum()),
    )


def measured(posterior: Any, prior: Any, number: int, sessions: int) -> dict[str, Any]:
    times, choices = drawn(number, sessions)
    xs = world.summaries(times, choices)
    runs = {
        OURS: lambda: ours(posterior, prior, xs, number),
        SUMMED: lambda: theirs(posterior, prior, xs, use_jac=False),
        WEIGHED: lambda: theirs(posterior, prior, xs, use_jac=True),
    }
    found: dict[str, Any] = {}
    reference = None
    for name, run in runs.items():
        began = time.process_time()
        draws, status, evaluations = run()
        cpu = time.process_time() - began
        reference = reference or exact(draws, times, choices)
        mean, deviation, effective = reference
        found[name] = {
            "off": ((draws.mean(0) - mean) / deviation).tolist(),
            "wider": (draws.std(0) / deviation).tolist(),
            "status": status,
            "evaluations": evaluations,
            "cpu": cpu,
            "effective": effective,
            "finite": bool(np.isfinite(draws).all()),
        }
    return found


def main() -> int:
    posterior: Any = cp.load("drift-diffusion-posterior")
    prior = cp.Analytic(world.prior(), posterior.schedule, label="prior")
    rows, details, checks = [], {}, {}
    for n in SESSIONS:
        cells = [
            kept(
                "sessions",
                f"{n} {key}",
                lambda n=n, key=key: measured(posterior, prior, key, n),
            )
            for key in range(KEYS)
        ]
        details[str(n)] = cells
        for name in (OURS, SUMMED, WEIGHED):
            runs = [cell[name] for cell in cells]
            off, wider = (
                np.array([run[what] for run in runs]) for what in ("off", "wider")
            )
            status = ", ".join(sorted({run["status"] for run in runs})) or "–"
            rows.append(
                [
                    str(n),
                    name,
                    f"{np.abs(off).mean():.2f}",
                    f"{np.abs(off).max():.2f}",
                    f"{wider.min():.2f} to {wider.max():.2f}",
                    f"{np.median([run['evaluations'] for run in runs]):,.0f}",
                    f"{np.median([run['cpu'] for run in runs]):.0f}",
                    status,
                ]
            )
            if name == OURS:
                checks[
                    f"{n} sessions: our means are within {NEAR} sd on average "
                    f"({np.abs(off).mean():.2f})"
                ] = bool(np.abs(off).mean() <= NEAR)
                checks[
                    f"{n} sessions: our deviations are within 15 % on average "
                    f"({wider.mean():.2f})"
                ] = bool(abs(wider.mean() - 1) <= WIDTH)
    least = min(cell[OURS]["effective"] for cells in details.values() for cell in cells)
    columns = [
        "sessions",
        "sampler",
        "mean off exact, sd",
        "largest",
        "sd over exact",
        "evaluations a draw",
        "CPU s",
        "status",
    ]
    notes = (
        f"{DRAWS} draws, {KEYS} subjects each; BayesFlow {bayesflow.__version__}. "
        "Exact means and deviations by importance sampling with the likelihood "
        f"(least effective number {least:.0f} of {PROPOSALS}); the error of the "
        "network itself is the same in every row. Evaluations are of the network for "
        f"each session, and seconds include compilation. The floor: {DRAWS} exact "
        f"draws put a mean {np.sqrt(2 / np.pi / DRAWS):.2f} sd off on average, and a "
        f"deviation {100 * np.sqrt(1 / np.pi / DRAWS):.0f} %."
    )
    title = "One subject in many sessions, from a network that saw one"
    return publish("sessions", title, columns, rows, checks, details, notes)


if __name__ == "__main__":
    sys.exit(main())
