"""Inverse problems of images under a learned prior: ours, and five published methods.

The methods are DPS, ΠGDM, MMPS, TDS and FPS-SMC. Images are blurred, masked, compressed
or phaseless.

    python -m benchmarks inverse-problems [--truths 2] [--chains 128] [--exact 2]

First a law of three Gaussians in 16 dimensions, whose score is all that methods are
given and whose posterior is known: how far each method's mean and covariance are from
it. Then the zoo's digits: what is measured is a draw of the prior itself, so that bands
of 90 % hold 90 % of its pixels if they are right, whatever digits are. All methods get
as many passes through the network for a sample as `cp.infer`'s default took. Runs are
kept in out/, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from inverse import restated
from inverse.measured import apart, coverage, crps
from report import kept, publish

import composeprob as cp

SIZE, SEEN, MODES = 16, 6, 3
NOISE, FAINT = 0.1, 0.05
"""Noise of linear measurements, and of amplitudes."""
DIRECTIONS = 16
"""Products of a Jacobian that `anneal="moments"` takes for an evaluation, at most."""
PIXELS = 8
METHODS: dict[str, restated.Method] = {
    "DPS": restated.dps(),
    "ΠGDM": restated.pseudoinverse_guided(),
    "MMPS, 3 iterations": restated.moments(3),
    "TDS": restated.twisted(),
    "FPS-SMC": restated.filtering(),
}
ANY = {"DPS": restated.dps(0.4), "TDS": restated.twisted()}
"""Methods that take an A that is not a matrix; 0.4 is DPS's own scale of phase
retrieval."""
OURS, TARGETS = "cp.infer, its own choice", (0.85, 0.95)


@cp.program
def bare(prior: Any) -> None:
    cp.sample("x", prior)


@cp.program
def measured(prior: Any, matrix: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", prior)
    cp.observe("y", dist.Normal(matrix @ x.ravel(), noise).to_event(1), y)


def amplitudes(x: Any) -> Any:
    """Absolute values of the Fourier transform of an image (64,) of ink, 0 to 1, in a
    field twice its size."""
    waves = jnp.fft.rfft2(
        (x.reshape(PIXELS, PIXELS) + 1) / 2, (2 * PIXELS, 2 * PIXELS), norm="ortho"
    )
    return jnp.sqrt(waves.real**2 + waves.imag**2 + 1e-6).ravel()


@cp.program
def phaseless(prior: Any, y: Any, noise: Any) -> None:
    x = cp.sample("x", prior)
    cp.observe("y", dist.Normal(amplitudes(x), noise).to_event(1), y)


def compiled(prior: Any, problem: restated.Problem) -> Any:
    """The posterior, as a user writes it."""
    if callable(problem.measure):
        return cp.compile(phaseless, prior, problem.y, problem.noise)
    return cp.compile(measured, prior, problem.measure, problem.y, problem.noise)


def passes(density: Any, result: Any, problem: restated.Problem) -> int:
    """Passes through the network for a sample: with moments an evaluation takes
    products of its Jacobian, and one of its transpose."""
    products = min(len(problem.y), DIRECTIONS) + 1 if "'moments'" in str(density) else 0
    return int(result.evaluations) * (1 + products)


# ── a posterior that is known ─────────────────────────────────────────────────────────
class Known:
    """Three Gaussians, of eigenvalues from 0.02 to 1, seen in six random directions."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.schedule = cp.Schedule.log_snr(60, -9.0, 9.0)
        self.means = 1.2 * rng.normal(size=(MODES, SIZE))
        axes = [np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] for _ in range(MODES)]
        self.axes = np.array(axes)
        self.variances = np.exp(rng.uniform(np.log(0.02), 0.0, (MODES, SIZE)))
        self.matrix = rng.normal(size=(SEEN, SIZE)) / 4
        one = rng.integers(MODES)
        x = self.means[one] + self.axes[one] @ (
            np.sqrt(self.variances[one]) * rng.normal(size=SIZE)
        )
        self.y = self.matrix @ x + NOISE * rng.normal(size=SEEN)

    def score(self, x: Any, log_snr: Any) -> Any:
        """Score of the law under noise."""
        alpha2 = jax.nn.sigmoid(log_snr)
        axes = jnp.asarray(self.axes, jnp.float32)
        variances = alpha2 * jnp.asarray(self.variances, jnp.float32) + 1 - alpha2

        def log_law(x: Any) -> Any:
            z = jnp.einsum(
                "kij,ki->kj",
                axes,
                x - jnp.sqrt(alpha2) * jnp.asarray(self.means, jnp.float32),
            )
            return jax.nn.logsumexp(
                -0.5 * jnp.sum(z**2 / variances + jnp.log(variances), axis=1)
            )

        return jax.grad(log_law)(x)

    def posterior(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean, covariance and log-evidence of what level 0 holds."""
        first = float(self.schedule.at(0).variance)
        parts = []
        for mean, axes, variances in zip(
            self.means, self.axes, self.variances, strict=True
        ):
            c = axes * (variances + first) @ axes.T
            s = self.matrix @ c @ self.matrix.T + NOISE**2 * np.eye(SEEN)
            gain = np.linalg.solve(s, self.matrix @ c).T
            e = self.y - self.matrix @ mean
            log_w = -0.5 * (
                e @ np.linalg.solve(s, e) + np.linalg.slogdet(2 * np.pi * s)[1]
            ) - np.log(MODES)
            parts.append((log_w, mean + gain @ e, c - gain @ self.matrix @ c))
        logs, means, covariances = (np.array(each) for each in zip(*parts, strict=True))
        log_evidence = float(np.logaddexp.reduce(logs))
        w = np.exp(logs - log_evidence)
        mean = w @ means
        away = means - mean
        return (
            mean,
            np.einsum("k,kij->ij", w, covariances)
            + np.einsum("k,ki,kj->ij", w, away, away),
            log_evidence,
        )

    def compare(self, x: np.ndarray) -> dict[str, float]:
        """Errors of samples, along the axes of the exact covariance.

        They are the root mean square of the mean's distance in standard deviations, and
        the mean ratio of the variances to the exact ones.
        """
        mean, covariance, _ = self.posterior()
        whiten = np.linalg.inv(np.linalg.cholesky(covariance))
        z = (x - mean) @ whiten.T
        return {
            "mean": float(np.sqrt(np.mean(z.mean(0) ** 2))),
            "variance": float(z.var(0).mean()),
        }


def known(seed: int, chains: int) -> dict[str, Any]:
    """All methods on one known posterior."""
    law = Known(seed)
    prior = cp.Diffusion(
        law.score,
        law.schedule,
        event_shape=(SIZE,),
        parameterization="score",
        time="log_snr",
    )
    arrays = (jnp.asarray(a, jnp.float32) for a in (law.matrix, law.y, NOISE))
    problem = restated.Problem(cp.compile(bare, prior), *arrays)
    found = {}
    result, spent = ours(prior, problem, seed, chains)
    rng = np.random.default_rng(seed)
    mean, covariance, log_evidence = law.posterior()
    # Draws with the exact moments show the effect of chance on `compare`.
    exact = rng.multivariate_normal(mean, covariance, chains)
    found["floor: draws of the right mean and covariance"] = law.compare(exact)
    found[OURS] = law.compare(np.asarray(result["x"], float)) | {
        "passes": spent,
        "seconds": result.about.seconds,
        "status": str(result.status),
        "reason": result.reason,
        "log_evidence": None
        if result.log_evidence is None
        else result.log_evidence - log_evidence,
        "log_evidence_error": result.log_evidence_error,
    }
    for name, method in METHODS.items():
        x, seconds = timed(method, problem, seed, chains, spent)
        found[name] = law.compare(x) | {"passes": spent, "seconds": seconds}
    return found


# ── digits ────────────────────────────────────────────────────────────────────────────
def matrices() -> dict[str, Any]:
    """Measurements of the 64 pixels."""
    rows, columns = np.divmod(np.arange(PIXELS**2), PIXELS)
    near = np.exp(
        -0.5 * ((rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2)
    )
    rng = np.random.default_rng(0)
    return {
        "deblurring": near / near.sum(1, keepdims=True),
        "inpainting": np.eye(PIXELS**2)[
            np.sort(rng.permutation(PIXELS**2)[: PIXELS**2 // 2])
        ],
        "compressed sensing": rng.normal(size=(PIXELS**2 // 4, PIXELS**2)) / PIXELS,
        "phase retrieval": amplitudes,
    }


@functools.cache
def truths(count: int) -> np.ndarray:
    """Draws of the prior by the default, flat."""
    drawn = cp.infer(
        cp.compile(bare, cp.load("digits")),
        jax.random.key(9),
        num_chains=256,
        progress=False,
    )["x"]
    return np.asarray(drawn, float).reshape(len(drawn), -1)[:count]


def ours(
    prior: Any, problem: restated.Problem, key: int, chains: int, **settings: Any
) -> tuple[Any, int]:
    """A run of `cp.infer`, and passes for a sample."""
    density = compiled(prior, problem)
    result = cp.infer(
        density, jax.random.key(key), num_chains=chains, progress=False, **settings
    )
    return result, passes(density, result, problem)


def timed(
    method: Any, problem: restated.Problem, key: int, n: int, spent: int
) -> tuple[np.ndarray, float]:
    """Samples of a method and its seconds, compilation included, as in ours."""
    began = time.monotonic()
    samples = np.asarray(method(problem, jax.random.key(key), n, spent), float)
    return samples, time.monotonic() - began


def digits(task: str, which: int, chains: int) -> dict[str, Any]:
    """All methods on one measurement of one digit."""
    prior = cp.load("digits")
    measure = matrices()[task]
    truth = truths(which + 1)[which]
    linear = not callable(measure)
    matrix = jnp.asarray(measure, jnp.float32) if linear else measure
    if linear:
        clean = np.asarray(matrix @ jnp.asarray(truth, jnp.float32))
        noise = NOISE
    else:
        clean = np.asarray(matrix(jnp.asarray(truth)))
        noise = FAINT
    y = clean + noise * np.random.default_rng(which).normal(size=len(clean))
    problem = restated.Problem(
        cp.compile(bare, prior),
        matrix,
        jnp.asarray(y, jnp.float32),
        jnp.asarray(noise, jnp.float32),
    )
    closer = np.linspace(*np.asarray(prior.schedule.log_snr, float)[[0, -1]], LONG)
    long, _ = ours(prior, problem, which + 100, chains, levels=closer)
    reference = np.asarray(long["x"], float).reshape(chains, -1)

    def compare(x: np.ndarray) -> dict[str, Any]:
        x = x.reshape(chains, -1)
        return {
            "coverage": coverage(x, truth),
            "crps": crps(x, truth),
            "apart": apart(x, reference),
        }

    result, spent = ours(prior, problem, which, chains)
    found = {
        f"long run of ours, {LONG} levels": compare(reference)
        | told(long, int(long.evaluations))
    }
    found[OURS] = compare(np.asarray(result["x"], float)) | told(result, spent)
    for name, method in (METHODS if linear else ANY).items():
        x, seconds = timed(method, problem, which, chains, spent)
        found[name] = compare(x) | {"passes": spent, "seconds": seconds}
    return found


LONG = 240
"""Levels of a reference run."""


def told(result: Any, spent: int) -> dict[str, Any]:
    """Cost and status that a run reports."""
    return {
        "passes": spent,
        "seconds": result.about.seconds,
        "status": str(result.status),
        "reason": result.reason,
    }


# ── the table ─────────────────────────────────────────────────────────────────────────
def over(values: list[Any], form: str = ".3f") -> str:
    """The mean, and the least and greatest."""
    if len(values) == 1:
        return format(values[0], form)
    return (
        f"{format(np.mean(values), form)} "
        f"({format(min(values), form)}–{format(max(values), form)})"
    )


def statuses(runs: list[dict[str, Any]]) -> str:
    """Status codes of runs."""
    codes = sorted(
        {run["status"].split(":")[0].split("\n")[0] for run in runs if "status" in run}
    )
    return ", ".join(codes)


def row(
    task: str, method: str, runs: list[dict[str, Any]], measures: dict[str, str]
) -> list[str]:
    """Results of a method's runs, each measure in its own format."""
    cells = []
    for name, form in measures.items():
        if name in runs[0]:
            cells.append(over([run[name] for run in runs], form))
        else:
            cells.append("")
    for name in ("passes", "seconds"):
        if name in runs[0]:
            mean = np.mean([run[name] for run in runs])
            cells.append(f"{mean:,.0f}")
        else:
            cells.append("")
    return [task, method, *cells, statuses(runs)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--truths", type=int, default=2, help="digits of each task")
    parser.add_argument(
        "--chains", type=int, default=128, help="samples of each method"
    )
    parser.add_argument(
        "--exact", type=int, default=3, help="known posteriors, of 512 samples each"
    )
    options = parser.parse_args()
    measures = dict.fromkeys(("mean", "variance", "coverage", "crps", "apart"), ".3f")
    rows, details, checks = [], {}, {}
    exact = [
        kept("inverse", f"known {seed}", functools.partial(known, seed, 512))
        for seed in range(options.exact)
    ]
    for method in exact[0]:
        rows.append(
            row("known posterior", method, [run[method] for run in exact], measures)
        )
    details["known"] = exact
    mine = [run[OURS] for run in exact]
    quiet = [run for run in mine if run["status"].startswith("OK")]
    worst = max([run["mean"] for run in quiet], default=0.0)
    checks[
        f"known posteriors, runs that say OK: means off by at most 0.15 ({worst:.3f})"
    ] = worst <= 0.15
    off = max([abs(run["variance"] - 1) for run in quiet], default=0.0)
    checks[f"and variances by at most 15 % ({off:.1%})"] = off <= 0.15
    sure = [r for r in mine if r["log_evidence"] is not None]
    errors = [abs(run["log_evidence"]) / run["log_evidence_error"] for run in sure]
    most = max(errors, default=0.0)
    checks[f"log-evidences within 3 of their stated errors ({most:.1f})"] = most <= 3
    bands = []
    for task in matrices():
        runs = [
            kept(
                "inverse",
                f"{task} {i} {options.chains}",
                functools.partial(digits, task, i, options.chains),
            )
            for i in range(options.truths)
        ]
        details[task] = runs
        for method in runs[0]:
            rows.append(row(task, method, [run[method] for run in runs], measures))
        bands += [
            run[OURS]["coverage"]
            for run in runs
            if run[OURS]["status"].startswith("OK")
        ]
    covered = float(np.mean(bands)) if bands else 0.9
    checks[
        f"digits, runs that say OK: bands of 90 % hold {TARGETS[0]:.0%} to "
        f"{TARGETS[1]:.0%} ({covered:.1%})"
    ] = TARGETS[0] <= covered <= TARGETS[1]
    columns = [
        "task",
        "method",
        "mean off",
        "variance",
        "coverage of 90 %",
        "CRPS",
        "from the long run",
        "passes",
    ]
    columns += ["seconds", "status"]
    title = "Inverse problems under a known law and under learned digits"
    return publish(
        "inverse_problems",
        title,
        columns,
        rows,
        checks,
        details,
        NOTES.format(**vars(options), long=LONG),
    )


NOTES = """\
Means over problems, with the least and greatest.

*Known posterior*: {exact} laws of three Gaussians in 16 dimensions, seen in 6 random
directions with noise 0.1, 512 samples. Mean off: root mean square of the error of the
mean, in posterior standard deviations along its axes. Variance: of the samples, over
the exact one.

*Digits*: {truths} draws of the zoo's model of 8×8 digits, {chains} samples of each
method; noise 0.1 (amplitudes: 0.05). Tasks: deblurring by a Gaussian of one pixel,
inpainting of 32 random pixels seen, compressed sensing by 16 random projections, phase
retrieval from amplitudes in a field twice as wide. From the long run: Wasserstein
distance between a pixel's law and that of our run on {long} levels, over its standard
deviation; two sets of 128 draws of one law are about 0.16 apart.

Passes: scores and products of their Jacobian for a sample; all other methods get as
many as our default took. Ours moves by HMC on an energy; the others take its scores.
All others are restated here from their formulas (benchmarks/inverse/restated.py), on
levels of equal steps in log-SNR, and none is tuned: DPS has its scale 1, for phase
retrieval 0.4; ΠGDM's guidance is part of the score; MMPS makes three iterations.
FPS-SMC treats the noise of one measurement as new noise at every level, so many levels
make its posterior too narrow. Seconds are of a machine that others used too."""


if __name__ == "__main__":
    sys.exit(main())
