"""Programs whose default runs were wrong with status OK when others tried them: rewards
that are high in a small place, conjunctions of many learned factors, a needle among
latents, powers of learned factors, funnels, and an unknown error under a cubic.

Exact answers are closed forms or quadrature, of level 0 with its noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats
from scipy.special import logsumexp

import composeprob as cp
from exact.axis import Mixture, along, two
from exact.case import Answer, Case, schedule, share, single
from exact.grids import log_normal, on_grid
from exact.networks import by_energy, by_score


# ── rewards that are high in a small place ────────────────────────────────────────────
@cp.program
def rewarded(f: Any, reward: Any) -> None:
    x = cp.sample("x", f)
    cp.factor("reward", reward, at=x)


def rewards_schedule() -> cp.Schedule:
    return cp.Schedule.log_snr(60, min=-9.0, max=8.0)


def box(x: Any) -> Any:
    return 8.0 * (np.abs(x - 3.5) < 0.3)


def tail(x: Any) -> Any:
    return 4.0 * (x > 2.29)


def bump(x: Any) -> Any:
    return 8.0 * np.exp(-0.5 * ((x - 3.5) / 0.4) ** 2)


def on_the_right(x: Any) -> Any:
    return 6.5 * (x[..., 0] > 1.5)


def reward_of_one_number(
    name: str, reward: Callable[[Any], Any], low: float, high: float
) -> Case:
    """N(0, 1) under a reward that is high between two numbers: the share there."""

    def compiled() -> cp.AnnealedDensity:
        standard = cp.Analytic(dist.Normal(0.0, 1.0), rewards_schedule())
        return cp.compile(rewarded, standard, cp.Reward(reward))

    def exact() -> Answer:
        return on_grid(
            (-9.0, 9.0, 180_000),
            log_joint=lambda x: log_normal(x, 0.0, 1.0) + reward(x),
            inside=lambda x: (x > low) & (x < high),
        )

    event = share(lambda s: (s["x"] > low) & (s["x"] < high))
    return Case("rewards in a small place", name, compiled, event, exact)


def light_mode() -> Case:
    """A mode of share 0.0043 in the plane under a reward of 6.5: its share."""
    weights = np.array([0.9957, 0.0043])
    centres = np.array([[-2.0, 0.0], [3.0, 3.0]])
    widths = np.array([0.7, 0.3])

    def compiled() -> cp.AnnealedDensity:
        each = dist.Normal(jnp.asarray(centres), widths[:, None]).to_event(1)
        components = dist.Categorical(jnp.asarray(weights))
        mixture = dist.MixtureSameFamily(components, each)
        prior = cp.Analytic(mixture, rewards_schedule())
        return cp.compile(rewarded, prior, cp.Reward(on_the_right))

    def exact() -> Answer:
        levels = rewards_schedule()
        alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
        noised = np.hypot(alpha * widths, sigma)
        right = weights * stats.norm.sf(1.5, alpha * centres[:, 0], noised)
        inside = right.sum() * np.exp(6.5)
        total = inside + 1.0 - right.sum()
        return Answer(float(inside / total), float(np.log(total)))

    event = share(lambda s: s["x"][0] > 1.5)
    name = "a light mode under a reward, d = 2"
    return Case("rewards in a small place", name, compiled, event, exact)


def rewards() -> list[Case]:
    """A box, a tail and a bump of one number, and a light mode in the plane."""
    return [
        reward_of_one_number("reward of 8 in a box", box, 3.2, 3.8),
        reward_of_one_number("reward of 4 in a tail", tail, 2.29, 20.0),
        reward_of_one_number("reward of 8 in a bump", bump, 2.5, 20.0),
        light_mode(),
    ]


# ── conjunctions and powers of learned factors ────────────────────────────────────────
def centred(weight: float, widths: tuple[float, float], dims: int) -> Mixture:
    """Return two modes at −1 and 1 in each number."""
    far = dims**0.5
    return two(weight, (-far, far), widths)


def conjunctions() -> list[Case]:
    """AND of four, five and six, alike and unlike, by scores and by energies. Every
    factor has a broad mode of weight 0.8, the product a narrow one of 0.8."""
    alike = centred(0.8, (0.9, 0.45), 3)
    narrower = centred(0.8, (0.9, 0.554), 4)
    unlike = []
    for weight, broad, narrow in (
        (0.8, 0.9, 0.45),
        (0.7, 1.0, 0.45),
        (0.85, 0.8, 0.4),
        (0.75, 0.9, 0.5),
        (0.8, 1.0, 0.45),
    ):
        unlike.append(centred(weight, (broad, narrow), 3))
    named = (
        ("AND of four, d = 3, score", [alike] * 4, 3, by_score),
        ("AND of five, d = 3, score", [alike] * 5, 3, by_score),
        ("AND of five, d = 3, energy", [alike] * 5, 3, by_energy),
        ("AND of five unlike, d = 3, score", unlike, 3, by_score),
        ("AND of six, d = 4, score", [narrower] * 6, 4, by_score),
    )
    cases = []
    for name, mixtures, dims, form in named:
        terms = tuple((mixture, 1.0) for mixture in mixtures)
        answered = along("AND of learned factors", name, terms, dims)
        compiled = functools.partial(conjunction, mixtures, dims, form)
        cases.append(dataclasses.replace(answered, compile=compiled))
    return cases


def conjunction(mixtures: list[Mixture], dims: int, form: Any) -> cp.AnnealedDensity:
    """The density of a product without powers, as people write it: `cp.product(f, f)`
    where mixtures are equal."""
    factor = functools.cache(form)
    return cp.compile(single, cp.product(*(factor(each, dims) for each in mixtures)))


def powers() -> list[Case]:
    """Three learned modes to the power 2.5."""
    three = Mixture((0.5, 0.2, 0.3), (-3.0, 0.5, 3.0), (0.8, 0.3, 0.15))
    cases = []
    for form, text in ((by_score, "score"), (by_energy, "energy")):
        name = f"three learned modes to the power 2.5, {text}"
        terms = ((three, 2.5),)
        family = "powers of learned factors"
        cases.append(along(family, name, terms, cut=-0.8, form=form))
    return cases


# ── a needle among latents ────────────────────────────────────────────────────────────
SHARP = 50.0
"""Precision of the needle; that of the broad mode is 1."""
PRIOR_SD = 3.0


@cp.program
def with_needle(zeros: Any) -> None:
    z = numpyro.sample("z", dist.Normal(zeros, PRIOR_SD).to_event(1))
    broad = -0.5 * jnp.sum((z + 2.0) ** 2)
    height = 0.5 * len(zeros) * jnp.log(SHARP)
    needle = height - 0.5 * SHARP * jnp.sum((z - 2.0) ** 2)
    cp.factor("modes", jnp.logaddexp(broad, needle))


def needle(dims: int) -> Case:
    """A broad mode at −2 and a needle at 2: the share of a positive sum."""

    def exact() -> Answer:
        log_masses, shares = [], []
        for centre, variance in ((-2.0, 1.0), (2.0, 1 / SHARP)):
            both = PRIOR_SD**2 + variance
            each = 0.5 * np.log(2 * np.pi) + log_normal(centre, 0.0, np.sqrt(both))
            log_masses.append(dims * each)
            mean = centre * PRIOR_SD**2 / both
            sd = np.sqrt(variance * PRIOR_SD**2 / both)
            shares.append(stats.norm.sf(0.0, dims * mean, np.sqrt(dims) * sd))
        log_evidence = logsumexp(log_masses)
        weights = np.exp(np.array(log_masses) - log_evidence)
        return Answer(float(weights @ shares), float(log_evidence))

    return Case(
        "needle of latents",
        f"a needle of latents, d = {dims}",
        lambda: cp.compile(with_needle, jnp.zeros(dims)),
        share(lambda s: jnp.sum(s["z"]) > 0),
        exact,
    )


def needles() -> list[Case]:
    return [needle(2), needle(10)]


# ── funnels, and an unknown error ─────────────────────────────────────────────────────
@cp.program
def reweighted(f: Any, log_weight: Any) -> None:
    x = cp.sample("x", f)
    cp.factor("target", log_weight(x), anneal="tempered")


def funnel(dims: int) -> Case:
    """x₀ ~ N(0, 9) and the others N(0, exp x₀), beside N(0, 9·I): the mean of x₀²."""
    prior = dist.Normal(jnp.zeros(dims), 3.0).to_event(1)

    def log_weight(x: Any) -> Any:
        first = dist.Normal(0.0, 3.0).log_prob(x[0])
        others = dist.Normal(0.0, jnp.exp(x[0] / 2)).log_prob(x[1:])
        return first + jnp.sum(others) - prior.log_prob(x)

    def compiled() -> cp.AnnealedDensity:
        return cp.compile(reweighted, cp.Analytic(prior, schedule()), log_weight)

    return Case(
        "funnels and an unknown error",
        f"a funnel, d = {dims}",
        compiled,
        lambda result: result.mean(lambda s: s["x"][0] ** 2),
        lambda: Answer(9.0),
    )


CUBIC_DATA = np.array([0.4, -1.1, 0.9, 2.3])


@cp.program
def cubic(f: Any, y: Any) -> None:
    x = cp.sample("x", f)
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(x + x**3 / 10, sd).to_event(1), y)


def unknown_error() -> Case:
    """y ~ N(x + x³/10, σ) of four numbers, σ unknown: the mean of log σ."""

    def compiled() -> cp.AnnealedDensity:
        standard = dist.Normal(jnp.zeros(4), 1.0).to_event(1)
        return cp.compile(cubic, cp.Analytic(standard, schedule()), CUBIC_DATA)

    def exact() -> Answer:
        log_sd = np.linspace(-14.0, 2.5, 3301)
        sd = np.exp(log_sd)[:, None]
        x = np.linspace(-6.0, 6.0, 12_001)
        log_mass = stats.halfnorm.logpdf(sd[:, 0]) + log_sd
        for y in CUBIC_DATA:
            # The error as the variable of integration: it is sharp where σ is small.
            error = np.linspace(-9.0, 9.0, 721)
            at = np.interp(y + sd * error, x + x**3 / 10, x)
            log_joint = log_normal(at, 0.0, 1.0) - np.log1p(0.3 * at**2)
            log_joint = log_joint + stats.norm.logpdf(error)
            log_mass += logsumexp(log_joint, axis=1) + np.log(error[1] - error[0])
        log_mass += np.log(log_sd[1] - log_sd[0])
        log_evidence = float(logsumexp(log_mass))
        mean = float(np.exp(log_mass - log_evidence) @ log_sd)
        return Answer(mean, log_evidence)

    return Case(
        "funnels and an unknown error",
        "x + x³/10 with an unknown error",
        compiled,
        lambda result: result.mean(lambda s: jnp.log(s["sd"])),
        exact,
    )


def funnels() -> list[Case]:
    return [funnel(10), funnel(3), unknown_error()]
