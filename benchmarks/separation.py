"""Sources that are seen only in sums: ours by default, MMPS and DPS.

They are points of random curves, and two digits in one image.

    python -m benchmarks separation [--views 2] [--pairs 2] [--chains 128]

Curves (DDPRISM's `rand_manifolds`): three sources in R⁵ on random curves, seen in three
noisy views, of which the second and the third hold two and three sources. Exact draws
of the posterior are at hand. Methods are given the closed form of the sources' scores,
and once more three small networks that learn them here, within minutes, kept in out/.
Digits: two draws of the zoo's model, added, blurred and noised. All get as many passes
through the networks for a sample as `cp.infer`'s default took. Runs are kept in out/,
so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from inverse import manifolds, restated
from inverse.measured import coverage, crps, pqmass, sinkhorn
from inverse_problems import NOISE, OURS, PIXELS, matrices, row, told, truths
from report import kept, publish

import composeprob as cp
from composeprob.models.networks.film_mlp import FiLMMLP
from composeprob.models.rates import cosine
from composeprob.models.worlds import digits as world
from composeprob.training.weight_files import load_weights, save_weights

SCHEDULE = cp.Schedule.log_snr(60, -8.0, 9.0)
"""Schedule of the curves: σ is 0.011 at level 0, about the noise of a view."""
METHODS = {"MMPS, 3 iterations": restated.moments(3), "DPS": restated.dps()}
NEAR, SAME = 2.0, 1.3
"""Limits with exact scores: our Sinkhorn distance over the floor's, and our χ² of
PQMass for each degree of freedom."""
SOURCES = ("first", "second", "third")


@cp.program
def sources(first: Any, second: Any, third: Any) -> None:
    cp.sample("first", first)
    cp.sample("second", second)
    cp.sample("third", third)


@cp.program
def viewed(first: Any, second: Any, third: Any, matrix: Any, y: Any) -> None:
    x = [
        cp.sample(name, f)
        for name, f in zip(SOURCES, (first, second, third), strict=True)
    ]
    mean = sum(
        a @ each for a, each in zip(jnp.split(matrix, 3, axis=1), x, strict=True)
    )
    cp.observe("y", dist.Normal(mean, manifolds.NOISE).to_event(1), y)


@cp.program
def images(digits: Any) -> None:
    cp.sample("one", digits)
    cp.sample("other", digits)


@cp.program
def added(digits: Any, blur: Any, y: Any) -> None:
    one, other = cp.sample("one", digits), cp.sample("other", digits)
    cp.observe("y", dist.Normal(blur @ (one + other).ravel(), NOISE).to_event(1), y)


# ── curves ────────────────────────────────────────────────────────────────────────────
def exact(curve: manifolds.Waves) -> cp.Diffusion:
    """The score of points of a curve under noise."""
    points = jnp.asarray(np.asarray(curve(manifolds.COARSE)), jnp.float32)

    def score(x: Any, log_snr: Any) -> Any:
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        variance = jax.nn.sigmoid(-log_snr)
        shares = jax.nn.softmax(-0.5 * jnp.sum((x - alpha * points) ** 2, 1) / variance)
        return (alpha * shares @ points - x) / variance

    shape = (manifolds.FEATURES,)
    return cp.Diffusion(
        score,
        SCHEDULE,
        event_shape=shape,
        parameterization="score",
        time="log_snr",
        label="curve",
    )


def recipe(curve: manifolds.Waves) -> cp.training.Recipe:
    """Recipe by which a network learns that score."""

    def network(key: Any) -> Any:
        return FiLMMLP(
            manifolds.FEATURES,
            manifolds.FEATURES,
            width=128,
            blocks=3,
            rngs=nnx.Rngs(params=key),
        )

    def data(key: Any, n: int) -> Any:
        return manifolds.draw(curve, key, n)

    return cp.training.Recipe(
        network=network,
        data=data,
        schedule=SCHEDULE,
        log_snr=(-9.0, 10.0),
        parameterization="v",
        batches=cp.training.Batches(256, antithetic=True),
        learning_rate=cosine(2e-3),
        iterations=ITERATIONS,
    )


ITERATIONS = 6000


def learned(which: int, curve: manifolds.Waves) -> Any:
    """The network that learned it, from out/ where it lies there."""
    chosen = recipe(curve)
    file = Path("out", "separation", f"curve-{which}.safetensors")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        run = cp.training.train(chosen, jax.random.key(which), progress=False)
        save_weights(run.factor.network, file)
        print(
            f"curve {which}: trained in {run.seconds:.0f} s, loss "
            f"{run.loss[-500:].mean():.4f}",
            flush=True,
        )
    untrained = chosen.untrained(jax.random.key(0))
    return chosen.factor(load_weights(untrained, file))


def ours(density: Any, key: int, chains: int) -> Any:
    return cp.infer(density, jax.random.key(key), num_chains=chains, progress=False)


def curves(scores: str, which: int, chains: int) -> dict[str, Any]:
    """All methods on the views of one draw of the sources."""
    known = manifolds.curves()
    matrix = manifolds.views(which)
    rng = np.random.default_rng(which)
    if scores == "exact":
        priors = [exact(curve) for curve in known]
    else:
        priors = [learned(i, curve) for i, curve in enumerate(known)]
    first = float(SCHEDULE.at(0).variance)
    points = manifolds.COARSE if scores == "exact" else manifolds.GRID
    truth = np.concatenate([np.asarray(curve(rng.choice(points))) for curve in known])
    truth = truth + np.sqrt(first) * rng.normal(size=truth.shape)
    y = matrix @ truth + manifolds.NOISE * rng.normal(size=len(matrix))
    right, again = np.split(
        manifolds.posterior(known, points, matrix, y, first, rng, 2 * chains), 2
    )

    def compare(x: np.ndarray) -> dict[str, float]:
        return {
            "sinkhorn": sinkhorn(x, right),
            "pqmass": pqmass(x, right),
            "coverage": coverage(x, truth),
        }

    arrays = jnp.asarray(matrix, jnp.float32), jnp.asarray(y, jnp.float32)
    result = ours(cp.compile(viewed, *priors, *arrays), which, chains)
    # A score, a product for each measurement, and one of the transpose.
    passes = 2 + len(y)
    spent = int(result.evaluations) * passes
    found = {"floor: exact draws": compare(again)}
    samples = result.unweighted()
    found[OURS] = compare(
        np.concatenate([samples[name] for name in SOURCES], axis=1)
    ) | told(result, spent)
    problem = restated.Problem(
        cp.compile(sources, *priors), *arrays, jnp.float32(manifolds.NOISE)
    )
    return found | others(problem, which, chains, spent, compare)


def others(
    problem: restated.Problem, key: int, chains: int, spent: int, compare: Any
) -> dict[str, Any]:
    """The methods of `METHODS`."""
    found = {}
    for name, method in METHODS.items():
        began = time.monotonic()
        x = np.asarray(method(problem, jax.random.key(key), chains, spent), float)
        found[name] = compare(x) | {
            "passes": spent,
            "seconds": time.monotonic() - began,
        }
    return found


# ── digits ────────────────────────────────────────────────────────────────────────────
def digits(which: int, chains: int) -> dict[str, Any]:
    """All methods on one sum of two digits."""
    prior = cp.load("digits")
    blur = matrices()["deblurring"]
    one, other = pair = truths(2 * which + 2)[2 * which :]
    y = blur @ (one + other) + NOISE * np.random.default_rng(which).normal(
        size=PIXELS**2
    )
    right = sorted(judged(pair))

    def compare(x: np.ndarray) -> dict[str, float]:
        x = x.reshape(chains, 2, -1)
        # The two may exchange places, so that both have one law.
        either = x.reshape(2 * chains, -1)
        return {
            "coverage": float(np.mean([coverage(either, each) for each in pair])),
            "crps": float(np.mean([crps(either, each) for each in pair])),
            "pair": float(
                np.mean(
                    np.all(
                        np.sort(judged(x).reshape(chains, 2), axis=1) == right, axis=1
                    )
                )
            ),
        }

    arrays = jnp.asarray(blur, jnp.float32), jnp.asarray(y, jnp.float32)
    result = ours(cp.compile(added, prior, *arrays), which, chains)
    samples = result.unweighted()
    x = np.stack([np.asarray(samples[name], float) for name in ("one", "other")], 1)
    spent = int(result.evaluations)
    found = {OURS: compare(x) | told(result, spent)}
    matrix = jnp.concatenate([arrays[0]] * 2, axis=1)
    problem = restated.Problem(
        cp.compile(images, prior), matrix, arrays[1], jnp.float32(NOISE)
    )
    return found | others(problem, which, chains, spent, compare)


def judged(x: np.ndarray) -> np.ndarray:
    """Classes of flat digits."""
    return world.judge(np.asarray(x).reshape(-1, PIXELS, PIXELS, 1))


# ── the table ─────────────────────────────────────────────────────────────────────────
MEASURES = {
    "sinkhorn": ".4f",
    "pqmass": ".2f",
    "coverage": ".3f",
    "crps": ".3f",
    "pair": ".2f",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--views", type=int, default=2, help="draws of the curves' sources"
    )
    parser.add_argument("--pairs", type=int, default=2, help="pairs of digits")
    parser.add_argument(
        "--chains", type=int, default=128, help="samples of each method"
    )
    options = parser.parse_args()
    rows = []
    details = {}
    checks = {}
    chains = options.chains

    def all_of(task: str, run: Any, count: int) -> list[dict[str, Any]]:
        found = [
            kept(
                "separation", f"{task} {i} {chains}", functools.partial(run, i, chains)
            )
            for i in range(count)
        ]
        rows.extend(
            row(task, method, [each[method] for each in found], MEASURES)
            for method in found[0]
        )
        details[task] = found
        return found

    quiet = [
        run
        for run in all_of(
            "curves, exact scores", functools.partial(curves, "exact"), options.views
        )
        if run[OURS]["status"].startswith("OK")
    ]
    floor = "floor: exact draws"
    far = max(
        [run[OURS]["sinkhorn"] / run[floor]["sinkhorn"] for run in quiet], default=0.0
    )
    checks[
        f"curves, exact scores, {len(quiet)} runs that say OK: Sinkhorn within {NEAR} "
        f"of the floor's ({far:.2f})"
    ] = far <= NEAR
    apart = float(np.mean([run[OURS]["pqmass"] for run in quiet])) if quiet else 1.0
    checks[
        f"and χ² of PQMass for each degree of freedom at most {SAME} ({apart:.2f})"
    ] = apart <= SAME
    all_of(
        "curves, learned scores", functools.partial(curves, "learned"), options.views
    )
    pairs = [run[OURS] for run in all_of("two digits", digits, options.pairs)]
    bands = [run["coverage"] for run in pairs if run["status"].startswith("OK")]
    covered = float(np.mean(bands)) if bands else 0.9
    checks[
        f"two digits, runs that say OK: bands of 90 % hold 82 % to 97 % ({covered:.1%})"
    ] = 0.82 <= covered <= 0.97
    columns = [
        "task",
        "method",
        "Sinkhorn",
        "PQMass",
        "coverage of 90 %",
        "CRPS",
        "right pair",
        "passes",
        "seconds",
    ]
    title = "Sources that are seen only in sums"
    notes = NOTES.format(**vars(options), steps=ITERATIONS)
    return publish(
        "separation", title, [*columns, "status"], rows, checks, details, notes
    )


NOTES = """\
Means over {views} draws of the sources, and {pairs} pairs of digits, with the least and
greatest; {chains} samples of each method.

*Curves* follow the recipe of DDPRISM's rand_manifolds: three sources in R⁵ on random
curves of smoothness 3, 4 and 5, with the noise of level 0 (0.011) on them, and nine
measurements with noise 0.01. Exact scores are those of 500 points of each curve;
learned ones are networks of 128 numbers by three blocks, trained here on the whole
curves in {steps} steps of 256. Sinkhorn: the debiased distance from exact draws of the
posterior, blur 0.01. PQMass: χ² for each degree of freedom of the counts in 20 Voronoi
cells, 1 for the same law. Both are of all 15 numbers together. Floors are other exact
draws.

*Two digits* are draws of the zoo's model, added, blurred by a Gaussian of one pixel,
with noise 0.1. Coverage and CRPS are of each digit's pixels, over samples of both, as
the two may exchange places. Right pair: the share of samples that the judge assigns to
the two classes in either order.

Passes: scores of each source's network, and products of their Jacobian, for a sample;
MMPS and DPS are restated (benchmarks/inverse/restated.py) and get as many as our
default took. DDPRISM learns its networks from views; here they see the sources. Seconds
are of a machine that others used too."""


if __name__ == "__main__":
    sys.exit(main())
