"""Programs of learned factors: networks in closed form, which the library does not know
as such."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

import composeprob as cp
from exact.case import Case, schedule, share
from exact.grids import at_level_0, log_normal, on_grid

WEIGHTS = np.array([0.5, 0.3, 0.2])
CENTRES = np.array([[-2.0, 0.0], [1.5, 1.5], [2.0, -2.0]])
WIDTHS = (0.5, 0.35, 0.7)
SUBJECTS = np.array([-1.2, 0.4, 0.9, -0.3, 1.6, 0.2])
MODES = ((0.6, 0.0, 0.3), (0.4, 2.0, 0.4))
"""Law of a subject's parameter given its number: weight, distance from the number,
standard deviation."""


@cp.program
def measured(f: Any, y: Any) -> None:
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(x[0] + 0.5 * x[1], 0.4), y)


@cp.program
def study(estimator: Any, data: Any) -> None:
    mu = cp.sample("mu", dist.Normal(0.0, 2.0))
    tau = cp.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(SUBJECTS)):
        eta = cp.sample("eta", dist.Normal(mu, tau))
        cp.factor("x", estimator.given(x=data), at=eta)


def three_modes(form: Literal["energy", "score"]) -> Case:
    """A network of three modes in the plane and one measurement: the share of the lower
    half."""
    levels = schedule()
    widths = jnp.asarray(WIDTHS)

    def log_prob(x: Any, level: Any) -> Any:
        a, s = jnp.asarray(levels.alpha)[level], jnp.asarray(levels.sigma)[level]
        v = (a * widths) ** 2 + s**2
        each = (
            jnp.log(jnp.asarray(WEIGHTS))
            - jnp.log(v)
            - 0.5 * jnp.sum((x - a * CENTRES) ** 2, -1) / v
        )
        return jax.nn.logsumexp(each)

    def network(x: Any, level: Any) -> Any:
        """Energies are in units of the noise."""
        scale = jnp.asarray(levels.sigma)[level]
        return (
            -scale * log_prob(x, level)
            if form == "energy"
            else jax.grad(log_prob)(x, level)
        )

    def log_joint(x: Any, y: Any) -> Any:
        parts = []
        for weight, centre, width in zip(WEIGHTS, CENTRES, WIDTHS, strict=True):
            (a, sd), (b, _) = (at_level_0(c, width) for c in centre)
            parts.append(np.log(weight) + log_normal(x, a, sd) + log_normal(y, b, sd))
        return np.logaddexp.reduce(parts) + log_normal(0.7, x + 0.5 * y, 0.4)

    def compiled() -> cp.AnnealedDensity:
        f = cp.Diffusion(
            network, levels, event_shape=(2,), parameterization=form, time="level"
        )
        return cp.compile(measured, f, 0.7)

    return Case(
        "learned, measured",
        f"three modes and a measurement, {form}",
        compiled,
        share(lambda s: s["x"][1] < 0.0),
        lambda: on_grid(
            (-6.0, 6.0, 2400),
            (-6.0, 6.0, 2400),
            log_joint=log_joint,
            inside=lambda x, y: y < 0,
        ),
    )


def two_modes_each() -> Case:
    """Six subjects whose estimator has two modes each: the probability of a group scale
    below 0.7."""
    levels = schedule()
    weight, far, sd = map(np.array, zip(*MODES, strict=True))

    def score(eta: Any, level: Any, x: Any) -> Any:
        a, s = jnp.asarray(levels.alpha)[level], jnp.asarray(levels.sigma)[level]
        v = (a * sd) ** 2 + s**2

        def log_prob(eta: Any) -> Any:
            return jax.nn.logsumexp(
                jnp.log(weight)
                - 0.5 * jnp.log(v)
                - 0.5 * (eta - a * (x + far)) ** 2 / v
            )

        return jax.grad(log_prob)(eta)

    def compiled() -> cp.AnnealedDensity:
        f = cp.Diffusion(
            score,
            levels,
            event_shape=(),
            parameterization="score",
            time="level",
            conditions=("x",),
        )
        return cp.compile(study, f, jnp.asarray(SUBJECTS))

    def log_joint(mu: Any, tau: Any) -> Any:
        found = log_normal(mu, 0.0, 2.0) + stats.halfnorm.logpdf(tau)
        noise = float(levels.sigma[0] / levels.alpha[0])
        for x in SUBJECTS:
            wide = [np.sqrt(tau**2 + s**2 + noise**2) for s in sd]
            each = [
                np.log(w) + log_normal(mu, x + d, s)
                for w, d, s in zip(weight, far, wide, strict=True)
            ]
            found = found + np.logaddexp(*each)
        return found

    return Case(
        "learned, hierarchy",
        "six subjects of two modes each, score",
        compiled,
        share(lambda s: s["tau"] < 0.7),
        lambda: on_grid(
            (-8.0, 8.0, 1600),
            (0.0, 7.0, 7000),
            log_joint=log_joint,
            inside=lambda mu, tau: tau < 0.7,
        ),
    )


def cases() -> list[Case]:
    """Three modes and a measurement by an energy and by a score, and subjects of two
    modes."""
    return [three_modes("energy"), three_modes("score"), two_modes_each()]
