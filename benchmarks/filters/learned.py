"""Transitions that are learned from pairs of states, without the equations.

A forecast network gives x̂(z), the state after z, by regression. A diffusion factor
given x̂ is the law of the state about it: its network is trained by denoising, and
starts as the Gaussian that the forecast's errors suggest.
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

STAGES = 5
"""Steps of a forecast, all by the same network."""

BATCH = 512
SEGMENT = 250
"""Iterations between two readings of the loss."""


class Pairs(NamedTuple):
    """States before and after a transition, (n, 3)."""

    before: Array
    after: Array


class Forecast(eqx.Module):
    """Network of the state that follows: `STAGES` midpoint steps of one rate network.

    Args:
        pairs: their states before give the units of the network.
        width: of its layers.
        key: for the initial weights.
    """

    network: eqx.nn.MLP
    centre: Array
    scale: Array

    def __init__(self, pairs: Pairs, width: int, key: Array):
        self.network = eqx.nn.MLP(3, 3, width, 2, jax.nn.swish, key=key)
        self.centre = pairs.before.mean(0)
        self.scale = pairs.before.std(0)

    def __call__(self, x: Array) -> Array:
        centre, scale = jax.lax.stop_gradient((self.centre, self.scale))
        u = (x - centre) / scale
        h = 1 / STAGES
        for _ in range(STAGES):
            middle = u + 0.5 * h * self.network(u)
            u = u + h * self.network(middle)
        return centre + scale * u


class Spread(eqx.Module):
    r"""Network of ε̂ for the law of a state about its forecast x̂.

    With c(x̂) and v(x̂) the mean and variances that a small network gives,

        ε̂ = σ·(x − α·c)/(α²·v + σ²),

    which is exact for a Gaussian. At first c = x̂, and v is the mean square of the
    forecast's errors.
    """

    network: eqx.nn.MLP
    centre: Array
    scale: Array
    deviation: Array

    def __init__(self, forecasts: Array, after: Array, key: Array):
        network = eqx.nn.MLP(3, 6, 32, 2, jax.nn.swish, key=key)
        last = jax.tree.map(jnp.zeros_like, network.layers[-1])
        self.network = eqx.tree_at(lambda n: n.layers[-1], network, last)
        self.centre = forecasts.mean(0)
        self.scale = forecasts.std(0)
        self.deviation = jnp.sqrt(jnp.mean((after - forecasts) ** 2, axis=0))

    def __call__(self, event: Array, t: Array, forecast: Array) -> Array:
        known = (self.centre, self.scale, self.deviation)
        centre, scale, deviation = jax.lax.stop_gradient(known)
        change = self.network((forecast - centre) / scale)
        mean = forecast + deviation * change[:3]
        variance = (deviation * jnp.exp(change[3:])) ** 2
        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        sigma = jnp.sqrt(jax.nn.sigmoid(-t))
        return sigma * (event - alpha * mean) / (alpha**2 * variance + sigma**2)


class Transition(NamedTuple):
    """A learned transition: ``factor.given(forecast=forecast(z))`` is its law after z.

    Attributes:
        forecast: the network of the state that follows.
        factor: the law of that state about its forecast.
    """

    forecast: Forecast
    factor: Any


def forecast_of(pairs: Pairs, width: int, iterations: int) -> Forecast:
    """Train a forecast on pairs."""
    return fitted(Forecast(pairs, width, jax.random.key(5)), pairs, iterations)


def fitted(forecast: Any, pairs: Pairs, iterations: int) -> Any:
    """Fit a forecast to pairs by the mean square of its errors."""
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, iterations))
    parameters, static = eqx.partition(forecast, eqx.is_inexact_array)

    def loss_of(parameters: Any, chosen: Array) -> Array:
        predicted = jax.vmap(eqx.combine(parameters, static))(pairs.before[chosen])
        return jnp.mean(((predicted - pairs.after[chosen]) / forecast.scale) ** 2)

    def iterate(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
        parameters, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, len(pairs.before))
        loss, gradient = jax.value_and_grad(loss_of)(parameters, chosen)
        change, state = optimiser.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, change), state), loss

    @jax.jit
    def segment(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
        return jax.lax.scan(iterate, carry, jax.random.split(key, SEGMENT))

    carry = parameters, optimiser.init(parameters)
    for number in range(iterations // SEGMENT):
        carry, losses = segment(carry, jax.random.key(100 + number))
        if number % 20 == 19:
            print(f"forecast, {(number + 1) * SEGMENT}: {losses.mean():.3g}")
    return eqx.combine(carry[0], static)


def factor_of(
    forecast: Forecast, pairs: Pairs, levels: cp.Schedule, iterations: int
) -> Any:
    """Train the law of states about their forecasts by denoising."""
    forecasts = jax.lax.map(forecast, pairs.before, batch_size=1000)
    network = Spread(forecasts, pairs.after, jax.random.key(6))
    low = float(levels.log_snr.min())
    high = float(levels.log_snr.max())
    # Half of the events at levels whose noise is near the width of the law.
    middle = -2 * float(jnp.log(network.deviation).mean())

    def data(key: Array, n: int) -> tuple[Array, dict[str, Array]]:
        chosen = jax.random.randint(key, (n,), 0, len(forecasts))
        return pairs.after[chosen], {"forecast": forecasts[chosen]}

    recipe = cp.training.Recipe(
        network=lambda key: network,
        data=data,
        schedule=levels,
        log_snr=cp.training.LogSNR(low, high, (middle - 3.0, min(middle + 3.0, high))),
        conditions=("forecast",),
        iterations=iterations,
        batches=cp.training.Batches(BATCH, antithetic=True),
        learning_rate=functools.partial(optax.cosine_decay_schedule, 1e-3),
    )
    key = jax.random.key(7)
    return cp.training.train(recipe, key, progress=False, label="transition").factor


def transition(
    pairs_of: Callable[[], Pairs],
    levels: cp.Schedule,
    width: int,
    iterations: int,
    weights: Path,
) -> Transition:
    """Read a transition's weights, or train it and write them if there are none."""
    if weights.is_file():
        return _read(weights, levels, width)
    pairs = pairs_of()
    forecast = forecast_of(pairs, width, iterations)
    factor = factor_of(forecast, pairs, levels, iterations // 10)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_weights((forecast, factor.network), weights)
    return Transition(forecast, factor)


def _read(weights: Path, levels: cp.Schedule, width: int) -> Transition:
    """Read a transition's weights into networks of the same shapes."""
    key = jax.random.key(0)
    some = jnp.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    shapes = Forecast(Pairs(some, some), width, key), Spread(some, some, key)
    forecast, network = load_weights(shapes, weights)
    factor = cp.Diffusion(
        network,
        levels,
        event_shape=(3,),
        time="log_snr",
        conditions=("forecast",),
        label="transition",
    )
    return Transition(forecast, factor)
