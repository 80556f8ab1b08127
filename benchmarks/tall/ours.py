"""The same problems as programs: one network of single observations, multiplied over
all of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import composeprob as cp

from .instances import Instance, log_posterior, mistake, time_of

SCHEDULES = {
    "gaussian": cp.Schedule.log_snr(80, min=-16.0, max=11.0),
    "mixture": cp.Schedule.log_snr(80, -10.0, 10.0),
}


@cp.program
def tall(posterior: Any, prior: Any, data: Any) -> Any:
    return cp.sample("theta", prior * cp.product(posterior / prior, over=data))


class Single(eqx.Module):
    """ε̂(θ, λ; observation) of the individual posteriors: minus σ times their energy,
    or noise that is wrong.

    What a posterior is, the network is told by its conditions, which every observation
    has its own of. The rest are arrays of a module, so that the problems of other seeds
    are not compiled again.
    """

    instance: Instance

    def energy(
        self, theta: Any, log_snr: Any, log_weights: Any, means: Any, x: Any
    ) -> Any:
        amplitude = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return -sigma * log_posterior(
            self.instance, theta, (log_weights, means), amplitude, sigma
        )

    def __call__(
        self, theta: Any, log_snr: Any, log_weights: Any, means: Any, x: Any
    ) -> Any:
        if not self.instance.error:
            return self.energy(theta, log_snr, log_weights, means, x)
        exact = jax.grad(self.energy)(theta, log_snr, log_weights, means, x)
        return exact + mistake(self.instance, theta, x, time_of(log_snr))


def density(toy: str, instance: Instance) -> cp.AnnealedDensity:
    """The compiled program."""
    schedule = SCHEDULES[toy]
    arrays = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), instance._replace(error=0.0)
    )
    form = "epsilon" if instance.error else "energy"
    posterior = cp.Diffusion(
        Single(arrays._replace(error=instance.error)),
        schedule,
        event_shape=(instance.size,),
        parameterization=form,
        time="log_snr",
        mode_depth=not instance.error,
        conditions=("log_weights", "means", "x"),
        log_snr_range=(-30.0, 30.0),
        label=("posterior"),
    )
    law = dist.Normal(
        jnp.asarray(instance.prior_mean), jnp.sqrt(jnp.asarray(instance.prior_variance))
    ).to_event(1)
    prior = cp.Analytic(law, schedule, label="prior")
    data = {
        "log_weights": instance.log_weights,
        "means": instance.means,
        "x": instance.xs,
    }
    return cp.compile(
        tall, posterior, prior, jax.tree.map(lambda a: np.asarray(a, np.float32), data)
    )


def draw(
    toy: str,
    instance: Instance,
    seed: int,
    count: int,
    sampler: cp.Sampler | None = None,
) -> tuple[np.ndarray, str, int]:
    """Draws (count, m) of a run, the default one unless told otherwise, what its status
    says, and evaluations."""
    result = cp.infer(
        density(toy, instance),
        jax.random.key(seed),
        num_chains=count,
        sampler=sampler,
        progress=False,
    )
    return result.unweighted()["theta"], str(result.status.code), result.evaluations
