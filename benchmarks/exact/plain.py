"""Hierarchies of NumPyro latents alone, with data whose members hardly differ."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import composeprob as cp
from exact.case import Answer, Case, share
from exact.grids import log_normal, on_grid

NOISE = 0.5
"""Standard deviation of a datum given its member."""
SPREAD = 0.05
"""Standard deviation of the members."""
SMALL = 0.1
"""The scale of the members below which shares are asked for."""


@cp.program
def centred(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("members", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, NOISE), obs=y)


@cp.program
def non_centred(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("members", len(y)):
        xi = numpyro.sample("xi", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * xi, NOISE), obs=y)


FORMS = {"centred": centred, "non-centred": non_centred}


def data(members: int) -> np.ndarray:
    """Return one datum of each member."""
    rng = np.random.default_rng(members)
    theta = 0.4 + SPREAD * rng.standard_normal(members)
    return theta + NOISE * rng.standard_normal(members)


def exact(members: int) -> Answer:
    """P(tau < 0.1) given data, by a grid of mu and log tau; members are integrated in
    closed form."""
    y = data(members)

    def log_joint(mu: Any, log_tau: Any) -> Any:
        tau = np.exp(log_tau)
        found = log_normal(mu, 0.0, 2.0) - 0.5 * tau**2 + log_tau
        for value in y:
            found = found + log_normal(value, mu, np.sqrt(tau**2 + NOISE**2))
        return found

    found = on_grid(
        (-3.0, 4.0, 1400),
        (-12.0, 2.0, 1400),
        log_joint=log_joint,
        inside=lambda _, log_tau: log_tau < np.log(SMALL),
    )
    return Answer(found.value)


def cases() -> list[Case]:
    """Centred and non-centred, of 5 and 50 members."""
    found = []
    for members in (5, 50):
        for form, program in FORMS.items():

            def compiled(program: Any = program, members: int = members) -> Any:
                return cp.compile(program, jnp.asarray(data(members), jnp.float32))

            def answer(members: int = members) -> Answer:
                return exact(members)

            name = f"{form}, {members} members"
            below = share(lambda s: s["tau"] < SMALL)
            found.append(Case("plain hierarchy", name, compiled, below, answer))
    return found
