"""Rewards that are programs: two modes by quadrature, and a rare event.

It counts the events that the program is asked for, and compares shares and evidence
with their exact values.

    python -m benchmarks rewards

The prior is ½N(−4, .5²) + ½N(4, .5²), the reward 3 in a step of the right mode and 1 in
the left one. The rare event is x₁ + x₂ > 6 of N(0, I), 1.1·10⁻⁵, softened to
exp(20·min(0, x₁ + x₂ − 6)). Exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from exact.case import Answer, Case
from report import publish
from scipy import integrate, stats

import composeprob as cp

SCHEDULE = cp.Schedule.log_snr(60)
NOISE = float(SCHEDULE.sigma[0] / SCHEDULE.alpha[0])
ALPHA = float(SCHEDULE.alpha[0])
KEYS = 4
COLUMNS = [
    "problem",
    "method",
    "chains",
    "quantity",
    "exact",
    "found, by key",
    "events a chain",
    "status",
    "seconds",
]


class Counting:
    """A host function that counts the events that it is asked for."""

    def __init__(self, function):
        self.function = function
        self.asked = 0

    def __call__(self, events):
        events = np.asarray(events)
        answers = self.function(events)
        self.asked += np.size(answers)
        return answers


def step(x):
    """The reward of the two modes."""
    return 3.0 * (np.abs(x - 4) < 0.3) + 1.0 * (x < 0)


def deficit(x):
    """The reward of the rare event."""
    return 20.0 * np.minimum(x.sum(-1) - 6.0, 0.0)


def two_modes() -> cp.Analytic:
    """The prior of two modes."""
    parts = dist.Normal(jnp.array([-4.0, 4.0]), 0.5)
    equal = dist.Categorical(jnp.array([0.5, 0.5]))
    return cp.Analytic(dist.MixtureSameFamily(equal, parts), SCHEDULE)


@cp.program
def rewarded(f, reward):
    """A site under a factor, and a reward."""
    cp.factor("score", reward, at=cp.sample("x", f))


@cp.program
def called_back(f, function):
    """The same by a callback that has a derivative of 0."""
    cp.factor("score", function(cp.sample("x", f)))


def callback(host: Counting):
    """A JAX function that calls the host, with a derivative of 0."""

    @jax.custom_jvp
    def call(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(
            lambda x: host(x).astype(x.dtype), shape, x, vmap_method="expand_dims"
        )

    call.defjvp(lambda primals, tangents: (call(*primals), jnp.zeros_like(tangents[0])))
    return call


@dataclasses.dataclass(frozen=True)
class Row:
    """The estimate of one quantity by one method."""

    problem: str
    method: str
    chains: int
    quantity: str
    exact: float
    found: tuple[float, ...]
    calls: float
    status: str
    seconds: float

    def as_text(self) -> list[str]:
        """The row's cells."""
        return [
            self.problem,
            self.method,
            f"{self.chains:,}",
            self.quantity,
            f"{self.exact:.4f}",
            " ".join(f"{value:.3f}" for value in self.found),
            f"{self.calls:.0f}",
            self.status,
            f"{self.seconds:.0f}",
        ]

    @property
    def worst(self) -> float:
        """Largest error over the keys."""
        return max(abs(value - self.exact) for value in self.found)


def runs(density, host: Counting, chains: int, keys: int) -> tuple[list, float, float]:
    """Results of default calls, the events asked for by a chain, and the time."""
    began = time.monotonic()
    host.asked = 0
    results = []
    for seed in range(keys):
        key = jax.random.key(seed)
        results.append(cp.infer(density, key, num_chains=chains, progress=False))
    return results, host.asked / chains / keys, time.monotonic() - began


def exact_two_modes() -> tuple[dict[str, float], float]:
    """Shares of the right mode and of the step, and log Z, at the noise of level 0."""
    sd = np.hypot(0.5, NOISE)
    low = (3.7 / ALPHA - 4) / sd
    high = (4.3 / ALPHA - 4) / sd
    inside = 0.5 * (stats.norm.cdf(high) - stats.norm.cdf(low)) * np.exp(3)
    right = inside + 0.5 * (1 - stats.norm.cdf(high) + stats.norm.cdf(low))
    total = right + 0.5 * np.e
    return {"right": right / total, "step": inside / total}, math.log(total)


def of_two_modes(method: str, make) -> list[Row]:
    """Rows of the two modes' shares by a method."""
    host = Counting(step)
    results, calls, seconds = runs(make(host), host, 1000, KEYS)
    shares = {
        "right": tuple(float(np.mean(r["x"] > 0)) for r in results),
        "step": tuple(float(np.mean(np.abs(r["x"] - 4) < 0.3)) for r in results),
    }
    statuses = " ".join(sorted({str(r.status.code) for r in results}))
    rows = []
    for name, exact in exact_two_modes()[0].items():
        rows.append(
            Row(
                "two modes",
                method,
                1000,
                name,
                exact,
                shares[name],
                calls,
                statuses,
                seconds,
            )
        )
    return rows


def exact_rare_event() -> float:
    """The log-probability of the rare event, softened."""
    sd = ALPHA * np.sqrt(2 * (1 + NOISE**2))

    def weight(s: float) -> float:
        return float(np.exp(20 * min(s - 6, 0)) * stats.norm.pdf(s, 0, sd))

    total, _ = integrate.quad(weight, 3, 12, points=[6.0])
    return math.log(total)


def rare_event(host: Callable[[np.ndarray], np.ndarray]) -> cp.AnnealedDensity:
    """The density of the rare event."""
    prior = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), SCHEDULE)
    return cp.compile(rewarded, prior, cp.Reward(host, calls=60))


def cases() -> list[Case]:
    """The programs of the gate: both shares of the two modes, and the rare event."""

    def shares(result: cp.Result):
        return result.mean(
            lambda s: jnp.stack([s["x"] > 0, jnp.abs(s["x"] - 4) < 0.3]).astype(float)
        )

    def two_modes_answer() -> Answer:
        found, log_evidence = exact_two_modes()
        return Answer((found["right"], found["step"]), log_evidence)

    return [
        Case(
            "rewards",
            "two modes under a reward",
            lambda: cp.compile(rewarded, two_modes(), cp.Reward(step)),
            shares,
            two_modes_answer,
        ),
        Case(
            "rewards",
            "a rare event under a reward",
            lambda: rare_event(deficit),
            lambda result: result.mean(lambda s: s["x"][0] - s["x"][1]),
            lambda: Answer(0.0, exact_rare_event()),
        ),
    ]


def of_rare_event() -> Row:
    """The row of the rare event's log-probability."""
    host = Counting(deficit)
    density = rare_event(host)
    results, calls, seconds = runs(density, host, 4000, 2 * KEYS)
    statuses = " ".join(sorted({str(r.status.code) for r in results}))
    found = tuple(float(r.log_evidence) for r in results)
    exact = exact_rare_event()
    return Row(
        "rare event", "cp.Reward", 4000, "log Z", exact, found, calls, statuses, seconds
    )


def main() -> int:
    """Measure everything; return the exit status."""
    ours = of_two_modes(
        "cp.Reward", lambda host: cp.compile(rewarded, two_modes(), cp.Reward(host))
    )
    theirs = of_two_modes(
        "a callback of derivative 0",
        lambda host: cp.compile(called_back, two_modes(), callback(host)),
    )
    rare = of_rare_event()
    rows = [*ours, *theirs, rare]
    variation = float(np.std(np.exp(np.array(rare.found) - rare.exact), ddof=1))
    checks = {
        "two modes: both shares within .03, each key": max(r.worst for r in ours)
        < 0.03,
        "two modes: status OK, at most 120 events a chain": ours[0].status == "ok"
        and ours[0].calls <= 120,
        "rare event: at most 60 events a chain": rare.calls <= 60,
        "rare event: variation over keys at most .1": variation <= 0.1,
        "rare event: status OK": rare.status == "ok",
    }
    notes = (
        "Default calls. An event is one input of the program; a batch has one of each "
        f"chain. The rare event's estimates vary by {variation:.3f} over "
        f"{len(rare.found)} keys, relative to the exact value."
    )
    details = {"rows": [dataclasses.asdict(row) for row in rows]}
    return publish(
        "rewards",
        "Rewards that are programs: shares, evidence and calls",
        COLUMNS,
        [row.as_text() for row in rows],
        checks,
        details,
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
