"""Thirty easy programs: one mode, hierarchies, modes far apart with equal curvature,
compositions of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

import composeprob as cp
from exact.axis import Mixture, along, two
from exact.case import Answer, Case, schedule, share, single
from exact.grids import at_level_0, log_normal, on_grid

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GROUPS = np.array([0.9, 0.2, 1.4, -0.3, 0.8, 0.6])
READINGS = np.array([1.2, 1.6, 0.2])
INPUTS = np.stack([np.linspace(-2, 2, 40), np.cos(np.arange(40.0))], 1)
TARGETS = INPUTS @ np.array([0.7, -0.4]) + 0.3 * np.sin(7 * np.arange(40.0))
CLASSES = (
    INPUTS @ np.array([1.0, 0.5]) + 0.8 * np.sin(5 * np.arange(40.0)) > 0
).astype(float)
COUNTS = np.array([3, 5, 2, 4, 6, 1])


def gaussian(mean: float, sd: float) -> Mixture:
    """A mixture of one."""
    return Mixture((1.0,), (mean,), (sd,))


# ── one mode ──────────────────────────────────────────────────────────────────────────
@cp.program
def measured(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x, 0.4), y)


@cp.program
def curved(f, y):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x[1] + 0.5 * x[0] ** 2, 0.3), y)


@cp.program
def walled(f):
    x = cp.sample("x", f)
    cp.factor("inside", jnp.where(x > 0.3, 0.0, -jnp.inf))


@cp.program
def soft(f):
    x = cp.sample("x", f)
    cp.factor("slope", jax.nn.log_sigmoid((x - 0.5) / 0.3))


def on_line(
    name: str, program: Any, arguments: tuple, log_likelihood: Callable[[Any], Any]
) -> Case:
    """One number under N(0, 1) and a likelihood: the share above 0.8."""
    normal = dist.Normal(0.0, 1.0)
    return Case(
        "right: one mode",
        name,
        lambda: cp.compile(program, cp.Analytic(normal, schedule()), *arguments),
        share(lambda s: s["x"] > 0.8),
        lambda: on_grid(
            (-8.0, 8.0, 80_000),
            log_joint=lambda x: (
                log_normal(x, *at_level_0(0.0, 1.0)) + log_likelihood(x)
            ),
            inside=lambda x: x > 0.8,
        ),
    )


def banana() -> Case:
    """A bent ridge."""
    normal = dist.Normal(jnp.zeros(2), 1.0).to_event(1)

    def log_joint(a: Any, b: Any) -> Any:
        prior = log_normal(a, *at_level_0(0.0, 1.0)) + log_normal(
            b, *at_level_0(0.0, 1.0)
        )
        return prior + log_normal(0.8, b + 0.5 * a**2, 0.3)

    return Case(
        "right: one mode",
        "a bent ridge",
        lambda: cp.compile(curved, cp.Analytic(normal, schedule()), 0.8),
        share(lambda s: s["x"][1] > 0.3),
        lambda: on_grid(
            (-6.0, 6.0, 1500),
            (-6.0, 6.0, 1500),
            log_joint=log_joint,
            inside=lambda a, b: b > 0.3,
        ),
    )


def one_mode() -> list[Case]:
    family = "right: one mode"
    skewed = two(0.7, (0.0, 0.8), (0.6, 1.0))

    def inside(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0.3, 0.0, -np.inf)

    return [
        along(family, "a Gaussian", ((gaussian(0.4, 0.7), 1.0),), cut=0.2),
        along(family, "a Gaussian, d = 10", ((gaussian(0.4, 0.7), 1.0),), 10, cut=0.2),
        along(family, "a Gaussian, d = 40", ((gaussian(0.4, 0.7), 1.0),), 40, cut=0.2),
        along(
            family,
            "two Gaussians, d = 20",
            ((gaussian(0.4, 0.7), 1.0), (gaussian(-0.3, 0.9), 1.0)),
            20,
        ),
        along(
            family,
            "a Gaussian to the power 5, d = 3",
            ((gaussian(0.4, 0.7), 5.0),),
            3,
            cut=0.3,
        ),
        along(
            family,
            "guidance 3 of Gaussians, d = 2",
            ((gaussian(0.5, 0.8), 3.0), (gaussian(0.0, 1.5), -2.0)),
            2,
            0.7,
        ),
        along(
            family,
            "a skewed mixture times a Gaussian",
            ((skewed, 1.0), (gaussian(0.5, 1.0), 1.0)),
            cut=0.4,
        ),
        on_line("a measurement", measured, (1.1,), lambda x: log_normal(1.1, x, 0.4)),
        on_line("a wall", walled, (), inside),
        on_line(
            "a soft slope", soft, (), lambda x: -np.logaddexp(0.0, -(x - 0.5) / 0.3)
        ),
        banana(),
    ]


# ── modes far apart with equal curvature ──────────────────────────────────────────────
def equal_modes() -> list[Case]:
    family = "right: equal curvature"
    pair = two(0.3, (-2.5, 2.5), (0.5, 0.5))
    wide = gaussian(0.3, 3.0)
    triple = Mixture((0.2, 0.5, 0.3), (-4.0, 0.0, 4.0), (0.5, 0.5, 0.5))
    return [
        along(family, "two modes", ((pair, 1.0),)),
        along(family, "three modes, d = 2", ((triple, 1.0),), 2, cut=-2.0),
        along(family, "two modes, d = 10", ((pair, 1.0),), 10),
        along(family, "two modes, d = 30", ((pair, 1.0),), 30),
        along(family, "two modes squared", ((pair, 2.0),)),
        along(family, "two modes squared, d = 5", ((pair, 2.0),), 5),
        along(
            family,
            "three modes times a Gaussian, d = 2",
            ((triple, 1.0), (wide, 1.0)),
            2,
            cut=-2.0,
        ),
    ]


# ── hierarchies and other latents ─────────────────────────────────────────────────────
@cp.program
def schools(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.LogNormal(1.0, 0.7))
    with numpyro.plate("school", len(EFFECTS)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, jnp.asarray(ERRORS)), obs=y)


@cp.program
def groups(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.LogNormal(-1.0, 0.5))
    with numpyro.plate("group", len(GROUPS)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, 0.5), obs=y)


@cp.program
def unknown_scale(f, y):
    x = cp.sample("x", f)
    s = cp.sample("s", dist.LogNormal(-0.7, 0.4))
    cp.observe("y", dist.Normal(x, s), y)


@cp.program
def line(y):
    slopes = numpyro.sample("slopes", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    cp.observe("y", dist.Normal(jnp.asarray(INPUTS) @ slopes, 0.3).to_event(1), y)


@cp.program
def classes(y):
    slopes = numpyro.sample("slopes", dist.Normal(jnp.zeros(2), 1.5).to_event(1))
    cp.observe("y", dist.Bernoulli(logits=jnp.asarray(INPUTS) @ slopes).to_event(1), y)


@cp.program
def rate(y):
    rate = numpyro.sample("rate", dist.Gamma(3.0, 1.0))
    with numpyro.plate("count", len(COUNTS)):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def random_effects(
    y: np.ndarray, errors: Any, mu_sd: float, tau: tuple[float, float], above: float
) -> Answer:
    """P(μ > above) where y_j ~ N(μ, τ² + error_j²), by a grid of μ and log τ."""

    def log_joint(mu: Any, log_tau: Any) -> Any:
        found = log_normal(mu, 0.0, mu_sd) + log_normal(log_tau, *tau)
        spread = np.exp(2 * log_tau)
        for value, error in zip(y, np.broadcast_to(errors, y.shape), strict=True):
            found = found + log_normal(value, mu, np.sqrt(spread + error**2))
        return found

    return on_grid(
        (-8 * mu_sd, 8 * mu_sd, 2000),
        (tau[0] - 8 * tau[1], tau[0] + 8 * tau[1], 400),
        log_joint=log_joint,
        inside=lambda mu, _: mu > above,
    )


def linear_answer() -> Answer:
    """The posterior of two slopes under Gaussian noise: closed form."""
    precision = np.eye(2) + INPUTS.T @ INPUTS / 0.3**2
    mean = np.linalg.solve(precision, INPUTS.T @ TARGETS / 0.3**2)
    covariance = np.linalg.inv(precision)
    evidence = stats.multivariate_normal(
        np.zeros(40), INPUTS @ INPUTS.T + 0.3**2 * np.eye(40)
    ).logpdf(TARGETS)
    return Answer(
        float(stats.norm(mean[0], np.sqrt(covariance[0, 0])).sf(0.7)), float(evidence)
    )


def scale_answer() -> Answer:
    """Three readings of a number with an unknown error."""

    def log_joint(x: Any, log_s: Any) -> Any:
        found = log_normal(x, *at_level_0(0.0, 1.0)) + log_normal(log_s, -0.7, 0.4)
        for y in READINGS:
            found = found + log_normal(y, x, np.exp(log_s))
        return found

    return on_grid(
        (-6.0, 6.0, 2000),
        (-4.0, 2.5, 400),
        log_joint=log_joint,
        inside=lambda x, _: x > 0.8,
    )


def class_answer() -> Answer:
    """Two slopes of a logistic regression."""

    def log_joint(a: Any, b: Any) -> Any:
        found = log_normal(a, 0.0, 1.5) + log_normal(b, 0.0, 1.5)
        for (u, v), y in zip(INPUTS, CLASSES, strict=True):
            found = found - np.logaddexp(0.0, (1 - 2 * y) * (a * u + b * v))
        return found

    return on_grid(
        (-8.0, 12.0, 1000),
        (-9.0, 9.0, 900),
        log_joint=log_joint,
        inside=lambda a, _: a > 2.0,
    )


def hierarchies() -> list[Case]:
    family = "right: hierarchy"
    normal = dist.Normal(0.0, 1.0)
    posterior = stats.gamma(3.0 + COUNTS.sum(), scale=1 / (1.0 + len(COUNTS)))
    return [
        Case(
            family,
            "eight schools",
            lambda: cp.compile(schools, jnp.asarray(EFFECTS)),
            share(lambda s: s["mu"] > 4.0),
            lambda: random_effects(EFFECTS, ERRORS, 5.0, (1.0, 0.7), 4.0),
        ),
        Case(
            family,
            "six groups",
            lambda: cp.compile(groups, jnp.asarray(GROUPS)),
            share(lambda s: s["mu"] > 0.5),
            lambda: random_effects(GROUPS, 0.5, 2.0, (-1.0, 0.5), 0.5),
        ),
        Case(
            family,
            "an unknown error",
            lambda: cp.compile(
                unknown_scale, cp.Analytic(normal, schedule()), jnp.asarray(READINGS)
            ),
            share(lambda s: s["x"] > 0.8),
            scale_answer,
        ),
        Case(
            family,
            "a line",
            lambda: cp.compile(line, jnp.asarray(TARGETS)),
            share(lambda s: s["slopes"][0] > 0.7),
            linear_answer,
        ),
        Case(
            family,
            "logistic regression",
            lambda: cp.compile(classes, jnp.asarray(CLASSES)),
            share(lambda s: s["slopes"][0] > 2.0),
            class_answer,
        ),
        Case(
            family,
            "a Poisson rate",
            lambda: cp.compile(rate, jnp.asarray(COUNTS)),
            share(lambda s: s["rate"] > 3.5),
            lambda: Answer(float(posterior.sf(3.5))),
        ),
    ]


# ── learned models of the zoo ─────────────────────────────────────────────────────────
def zoo() -> list[Case]:
    """Compositions of learned models: no exact answer, so that a run is right unless
    something is named."""
    load = cp.load

    def composed(name: str, factor: Callable[[], cp.Factor]) -> Case:
        asked = share(lambda s: s["x"][0] > 0)
        return Case(
            "right: zoo",
            name,
            lambda: cp.compile(single, factor()),
            asked,
            lambda: Answer(None),
        )

    return [
        composed("ring × bar", lambda: load("ring2d") * load("bar2d")),
        composed(
            "ring × bar, scores", lambda: load("ring2d-score") * load("bar2d-score")
        ),
        composed("ring squared", lambda: load("ring2d") ** 2),
        composed(
            "a box without a box",
            lambda: load("box2d") ** 1.3 / load("softbox2d") ** 0.3,
        ),
        composed(
            "bars, mixed",
            lambda: cp.mixture(
                [load("bar2d-left"), load("bar2d-right")], weights=[0.5, 0.5]
            ),
        ),
        composed("box × ring", lambda: load("box2d") * load("ring2d")),
    ]


def cases() -> list[Case]:
    """All thirty."""
    return [*one_mode(), *equal_modes(), *hierarchies(), *zoo()]
