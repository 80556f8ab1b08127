"""The denoising loss ‖ε + σ·∇log f(α·x₀ + σ·ε)‖², the same for every parameterization; the losses that compare levels
or conditions; and the cross-entropy of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from composeprob.factors.classifier import Classifier
from composeprob.factors.diffusion import Diffusion
from composeprob.schedule import Noise
from composeprob.training.recipe import CrossCondition, CrossLevel, Recipe


class Batch(NamedTuple):
    """A `Batch` holds events with their noise, every leaf with a leading batch axis.

    Attributes:
        events: clean events x₀, shape (n, *event_shape).
        epsilon: standard normal, of the same shape.
        noise: the noise of each event, fields of shape (n,).
        other: the noise of another level for each event, which the cross-level loss compares with its own; None
            without that loss.
        conditions: ``{name: (n, …)}``.
        foreign: the conditions of m other events, which the cross-condition loss compares with an event's own,
            ``{name: (n, m, …)}``; None without that loss.
        variant: one more condition to compare with, ``{name: (n, 1, …)}``; None without a `CrossCondition` that varies.
    """

    events: Array
    epsilon: Array
    noise: Noise
    other: Noise | None
    conditions: dict[str, Array]
    foreign: dict[str, Array] | None = None
    variant: dict[str, Array] | None = None


class Losses(NamedTuple):
    """`Losses` holds the losses of every event, each of shape (n,); zero where a recipe has no such loss."""

    denoising: Array
    cross_level: Array
    cross_condition: Array


def draw_batch(recipe: Recipe, key: Array, size: int) -> Batch:
    """Draws ``size`` events of a recipe: data, conditions (some dropped), log-SNR and noise."""
    data_key, noise_key, normal_key, drop_key = jax.random.split(key, 4)
    level, condition = recipe.loss(CrossLevel), recipe.loss(CrossCondition)
    n = size // 2 if recipe.batch.antithetic else size
    drawn: Any = recipe.data(data_key, n)
    events, conditions = drawn if isinstance(drawn, tuple) else (drawn, {})
    noise, other = (recipe.noise(noise_key, n), None) if level is None else recipe.noise_pairs(noise_key, n, level.gap)
    epsilon = jax.random.normal(normal_key, events.shape, events.dtype)
    if recipe.condition.dropout:
        conditions = _drop(recipe, drop_key, conditions, n)
    if recipe.batch.antithetic:
        twice = (events, noise, other, dict(conditions))
        events, noise, other, conditions = jax.tree.map(lambda a: jnp.concatenate([a, a]), twice)
        epsilon = jnp.concatenate([epsilon, -epsilon])
    foreign = None
    if condition is not None:  # events are independent, so the next ones' conditions are as good as any others'
        others = range(1, condition.others + 1)
        foreign = jax.tree.map(lambda a: jnp.stack([jnp.roll(a, k, axis=0) for k in others], axis=1), conditions)
    variant = None
    if condition is not None and condition.vary is not None:
        drawn = condition.vary(jax.random.fold_in(drop_key, 1), dict(conditions))
        variant = jax.tree.map(lambda a: a[:, None], drawn)
    return Batch(events, epsilon, noise, other, dict(conditions), foreign, variant)


def losses(factor: Diffusion | Classifier, batch: Batch, denoising: bool = True) -> Losses:
    """Computes every event's losses; a classifier has its cross-entropy in the place of the first, and no other.

    Without ``denoising`` no score is asked for, and the first loss is zero.

    The denoising loss is the mean over the event's elements. For a score-only form this is the error of ε̂; for the
    energy forms it matches ∇ₓE to ε, as both have −σ·∇log f in the place of ε̂. A model that predicts no noise at all
    has loss 1.

    The cross-level loss asks which of two levels x came from: −log sigmoid(log f(x, λ) − log f(x, λ′)), with λ the
    level that it did come from. Batches hold as many events of λ as of λ′, so that its least value is reached where
    log f(x, λ) − log f(x, λ′) = log p_λ(x) − log p_λ′(x), constants included. A score fixes log f on each connected
    region only; this ties each region to the same region at a noisier level, and so on to where all regions are one.

    The cross-condition loss asks which of m + 1 conditions x came with, its own c or those of m other events:
    −log(f(x|c, λ)/Σ_j f(x|c_j, λ)). Its least value is reached where log f(x|c) − log f(x|c′) =
    log p_λ(x|c) − log p_λ(x|c′), constants included; with dropout "no condition" is one of them. What a vague condition
    (a caption) contains about x hardly changes the denoising loss, and is all that this loss depends on. Its
    ``vary`` adds the same loss against a condition that is close to c; as close conditions lead to one another
    equally often, its least value is reached at the same log-densities.

    References:
        Gutmann and Hyvärinen 2012, *Noise-contrastive estimation*; van den Oord et al. 2018, *Contrastive predictive
        coding*, for many conditions at once.
    """
    none = jnp.zeros(())

    def event_losses(event: Batch) -> Losses:
        x = event.noise.alpha * event.events + event.noise.sigma * event.epsilon
        at = lambda given: factor.evaluate(x, event.noise, given)  # noqa: E731
        rivals = [conditions for conditions in (event.foreign, event.variant) if conditions is not None]
        if denoising or not rivals:
            log_density, score = at(event.conditions)
            if isinstance(factor, Classifier):
                assert log_density is not None
                return Losses(-log_density, none, none)
            error = jnp.mean((event.epsilon + event.noise.sigma * score) ** 2) if denoising else none
            others = _log_densities(at, rivals)
        else:
            true = jax.tree.map(lambda a: a[None], event.conditions)
            (log_density,), *others = _log_densities(at, [true, *rivals])
            error = none
        level = none
        if event.other is not None:
            level = _contrast(log_density, factor.evaluate(x, event.other, event.conditions)[0])
        condition = sum((_contrast(log_density, values) for values in others), none)
        return Losses(error, level, condition)

    return jax.vmap(event_losses)(batch)


def _log_densities(
    at: Callable[[dict[str, Array]], tuple[Any, Array]], groups: Sequence[dict[str, Array]]
) -> list[Array]:
    """log f given each of a group's conditions, one array a group. All are asked for in one batch, so that what depends
    on x alone is computed once."""
    if not groups:
        return []
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups)
    ends = np.cumsum([len(jax.tree.leaves(group)[0]) for group in groups])
    return jnp.split(jax.vmap(lambda given: at(given)[0])(joined), ends[:-1])


def _contrast(true: Array | None, others: Array | None) -> Array:
    """−log(e^own/(e^own + Σ e^others)) of log-densities; a recipe with such a loss has an energy."""
    assert true is not None
    assert others is not None
    return jax.nn.logsumexp(jnp.append(others, true)) - true


def _drop(recipe: Recipe, key: Array, conditions: Mapping[str, Array], n: int) -> dict[str, Array]:
    none = recipe.condition.values
    assert not isinstance(none, tuple)  # which have no dropout
    drop = jax.random.bernoulli(key, recipe.condition.dropout, (n,))

    def replace(value: Array, other: Array) -> Array:
        return jnp.where(drop.reshape((n,) + (1,) * (value.ndim - 1)), other, value)

    return {name: replace(value, jnp.asarray(none[name])) for name, value in conditions.items()}
