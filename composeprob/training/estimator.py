"""Default recipe of estimators: the posterior of a simulator, from given pairs.

The network corrects a linear regression, and takes sets of observations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float, PyTree
from numpy.typing import ArrayLike

from composeprob.arguments import check_count, check_key
from composeprob.core import Schedule
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.extras import needed
from composeprob.factors.gaussians import base_of
from composeprob.factors.one_dimension import log_normal_mass
from composeprob.training import tuning
from composeprob.training.loop import (
    TrainingRun,
    draw_batch,
    finish,
    initial,
    losses,
    make_advance,
    segments,
)
from composeprob.training.recipe import Batches, Data, LogSNR, Recipe

Box = tuple[Float[Array, " size"], Float[Array, " size"]]
"""Bounds (low, high) of θ."""


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
    r"""Train the posterior p(θ | x) of a simulator on given pairs (θ, x).

    The factor is in the units of θ and takes x in the units of the data, as the
    condition ``x``; the network standardises both. A tenth of the pairs, at most 2,000,
    is held out. The factor gets the averaged weights of the step whose denoising loss
    on these pairs is least, so that a small set of pairs is not overfitted.

    Args:
        theta: parameters, (N, size), drawn from the prior.
        x: outputs of the simulator, one for each θ: (N, d); or (N, m, d) for m
            observations that are exchangeable given θ, which the network takes as a
            set.
        key: a typed random key.
        prior: the prior of θ. If it is uniform in a box, draws stay within the box, and
            its walls need not be learned; a prior on all of ℝ changes nothing, and any
            other is refused.
        iterations: optimiser steps.
        progress: show a progress bar with the loss.
        label: the factor's name.

    Returns:
        A `TrainingRun`, whose ``held_out`` is the loss on the pairs held out, before
        training and after every 256 steps. Ctrl-C ends training early, with the best
        weights so far.

    Raises:
        ShapeError: arrays of other shapes, or of different lengths.
        InvalidValueError: fewer than 100 pairs, numbers that are not finite, a constant
            entry of θ, θ outside of its prior, or a prior with other bounds, such as
            one of positive parameters.
        WrongTypeError: a key or a prior of another type.

    References:
        Denoising by a network of order 1 at every level: Karras et al. 2022,
        *Elucidating the design space of diffusion-based generative models*. Posteriors
        by diffusion: Sharrock et al. 2024, *Sequential neural score estimation*.

    Example:
        With parameters ``theta`` (N, size) and simulations ``x`` (N, d)::

            key = jax.random.key(0)
            posterior = cp.training.estimator(theta, x, key, prior=prior).factor

            @cp.program
            def answer(posterior, x):
                return cp.sample("theta", posterior.given(x=x))

            density = cp.compile(answer, posterior, observed)
            result = cp.infer(density, jax.random.key(1))
    """
    settings = tuning.ESTIMATOR
    check_key(key)
    check_count(iterations, "iterations")
    thetas, xs = _checked(theta, x)
    box = _box(prior, thetas)
    order_key, network_key, train_key, noise_key = jax.random.split(key, 4)
    # Simulations may come in an order, such as that of a grid: those held out are
    # drawn at random.
    order = np.asarray(jax.random.permutation(order_key, len(thetas)))
    count = min(len(thetas) // 10, settings.held_out)
    held_out = order[:count]
    training = order[count:]
    train_theta = thetas[training]
    train_x = xs[training]
    network = PosteriorDenoiser(train_theta, train_x, box, network_key)
    data = _pairs(train_theta, train_x)
    recipe = _recipe(network, data, train_theta.std(0), iterations)

    loss_held_out = _held_out_loss(
        recipe, network, _pairs(thetas[held_out], xs[held_out]), count, noise_key
    )
    first = initial(recipe, network)
    advance = make_advance(recipe, network, train_key)
    state = first
    best = first.average
    history = [float(loss_held_out(best))]
    for state in segments(recipe, first, advance, progress, tuning.TRAINING_STEPS):
        history.append(float(loss_held_out(state.average)))
        # Early stopping: NaN, which compares unequal, never counts as best.
        if history[-1] == min(history):
            best = state.average
    run = finish(recipe, network, state._replace(average=best), label)
    return dataclasses.replace(run, held_out=np.array(history))


def _held_out_loss(
    recipe: Recipe, network: PosteriorDenoiser, data: Data, count: int, key: Array
) -> Callable[[PyTree[Array]], Float[Array, ""]]:
    """Compile the denoising loss of weights, on pairs that are not trained on.

    Pairs and noise are drawn once: losses of different weights then differ by the
    weights alone.
    """
    noises = 2 * tuning.ESTIMATOR.noises
    recipe_held_out = dataclasses.replace(recipe, data=data)
    batch = draw_batch(recipe_held_out, key, noises * count)
    static = eqx.filter(network, eqx.is_inexact_array, inverse=True)

    @jax.jit
    def loss(parameters: PyTree[Array]) -> Float[Array, ""]:
        factor = recipe.factor(eqx.combine(parameters, static))
        events = jax.tree.map(lambda a: a.reshape(-1, noises, *a.shape[1:]), batch)
        denoising = jax.lax.map(
            lambda chunk: losses(factor, chunk).denoising, events, batch_size=32
        )
        return jnp.mean(denoising)

    return loss


def _checked(theta: ArrayLike, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return parameters and data in single precision; refuse unusable ones."""
    thetas = np.asarray(theta, np.float32)
    xs = np.asarray(x, np.float32)
    shaped = thetas.ndim == 2 and xs.ndim in (2, 3) and len(thetas) == len(xs)
    if not (shaped and thetas.size and xs.size):
        raise ShapeError(
            f"estimator got theta of shape {thetas.shape} and x of shape {xs.shape}.",
            fix="give N parameters (N, size) and their N simulations, (N, d), or "
            "(N, m, d) for sets of m observations.",
        )
    if len(thetas) < tuning.ESTIMATOR.fewest:
        raise InvalidValueError(
            f"estimator got {len(thetas)} pairs.",
            fix=f"simulate more: {tuning.ESTIMATOR.fewest} at the very least.",
        )
    _check_finite("theta", thetas)
    _check_finite("x", xs)
    constant = np.flatnonzero(thetas.std(0) == 0)
    if constant.size:
        raise InvalidValueError(
            f"Entry {constant[0]} of theta is the same in all pairs.",
            fix="leave it out: there is nothing to learn.",
        )
    return thetas, xs


def _check_finite(name: str, values: np.ndarray) -> None:
    rows = (~np.isfinite(values)).reshape(len(values), -1).any(1)
    if rows.any():
        raise InvalidValueError(
            f"{rows.sum()} of the {len(values)} rows of {name} hold numbers that are "
            "not finite.",
            fix="leave these pairs out, or give failed simulations a finite value that "
            "says so.",
        )


def _box(prior: dist.Distribution | None, thetas: np.ndarray) -> Box | None:
    """Return the bounds of a uniform prior; None for a prior on all of ℝ."""
    if prior is None:
        return None
    if not isinstance(prior, dist.Distribution):
        raise WrongTypeError(
            f"prior is a {type(prior).__name__}.",
            fix="pass a NumPyro distribution, or leave it out.",
        )
    base = base_of(prior)
    if isinstance(base, dist.Uniform):
        shape = thetas.shape[1:]
        low = jnp.broadcast_to(jnp.asarray(base.low, jnp.float32), shape)
        high = jnp.broadcast_to(jnp.asarray(base.high, jnp.float32), shape)
        if np.any((thetas < low) | (thetas > high)):
            raise InvalidValueError(
                "Some theta lie outside of their prior's box.",
                fix="give the prior that they were drawn from.",
            )
        return low, high
    if base.support in (dist.constraints.real, dist.constraints.real_vector):
        return None
    raise InvalidValueError(
        f"estimator has no rule for the bounds of a prior like {type(base).__name__}.",
        fix="train on parameters without bounds, such as log(theta) of positive ones, "
        "and transform the draws back; or leave prior out: the bounds are then "
        "learned.",
    )


def _pairs(theta: np.ndarray, x: np.ndarray) -> Data:
    """Return a sampler of pairs, with replacement."""
    events = jnp.asarray(theta)
    conditions = jnp.asarray(x)

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        index = jax.random.randint(key, (n,), 0, len(events))
        return events[index], {"x": conditions[index]}

    return data


def _recipe(
    network: PosteriorDenoiser, data: Data, scale: np.ndarray, iterations: int
) -> Recipe:
    """Return the recipe, with levels from pure noise to nearly clean θ.

    The noise at the cleanest level is a hundredth of the narrowest width that a linear
    regression leaves.
    """
    with needed("train", "Training"):
        import optax

    settings = tuning.ESTIMATOR
    # log-SNR at which σ has a given ratio to a width w is that ratio's, less 2·log w.
    narrowest = float(network.known["deviation"].min())
    low = settings.low - 2 * math.log(scale.max())
    high = settings.high - 2 * math.log(scale.min())
    high = max(high, settings.residual - 2 * math.log(narrowest))
    focus = (low + settings.focus[0], high - settings.focus[1])
    return Recipe(
        network=lambda key: network,
        data=data,
        schedule=Schedule.log_snr(settings.levels, low, high),
        log_snr=LogSNR(low, high, focus=focus),
        conditions=("x",),
        iterations=iterations,
        batches=Batches(settings.batch, antithetic=True),
        learning_rate=functools.partial(optax.cosine_decay_schedule, settings.rate),
    )


class _Block(eqx.Module):
    """Residual block h + W₂·swish(FiLM(norm(W₁·swish(norm h)))).

    W₂ and FiLM (Perez et al. 2018) start at zero, so that the block is the identity.
    """

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
        # Zero at first: 1 + gain keeps the layer as it is.
        gain, shift = jnp.split(self.film(embedding), 2)
        inner = self.norm(self.enter(jax.nn.swish(self.norm(h))))
        return h + self.leave(jax.nn.swish(inner * (1 + gain) + shift))


class PosteriorDenoiser(eqx.Module):
    r"""Network of ε̂, the noise in α·θ + σ·ε, that starts as a linear regression.

    The schedule is variance preserving. Were θ given x Gaussian with mean c(x) and
    variances v(x) along axes U, then ε̂ = U·σ·r/m with r = Uᵀ·(θ_k − α·c)/m and m² =
    α²·v + σ². Here

        ε̂ = σ·U·(r + α·√v·F/d)/m,   d² = α²·w² + σ²,

    where the network F is of order 1 wherever the noise is wider than the finest
    structure w (Karras et al. 2022), and below that changes the score by no more than
    F/w. At first F is 0, c is the linear regression of θ on x, U and v are of its
    residuals' covariance; a network of x learns to change c, v and w. In a box the mean
    of θ given θ_k becomes that of a Gaussian cut by its walls, of variances s² =
    U²·(σ²·v/m²) entry by entry: where walls only cut, F has nothing to learn.

    Args:
        theta: parameters (N, size), in their own units, as are all arrays below.
        x: data (N, d), or sets of them (N, m, d).
        box: bounds (low, high) of θ, each (size,); None without.
        key: for the initial weights.
    """

    # Names of fields are names of tensors in files of weights: keep them.
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

    def __init__(
        self,
        theta: Float[np.ndarray, "N size"],
        x: Float[np.ndarray, "N ..."],
        box: Box | None,
        key: Array,
    ):
        settings = tuning.ESTIMATOR
        width = settings.width
        size = theta.shape[1]
        all_but_last = tuple(range(x.ndim - 1))
        self.box = box
        self.known = {}
        self._store(
            centre=theta.mean(0),
            scale=theta.std(0),
            x_centre=x.mean(all_but_last),
            x_scale=x.std(all_but_last) + 1e-12,
        )
        # Double precision: the features are nearly collinear where tails are short.
        features = np.asarray(jax.vmap(self._features)(jnp.asarray(x)), float)
        slope = np.linalg.lstsq(features, theta.astype(float), rcond=None)[0]
        residual = theta - features @ slope
        variance, axes = np.linalg.eigh(residual.T @ residual / len(x))
        # A direction that the regression explains exactly keeps a little variance.
        floor = 1e-8 * variance.max()
        deviation = np.sqrt(np.maximum(variance, floor))
        self._store(slope=slope.T, axes=axes, deviation=deviation)

        keys = iter(jax.random.split(key, 8 + settings.blocks))

        def linear(inputs: int, outputs: int) -> eqx.nn.Linear:
            return eqx.nn.Linear(inputs, outputs, key=next(keys))

        def mlp(inputs: int, depth: int) -> eqx.nn.MLP:
            return eqx.nn.MLP(inputs, width, width, depth, jax.nn.swish, key=next(keys))

        num_inputs = features.shape[1]
        self.item = None
        if x.ndim == 3:
            self.item = mlp(2 * x.shape[-1], depth=1)
            num_inputs += width
        self.enter = mlp(num_inputs, depth=2)
        self.gaussian = _zero(linear(width, 3 * size))
        self.time = linear(settings.waves, width)
        self.mix = linear(width, width)
        self.first = linear(2 * size + features.shape[1], width)
        self.blocks = [_Block(width, next(keys)) for _ in range(settings.blocks)]
        self.last = _zero(linear(width, size))
        self.gate = _zero(linear(width, width))

    def _store(self, **arrays: np.ndarray) -> None:
        """Keep the constants of the regression in single precision."""
        for name, array in arrays.items():
            self.known[name] = jnp.asarray(array, jnp.float32)

    def _features(self, x: Float[Array, "*m d"]) -> Float[Array, " features"]:
        """Return the regressors of θ: standardised x, and x with its tails drawn in.

        Of a set they are means over its members, and log-deviations of x.
        """
        standard = (x - self.known["x_centre"]) / self.known["x_scale"]
        features = [standard, jnp.arcsinh(standard)]
        if x.ndim == 2:
            features = [feature.mean(0) for feature in features]
            features.append(jnp.log(standard.std(0) + 1e-4))
        return jnp.concatenate([*features, jnp.ones(1)])

    def __call__(
        self, event: Float[Array, " size"], t: Float[Array, ""], x: Array
    ) -> Float[Array, " size"]:
        """Return ε̂ for one event at log-SNR t, given one x."""
        # Constants of the data, which training must not change.
        known, box = jax.lax.stop_gradient((self.known, self.box))
        features = jax.lax.stop_gradient(self._features(x))
        size = len(event)

        # c, √v and w of the class's formula, as the network of x corrects them.
        context = self.enter(self._inputs(x, features, known))
        change = self.gaussian(jax.nn.swish(context))
        axes = known["axes"]
        mean = known["slope"] @ features
        mean = mean + axes @ (known["deviation"] * change[:size])
        deviation = known["deviation"] * jnp.exp(change[size : 2 * size])
        finest = tuning.ESTIMATOR.finest * deviation * jnp.exp(change[2 * size :])

        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        sigma = jnp.sqrt(jax.nn.sigmoid(-t))
        spread = jnp.sqrt((alpha * deviation) ** 2 + sigma**2)  # m
        r = (event - alpha * mean) @ axes / spread

        # F, in the residual r and in θ_k standardised by its marginal.
        embedding = self._embedding(t, context, known["scale"])
        marginal = jnp.sqrt((alpha * known["scale"]) ** 2 + sigma**2)
        standard = (event - alpha * known["centre"]) / marginal
        h = self.first(jnp.concatenate([r, standard, features]))
        for block in self.blocks:
            h = block(h, embedding)
        corrected = self.last(jax.nn.swish(h) * (1 + self.gate(embedding)))

        fine = jnp.sqrt((alpha * finest) ** 2 + sigma**2)  # d
        noise = sigma * (axes @ ((r + alpha * deviation * corrected / fine) / spread))
        if box is None:
            return noise
        # The posterior of θ given θ_k, entry by entry, is cut by the walls: its mean
        # moves, and with it ε̂ = (θ_k − α·E θ)/σ.
        s = jnp.sqrt(axes**2 @ (sigma * deviation / spread) ** 2)
        clean = (event - sigma * noise) / alpha
        return noise - alpha / sigma * _shift_into(box, clean, s)

    def _inputs(
        self, x: Array, features: Float[Array, " features"], known: dict[str, Array]
    ) -> Float[Array, " inputs"]:
        """Return the features, with a learned mean over the members of a set."""
        if self.item is None:
            return features
        # Members relative to their set, and in the units of all data.
        within = (x - x.mean(0)) / (x.std(0) + 1e-6)
        overall = jnp.arcsinh((x - known["x_centre"]) / known["x_scale"])
        items = jnp.concatenate([within, overall], axis=1)
        return jnp.append(features, jax.vmap(self.item)(items).mean(0))

    def _embedding(
        self, t: Float[Array, ""], context: Array, scale: Float[Array, " size"]
    ) -> Float[Array, " width"]:
        """Return the embedding of log-SNR and context that modulates the blocks."""
        settings = tuning.ESTIMATOR
        # Log-SNR in units in which θ has variance 1.
        level = t + 2 * jnp.mean(jnp.log(scale))
        periods = jnp.geomspace(*settings.periods, settings.waves // 2)
        angle = 2 * jnp.pi * level / periods
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])
        context = self.time(waves) + context
        return jax.nn.swish(self.mix(jax.nn.swish(context)))


def _shift_into(
    box: Box, mean: Float[Array, " size"], s: Float[Array, " size"]
) -> Float[Array, " size"]:
    """Return by how much the mean of N(mean, s²) moves when the box cuts it.

    With l, u = (low − mean)/s, (high − mean)/s it moves by s·(φ(l) − φ(u))/(Φ(u) −
    Φ(l)).
    """
    low, high = box
    # exp(−l²/2) underflows farther outside than 30 s: such a mean first moves there.
    near = jnp.clip(mean, low - 30 * s, high + 30 * s)
    lower = (low - near) / s
    upper = (high - near) / s
    log_mass = log_normal_mass(lower, upper, upper - lower)
    log_mass = log_mass + 0.5 * math.log(2 * math.pi)
    at_lower = jnp.exp(-0.5 * lower**2 - log_mass)
    at_upper = jnp.exp(-0.5 * upper**2 - log_mass)
    return near - mean + s * (at_lower - at_upper)


def _zero(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    """Return a layer with weights and biases of zero."""
    return jax.tree.map(jnp.zeros_like, layer)
