"""The 2D models of Du et al. 2023: their data, and their settings of training."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax import Array

import composeprob as cp

from .networks import residual_mlp_eqx, residual_mlp_nnx
from .networks.conditioning import OutputScale
from .networks.offset_energy import OffsetEnergy
from .rates import cosine

LEVELS = {"min": -9.0, "max": 9.5}
"""Log-SNR of the levels that the models offer: σ is 0.0087 at level 0, far below the
ring's 0.075."""
CONTINUOUS: dict[str, Any] = {
    # Wide enough for the usual schedules to be aligned with; the focus is where these
    # data take shape.
    "log_snr": cp.training.LogSNR(-16.0, 11.0, focus=(0.0, 10.0)),
    # Half the paper's batch: stratified log-SNR and antithetic noise make up for it.
    "batches": cp.training.Batches(500, chunk=250, antithetic=True),
    "learning_rate": cosine(1e-3),
}
"""Settings of models continuous in log-SNR, in addition to the paper's."""

SHARP: dict[str, Any] = CONTINUOUS | {
    "log_snr": cp.training.LogSNR(-16.0, 12.0, focus=(0.0, 11.5)),
    "schedule": cp.Schedule.log_snr(60, -9.0, 11.0),
    "iterations": 8000,  # each of these models is trained five times
}
"""Settings for data of a finer scale: σ is 0.0041 at level 0, far below the sharp
ring's 0.03."""

DEPTH: dict[str, Any] = {
    "parameterization": "energy",
    "losses": (cp.training.Denoising(), cp.training.CrossLevel(gap=8.0)),
    # Each chunk holds as many events of one level of a pair as of the other, each
    # twice.
    "batches": cp.training.Batches(504, chunk=252, antithetic=True),
}
"""Settings of energies that learn the depth of modes."""


# The distributions of models that README loads are made of NumPy's arrays: of JAX's, a
# first `cp.load` would compile a program for each operation, and for each of NumPyro's
# checks of arguments.


def ring(deviation: float = 0.075) -> Any:
    """Return eight equally likely Gaussians on a circle of radius 0.5."""
    angle = np.arange(8) * (2 * np.pi / 8)
    centres = 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    width = np.float32(deviation)
    modes = dist.Normal(centres.astype(np.float32), width).to_event(1)
    probs = np.full(8, 1 / 8, np.float32)
    return dist.MixtureSameFamily(dist.Categorical(probs=probs), modes)


def bar(centre: float = 0.0) -> Any:
    """Return the uniform distribution on the box |x₁ − centre| < 0.2, |x₂| < 1."""
    low = np.array([centre - 0.2, -1.0], np.float32)
    high = np.array([centre + 0.2, 1.0], np.float32)
    return dist.Uniform(low, high).to_event(1)


def box(half_width: float) -> Any:
    """Return the uniform distribution on the square |x₁|, |x₂| < half_width."""
    return dist.Uniform(jnp.full(2, -half_width), jnp.full(2, half_width)).to_event(1)


def soft(half_widths: tuple[float, float], inside: float, outer: float = 1.1) -> Any:
    """Return a box |x₁| < w₁, |x₂| < w₂ with a floor.

    It is uniform in the box, or with probability 1 − inside on the square |x₁|, |x₂| <
    outer. The floor keeps products and quotients with it proper: no point of the outer
    square is impossible.
    """
    boxes = []
    for widths in (half_widths, (outer, outer)):
        half = jnp.array(widths)
        boxes.append(dist.Uniform(-half, half).to_event(1))
    weights = dist.Categorical(probs=jnp.array([inside, 1 - inside]))
    return dist.MixtureGeneral(weights, boxes, support=dist.constraints.real_vector)


def energy(
    distribution: Any, *, deviation: float, finest: float, **settings: Any
) -> cp.training.Recipe:
    """Return the recipe of an energy log f = −½‖s‖²/σ, s a residual MLP in Equinox.

    Args:
        distribution: a NumPyro distribution over vectors of length 2.
        deviation, finest: see `OutputScale`.
        settings: settings of the recipe in place of `CONTINUOUS`.
    """
    scale = OutputScale("energy_norm", deviation, finest)

    def network(key: Array) -> Any:
        return residual_mlp_eqx.ResidualMLP(2, output_scale=scale, key=key)

    chosen = CONTINUOUS | {"parameterization": "energy_norm"} | settings
    return _recipe(distribution, network, **chosen)


def depth(
    distribution: Any, *, deviation: float, finest: float, **settings: Any
) -> cp.training.Recipe:
    """Return the recipe of an energy that also learns the depth of separated modes.

    It is log f = −½‖s‖²/σ + b(λ), with a cross-level loss.

    Args:
        distribution: a NumPyro distribution over vectors of length 2.
        deviation, finest: see `OutputScale`.
        settings: settings of the recipe in place of `CONTINUOUS` and `DEPTH`.
    """
    chosen = CONTINUOUS | DEPTH | settings
    log_snr_min = chosen["log_snr"].low

    def network(key: Array) -> Any:
        return OffsetEnergy(
            2, deviation=deviation, finest=finest, log_snr_min=log_snr_min, key=key
        )

    return _recipe(distribution, network, **chosen)


def score(
    distribution: Any, *, deviation: float, finest: float, **settings: Any
) -> cp.training.Recipe:
    """Return the recipe of a score-only model, a residual MLP in Flax NNX.

    The network predicts the noise.

    Args:
        distribution: a NumPyro distribution over vectors of length 2.
        deviation, finest: see `OutputScale`.
        settings: settings of the recipe in place of `CONTINUOUS`.
    """
    scale = OutputScale("epsilon", deviation, finest)

    def network(key: Array) -> Any:
        rngs = nnx.Rngs(params=key)
        return residual_mlp_nnx.ResidualMLP(2, output_scale=scale, rngs=rngs)

    chosen = CONTINUOUS | {"parameterization": "epsilon"} | settings
    return _recipe(distribution, network, **chosen)


def paper(distribution: Any) -> cp.training.Recipe:
    """Return the recipe of the paper's model: E = ½‖x − s‖² on 100 discrete levels.

    It has a learned table of levels, and a constant learning rate.
    """

    def network(key: Array) -> Any:
        return residual_mlp_eqx.ResidualMLP(2, num_levels=100, key=key)

    return _recipe(
        distribution,
        network,
        parameterization="energy_residual",
        schedule=cp.Schedule.cosine(100),
        time="level",
    )


def _recipe(distribution: Any, network: Any, **settings: Any) -> cp.training.Recipe:
    settings.setdefault("schedule", cp.Schedule.log_snr(60, **LEVELS))

    def data(key: Array, n: int) -> Array:
        return distribution.sample(key, (n,))

    # The paper's settings are the recipe's defaults: 15,000 iterations, Adam 1e-3, EMA
    # 0.999, batch 1000.
    settings = {"batches": cp.training.Batches(1000, chunk=250)} | settings
    return cp.training.Recipe(network=network, data=data, **settings)
