"""A small diffusion model of this project: its data, network and training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import composeprob as cp

WEIGHTS = Path(__file__).with_name("weights.safetensors")


def data(key, n):
    """Draw n points of the plane on two crescents.

    Put your own data here: an array (n, *event_shape).
    """
    side, angle, noise = jax.random.split(key, 3)
    left = jax.random.bernoulli(side, shape=(n,))
    turn = jnp.pi * jax.random.uniform(angle, (n,))
    upper = jnp.stack([jnp.cos(turn) - 0.5, jnp.sin(turn) - 0.25], -1)
    points = jnp.where(left[:, None], upper, -upper)
    return 0.7 * points + 0.08 * jax.random.normal(noise, (n, 2))


class Network(eqx.Module):
    """Network s(x, log-SNR) of ONE noised point; the energy is ½‖x − s‖²."""

    layers: eqx.nn.MLP

    def __init__(self, key):
        self.layers = eqx.nn.MLP(2 + 2 * 4, 2, 128, 3, jax.nn.silu, key=key)

    def __call__(self, x, log_snr):
        """Return s, shape (2,)."""
        waves = 0.25 * 2.0 ** jnp.arange(4) * log_snr
        return self.layers(jnp.concatenate([x, jnp.sin(waves), jnp.cos(waves)]))


RECIPE = cp.training.Recipe(
    network=Network,
    data=data,
    schedule=cp.Schedule.log_snr(60, min=-8.0, max=6.0),
    log_snr=(-8.0, 6.0),
    parameterization="energy_residual",
    iterations=5000,
    batches=cp.training.Batches(512, antithetic=True),
    learning_rate=partial(optax.cosine_decay_schedule, 2e-3),
    ema=0.995,
)


def model():
    """Return the trained factor.

    Without a file of weights it is trained first, which takes less than a minute.
    """
    if not WEIGHTS.exists():
        trained = cp.training.train(RECIPE, jax.random.key(0)).factor
        cp.training.save_weights(trained.network, WEIGHTS)
    untrained = RECIPE.untrained(jax.random.key(0))
    network = cp.training.load_weights(untrained, WEIGHTS)
    return RECIPE.factor(network, label="crescents")
