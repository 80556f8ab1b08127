"""Learned posteriors of one observation, and of eight: calibration and C2ST.

    python -m benchmarks learned-posteriors [--replicates 300] [--draws 99] [--tests 10]
    python -m benchmarks learned-posteriors --eight

Simulation-based calibration: θ is drawn from the prior and x from the simulator, and
the rank of θ among draws from the model's p(θ | x) is uniform where the model is
calibrated. C2ST is how often a classifier tells 1,000 draws from as many exact ones,
for several x: 0.5 where they are alike.

``--eight`` asks the first question of SLCP's posterior given eight observations,
composed of eight of one, by a default run and by reverse diffusion of the summed
scores, and writes results of its own. Replicates are kept in out/, so that the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import publish
from scipy import stats
from tall.ours import tall
from tall.slcp import c2st, reference

import composeprob as cp
from composeprob.models.worlds import slcp, two_moons

MODELS = {"slcp-posterior": slcp, "two-moons-posterior": two_moons}
CHAINS = 1000
REJECTED = 0.01
"""p-value below which a rank's uniformity is rejected; of all entries together, divided
by their number."""


@cp.program
def single(posterior: Any, x: Any) -> Any:
    return cp.sample("theta", posterior.given(x=x))


def draws(posterior: Any, x: Any, key: Any, count: int) -> np.ndarray:
    """Draws (count, m) by reverse diffusion over the model's own levels."""
    density = cp.compile(single, posterior, x)
    return cp.infer(
        density, key, num_chains=count, sampler=cp.Ancestral(), progress=False
    )["theta"]


def pairs(world: ModuleType, count: int, key: Any) -> tuple[Any, Any]:
    """``count`` draws of θ and x."""
    theta_key, x_key = jax.random.split(key)
    theta = world.prior().sample(theta_key, (count,))
    return theta, world.simulate(x_key, theta)


EIGHT, EIGHT_REPLICATES = 8, 200
BY = {
    "cp.infer, its own choice": None,
    "reverse diffusion of the summed scores": cp.Ancestral(),
}
KEPT = Path("out") / "slcp_eight.json"


def eight(count: int) -> int:
    """Ranks of the true θ among draws of its posterior given eight observations, by the
    ways of `BY`."""
    posterior: Any = cp.load("slcp-posterior")
    prior = cp.Analytic(slcp.prior(), posterior.schedule, label="prior")
    theta_key, x_key = jax.random.split(jax.random.key(3))
    thetas = slcp.prior().sample(theta_key, (EIGHT_REPLICATES,))
    xs = jax.vmap(
        lambda key, theta: slcp.simulate(key, jnp.repeat(theta[None], EIGHT, axis=0))
    )(jax.random.split(x_key, EIGHT_REPLICATES), thetas)
    found: dict[str, list[Any]] = (
        json.loads(KEPT.read_text()) if KEPT.exists() else {by: [] for by in BY}
    )
    KEPT.parent.mkdir(exist_ok=True)
    for by, sampler in BY.items():
        for i in range(len(found[by]), EIGHT_REPLICATES):
            density = cp.compile(tall, posterior, prior, {"x": xs[i]})
            result = cp.infer(
                density,
                jax.random.key(i),
                num_chains=count,
                sampler=sampler,
                progress=False,
            )
            below = (np.asarray(result["theta"]) < np.asarray(thetas[i])).sum(0)
            found[by].append([*below.tolist(), str(result.status.code)])
            KEPT.write_text(json.dumps(found))
            if i % 20 == 0:
                print(
                    f"{by}: {i + 1} of {EIGHT_REPLICATES}, {result.status.code}, "
                    f"{result.reason}",
                    flush=True,
                )
    rows, least = [], {}
    for by, lines in found.items():
        shares = (np.array([line[:-1] for line in lines], float) + 0.5) / (count + 1)
        least[by] = min(stats.kstest(column, "uniform").pvalue for column in shares.T)
        inside = [
            float(((shares > (1 - level) / 2) & (shares < (1 + level) / 2)).mean())
            for level in (0.5, 0.9)
        ]
        named = float(np.mean([line[-1] != "ok" for line in lines]))
        rows.append(
            [
                by,
                f"{least[by]:.2g}",
                *(f"{share:.3f}" for share in inside),
                f"{named:.0%}",
            ]
        )
    ours, theirs = BY
    limit = REJECTED / shares.shape[1]
    checks = {
        "ranks by cp.infer are not told from uniform ones (p > "
        f"{REJECTED}/{shares.shape[1]})": least[ours] > limit,
        "those of summed scores are": least[theirs] < limit,
    }
    columns = [
        "by",
        "least p of the ranks",
        "in the central 50 %",
        "in the central 90 %",
        "runs with a finding",
    ]
    notes = (
        f"{EIGHT_REPLICATES} replicates: θ from the prior, {EIGHT} observations of "
        f"it, {count} chains each."
    )
    title = "SLCP's learned posterior given eight observations"
    return publish(
        "learned_posteriors_eight",
        title,
        columns,
        rows,
        checks,
        {"ranks": found},
        notes,
    )


def ranks(posterior: Any, world: ModuleType, replicates: int, count: int) -> np.ndarray:
    """The ranks of each true θ among draws, as shares of (0, 1), shape (replicates,
    m)."""
    theta, xs = pairs(world, replicates, jax.random.key(1))
    below = [
        (
            draws(posterior, xs[i], jax.random.key(1000 + i), count)
            < np.asarray(theta[i])
        ).sum(0)
        for i in range(replicates)
    ]
    return (np.array(below) + 0.5) / (count + 1)


def exact(world: ModuleType, x: Any, seed: int, count: int) -> np.ndarray:
    """Draws of the true posterior.

    SLCP's come from NUTS. Those of two moons come from rejection, as x determines θ but
    for a point of the crescent and a sign.
    """
    if world is slcp:
        return reference(x[None], seed, count)
    rng = np.random.default_rng(seed)
    found = []
    while sum(map(len, found)) < count:
        angle = rng.uniform(-np.pi / 2, np.pi / 2, 10**5)
        radius = rng.normal(two_moons.RADIUS, two_moons.WIDTH, 10**5)
        # |θ₁ + θ₂|/√2, whose sign x does not show.
        away = radius * np.cos(angle) + two_moons.CENTRE - np.asarray(x)[0]
        total = np.where(rng.uniform(size=10**5) < 0.5, away, -away) * np.sqrt(2)
        # θ₂ − θ₁.
        difference = (np.asarray(x)[1] - radius * np.sin(angle)) * np.sqrt(2)
        theta = np.stack([total - difference, total + difference], axis=1) / 2
        found.append(
            theta[(away > 0) & np.all(np.abs(theta) < two_moons.BOUND, axis=1)]
        )
    return np.concatenate(found)[:count]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS)
    )
    parser.add_argument("--replicates", type=int, default=300)
    parser.add_argument("--draws", type=int, default=99)
    parser.add_argument("--tests", type=int, default=10)
    parser.add_argument(
        "--eight", action="store_true", help="SLCP given eight observations"
    )
    options = parser.parse_args()
    if options.eight:
        return eight(options.draws)
    rows, checks, details = [], {}, {}
    for name in options.models:
        world = MODELS[name]
        posterior = cp.load(name)
        shares = ranks(posterior, world, options.replicates, options.draws)
        p_values = np.array(
            [stats.kstest(column, "uniform").pvalue for column in shares.T]
        )
        inside = [
            float(((shares > (1 - level) / 2) & (shares < (1 + level) / 2)).mean())
            for level in (0.5, 0.9)
        ]
        _, xs = pairs(world, options.tests, jax.random.key(2))
        told = [
            c2st(
                exact(world, x, i, CHAINS),
                draws(posterior, x, jax.random.key(i), CHAINS),
            )
            for i, x in enumerate(xs)
        ]
        numbers = [p_values.min(), *inside, np.mean(told), max(told)]
        shown = [f"{number:.3f}" for number in numbers]
        rows.append([name, *shown])
        print("  ".join(rows[-1]), flush=True)
        holds = bool(p_values.min() > REJECTED / len(p_values))
        checks[
            f"ranks of {name} are not told from uniform ones (p > "
            f"{REJECTED}/{len(p_values)})"
        ] = holds
        checks[f"C2ST of {name} is at most 0.6 (mean over {options.tests} x)"] = bool(
            np.mean(told) <= 0.6
        )
        details[name] = {"p_values": p_values.tolist(), "inside": inside, "c2st": told}
    columns = [
        "model",
        "least p of the ranks",
        "in the central 50 %",
        "in the central 90 %",
        "C2ST, mean",
        "worst",
    ]
    notes = (
        f"{options.replicates} replicates of {options.draws} draws; C2ST of {CHAINS} "
        f"draws for {options.tests} x."
    )
    title = "Learned posteriors of one observation"
    return publish("learned_posteriors", title, columns, rows, checks, details, notes)


if __name__ == "__main__":
    sys.exit(main())
