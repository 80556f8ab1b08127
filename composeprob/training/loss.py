"""The denoising loss ‖ε + σ·∇log f(α·x₀ + σ·ε)‖², the same for every parameterization; the losses that compare levels
or conditions; and the cross-entropy of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Events with their noise, every leaf with a leading batch axis; None where no loss compares with it."""

    events: Array  # clean events x₀, (n, *event_shape)
    epsilon: Array  # standard normal
    noise: Noise
    other: Noise | None  # of another level, which the cross-level loss compares with the event's own
    conditions: dict[str, Array]  # {name: (n, …)}
    foreign: dict[str, Array] | None = None  # of m other events, {name: (n, m, …)}, for the cross-condition loss
    variant: dict[str, Array] | None = None  # one more condition to compare with, {name: (n, 1, …)}

    @property
    def noised(self) -> Array:
        """Of one event, α·x₀ + σ·ε."""
        return self.noise.alpha * self.events + self.noise.sigma * self.epsilon


class Losses(NamedTuple):
    """The losses of every event, each of shape (n,); zero where a recipe has no such loss."""

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
        absent: Any = recipe.condition.values
        drop = jax.random.bernoulli(drop_key, recipe.condition.dropout, (n,))
        replace = jax.vmap(jnp.where, in_axes=(0, None, 0))
        conditions = {name: replace(drop, jnp.asarray(absent[name]), value) for name, value in conditions.items()}
    if recipe.batch.antithetic:
        twice = (events, noise, other, dict(conditions))
        events, noise, other, conditions = jax.tree.map(lambda a: jnp.concatenate([a, a]), twice)
        epsilon = jnp.concatenate([epsilon, -epsilon])
    foreign = variant = None
    if condition is not None:  # events are independent, so the next ones' conditions are as good as any others'
        others = range(1, condition.others + 1)
        foreign = jax.tree.map(lambda a: jnp.stack([jnp.roll(a, k, axis=0) for k in others], axis=1), conditions)
        if condition.vary is not None:
            drawn = condition.vary(jax.random.fold_in(drop_key, 1), dict(conditions))
            variant = jax.tree.map(lambda a: a[:, None], drawn)
    return Batch(events, epsilon, noise, other, dict(conditions), foreign, variant)


def losses(factor: Diffusion | Classifier, batch: Batch, denoising: bool = True) -> Losses:
    """Computes every event's losses; a classifier has its cross-entropy in the place of the first, and no other.

    Without ``denoising`` no score is asked for, and the first loss is zero. It is the mean over the event's elements,
    for a score-only form the error of ε̂; for the energy forms it matches ∇ₓE to ε, as both have −σ·∇log f in the place
    of ε̂. A model that predicts no noise at all has loss 1.

    The cross-level loss is −log sigmoid(log f(x, λ) − log f(x, λ′)), x being of level λ. Batches hold as many events of
    λ as of λ′, so that it is least where log f(x, λ) − log f(x, λ′) = log p_λ(x) − log p_λ′(x), constants included. A
    score fixes log f on each connected region only; this ties each to the same region at a noisier level, and so on to
    where all regions are one.

    The cross-condition loss is −log(f(x|c, λ)/Σ_j f(x|c_j, λ)), c_j being c and the conditions of m other events. It is
    least where log f(x|c) − log f(x|c′) = log p_λ(x|c) − log p_λ(x|c′), constants included; with dropout "no condition"
    is one of them. Its ``vary`` adds the same loss against a condition that is close to c; as close conditions lead to
    one another equally often, it is least at the same log-densities.
    """
    zero = jnp.zeros(())

    def event_losses(event: Batch) -> Losses:
        x = event.noised
        at = lambda given: factor.evaluate(x, event.noise, given)  # noqa: E731
        rivals = [conditions for conditions in (event.foreign, event.variant) if conditions is not None]
        if denoising or not rivals:
            log_density, score = at(event.conditions)
            if isinstance(factor, Classifier):
                assert log_density is not None
                return Losses(-log_density, zero, zero)
            error = jnp.mean((event.epsilon + event.noise.sigma * score) ** 2) if denoising else zero
            others = _log_densities(at, rivals)
        else:
            true = jax.tree.map(lambda a: a[None], event.conditions)
            (log_density,), *others = _log_densities(at, [true, *rivals])
            error = zero
        level = zero
        if event.other is not None:
            level = _contrast(log_density, factor.evaluate(x, event.other, event.conditions)[0])
        condition = sum((_contrast(log_density, values) for values in others), zero)
        return Losses(error, level, condition)

    return jax.vmap(event_losses)(batch)


def _log_densities(at: Callable[..., tuple[Any, Array]], groups: Sequence[dict[str, Array]]) -> list[Array]:
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
