"""The laws of CompLift's nine compositions, learned as energies.

Their size: 128 wide, four layers deep, batches of 128 at a rate of 10⁻³, half as many
steps as they make (30,000; that is 480 epochs of 8,000 points), and a quarter for six
Gaussians and circles: a minute or two of a processor each. What differs: networks know
every log-SNR, not 50 levels, correct a Gaussian as the zoo's do (`OutputScale`), and
end with averaged weights and a rate of 0. Weights and log-normalisers are kept in out/,
and made again where they are missing.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

import composeprob as cp
from composeprob.calibration.driver import load_calibration, save_calibration
from composeprob.models import two_dimensional
from composeprob.models.networks.conditioning import OutputScale
from composeprob.models.networks.residual_mlp_eqx import ResidualMLP
from composeprob.training.weight_files import load_weights, save_weights

from .nine import BOXES, CIRCLES, DEVIATION, GAUSSIANS, LAWS, Named

ENERGY = "energy_norm"
OUT = Path("out", "nine-networks")
SETTINGS = two_dimensional.SHARP | {
    "batches": cp.training.Batches(128, antithetic=True)
}
ITERATIONS = dict.fromkeys(LAWS, 15_000) | dict.fromkeys((*BOXES, "eight"), 30_000)


def draw(name: str, key: Array, n: int) -> Array:
    """n draws (n, 2) of a law."""
    key, other = jax.random.split(key)
    if name in CIRCLES:
        angle = jax.random.uniform(key, (n,), maxval=2 * jnp.pi)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1) + jnp.array(CIRCLES[name])
    if name in BOXES:
        low, high = (jnp.array(corner) for corner in BOXES[name])
        return jax.random.uniform(key, (n, 2), minval=low, maxval=high)
    centres = jnp.asarray(GAUSSIANS[name], jnp.float32)
    which = jax.random.randint(key, (n,), 0, len(centres))
    return centres[which] + DEVIATION * jax.random.normal(other, (n, 2))


def recipe(name: str) -> cp.training.Recipe:
    """Recipe by which a law is learned."""
    deviation = float(jnp.sqrt(jnp.mean(draw(name, jax.random.key(0), 10_000) ** 2)))
    noise = DEVIATION if name in GAUSSIANS else 0.0
    scale = OutputScale(ENERGY, deviation, noise)

    def network(key: Array) -> ResidualMLP:
        return ResidualMLP(
            2, hidden=128, widen=1, blocks=1, output_scale=scale, key=key
        )

    def data(key: Array, n: int) -> Array:
        return draw(name, key, n)

    settings = SETTINGS | {"parameterization": ENERGY, "iterations": ITERATIONS[name]}
    return cp.training.Recipe(network=network, data=data, **settings)


def weights_of(name: str) -> Path:
    return OUT / f"{name.replace(' ', '-')}-{ENERGY}.safetensors"


@cache
def network(name: str) -> ResidualMLP:
    """The trained network of a law."""
    file = weights_of(name)
    chosen = recipe(name)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        key = jax.random.key(LAWS.index(name))
        run = cp.training.train(chosen, key, progress=False)
        save_weights(run.factor.network, file)
        print(
            f"{name}: trained in {run.seconds:.0f} s, loss "
            f"{run.loss[-1000:].mean():.4f}",
            flush=True,
        )
    return load_weights(chosen.untrained(jax.random.key(0)), file)


def learned(schedule: cp.Schedule) -> Named:
    """Each law as it was learned, with its log-normaliser, so that shares of mixtures
    are what they say."""

    def factor(name: str) -> cp.Factor:
        made = dataclasses.replace(recipe(name), schedule=schedule).factor(
            network(name), name
        )
        file = OUT / f"{name.replace(' ', '-')}-calibration.safetensors"
        if not file.is_file():
            save_calibration(
                cp.calibrate(made, jax.random.key(0)), file, weights=weights_of(name)
            )
            print(f"{name}: calibrated", flush=True)
        return load_calibration(made, file, weights=weights_of(name))

    return factor
