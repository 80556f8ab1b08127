"""The same problems as programs: one network of single observations, multiplied over all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

from .instances import Instance, log_posterior, mistake, time_of

SCHEDULES = {"gaussian": cp.Schedule.log_snr(80, min=-16.0, max=11.0), "mixture": cp.Schedule.log_snr(80, -10.0, 10.0)}


@cp.program
def tall(posterior: Any, prior: Any, data: Any) -> Any:
    return cp.sample("theta", prior * cp.product(posterior / prior, over=data))


def network(instance: Instance) -> tuple[Any, str]:
    """ε̂(θ, λ; observation) and its parameterization: an energy where it is known, else the wrong noise.

    What the individual posterior is, the network is told by its conditions, which every observation has its own of.
    """

    def energy(theta: Any, log_snr: Any, log_weights: Any, means: Any, x: Any) -> Any:
        amplitude, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return -sigma * log_posterior(instance, theta, (log_weights, means), amplitude, sigma)

    def noise(theta: Any, log_snr: Any, log_weights: Any, means: Any, x: Any) -> Any:
        exact = jax.grad(energy)(theta, log_snr, log_weights, means, x)
        return exact + mistake(instance, theta, x, time_of(log_snr))

    return (noise, "epsilon") if instance.error else (energy, "energy")


def density(toy: str, instance: Instance) -> cp.AnnealedDensity:
    """The compiled program."""
    schedule = SCHEDULES[toy]
    function, form = network(instance)
    posterior = cp.Diffusion(
        function, schedule, event_shape=(instance.size,), parameterization=form, time="log_snr",
        conditions=("log_weights", "means", "x"), log_snr_range=(-30.0, 30.0), label="posterior",
    )  # fmt: skip
    law = dist.Normal(jnp.asarray(instance.prior_mean), jnp.sqrt(jnp.asarray(instance.prior_variance))).to_event(1)
    prior = cp.Analytic(law, schedule, label="prior")
    data = {"log_weights": instance.log_weights, "means": instance.means, "x": instance.xs}
    return cp.compile(tall, posterior, prior, jax.tree.map(lambda a: np.asarray(a, np.float32), data))


def draw(toy: str, instance: Instance, seed: int, count: int) -> tuple[np.ndarray, str]:
    """Draws (count, m) of the default run, and what its status says."""
    result = cp.infer(density(toy, instance), jax.random.key(seed), num_chains=count, progress=False)
    return result.unweighted()["theta"], str(result.status.code)
