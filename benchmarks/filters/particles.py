"""Filters that know the equations, and what all filters are asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from filters.lorenz import START, VARIANCE, flow, noised

BURN_IN = 16
"""States at the start whose errors do not count."""


class Filtered(NamedTuple):
    """Estimates of a filter for a series.

    Attributes:
        means: of the states given the data so far, (T + 1, …).
        log_evidence: of all data so far, (T + 1,); NaN of a filter without one.
        seconds: that it took.
    """

    means: np.ndarray
    log_evidence: np.ndarray
    seconds: float

    def error(self, truth: np.ndarray, burn_in: int = BURN_IN) -> float:
        """Return the mean analysis error after the first observations."""
        squares = np.mean((self.means - truth) ** 2, axis=-1)
        return float(np.sqrt(squares)[burn_in:].mean())


def systematic(key: Array, weights: Array) -> Array:
    """Return the particles that systematic resampling chooses, (N,)."""
    number = len(weights)
    places = (jax.random.uniform(key) + jnp.arange(number)) / number
    chosen = jnp.searchsorted(jnp.cumsum(weights), places)
    return jnp.minimum(chosen, number - 1)


class Setting(NamedTuple):
    """Equations, first state and observations of a series.

    Attributes:
        start: mean of the first state.
        deviation: of the first state.
        flow: function of states: those at the next observation.
        every: one number in so many is seen.
        variance: of observations.
    """

    start: Array
    deviation: float
    flow: Callable[[Array], Array]
    every: int
    variance: float


LORENZ_63 = Setting(START, VARIANCE**0.5, flow, 1, VARIANCE)


def particle_filter(
    observations: np.ndarray,
    particles: int,
    noise: float,
    seed: int,
    setting: Setting = LORENZ_63,
) -> Filtered:
    """A bootstrap particle filter by the equations, resampled at every observation."""
    start, deviation, flow, every, variance = setting

    def weighed(x: Array, y: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
        law = dist.Normal(x[:, ::every], variance**0.5)
        log_likelihood = law.log_prob(y).sum(-1)
        increment = jax.nn.logsumexp(log_likelihood) - jnp.log(particles)
        weights = jax.nn.softmax(log_likelihood)
        return x[systematic(key, weights)], (weights @ x, increment)

    def advance(x: Array, given: tuple[Array, Array]) -> tuple[Array, Any]:
        y, key = given
        noise_key, choice_key = jax.random.split(key)
        return weighed(noised(noise_key, flow(x), noise), y, choice_key)

    @jax.jit
    def filtered(ys: Array, key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, len(ys) + 1)
        centre = jnp.broadcast_to(start, (particles, len(start)))
        x = noised(keys[-1], centre, deviation)
        x, (mean, increment) = weighed(x, ys[0], keys[0])
        _, (means, increments) = jax.lax.scan(advance, x, (ys[1:], keys[1:-1]))
        joined = jnp.concatenate([increment[None], increments])
        return jnp.concatenate([mean[None], means]), joined

    began = time.monotonic()
    means, increments = filtered(jnp.asarray(observations), jax.random.key(seed))
    evidence = np.cumsum(np.asarray(increments, float))
    return Filtered(np.asarray(means), evidence, time.monotonic() - began)


class Paths(NamedTuple):
    """Particles' paths under a posterior, (N, T, 3), and its log-evidence."""

    states: np.ndarray
    log_evidence: float


def path_filter(
    log_likelihoods: Callable[[Array], Array],
    data: Array,
    first: Array,
    advance: Callable[[Array, Array], Array],
    key: Array,
) -> Paths:
    """A bootstrap particle filter that resamples whole paths at every state.

    Args:
        log_likelihoods: of particles (N, 3) and a datum, (N,).
        data: one for each state, (T, …).
        first: draws of the first state, (N, 3).
        advance: ``advance(key, x)`` draws the states after x.
        key: a random key.
    """
    particles = len(first)

    def step(carry: tuple[Array, Array], given: tuple[Array, Array, Array]) -> Any:
        x, paths = carry
        y, number, key = given
        noise_key, choice_key = jax.random.split(key)
        x = jnp.where(number == 0, x, advance(noise_key, x))
        paths = paths.at[:, number].set(x)
        log_weights = log_likelihoods(x, y)
        increment = jax.nn.logsumexp(log_weights) - jnp.log(particles)
        chosen = systematic(choice_key, jax.nn.softmax(log_weights))
        return (x[chosen], paths[chosen]), increment

    @jax.jit
    def filtered(data: Array, first: Array, key: Array) -> tuple[Array, Array]:
        number = len(data)
        paths = jnp.zeros((particles, number, 3))
        keys = jax.random.split(key, number)
        given = data, jnp.arange(number), keys
        (_, paths), increments = jax.lax.scan(step, (first, paths), given)
        return paths, increments.sum()

    paths, log_evidence = filtered(data, first, key)
    return Paths(np.asarray(paths), float(log_evidence))
