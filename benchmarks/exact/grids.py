"""Programs of few numbers, or of many independent ones, whose exact answers are sums
over a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats
from scipy.special import logsumexp

import composeprob as cp
from exact.case import Answer, Case, schedule, share, single


def on_grid(
    *ranges: tuple[float, float, int], log_joint: Callable, inside: Callable
) -> Answer:
    """The probability of an event and log Z, by the middle rule.

    Args:
        ranges: (from, to, number of cells) of every axis.
        log_joint: of arrays that broadcast against each other, one for each axis.
        inside: the event, likewise.
    """
    steps = [(high - low) / n for low, high, n in ranges]
    middles = [
        low + step * (np.arange(n) + 0.5)
        for (low, _, n), step in zip(ranges, steps, strict=True)
    ]
    axes = np.meshgrid(*middles, indexing="ij", sparse=True)
    log_mass = log_joint(*axes) + np.log(steps).sum()
    log_evidence = float(logsumexp(log_mass))
    within = np.broadcast_to(inside(*axes), log_mass.shape)
    return Answer(
        float(np.exp(logsumexp(log_mass[within]) - log_evidence)), log_evidence
    )


def log_normal(x: Any, mean: Any, sd: Any) -> Any:
    """log N(x; mean, sd²)."""
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


def at_level_0(mean: float, sd: float) -> tuple[float, float]:
    """Mean and standard deviation of a Gaussian at level 0."""
    levels = schedule()
    alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
    return alpha * mean, float(np.hypot(alpha * sd, sigma))


# ── many independent entries ──────────────────────────────────────────────────────────
COORDINATES = 30
SQUARES = np.linspace(0.5, 3.0, COORDINATES)


@cp.program
def squares(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x**2, 0.5).to_event(1), y)


def squares_case() -> Case:
    """y = x² + ε over 30 entries of a Gaussian off the middle: the mean share of
    positive entries."""
    normal = dist.Normal(jnp.full(COORDINATES, 0.3), 1.0).to_event(1)

    def exact() -> Answer:
        alone = [
            on_grid(
                (-8.0, 8.0, 16_000),
                log_joint=lambda x, y=y: (
                    log_normal(x, *at_level_0(0.3, 1.0)) + log_normal(y, x**2, 0.5)
                ),
                inside=lambda x: x > 0,
            )
            for y in SQUARES
        ]
        return Answer(
            float(np.mean([a.value for a in alone])),
            float(np.sum([a.log_evidence for a in alone])),
        )

    return Case(
        "y = x²",
        "y = x² over 30 entries",
        lambda: cp.compile(
            squares, cp.Analytic(normal, schedule()), jnp.asarray(SQUARES)
        ),
        lambda result: result.mean(lambda s: (s["x"] > 0).mean()),
        exact,
    )


def bits_case(
    family: str, name: str, size: int, exponent: float, weight: float
) -> Case:
    """Independent entries near −1 and 1, to a power: the mean share of those near 1."""
    parts = dist.Normal(
        jnp.array([[-1.0], [1.0]]), jnp.array([[0.25], [0.2]])
    ).to_event(1)

    def compiled() -> cp.AnnealedDensity:
        bit = cp.Analytic(
            dist.MixtureSameFamily(
                dist.Categorical(jnp.array([1 - weight, weight])), parts
            ),
            schedule(),
        )
        return cp.compile(
            single, cp.window(bit, (size,), over=np.arange(size)[:, None]) ** exponent
        )

    def exact() -> Answer:
        low, high = (at_level_0(m, s) for m, s in ((-1.0, 0.25), (1.0, 0.2)))
        alone = on_grid(
            (-4.0, 4.0, 16_000),
            log_joint=lambda x: (
                exponent
                * np.logaddexp(
                    np.log(1 - weight) + log_normal(x, *low),
                    np.log(weight) + log_normal(x, *high),
                )
            ),
            inside=lambda x: x > 0,
        )
        return Answer(alone.value, size * (alone.log_evidence or 0.0))

    return Case(
        family,
        name,
        compiled,
        lambda result: result.mean(lambda s: (s["x"] > 0).mean()),
        exact,
    )


# ── a narrow mode of a function of the user's ─────────────────────────────────────────
def bump(x: Any, gain: Any, centre: float, width: float) -> Any:
    """log(1 + e^gain·exp(−|x − centre|²/(2·width²))): a narrow hill on flat ground."""
    return jnp.logaddexp(0.0, gain - 0.5 * jnp.sum((x - centre) ** 2) / width**2)


def bump_answer(
    dims: int, gain: float, centre: float, width: float, sd: float, reach: float
) -> Answer:
    """The probability of the ball of radius ``reach`` around the hill under N(0, sd²·I)
    times the hill, and log Z.

    Both terms of the density are Gaussians, and the squared distances from the hill's
    centre noncentral χ².
    """
    both = sd**2 + width**2
    hill = gain + 0.5 * dims * np.log(2 * np.pi * width**2)
    hill += -0.5 * dims * np.log(2 * np.pi * both) - 0.5 * dims * centre**2 / both
    log_evidence = float(np.logaddexp(0.0, hill))
    variance = (width * sd) ** 2 / both
    shift = centre * width**2 / both
    on_hill = stats.ncx2(dims, dims * shift**2 / variance).cdf(reach**2 / variance)
    on_ground = stats.ncx2(dims, dims * centre**2 / sd**2).cdf(reach**2 / sd**2)
    share = np.exp(hill - log_evidence)
    return Answer(
        float(share * on_hill + np.exp(-log_evidence) * on_ground), log_evidence
    )


def energy_case(
    family: str, name: str, dims: int, gain: float, centre: float, width: float
) -> Case:
    """A Gaussian times a `cp.Energy` with a narrow hill: the share of the hill."""
    sd = 1.0
    reach = width * (np.sqrt(dims) + 2)

    def compiled() -> cp.AnnealedDensity:
        levels = schedule()
        broad = cp.Analytic(dist.Normal(jnp.zeros(dims), sd).to_event(1), levels)
        hill = cp.Energy(
            lambda x, level: bump(x, gain, centre, width),
            levels,
            event_shape=(dims,),
            top_power=0.0,
        )
        return cp.compile(single, broad * hill)

    near = share(lambda s: jnp.sum((s["x"] - centre) ** 2) < reach**2)
    return Case(
        family,
        name,
        compiled,
        near,
        lambda: bump_answer(dims, gain, centre, width, at_level_0(0.0, sd)[1], reach),
    )


def latent_case(
    family: str, name: str, dims: int, gain: float, centre: float, width: float
) -> Case:
    """The same hill over a latent of NumPyro's."""
    reach = width * (np.sqrt(dims) + 2)

    @cp.program
    def latent(gain):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(dims), 1.0).to_event(1))
        cp.factor("hill", bump(z, gain, centre, width))

    near = share(lambda s: jnp.sum((s["z"] - centre) ** 2) < reach**2)
    return Case(
        family,
        name,
        lambda: cp.compile(latent, gain),
        near,
        lambda: bump_answer(dims, gain, centre, width, 1.0, reach),
    )


def improper_case() -> Case:
    """A log-density that rises without bound."""

    def compiled() -> cp.AnnealedDensity:
        levels = schedule()
        narrow = cp.Analytic(dist.Normal(jnp.zeros(2), 0.6).to_event(1), levels)
        rising = cp.Energy(
            lambda x, level: 100 * jnp.sum(x**2),
            levels,
            event_shape=(2,),
            top_power=0.0,
        )
        return cp.compile(single, narrow * rising)

    right = share(lambda s: s["x"][0] > 0)
    return Case(
        "improper",
        "an energy that rises",
        compiled,
        right,
        lambda: Answer(None, improper=True),
    )


# ── latents ───────────────────────────────────────────────────────────────────────────
LABELLED = np.concatenate(
    [
        stats.norm(-1.5, 0.7).ppf((np.arange(12) + 0.5) / 12),
        stats.norm(1.2, 0.7).ppf((np.arange(18) + 0.5) / 18),
    ]
)


@cp.program
def labels(y):
    left = numpyro.sample("left", dist.Normal(-0.3, 2.0))
    right = numpyro.sample("right", dist.Normal(0.5, 2.0))
    parts = dist.Normal(jnp.stack([left, right]), 0.7)
    with numpyro.plate("data", y.shape[0]):
        numpyro.sample(
            "y",
            dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), parts),
            obs=y,
        )


def labels_case() -> Case:
    """Two means whose labels switch; their priors differ a little: the share of left <
    right."""

    def log_joint(left: Any, right: Any) -> Any:
        found = log_normal(left, -0.3, 2.0) + log_normal(right, 0.5, 2.0)
        for y in LABELLED:
            found = (
                found
                + np.logaddexp(log_normal(y, left, 0.7), log_normal(y, right, 0.7))
                + np.log(0.5)
            )
        return found

    return Case(
        "label switching",
        "two means of a mixture",
        lambda: cp.compile(labels, jnp.asarray(LABELLED)),
        share(lambda s: s["left"] < s["right"]),
        lambda: on_grid(
            (-9.0, 9.0, 1800),
            (-9.0, 9.0, 1800),
            log_joint=log_joint,
            inside=lambda a, b: a < b,
        ),
    )


@cp.program
def multiplied(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x[0] * x[1], 0.1), y)


def product_case() -> Case:
    """The product of two numbers is measured: the share of two positive ones."""
    normal = dist.Normal(jnp.array([0.3, 0.1]), 1.0).to_event(1)

    def log_joint(a: Any, b: Any) -> Any:
        prior = log_normal(a, *at_level_0(0.3, 1.0)) + log_normal(
            b, *at_level_0(0.1, 1.0)
        )
        return prior + log_normal(1.5, a * b, 0.1)

    return Case(
        "measured product",
        "y = x₀·x₁",
        lambda: cp.compile(multiplied, cp.Analytic(normal, schedule()), 1.5),
        share(lambda s: s["x"][0] > 0),
        lambda: on_grid(
            (-7.0, 7.0, 2800),
            (-7.0, 7.0, 2800),
            log_joint=log_joint,
            inside=lambda a, b: a > 0,
        ),
    )


def common_cases() -> list[Case]:
    """Squares of many entries, many bits, a narrow mode of an energy and of a latent,
    an improper density."""
    return [
        squares_case(),
        bits_case("independent bits", "100 bits squared", 100, 2.0, 0.7),
        energy_case("narrow mode", "narrow mode of an energy, d = 2", 2, 6.4, 2.0, 0.2),
        latent_case(
            "narrow mode", "narrow mode of a latent, d = 10", 10, 13.6, 0.9, 0.4
        ),
        improper_case(),
    ]


def more_cases() -> list[Case]:
    """Bits to the fifth power, a hill in five dimensions, labels that switch, a
    measured product."""
    return [
        bits_case("independent bits", "40 bits to the power 5", 40, 5.0, 0.55),
        energy_case("narrow mode", "narrow mode of an energy, d = 5", 5, 8.5, 1.0, 0.3),
        labels_case(),
        product_case(),
    ]
