"""Hierarchies of NumPyro latents alone: members that hardly differ, and sharp crossed
effects."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import composeprob as cp
from composeprob.results.estimates import Estimate
from exact import hierarchies
from exact.case import Answer, Case, share
from exact.grids import log_normal, on_grid

CROSSED = 30
"""Members of the crossed effects."""
SMALL = 0.1
"""The scale of the members below which shares are asked for."""

PRIOR = "HalfNormal"
FORMS = {
    "centred": hierarchies.one_layer(PRIOR),
    "non-centred": hierarchies.non_centred(PRIOR),
}


def data(members: int) -> hierarchies.Data:
    """Return one vague datum of each member."""
    return hierarchies.data_of_one_layer(members, "vague")


def exact(members: int) -> Answer:
    """P(tau < 0.1) given data, by a grid of mu and log tau; members are integrated in
    closed form."""
    y, noise = data(members)

    def log_joint(mu: Any, log_tau: Any) -> Any:
        tau = np.exp(log_tau)
        found = log_normal(mu, 0.0, 2.0) - 0.5 * tau**2 + log_tau
        for value, sd in zip(y, noise, strict=True):
            found = found + log_normal(value, mu, np.sqrt(tau**2 + sd**2))
        return found

    found = on_grid(
        (-3.0, 4.0, 1400),
        (-12.0, 2.0, 1400),
        log_joint=log_joint,
        inside=lambda _, log_tau: log_tau < np.log(SMALL),
    )
    return Answer(found.value)


def crossed() -> Case:
    """Crossed effects under sharp data, whose latents hold one another: the variance of
    their mean."""
    structure = hierarchies.STRUCTURES["crossed"]
    data = structure.data(CROSSED, "sharp")
    law = structure.laws(PRIOR, data)["mu"]

    def compiled() -> cp.AnnealedDensity:
        return cp.compile(structure.program(PRIOR), *map(jnp.float32, data))

    def variance(result: cp.Result) -> Estimate:
        return result.mean(lambda s: (s["mu"] - law.mean) ** 2)

    name = f"crossed, sharp, {CROSSED} members"
    exact = Answer(law.variance)
    return Case("plain hierarchy", name, compiled, variance, lambda: exact)


def cases() -> list[Case]:
    """Centred and non-centred, of 5 and 50 members, and crossed effects."""
    found = []
    for members in (5, 50):
        for form, program in FORMS.items():

            def compiled(program: Any = program, members: int = members) -> Any:
                return cp.compile(program, *map(jnp.float32, data(members)))

            def answer(members: int = members) -> Answer:
                return exact(members)

            name = f"{form}, {members} members"
            below = share(lambda s: s["tau"] < SMALL)
            found.append(Case("plain hierarchy", name, compiled, below, answer))
    return [*found, crossed()]
