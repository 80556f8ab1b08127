"""The densities: a product of two learned energies, conditions of one network, and an
energy of images."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

import composeprob as cp
from composeprob import model_zoo

LEVEL = 30
"""Level of the transitions: the middle of 60 levels."""


@cp.program
def product(factors: Any) -> Any:
    return cp.sample("x", cp.product(*factors))


class Shifted(eqx.Module):
    """A network of the plane that is told where the data lie, by their log-SNR t."""

    network: Any

    def __call__(self, x: Array, t: Array, centre: Array) -> Array:
        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        return self.network(x - alpha * centre, t)


@dataclasses.dataclass(frozen=True)
class Case:
    """A density, and how it is measured.

    Attributes:
        name: as in the table.
        factors: whose product it is.
        num_chains: N.
        mala, hmc: step sizes in units of σ² and of σ.
        count: evaluations of each chain in one timed program.
        limit: what a transition may cost, in evaluations for each that it makes; None
            where no limit is set.
    """

    name: str
    factors: list[Any]
    num_chains: int
    mala: float
    hmc: float
    count: int
    limit: float | None

    def compile(self, num_levels: int = 60) -> Any:
        """The composed density on levels that are even in log-SNR."""
        log_snr = self.factors[0].schedule.log_snr
        return cp.compile(
            product,
            self.factors,
            schedule=cp.Schedule.log_snr(num_levels, log_snr[-1], log_snr[0]),
        )

    def positions(self, density: Any, key: Array) -> dict[str, Array]:
        """Starts of the chains: noised draws of N(0, 0.3²)."""
        noise = density.schedule.at(LEVEL)
        wide = jnp.sqrt((0.3 * noise.alpha) ** 2 + noise.sigma**2)
        return {
            "x": wide
            * jax.random.normal(key, (self.num_chains, *density.sites["x"].shape))
        }


def plane() -> Case:
    """Ring × bar, as the zoo has them."""
    return Case(
        "ring × bar, MLP energies",
        [cp.load("ring2d"), cp.load("bar2d")],
        2000,
        0.05,
        0.2,
        3,
        1.10,
    )


def conditional() -> cp.Diffusion:
    """The zoo's ring with its centre as a condition."""
    ring, _ = model_zoo.uncalibrated("ring2d")
    settings = {
        name: getattr(ring, name)
        for name in ("event_shape", "parameterization", "time")
    }
    return cp.Diffusion(
        Shifted(ring.network), ring.schedule, conditions=("centre",), **settings
    )


def conditions(number: int) -> list[Array]:
    """Centres on a circle."""
    angle = 2 * jnp.pi * jnp.arange(number) / number
    return list(0.3 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1))


def conditioned(number: int = 8, chains: int = 256) -> Case:
    """Rings that one network makes, multiplied."""
    factor = conditional()
    factors = [factor.given(centre=centre) for centre in conditions(number)]
    return Case(
        f"{number} conditions of one MLP energy", factors, chains, 0.02, 0.1, 3, None
    )


def perturbed(network: Any, key: Array, scale: float = 0.02) -> Any:
    """The same network with noise on its weights: untrained ones have layers of zeros,
    which real ones do not. With more noise its score is not that of noise at the
    noisiest level, and the compiler refuses it."""
    leaves, treedef = jax.tree.flatten(network)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        a + scale * jax.random.normal(k, a.shape, a.dtype)
        for k, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def images() -> Case:
    """Scenes of 32×32 pixels by the zoo's UNet; with random weights, on which the cost
    does not depend."""
    recipe = model_zoo.recipe("shapes-position")
    graph, state = nnx.split(recipe.network(jax.random.key(2)))
    network = nnx.merge(graph, perturbed(nnx.to_pure_dict(state), jax.random.key(3)))
    settings = {
        name: getattr(recipe, name) for name in ("event_shape", "parameterization")
    }
    factor = cp.Diffusion(
        network, recipe.schedule, time="log_snr", conditions=("position",), **settings
    )
    placed = factor.given(position=jnp.array([0.5, 0.5]))
    return Case("UNet energy, 32×32×3", [placed], 64, 0.02, 0.05, 3, 1.05)


CASES = {"plane": plane, "conditions": conditioned, "images": images}
