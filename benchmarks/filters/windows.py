"""SDA's way to paths: a score of short windows, and its sampler of whole paths.

Rozet and Louppe 2023, *Score-based data assimilation*: a network of the noise in
windows of 2k + 1 states gives the score of a whole path, each state by the window that
it is the centre of; data come in by the score of a Gaussian about the denoised path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

import composeprob as cp
from composeprob.training import load_weights, save_weights
from filters.learned import Forecast

ORDER = 2
"""k: states on either side of a window's centre."""

LENGTH = 2 * ORDER + 1
BATCH = 512
LEAST = 1e-3
"""σ at the end of the descent, and α at its start."""

GAMMA = 1e-2
"""Variance of the denoised path over (σ/α)², in the score of data."""

SIZE = 0.25
"""Size of Langevin steps, over the mean square of the noise that the network sees."""

LOW = -13.5
HIGH = 13.5
"""Range of log-SNR that the network is trained on."""


class Units(NamedTuple):
    """Units of states in the network: (x − centre)/scale, with transitions' noise."""

    centre: Array
    scale: float
    noise: float

    def standard(self, x: Array) -> Array:
        return (x - self.centre) / self.scale

    def states(self, u: Array) -> Array:
        return self.centre + self.scale * u


class Windows(eqx.Module):
    r"""Network of ε̂ in windows of `LENGTH` states in standard units.

    It sees how far each state is from the forecast of the state before, in units of the
    width √(q² + 2σ²/α²) of that difference, with q the noise of a transition:

        ε̂ = σ·v − α·F·σ/√(σ² + q²),

    where F is a network of v, of these differences and of the log-SNR.
    """

    first: eqx.nn.Linear
    blocks: list[eqx.nn.MLP]
    last: eqx.nn.Linear
    forecast: Forecast
    centre: Array
    noise: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(self, forecast: Forecast, units: Units, width: int, key: Array):
        keys = jax.random.split(key, 4)
        inputs = 3 * LENGTH + 3 * (LENGTH - 1) + 7
        self.first = eqx.nn.Linear(inputs, width, key=keys[0])
        self.blocks = []
        for each in keys[1:3]:
            self.blocks.append(
                eqx.nn.MLP(width, width, width, 1, jax.nn.silu, key=each)
            )
        self.last = eqx.nn.Linear(width, 3 * LENGTH, key=keys[3])
        self.forecast = forecast
        self.noise = units.noise / units.scale
        self.centre = units.centre
        self.scale = units.scale

    def foretold(self, v: Array, alpha: Array) -> Array:
        """Forecasts of the states after noised ones, (T, 3), in standard units."""
        known, rest = eqx.partition((self.centre, self.forecast), eqx.is_array)
        centre, forecast = eqx.combine(jax.lax.stop_gradient(known), rest)
        # Where noise is all there is, the forecast of a clipped state does no harm.
        x = jnp.clip(v / alpha, -4.0, 4.0)
        after = jax.vmap(forecast)(centre + self.scale * x)
        return (after - centre) / self.scale

    def of_window(self, v: Array, foretold: Array, t: Array) -> Array:
        """ε̂ of a window, (LENGTH, 3), with forecasts of all but its first state."""
        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        sigma = jnp.sqrt(jax.nn.sigmoid(-t))
        width = jnp.sqrt(self.noise**2 + 2 * (sigma / alpha) ** 2)
        away = (jnp.clip(v[1:] / alpha, -4.0, 4.0) - foretold) / width
        waves = jnp.pi * t / HIGH * jnp.array([0.5, 1.0, 2.0])
        time = [jnp.sin(waves), jnp.cos(waves), t[None] / HIGH]
        h = self.first(jnp.concatenate([v.ravel(), away.ravel(), *time]))
        for block in self.blocks:
            h = h + block(jax.nn.silu(h))
        change = self.last(jax.nn.silu(h)).reshape(v.shape)
        response = sigma / jnp.sqrt(sigma**2 + self.noise**2)
        return sigma * v - alpha * response * change

    def __call__(self, v: Array, t: Array) -> Array:
        """ε̂ of a path of `LENGTH` states or more: of each state by the window about
        it, of those near an end by the window there."""
        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        foretold = self.foretold(v[:-1], alpha)
        starts = jnp.arange(len(v) - LENGTH + 1)[:, None]
        windows = v[starts + jnp.arange(LENGTH)]
        forecasts = foretold[starts + jnp.arange(LENGTH - 1)]
        noises = jax.vmap(self.of_window, (0, 0, None))(windows, forecasts, t)
        ends = noises[0, :ORDER], noises[:, ORDER], noises[-1, ORDER + 1 :]
        return jnp.concatenate(ends)


def windows(
    draw: Callable[[], Array],
    forecast: Forecast,
    units: Units,
    width: int,
    iterations: int,
    weights: Path,
) -> Windows:
    """Read the network's weights, or train it on windows of states, (n, `LENGTH`, 3),
    and write them if there are none."""
    network = Windows(forecast, units, width, jax.random.key(8))
    if weights.is_file():
        return load_weights(network, weights)
    events = units.standard(draw())

    def data(key: Array, n: int) -> Array:
        return events[jax.random.randint(key, (n,), 0, len(events))]

    recipe = cp.training.Recipe(
        network=lambda key: network,
        data=data,
        schedule=cp.Schedule.log_snr(20, LOW, HIGH),
        log_snr=cp.training.LogSNR(LOW, HIGH, (-1.0, 9.0)),
        iterations=iterations,
        batches=cp.training.Batches(BATCH, antithetic=True),
        learning_rate=functools.partial(optax.cosine_decay_schedule, 2e-3),
    )
    key = jax.random.key(9)
    factor = cp.training.train(recipe, key, progress=False, label="windows").factor
    save_weights(factor.network, weights)
    return factor.network


class Seen(NamedTuple):
    """Observations of a path: the first number of some states, in standard units.

    Attributes:
        states: their places.
        data: the observations.
        width: standard deviation of these.
    """

    states: Array
    data: Array
    width: float


def noise_given(network: Windows, seen: Seen, v: Array, t: Array) -> Array:
    r"""ε̂ of a path given data: ε̂ − σ·∇_v log N(y; A(x̂), w² + γσ²/α²), with x̂ the
    denoised path, through whose network the gradient goes."""
    alpha = jnp.sqrt(jax.nn.sigmoid(t))
    sigma = jnp.sqrt(jax.nn.sigmoid(-t))

    def log_likelihood(v: Array) -> tuple[Array, Array]:
        noise = network(v, t)
        denoised = (v - sigma * noise) / alpha
        variance = seen.width**2 + GAMMA * (sigma / alpha) ** 2
        away = seen.data - denoised[seen.states, 0]
        return -0.5 * jnp.sum(away**2) / variance, noise

    score, noise = jax.grad(log_likelihood, has_aux=True)(v)
    return noise - sigma * score


def sda(
    network: Windows,
    seen: Seen,
    length: int,
    number: int,
    steps: int,
    corrections: int,
    key: Array,
) -> Array:
    """Draw paths by SDA's sampler, (number, length, 3), in standard units.

    A deterministic step down to the next level, by the network's ε̂ given the data, then
    Langevin steps there.
    """
    places = jnp.linspace(1.0, 0.0, steps + 1)
    # α(t) = cos²(t·arccos √LEAST), as SDA has it; its σ is LEAST at least.
    alphas = jnp.cos(jnp.arccos(LEAST**0.5) * places) ** 2
    sigmas = jnp.sqrt(1 - alphas**2 + LEAST**2)
    log_snr = 2 * jnp.log(alphas / sigmas)
    noises = jax.vmap(noise_given, (None, None, 0, None))

    def langevin(i: Array, carry: tuple[Array, Array, Array, Array]) -> Any:
        v, level, sigma, key = carry
        noise = noises(network, seen, v, level)
        each = jnp.mean(noise**2, axis=(1, 2), keepdims=True)
        size = SIZE / each
        z = jax.random.normal(jax.random.fold_in(key, i), v.shape)
        v = v - sigma * (size * noise - jnp.sqrt(2 * size) * z)
        return v, level, sigma, key

    def step(v: Array, at: tuple[Array, ...]) -> tuple[Array, None]:
        alpha, sigma, level, alpha_next, sigma_next, level_next, key = at
        ratio = alpha_next / alpha
        change = sigma_next - ratio * sigma
        v = ratio * v + change * noises(network, seen, v, level)
        carry = v, level_next, sigma_next, key
        return jax.lax.fori_loop(0, corrections, langevin, carry)[0], None

    @jax.jit
    def drawn(key: Array) -> Array:
        first_key, key = jax.random.split(key)
        v = jax.random.normal(first_key, (number, length, 3))
        before = alphas[:-1], sigmas[:-1], log_snr[:-1]
        after = alphas[1:], sigmas[1:], log_snr[1:]
        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, v, (*before, *after, keys))[0]

    return drawn(key)
