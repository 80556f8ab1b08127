"""The default recipe of estimators: the posterior of a simulator as a factor, from
pairs that are there already.

Its network corrects a linear regression, and sees sets of observations.
"""

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
from composeprob.factors.gaussians import base_of
from composeprob.factors.one_dimension import log_normal_mass
from composeprob.schedule import Schedule
from composeprob.training.loop import (
    TrainingRun,
    draw_batch,
    finish,
    initial,
    losses,
    make_advance,
    stretches,
)
from composeprob.training.recipe import Batches, Data, LogSNR, Recipe

Box = tuple[Array, Array]


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
    r"""Trains the posterior p(θ | x) of a simulator on pairs (θ, x) that are there
    already, by the default recipe.

    The factor is in the units of θ and takes x in its own as the condition ``x``; both
    are standardised inside of the network. A tenth of the pairs, at most 2,000, is held
    out: of the averaged weights along the way the factor gets those whose denoising
    loss on these is least, so that few pairs are not learned by heart.

    Args:
        theta: parameters, (N, size), drawn from the prior.
        x: what the simulator returned for each: (N, d); or (N, m, d) for m observations
            that are exchangeable given θ, which the network then takes as a set.
        key: a typed random key.
        prior: of θ. If it is uniform in a box, draws stay within it and its walls need
            not be learned; a prior on all of ℝ changes nothing, and any other is
            refused.
        iterations: optimiser steps.
        progress: show a progress bar with the loss.
        label: the factor's name.

    Returns:
        A `TrainingRun`, whose ``held_out`` is the loss on pairs held out, before
        training and each 256 steps. Ctrl-C ends training early, with the weights that
        are best so far.

    Raises:
        ShapeError: arrays of other shapes, or of different lengths.
        InvalidValueError: fewer than 100 pairs, numbers that are not finite, an entry
            of θ that never varies, θ outside of its prior, or a prior of positive
            parameters and the like.
        WrongTypeError: no key, or a prior that is no NumPyro distribution.

    References:
        Denoising by a network of order 1 at every level: Karras et al. 2022,
        *Elucidating the design space of diffusion-based generative models*. Posteriors
        by diffusion: Sharrock et al. 2024, *Sequential neural score estimation*.

    Example:
        With parameters ``theta`` (N, size) and simulations ``x`` (N, d)::

            posterior = cp.training.estimator(theta, x, jax.random.key(0),
            prior=prior).factor

            @cp.program
            def answer(posterior, x):
                return cp.sample("theta", posterior.given(x=x))

            result = cp.infer(cp.compile(answer, posterior, observed),
            jax.random.key(1))
    """
    settings = tuning.ESTIMATOR
    check_key(key)
    check_count(iterations, "iterations")
    thetas, xs = _checked(theta, x)
    box = _box(prior, thetas)
    order_key, network_key, train_key, noise_key = jax.random.split(key, 4)
    order = np.asarray(jax.random.permutation(order_key, len(thetas)))
    count = min(len(thetas) // 10, settings.held_out)
    held_out, (train_theta, train_x) = (
        (thetas[index], xs[index]) for index in np.split(order, [count])
    )
    network = PosteriorDenoiser(train_theta, train_x, box, network_key)
    recipe = _recipe(
        network, _pairs(train_theta, train_x), train_theta.std(0), iterations
    )
    test = dataclasses.replace(recipe, data=_pairs(*held_out))
    batch = draw_batch(
        test, noise_key, 2 * settings.noises * count
    )  # the same noise each time
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)

    @jax.jit
    def loss_held_out(parameters: PyTree[Array]) -> Array:
        factor = recipe.factor(eqx.combine(parameters, static))
        events = jax.tree.map(
            lambda a: a.reshape(-1, 2 * settings.noises, *a.shape[1:]), batch
        )
        return jnp.mean(
            jax.lax.map(
                lambda part: losses(factor, part).denoising, events, batch_size=32
            )
        )

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
    if (
        thetas.ndim != 2
        or xs.ndim not in (2, 3)
        or len(thetas) != len(xs)
        or not (thetas.size and xs.size)
    ):
        fix = "give N parameters (N, size) and their N simulations, (N, d), or (N, m, d) for sets of m observations."
        raise ShapeError(
            f"estimator got theta of shape {thetas.shape} and x of shape {xs.shape}.",
            fix=fix,
        )
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
        raise InvalidValueError(
            f"Entry {constant[0]} of theta is the same in all pairs.", fix=fix
        )
    return thetas, xs


def _box(prior: dist.Distribution | None, thetas: np.ndarray) -> Box | None:
    """Bounds (low, high) of a uniform prior; None for one on all of ℝ."""
    if prior is None:
        return None
    if not isinstance(prior, dist.Distribution):
        raise WrongTypeError(
            f"prior is a {type(prior).__name__}.",
            fix="pass a NumPyro distribution, or leave it out.",
        )
    base = base_of(prior)
    if isinstance(base, dist.Uniform):
        low, high = (
            jnp.broadcast_to(jnp.asarray(a, jnp.float32), thetas.shape[1:])
            for a in (base.low, base.high)
        )
        if np.any((thetas < low) | (thetas > high)):
            fix = "give the prior that they were drawn from."
            raise InvalidValueError(
                "Some theta lie outside of their prior's box.", fix=fix
            )
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


def _recipe(
    network: PosteriorDenoiser, data: Data, scale: np.ndarray, iterations: int
) -> Recipe:
    """Levels from where nothing is left of θ to a hundredth of the narrowest width that
    a linear regression leaves."""
    import optax

    settings = tuning.ESTIMATOR
    low, high = (
        settings.low - 2 * math.log(scale.max()),
        settings.high - 2 * math.log(scale.min()),
    )
    high = max(
        high, settings.residual - 2 * math.log(float(network.known["deviation"].min()))
    )
    return Recipe(
        network=lambda key: network, data=data, schedule=Schedule.log_snr(settings.levels, low, high),
        log_snr=LogSNR(low, high, focus=(low + settings.focus[0], high - settings.focus[1])), conditions=("x",),
        iterations=iterations, batches=Batches(settings.batch, antithetic=True),
        learning_rate=functools.partial(optax.cosine_decay_schedule, settings.rate),
    )  # fmt: skip


class _Block(eqx.Module):
    """h + W₂·swish(FiLM(norm(W₁·swish(norm h)))), with W₂ and FiLM zero at first (Perez
    et al. 2018)."""

    enter: eqx.nn.Linear
    leave: eqx.nn.Linear
    film: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, width: int, key: Array):
        keys = jax.random.split(key, 3)
        self.enter = eqx.nn.Linear(width, width, key=keys[0])
        self.leave = _zero(eqx.nn.Linear(width, width, key=keys[1]))
        self.film = _zero(eqx.nn.Linear(width, 2 * width, key=keys[2]))
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, h: Array, embedding: Array) -> Array:
        gain, shift = jnp.split(self.film(embedding), 2)
        inner = self.norm(self.enter(jax.nn.swish(self.norm(h))))
        return h + self.leave(jax.nn.swish(inner * (1 + gain) + shift))


class PosteriorDenoiser(eqx.Module):
    r"""The noise in α·θ + σ·ε on a variance-preserving schedule, beginning as what a
    linear regression says of it.

    Were θ given x Gaussian with mean c(x) and variances v(x) along axes U, then ε̂ =
    U·σ·r/m with r = Uᵀ·(θ_k − α·c)/m and m² = α²·v + σ². Here

        ε̂ = σ·U·(r + α·√v·F/d)/m,   d² = α²·w² + σ²,

    where the network F is of order 1 wherever the noise is wider than the finest
    structure w (Karras et al. 2022), and below that changes the score by no more than
    F/w. At first F is 0, c is the linear regression of θ on x, U and v are of its
    residuals' covariance; a network of x learns to change c, v and w. In a box the mean
    of θ given θ_k becomes that of a Gaussian cut by its walls, of variances s² =
    U²·(σ²·v/m²) entry by entry: where walls only cut, F has nothing to learn.

    Args:
        theta: parameters (N, size), as all that follows in their own units.
        x: data (N, d), or sets of them (N, m, d).
        box: bounds (low, high) of θ, each (size,); None without.
        key: for the initial weights.
    """

    known: dict[str, Array]
    box: Box | None
    item: eqx.nn.MLP | None
    enter: eqx.nn.MLP
    gaussian: eqx.nn.Linear
    time: eqx.nn.Linear
    mix: eqx.nn.Linear
    first: eqx.nn.Linear
    blocks: list[_Block]
    last: eqx.nn.Linear
    gate: eqx.nn.Linear

    def __init__(self, theta: np.ndarray, x: np.ndarray, box: Box | None, key: Array):
        width, waves, depth = (
            tuning.ESTIMATOR.width,
            tuning.ESTIMATOR.waves,
            tuning.ESTIMATOR.blocks,
        )
        size, keys = theta.shape[1], iter(jax.random.split(key, 8 + depth))
        every = tuple(range(x.ndim - 1))
        self.box, self.known = box, {}
        self._know(
            centre=theta.mean(0),
            scale=theta.std(0),
            x_centre=x.mean(every),
            x_scale=x.std(every) + 1e-12,
        )
        features = np.asarray(jax.vmap(self._features)(jnp.asarray(x)), float)
        slope = np.linalg.lstsq(features, theta.astype(float), rcond=None)[0]
        residual = theta - features @ slope
        variance, axes = np.linalg.eigh(residual.T @ residual / len(x))
        self._know(
            slope=slope.T,
            axes=axes,
            deviation=np.sqrt(np.maximum(variance, 1e-8 * variance.max())),
        )
        linear = lambda enter, leave: eqx.nn.Linear(enter, leave, key=next(keys))  # noqa: E731
        mlp = functools.partial(
            eqx.nn.MLP, out_size=width, width_size=width, activation=jax.nn.swish
        )
        self.item = (
            mlp(2 * x.shape[-1], depth=1, key=next(keys)) if x.ndim == 3 else None
        )
        self.enter = mlp(
            features.shape[1] + (width if self.item else 0), depth=2, key=next(keys)
        )
        self.gaussian = _zero(linear(width, 3 * size))
        self.time, self.mix = linear(waves, width), linear(width, width)
        self.first = linear(2 * size + features.shape[1], width)
        self.blocks = [_Block(width, next(keys)) for _ in range(depth)]
        self.last, self.gate = _zero(linear(width, size)), _zero(linear(width, width))

    def _know(self, **arrays: np.ndarray) -> None:
        self.known |= {
            name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()
        }

    def _features(self, x: Array) -> Array:
        """What the regression is on: x in its units, also with its tails drawn in; of a
        set means, and deviations."""
        units = (x - self.known["x_centre"]) / self.known["x_scale"]
        parts = [units, jnp.arcsinh(units)]
        if x.ndim == 2:
            parts = [part.mean(0) for part in parts] + [jnp.log(units.std(0) + 1e-4)]
        return jnp.concatenate([*parts, jnp.ones(1)])

    def __call__(self, event: Array, t: Array, x: Array) -> Array:
        """ε̂, shape (size,), for one event at log-SNR t and one x."""
        known, box = jax.lax.stop_gradient((self.known, self.box))  # given, not learned
        features = jax.lax.stop_gradient(self._features(x))
        inputs, size = features, len(event)
        if self.item is not None:
            within = (x - x.mean(0)) / (x.std(0) + 1e-6)
            items = jnp.concatenate(
                [within, jnp.arcsinh((x - known["x_centre"]) / known["x_scale"])],
                axis=1,
            )
            inputs = jnp.append(features, jax.vmap(self.item)(items).mean(0))
        context = self.enter(inputs)
        change = self.gaussian(jax.nn.swish(context))
        axes, mean = known["axes"], known["slope"] @ features
        mean = mean + axes @ (known["deviation"] * change[:size])
        deviation = known["deviation"] * jnp.exp(change[size : 2 * size])
        finest = tuning.ESTIMATOR.finest * deviation * jnp.exp(change[2 * size :])
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(t)), jnp.sqrt(jax.nn.sigmoid(-t))
        spread = jnp.sqrt((alpha * deviation) ** 2 + sigma**2)
        r = (event - alpha * mean) @ axes / spread
        level = t + 2 * jnp.mean(
            jnp.log(known["scale"])
        )  # log-SNR where θ has unit variance
        angle = (
            2
            * jnp.pi
            * level
            / jnp.geomspace(*tuning.ESTIMATOR.periods, tuning.ESTIMATOR.waves // 2)
        )
        context = self.time(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])) + context
        embedding = jax.nn.swish(self.mix(jax.nn.swish(context)))
        wide = (event - alpha * known["centre"]) / jnp.sqrt(
            (alpha * known["scale"]) ** 2 + sigma**2
        )
        h = self.first(jnp.concatenate([r, wide, features]))
        for block in self.blocks:
            h = block(h, embedding)
        corrected = self.last(jax.nn.swish(h) * (1 + self.gate(embedding)))
        fine = jnp.sqrt((alpha * finest) ** 2 + sigma**2)
        noise = sigma * (axes @ ((r + alpha * deviation * corrected / fine) / spread))
        if box is None:
            return noise
        low, high = box
        s = jnp.sqrt(axes**2 @ (sigma * deviation / spread) ** 2)
        mean = (event - sigma * noise) / alpha
        near = jnp.clip(
            mean, low - 30 * s, high + 30 * s
        )  # from farther away exp(−l²/2) has no digits left
        lower, upper = (low - near) / s, (high - near) / s
        log_mass = log_normal_mass(lower, upper, upper - lower) + 0.5 * math.log(
            2 * math.pi
        )
        pull = jnp.exp(-0.5 * lower**2 - log_mass) - jnp.exp(
            -0.5 * upper**2 - log_mass
        )  # (φ(l) − φ(u))/(Φ(u) − Φ(l))
        return noise - alpha / sigma * (near - mean + s * pull)


def _zero(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    return jax.tree.map(jnp.zeros_like, layer)
