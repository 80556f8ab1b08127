"""Other methods for posteriors of many observations, written anew from the papers, in
double precision.

GAUSS and JAC (Linhart et al., arXiv 2404.07593) combine the scores by the covariances
of θ given θ_t, estimated from draws of each individual posterior, or by the Jacobian of
each score; Langevin (F-NPSE, Geffner et al., arXiv 2209.14249) takes unadjusted steps
along their plain sum at every level. "Reverse" is the reverse diffusion of that sum.
Each with the settings that its authors print.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .instances import FLOOR, Instance, log_posterior, mistake, signal

BATCH = 64
"""Chains whose Jacobians are held at once."""


def deviation(t: Array) -> Array:
    """The papers' σ(t)."""
    return jnp.sqrt(1 - signal(t) + FLOOR)


def posterior_score(instance: Instance, theta: Array, t: Array, i: Any) -> Array:
    """∇ log p(θ_t | x_i), wrong by the instance's error; θ of shape (m,)."""
    at = jnp.asarray(instance.log_weights)[i], jnp.asarray(instance.means)[i]
    amplitude = jnp.sqrt(signal(t))
    sigma = jnp.sqrt(1 - signal(t))
    score = jax.grad(log_posterior, argnums=1)(instance, theta, at, amplitude, sigma)
    if instance.error:
        score = score - mistake(
            instance, theta, jnp.asarray(instance.xs)[i], t
        ) / deviation(t)
    return score


def prior_score(instance: Instance, theta: Array, t: Array) -> Array:
    """∇ log p(θ_t), exact."""
    alpha = signal(t)
    mean, variance = (
        jnp.asarray(instance.prior_mean),
        jnp.asarray(instance.prior_variance),
    )
    return -(theta - jnp.sqrt(alpha) * mean) / (alpha * variance + 1 - alpha)


def each_score(instance: Instance, theta: Array, t: Array) -> Array:
    """All individual scores, (n, m)."""
    return jax.vmap(lambda i: posterior_score(instance, theta, t, i))(
        jnp.arange(len(instance.xs))
    )


def ddim(
    score: Callable[[Array, Array], Array],
    key: Array,
    shape: tuple[int, ...],
    steps: int,
    eta: float,
) -> Array:
    """Reverse diffusion from N(0, I) by DDIM, time falling evenly from 1 to 0;
    ``score`` takes θ of ``shape``."""
    start_key, key = jax.random.split(key)

    def step(theta: Array, i: Array) -> tuple[Array, None]:
        t = 1 - i / steps
        alpha = signal(t)
        later = signal(t - 1 / steps)
        bridge = eta * jnp.sqrt((1 - later) / (1 - alpha) * (1 - alpha / later))
        clean = (theta + (1 - alpha) * score(theta, t)) / jnp.sqrt(alpha)
        noise = (theta - jnp.sqrt(alpha) * clean) / jnp.sqrt(1 - alpha)
        kept = jnp.sqrt(jnp.maximum(1 - later - bridge**2, 0))
        moved = jnp.sqrt(later) * clean + kept * noise
        return moved + bridge * jax.random.normal(
            jax.random.fold_in(key, i), shape
        ), None

    return jax.lax.scan(step, jax.random.normal(start_key, shape), jnp.arange(steps))[0]


def naive_sum(instance: Instance, theta: Array, t: Array) -> Array:
    """Σ_i ∇ log p(θ_t | x_i) + (1 − n)·∇ log p(θ_t)."""
    n = len(instance.xs)
    return each_score(instance, theta, t).sum(0) + (1 - n) * prior_score(
        instance, theta, t
    )


def _combined(instance: Instance, theta: Array, t: Array, precisions: Array) -> Array:
    """Λ⁻¹(Σ_i P_i·s_i + (1 − n)·P₀·s₀), Λ = Σ_i P_i + (1 − n)·P₀, of precisions (n, m,
    m) of θ given θ_t."""
    n = len(instance.xs)
    alpha = signal(t)
    prior = jnp.diag(
        1 / jnp.asarray(instance.prior_variance) + alpha / deviation(t) ** 2
    )
    scores = each_score(instance, theta, t)
    weighted = jnp.einsum("nab,nb->a", precisions, scores) + (
        1 - n
    ) * prior @ prior_score(instance, theta, t)
    return jnp.linalg.solve(precisions.sum(0) + (1 - n) * prior, weighted)


def gauss(
    instance: Instance, key: Array, count: int, steps: int = 1000, eta: float = 1.0
) -> Array:
    draw_key, key = jax.random.split(key)
    shape = (1000, len(instance.xs), instance.size)

    def alone(theta: Array, t: Array) -> Array:
        index = jnp.arange(shape[1])
        one = jax.vmap(lambda theta, i: posterior_score(instance, theta, t, i))
        return jax.vmap(lambda row: one(row, index))(theta)

    draws = ddim(alone, draw_key, shape, 100, 0.5)
    away = draws - draws.mean(0)
    inverses = jnp.linalg.inv(jnp.einsum("kna,knb->nab", away, away) / (shape[0] - 1))

    def score(theta: Array, t: Array) -> Array:
        precisions = inverses + signal(t) / deviation(t) ** 2 * jnp.eye(instance.size)
        return jax.vmap(lambda one: _combined(instance, one, t, precisions))(theta)

    return ddim(score, key, (count, instance.size), steps, eta)


def jac(
    instance: Instance, key: Array, count: int, steps: int = 400, eta: float = 0.8
) -> Array:
    index = jnp.arange(len(instance.xs))
    eye = jnp.eye(instance.size)
    # The score of a Gaussian has one Jacobian everywhere.
    constant = not instance.error and len(instance.covariances) == 1

    def precisions(theta: Array, t: Array) -> Array:
        one = jax.jacfwd(lambda theta, i: posterior_score(instance, theta, t, i))
        jacobians = jax.vmap(lambda i: one(theta, i))(index)
        sigma2 = deviation(t) ** 2
        return jnp.linalg.inv(sigma2 / signal(t) * (eye + sigma2 * jacobians))

    def score(theta: Array, t: Array) -> Array:
        if constant:
            known = precisions(theta[0], t)
            return jax.vmap(lambda one: _combined(instance, one, t, known))(theta)
        return jax.lax.map(
            lambda one: _combined(instance, one, t, precisions(one, t)),
            theta,
            batch_size=BATCH,
        )

    return ddim(score, key, (count, instance.size), steps, eta)


def langevin(
    instance: Instance,
    key: Array,
    count: int,
    steps: int = 400,
    inner: int = 5,
    tau: float = 0.5,
) -> Array:
    start_key, key = jax.random.split(key)
    shape = (count, instance.size)

    def step(theta: Array, i: Array) -> tuple[Array, None]:
        t = 1 - i / steps
        gamma = jnp.where(i < steps - 1, signal(t) / signal(t - 1 / steps), signal(t))
        delta = tau * (1 - gamma) / jnp.sqrt(gamma)
        for j in range(inner):
            noise = jax.random.normal(jax.random.fold_in(key, inner * i + j), shape)
            score = jax.vmap(lambda one: naive_sum(instance, one, t))(theta)
            theta = theta + delta * score + jnp.sqrt(2 * delta) * noise
        return theta, None

    return jax.lax.scan(step, jax.random.normal(start_key, shape), jnp.arange(steps))[0]


def reverse(
    instance: Instance, key: Array, count: int, steps: int = 400, eta: float = 0.8
) -> Array:
    def score(theta: Array, t: Array) -> Array:
        return jax.vmap(lambda one: naive_sum(instance, one, t))(theta)

    return ddim(score, key, (count, instance.size), steps, eta)


RIVALS = {"GAUSS": gauss, "JAC": jac, "Langevin": langevin, "reverse": reverse}


@partial(jax.jit, static_argnums=(0, 3, 4))
def _drawn(name: str, arrays: Instance, key: Array, count: int, error: float) -> Array:
    return RIVALS[name](arrays._replace(error=error), key, count)


def draw(name: str, instance: Instance, seed: int, count: int) -> np.ndarray:
    """Draws (count, m) by a method, compiled once for all instances of a cell."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, instance._replace(error=0.0))
        return np.asarray(
            _drawn(name, arrays, jax.random.key(seed), count, instance.error)
        )
