"""Powers and guidance of factors that offer only a score, by tracked log-densities.

    python -m benchmarks tracked [--keys 4] [--form tracked] [--sizes 64 300] [--kept]

Cubes of .8 N(−2, a²) + .2 N(2, b²) along the diagonal of d dimensions, guidance 5 of
two mixtures, and two products of two mixtures (whose exponents have nowhere to grow),
each by its exact score alone. Default runs in three forms: exponents
that are constant, as they were for scores; exponents that grow, with log f tracked
along each chain's path; and closed forms, whose log f is given. Each row is the mean
over keys of the first mode's share and of the error of log Z, with the standard
deviation. Runs are kept in out/, so that the same command goes on where it was
stopped. Exits with 1 if, over all tracked runs with status OK, more than one in fifty
has a share that is off by more than four of its errors. With one form, nothing is
written.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from report import file_of, kept, publish
from scipy.special import logsumexp
from scipy.stats import norm

import composeprob as cp
from composeprob.compiler.pipeline import lowered

SCHEDULE = cp.Schedule.log_snr(60)
CUT = 0.3
"""The place between the modes, along the diagonal."""
FORMS = ("constant", "tracked", "closed form")
SIZES = (64, 300, 1000)


class Modes(NamedTuple):
    """Two isotropic modes on the diagonal of d dimensions."""

    shares: tuple[float, float]
    places: tuple[float, float]
    widths: tuple[float, float]
    dims: int

    def components(self, x: Any, alpha: Any, sigma: Any, np: Any = jnp) -> Any:
        """log of each component's part of the density under noise."""
        means = np.asarray(self.places)[:, None] * np.ones(self.dims) / self.dims**0.5
        variance = (alpha * np.asarray(self.widths)) ** 2 + sigma**2
        away = np.sum((x - alpha * means) ** 2, axis=-1) / variance
        volume = self.dims * np.log(2 * np.pi * variance)
        return np.log(np.asarray(self.shares)) - 0.5 * (away + volume)

    def score(self, x: Any, log_snr: Any) -> Any:
        """The score at a log-SNR: all that the learned form offers."""
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))

        def log_density(x: Any) -> Any:
            return jax.nn.logsumexp(self.components(x, alpha, sigma))

        return jax.grad(log_density)(x)

    def factor(self, form: str) -> Any:
        """The factor of a form."""
        if form != "closed form":
            return cp.Diffusion(
                self.score,
                SCHEDULE,
                event_shape=(self.dims,),
                parameterization="score",
                time="log_snr",
            )
        means = np.array(self.places)[:, None] * np.ones(self.dims) / self.dims**0.5
        widths = jnp.asarray(self.widths)[:, None]
        parts = dist.Normal(jnp.asarray(means), widths).to_event(1)
        shares = dist.Categorical(probs=jnp.asarray(self.shares))
        return cp.Analytic(dist.MixtureSameFamily(shares, parts), SCHEDULE)


@cp.program
def cube(f: Any) -> Any:
    return cp.sample("x", f**3)


@cp.program
def product(f: Any, g: Any) -> Any:
    return cp.sample("x", f * g)


@cp.program
def guided(f: Any, g: Any) -> Any:
    return cp.sample("x", f**5 / g**4)


class Exact(NamedTuple):
    """Share of the first mode, and log Z, of level 0."""

    share: float
    log_z: float


class Case(NamedTuple):
    """A program and its factors."""

    name: str
    program: Any
    factors: tuple[Modes, ...]
    exact: Callable[..., Exact]

    def density(self, form: str) -> Any:
        """The compiled density of a form."""
        factors = tuple(modes.factor(form) for modes in self.factors)
        return lowered(self.program, factors, {}, tracking=form != "constant")


def exact_cube(modes: Modes) -> Exact:
    """The closed form: a product of three components is a Gaussian."""
    alpha = float(SCHEDULE.alpha[0])
    sigma = float(SCHEDULE.sigma[0])
    variances = (alpha * np.array(modes.widths)) ** 2 + sigma**2
    places = alpha * np.array(modes.places)
    logs = []
    masses = []
    for chosen in itertools.product(range(2), repeat=3):
        index = list(chosen)
        precision = np.sum(1 / variances[index])
        mean = np.sum(places[index] / variances[index]) / precision
        squares = np.sum(places[index] ** 2 / variances[index])
        volume = np.sum(np.log(2 * np.pi * variances[index]))
        volume -= np.log(2 * np.pi / precision)
        log = np.sum(np.log(np.array(modes.shares)[index]))
        log -= 0.5 * (modes.dims * volume + squares - precision * mean**2)
        logs.append(log)
        masses.append(norm.cdf((CUT - mean) * np.sqrt(precision)))
    log_z = logsumexp(logs)
    return Exact(float(np.exp(logs - log_z) @ masses), float(log_z))


def exact_guidance(f: Modes, g: Modes) -> Exact:
    """The exact values, by quadrature in one dimension."""
    return by_quadrature(f, g, (5.0, -4.0))


def by_quadrature(f: Modes, g: Modes, exponents: tuple[float, float]) -> Exact:
    """The exact values of a product of powers of one dimension."""
    x = np.linspace(-12, 12, 48001)
    noise = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
    log_f, log_g = (
        logsumexp(modes.components(x[:, None, None], *noise, np=np), axis=1)
        for modes in (f, g)
    )
    log = exponents[0] * log_f + exponents[1] * log_g
    log_z = logsumexp(log)
    share = np.exp(logsumexp(log[x < CUT]) - log_z)
    return Exact(float(share), float(log_z + np.log(x[1] - x[0])))


def exact_product(f: Modes, g: Modes) -> Exact:
    """The exact values, by quadrature in one dimension."""
    return by_quadrature(f, g, (1.0, 1.0))


def cube_of(dims: int, *widths: float) -> Case:
    modes = Modes((0.8, 0.2), (-2.0, 2.0), (widths[0], widths[1]), dims)
    return Case(f"cube, d = {dims}", cube, (modes,), exact_cube)


F = Modes((0.55, 0.45), (-2.0, 2.0), (0.5, 0.45), 1)
G = Modes((0.5, 0.5), (-1.5, 1.5), (0.9, 0.75), 1)
PAIR = (
    Modes((0.8, 0.2), (-2.0, 2.0), (0.7, 0.4), 1),
    Modes((0.3, 0.7), (-1.7, 1.8), (0.8, 0.2), 1),
)
NARROW = (
    Modes((0.9, 0.1), (-2.0, 2.0), (1.0, 0.15), 1),
    Modes((0.6, 0.4), (-1.5, 2.0), (0.8, 0.2), 1),
)
CASES = (
    cube_of(1, 1.0, 0.1),
    cube_of(4, 0.8, 0.45),
    cube_of(16, 0.8, 0.6),
    Case("guidance 5", guided, (F, G), exact_guidance),
    Case("product", product, PAIR, exact_product),
    Case("product, narrow", product, NARROW, exact_product),
)


def measured(case: Case, form: str, size: int, keys: int) -> list[dict[str, Any]]:
    """One run for each key."""
    density = case.density(form)
    runs = []
    for key in range(keys):
        result = cp.infer(density, jax.random.key(key), num_chains=size, progress=False)

        def first(values: Any) -> Any:
            return values["x"].sum(-1) / values["x"].shape[-1] ** 0.5 < CUT

        share = result.probability(first)
        runs.append(
            {
                "share": float(share.value),
                "error": float(share.error),
                "log_z": result.log_evidence,
                "log_z_error": result.log_evidence_error,
                "effective": float(result.effective_chains),
                "evaluations": result.evaluations,
                "ok": bool(result.status.ok),
            }
        )
    return runs


def number(value: Any) -> float:
    """A number that a run may lack."""
    return np.nan if value is None else float(value)


def row(case: Case, form: str, size: int, runs: list[dict[str, Any]]) -> list[str]:
    """A row of the table."""
    exact = case.exact(*case.factors)
    shares = np.array([run["share"] for run in runs])
    errors = np.array([run["error"] for run in runs])
    off = np.array([number(run["log_z"]) for run in runs]) - exact.log_z
    stated = np.array([number(run["log_z_error"]) for run in runs])
    evidence = "none"
    if np.isfinite(off).any():
        evidence = f"{np.nanmean(off):+.2f} ± {np.nanstd(off):.2f}"
        evidence += f" ({np.nanmean(stated):.2f})"
    ok = sum(run["ok"] for run in runs)
    off_by = [errors_off(case, run) for run in runs if run["ok"]]
    worst = "none"
    if off_by:
        worst = f"{max(off_by):.1f}"
    return [
        case.name,
        str(size),
        form,
        f"{exact.share:.3f}",
        f"{shares.mean():.3f} ± {shares.std():.3f} ({np.nanmean(errors):.3f})",
        evidence,
        f"{np.mean([run['effective'] for run in runs]):.0f}",
        f"{np.mean([run['evaluations'] for run in runs]):.0f}",
        f"{ok} of {len(runs)}",
        worst,
    ]


def errors_off(case: Case, run: dict[str, Any]) -> float:
    """Distance of a run's share in its errors; NaN where it has none."""
    exact = case.exact(*case.factors)
    return float(abs(run["share"] - exact.share) / run["error"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--form", choices=FORMS, help="no other, and nothing written")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--quick", action="store_true", help="64 chains, two keys")
    parser.add_argument("--kept", action="store_true", help="runs nothing more")
    options = parser.parse_args()
    sizes = SIZES[:1] if options.quick else options.sizes
    keys = 2 if options.quick else options.keys
    rows = []
    details: dict[str, Any] = {}
    far = []
    forms = (options.form,) if options.form else FORMS
    for case, size, form in itertools.product(CASES, sizes, forms):
        part = f"{case.name} {size} {form} {keys}"
        if options.kept and not file_of("tracked", part).is_file():
            continue

        def measure(
            case: Case = case, form: str = form, size: int = size
        ) -> list[dict[str, Any]]:
            return measured(case, form, size, keys)

        runs = kept("tracked", part, measure)
        rows.append(row(case, form, size, runs))
        details[part] = runs
        if form == "tracked":
            far += [errors_off(case, run) > 4 for run in runs if run["ok"]]
    return publish(
        "tracked",
        "Factors that offer only a score, by default calls",
        [
            "program",
            "chains",
            "exponents",
            "exact share",
            "share ± sd over keys (stated)",
            "log Z off ± sd (stated)",
            "effective chains",
            "evaluations",
            "OK",
            "worst share of these, in errors",
        ],
        rows,
        {"at most one OK in fifty is off by over 4 errors": np.mean(far) <= 0.02},
        details,
        write=not (options.quick or options.form),
    )


if __name__ == "__main__":
    sys.exit(main())
