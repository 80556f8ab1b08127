"""The denoising loss ‖ε + σ·∇log f(α·x₀ + σ·ε)‖², the same for every parameterization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.factors.diffusion import Diffusion
from composeprob.schedule import Noise
from composeprob.training.recipe import Recipe


class Batch(NamedTuple):
    """Events with their noise, every leaf with a leading batch axis.

    Attributes:
        events: clean events x₀, shape (n, *event_shape).
        epsilon: standard normal, of the same shape.
        noise: the noise of each event, fields of shape (n,).
        conditions: ``{name: (n, …)}``.
    """

    events: Array
    epsilon: Array
    noise: Noise
    conditions: dict[str, Array]


def draw(recipe: Recipe, key: Array, size: int) -> Batch:
    """``size`` events of a recipe: data, conditions (some dropped), log-SNR and noise."""
    data_key, noise_key, normal_key, drop_key = jax.random.split(key, 4)
    n = size // 2 if recipe.antithetic else size
    drawn: Any = recipe.data(data_key, n)
    events, conditions = drawn if isinstance(drawn, tuple) else (drawn, {})
    noise = recipe.noise(noise_key, n)
    epsilon = jax.random.normal(normal_key, events.shape, events.dtype)
    if recipe.condition_dropout:
        conditions = _drop(recipe, drop_key, conditions, n)
    if recipe.antithetic:
        twice = (events, noise, dict(conditions))
        events, noise, conditions = jax.tree.map(lambda a: jnp.concatenate([a, a]), twice)
        epsilon = jnp.concatenate([epsilon, -epsilon])
    return Batch(events, epsilon, noise, dict(conditions))


def losses(factor: Diffusion, batch: Batch) -> Array:
    """Every event's loss, shape (n,), each the mean over the event's elements.

    For a score-only form this is the error of ε̂; for the energy forms it matches ∇ₓE to ε, as both have
    −σ·∇log f in the place of ε̂. A model that predicts no noise at all has loss 1.
    """

    def one(event: Batch) -> Array:
        x = event.noise.alpha * event.events + event.noise.sigma * event.epsilon
        _, score = factor.evaluate(x, event.noise, event.conditions)
        return jnp.mean((event.epsilon + event.noise.sigma * score) ** 2)

    return jax.vmap(one)(batch)


def _drop(recipe: Recipe, key: Array, conditions: Mapping[str, Array], n: int) -> dict[str, Array]:
    assert not isinstance(recipe.conditions, tuple)  # the recipe refuses dropout without values
    drop = jax.random.bernoulli(key, recipe.condition_dropout, (n,))

    def replace(value: Array, none: Array) -> Array:
        return jnp.where(drop.reshape((n,) + (1,) * (value.ndim - 1)), none, value)

    return {name: replace(value, jnp.asarray(recipe.conditions[name])) for name, value in conditions.items()}
