"""The denoising loss ‖ε + σ·∇log f(α·x₀ + σ·ε)‖², the same for every parameterization; the cross-level loss; and the
cross-entropy of classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.schedule import Noise
from composeprob.training.recipe import Recipe


class Batch(NamedTuple):
    """Events with their noise, every leaf with a leading batch axis.

    Attributes:
        events: clean events x₀, shape (n, *event_shape).
        epsilon: standard normal, of the same shape.
        noise: the noise of each event, fields of shape (n,).
        other: the noise that each event's own is told apart from in the cross-level loss; None without it.
        conditions: ``{name: (n, …)}``.
    """

    events: Array
    epsilon: Array
    noise: Noise
    other: Noise | None
    conditions: dict[str, Array]


def draw(recipe: Recipe, key: Array, size: int) -> Batch:
    """``size`` events of a recipe: data, conditions (some dropped), log-SNR and noise."""
    data_key, noise_key, normal_key, drop_key = jax.random.split(key, 4)
    n = size // 2 if recipe.antithetic else size
    drawn: Any = recipe.data(data_key, n)
    events, conditions = drawn if isinstance(drawn, tuple) else (drawn, {})
    noise, other = recipe.noise_pairs(noise_key, n) if recipe.cross_level else (recipe.noise(noise_key, n), None)
    epsilon = jax.random.normal(normal_key, events.shape, events.dtype)
    if recipe.condition_dropout:
        conditions = _drop(recipe, drop_key, conditions, n)
    if recipe.antithetic:
        twice = (events, noise, other, dict(conditions))
        events, noise, other, conditions = jax.tree.map(lambda a: jnp.concatenate([a, a]), twice)
        epsilon = jnp.concatenate([epsilon, -epsilon])
    return Batch(events, epsilon, noise, other, dict(conditions))


def losses(factor: Diffusion | Classifier, batch: Batch) -> tuple[Array, Array]:
    """Every event's denoising loss and cross-level loss, each of shape (n,); of a classifier its cross-entropy and 0.

    The denoising loss is the mean over the event's elements. For a score-only form this is the error of ε̂; for the
    energy forms it matches ∇ₓE to ε, as both have −σ·∇log f in the place of ε̂. A model that predicts no noise at all
    has loss 1.

    The cross-level loss asks which of two levels x came from: −log sigmoid(log f(x, λ) − log f(x, λ′)), with λ the
    level that it did come from. Batches hold as many events of λ as of λ′, so that its least value is reached where
    log f(x, λ) − log f(x, λ′) = log p_λ(x) − log p_λ′(x), constants included. A score fixes log f on each connected
    region only; this ties each region to the same region at a noisier level, and so on to where all regions are one.
    It is zero for a batch without other levels.
    """

    def one(event: Batch) -> tuple[Array, Array]:
        x = event.noise.alpha * event.events + event.noise.sigma * event.epsilon
        log_density, score = factor.evaluate(x, event.noise, event.conditions)
        if isinstance(factor, Classifier):
            assert log_density is not None
            return -log_density, jnp.zeros(())
        denoising = jnp.mean((event.epsilon + event.noise.sigma * score) ** 2)
        if event.other is None:
            return denoising, jnp.zeros(())
        at_other, _ = factor.evaluate(x, event.other, event.conditions)
        assert log_density is not None  # a recipe with a cross-level loss has an energy
        assert at_other is not None
        return denoising, jax.nn.softplus(at_other - log_density)

    return jax.vmap(one)(batch)


def _drop(recipe: Recipe, key: Array, conditions: Mapping[str, Array], n: int) -> dict[str, Array]:
    assert not isinstance(recipe.conditions, tuple)  # the recipe refuses dropout without values
    drop = jax.random.bernoulli(key, recipe.condition_dropout, (n,))

    def replace(value: Array, none: Array) -> Array:
        return jnp.where(drop.reshape((n,) + (1,) * (value.ndim - 1)), none, value)

    return {name: replace(value, jnp.asarray(recipe.conditions[name])) for name, value in conditions.items()}
