"""The default recipe of estimators: the posterior of a simulator as a factor, from pairs that are there already."""

from __future__ import annotations

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.arguments import check_count, check_key
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.schedule import Schedule
from composeprob.training.denoiser import Box, PosteriorDenoiser
from composeprob.training.loss import draw_batch, losses
from composeprob.training.recipe import Batches, Data, LogSNR, Recipe
from composeprob.training.run import TrainingRun, finish, initial, make_advance, stretches


def estimator(
    theta: ArrayLike,
    x: ArrayLike,
    key: Array,
    *,
    prior: dist.Distribution | None = None,
    iterations: int = tuning.ESTIMATOR.iterations,
    progress: bool = True,
    label: str = "posterior",
) -> TrainingRun:
    r"""Trains the posterior p(θ | x) of a simulator on pairs (θ, x) that are there already, by the default recipe.

    The factor is in the units of θ and takes x in its own as the condition ``x``; both are standardised inside of the
    network. A tenth of the pairs, at most 2,000, is held out: of the averaged weights along the way the factor gets
    those whose denoising loss on these is least, so that few pairs are not learned by heart.

    Args:
        theta: parameters, (N, size), drawn from the prior.
        x: what the simulator returned for each: (N, d); or (N, m, d) for m observations that are exchangeable given
            θ, which the network then takes as a set.
        key: a typed random key.
        prior: of θ. If it is uniform in a box, draws stay within it and its walls need not be learned; a prior on all
            of ℝ changes nothing, and any other is refused.
        iterations: optimiser steps.
        progress: show a progress bar with the loss.
        label: the factor's name.

    Returns:
        A `TrainingRun`, whose ``held_out`` is the loss on pairs held out, before training and each 256 steps. Ctrl-C
        ends training early, with the weights that are best so far.

    Raises:
        ShapeError: arrays of other shapes, or of different lengths.
        InvalidValueError: fewer than 100 pairs, numbers that are not finite, an entry of θ that never varies, θ outside
            of its prior, or a prior of positive parameters and the like.
        WrongTypeError: no key, or a prior that is no NumPyro distribution.

    References:
        Denoising by a network of order 1 at every level: Karras et al. 2022, *Elucidating the design space of
        diffusion-based generative models*. Posteriors by diffusion: Sharrock et al. 2024, *Sequential neural score
        estimation*.

    Example:
        With parameters ``theta`` (N, size) and simulations ``x`` (N, d)::

            posterior = cp.training.estimator(theta, x, jax.random.key(0), prior=prior).factor

            @cp.program
            def answer(posterior, x):
                return cp.sample("theta", posterior.given(x=x))

            result = cp.infer(cp.compile(answer, posterior, observed), jax.random.key(1))
    """
    settings = tuning.ESTIMATOR
    check_key(key)
    check_count(iterations, "iterations")
    thetas, xs = _checked(theta, x)
    box = _box(prior, thetas)
    order_key, network_key, train_key, noise_key = jax.random.split(key, 4)
    order = np.asarray(jax.random.permutation(order_key, len(thetas)))
    count = min(len(thetas) // 10, settings.held_out)
    unseen, seen = order[:count], order[count:]
    network = PosteriorDenoiser(thetas[seen], xs[seen], box, network_key)
    recipe = _recipe(network, _pairs(thetas[seen], xs[seen]), thetas[seen].std(0), iterations)
    held_out = dataclasses.replace(recipe, data=_pairs(thetas[unseen], xs[unseen]))
    batch = draw_batch(held_out, noise_key, 2 * settings.noises * count)  # the same noise each time
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)

    @jax.jit
    def loss_held_out(parameters: PyTree[Array]) -> Array:
        factor = recipe.factor(eqx.combine(parameters, static))
        events = jax.tree.map(lambda a: a.reshape(-1, 2 * settings.noises, *a.shape[1:]), batch)
        return jnp.mean(jax.lax.map(lambda part: losses(factor, part).denoising, events, batch_size=32))

    first, advance = initial(recipe, network), make_advance(recipe, network, train_key)
    now, best = first, first.average
    found = [float(loss_held_out(best))]
    for now in stretches(recipe, first, advance, progress, tuning.TRAINING_STEPS):
        found.append(float(loss_held_out(now.average)))
        if found[-1] == min(found):
            best = now.average
    run = finish(recipe, network, now._replace(average=best), label)
    return dataclasses.replace(run, held_out=np.array(found))


def _checked(theta: ArrayLike, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    thetas, xs = (np.asarray(a, np.float32) for a in (theta, x))
    if thetas.ndim != 2 or xs.ndim not in (2, 3) or len(thetas) != len(xs) or not (thetas.size and xs.size):
        fix = "give N parameters (N, size) and their N simulations, (N, d), or (N, m, d) for sets of m observations."
        raise ShapeError(f"estimator got theta of shape {thetas.shape} and x of shape {xs.shape}.", fix=fix)
    if len(thetas) < tuning.ESTIMATOR.fewest:
        fix = f"simulate more: {tuning.ESTIMATOR.fewest} at the very least."
        raise InvalidValueError(f"estimator got {len(thetas)} pairs.", fix=fix)
    for name, values in (("theta", thetas), ("x", xs)):
        if bad := int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum()):
            raise InvalidValueError(
                f"{bad} of the {len(values)} rows of {name} hold numbers that are not finite.",
                fix="leave these pairs out, or give failed simulations a finite value that says so.",
            )
    if (constant := np.flatnonzero(thetas.std(0) == 0)).size:
        fix = "leave it out: there is nothing to learn."
        raise InvalidValueError(f"Entry {constant[0]} of theta is the same in all pairs.", fix=fix)
    return thetas, xs


def _box(prior: dist.Distribution | None, thetas: np.ndarray) -> Box | None:
    """Bounds (low, high) of a uniform prior; None for one on all of ℝ."""
    if prior is None:
        return None
    if not isinstance(prior, dist.Distribution):
        raise WrongTypeError(f"prior is a {type(prior).__name__}.", fix="pass a NumPyro distribution, or leave it out.")
    base = prior
    while isinstance(base, dist.Independent | dist.ExpandedDistribution):
        base = base.base_dist
    if isinstance(base, dist.Uniform):
        low, high = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), thetas.shape[1:]) for a in (base.low, base.high))
        if np.any((thetas < low) | (thetas > high)):
            fix = "give the prior that they were drawn from."
            raise InvalidValueError("Some theta lie outside of their prior's box.", fix=fix)
        return low, high
    if base.support in (dist.constraints.real, dist.constraints.real_vector):
        return None
    raise InvalidValueError(
        f"estimator knows no prior like {type(base).__name__}, which has bounds.",
        fix="train on parameters without bounds, such as log(theta) of positive ones, and transform the draws back; "
        "or leave prior out: the bounds are then learned.",
    )


def _pairs(theta: np.ndarray, x: np.ndarray) -> Data:
    events, conditions = jnp.asarray(theta), jnp.asarray(x)

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        index = jax.random.randint(key, (n,), 0, len(events))
        return events[index], {"x": conditions[index]}

    return data


def _recipe(network: PosteriorDenoiser, data: Data, scale: np.ndarray, iterations: int) -> Recipe:
    """Levels from where nothing is left of θ to a hundredth of the narrowest width that a linear regression leaves."""
    import optax

    settings = tuning.ESTIMATOR
    low, high = settings.low - 2 * math.log(scale.max()), settings.high - 2 * math.log(scale.min())
    high = max(high, settings.residual - 2 * math.log(float(network.known["deviation"].min())))
    return Recipe(
        network=lambda key: network, data=data, schedule=Schedule.log_snr(settings.levels, low, high),
        log_snr=LogSNR(low, high, focus=(low + settings.focus[0], high - settings.focus[1])), conditions=("x",),
        iterations=iterations, batches=Batches(settings.batch, antithetic=True),
        learning_rate=functools.partial(optax.cosine_decay_schedule, settings.rate),
    )  # fmt: skip
