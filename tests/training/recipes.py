"""Tiny recipes for the tests of training."""

import dataclasses

import jax
import numpyro.distributions as dist

import composeprob as cp
from composeprob.models.networks.residual_mlp_eqx import ResidualMLP
from composeprob.training import Recipe

NORMAL = dist.Normal(jax.numpy.array([0.3, -0.2]), jax.numpy.array([0.5, 0.8])).to_event(1)


def tiny(**changes):
    """A small network that learns a Gaussian; a second or so."""
    recipe = Recipe(
        network=lambda key: ResidualMLP(2, hidden=16, blocks=1, embedding=8, key=key),
        data=lambda key, n: NORMAL.sample(key, (n,)),
        event_shape=(2,),
        schedule=cp.Schedule.log_snr(10, min=-6.0, max=4.0),
        log_snr=(-6.0, 4.0),
        iterations=24,
        batch_size=16,
        learning_rate=3e-3,
    )
    return dataclasses.replace(recipe, **changes)
