"""The 2D models of Du et al. 2023: their data, and the settings that they are trained with."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

import composeprob as cp

from .networks import residual_mlp_eqx, residual_mlp_nnx
from .networks.conditioning import OutputScale

LEVELS = {"min": -9.0, "max": 9.5}
"""Log-SNR of the levels that the models offer: σ is 0.0087 at level 0, far below the ring's 0.075."""
CONTINUOUS: dict[str, Any] = {
    "log_snr": (-16.0, 11.0),  # wide enough for the usual schedules to be aligned with
    "focus": (0.0, 10.0),  # where these data take shape
    "antithetic": True,
    "decay": "cosine",
    "batch_size": 500,  # half the paper's: stratified log-SNR and antithetic noise make up for it
}
"""What the models that are continuous in log-SNR add to the paper's settings."""


def ring() -> Any:
    """Eight Gaussians of standard deviation 0.075 on a circle of radius 0.5, equally likely."""
    angle = jnp.arange(8) * (2 * jnp.pi / 8)
    centres = 0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return dist.MixtureSameFamily(dist.Categorical(probs=jnp.full(8, 1 / 8)), dist.Normal(centres, 0.075).to_event(1))


def bar() -> Any:
    """Uniform on the box |x₁| < 0.2, |x₂| < 1."""
    return dist.Uniform(jnp.array([-0.2, -1.0]), jnp.array([0.2, 1.0])).to_event(1)


def energy(distribution: Any, *, deviation: float, finest: float) -> cp.training.Recipe:
    """An energy model of a 2D distribution, log f = −½‖s‖²/σ, over the residual MLP in Equinox.

    Args:
        distribution: a NumPyro distribution over vectors of length 2.
        deviation, finest: see `OutputScale`.
    """
    scale = OutputScale("energy_norm", deviation, finest)

    def network(key: Array) -> Any:
        return residual_mlp_eqx.ResidualMLP(2, output_scale=scale, key=key)

    return _recipe(distribution, network, parameterization="energy_norm", **CONTINUOUS)


def score(distribution: Any, *, deviation: float, finest: float) -> cp.training.Recipe:
    """A score-only model of a 2D distribution that predicts the noise, over the residual MLP in Flax NNX.

    Args:
        distribution: a NumPyro distribution over vectors of length 2.
        deviation, finest: see `OutputScale`.
    """
    scale = OutputScale("epsilon", deviation, finest)

    def network(key: Array) -> Any:
        return residual_mlp_nnx.ResidualMLP(2, output_scale=scale, rngs=nnx.Rngs(params=key))

    return _recipe(distribution, network, parameterization="epsilon", **CONTINUOUS)


def paper(distribution: Any) -> cp.training.Recipe:
    """The paper's own model: E = ½‖x − s‖² on 100 discrete levels, a learned table of levels, a constant rate."""

    def network(key: Array) -> Any:
        return residual_mlp_eqx.ResidualMLP(2, num_levels=100, key=key)

    return _recipe(
        distribution, network, parameterization="energy_residual", schedule=cp.Schedule.cosine(100), time="level"
    )


def _recipe(distribution: Any, network: Any, **settings: Any) -> cp.training.Recipe:
    settings.setdefault("schedule", cp.Schedule.log_snr(60, **LEVELS))

    def data(key: Array, n: int) -> Array:
        return distribution.sample(key, (n,))

    # The paper's settings are the recipe's defaults: 15,000 iterations, Adam 1e-3, EMA 0.999, batch 1000.
    return cp.training.Recipe(network=network, data=data, event_shape=(2,), microbatch=250, **settings)
