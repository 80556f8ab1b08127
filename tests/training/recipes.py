"""Tiny recipes for the tests of training."""

import dataclasses
import functools

import equinox as eqx
import jax
import numpyro.distributions as dist
import optax

import composeprob as cp
from composeprob.models.networks.residual_mlp_eqx import ResidualMLP
from composeprob.training import Batches, Recipe
from composeprob.training.loop import draw_batch

MEAN = jax.numpy.array([0.3, -0.2])
DEVIATION = jax.numpy.array([0.5, 0.8])
NORMAL = dist.Normal(MEAN, DEVIATION).to_event(1)


def tiny(size=16, chunk=None, antithetic=False, **changes):
    """A small network that learns a Gaussian; a second or so."""
    recipe = Recipe(
        network=lambda key: ResidualMLP(2, hidden=16, blocks=1, embedding=8, key=key),
        data=lambda key, n: NORMAL.sample(key, (n,)),
        schedule=cp.Schedule.log_snr(10, min=-6.0, max=4.0),
        log_snr=(-6.0, 4.0),
        iterations=24,
        batches=Batches(size, chunk, antithetic),
        learning_rate=3e-3,
    )
    return dataclasses.replace(recipe, **changes)


def batch_of(recipe, key, size):
    """A batch as training draws it: in one compilation."""
    return jax.jit(lambda key: draw_batch(recipe, key, size))(key)


def untrained(recipe, key):
    """The network before training: one compilation instead of one for each layer."""
    return eqx.filter_jit(recipe.untrained)(key)


cosine = functools.partial(functools.partial, optax.cosine_decay_schedule)
"""``cosine(3e-3)`` is a learning rate that falls to 0."""
