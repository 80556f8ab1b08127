"""Lorenz's system of 1996 on rings of 10 and 40 numbers, and filters of many numbers.

A particle filter's transition N(M(x), q²) has to spread the chains in all numbers at
once. The other transition here spreads them as they vary together: with m and P the
mean and the covariance of the forecasts M(x) of all chains,

    N(m + √(1 − h²)·(M(x) − m), h²·P + q²)

keeps their mean and covariance up to q². h = 0 is a particle filter, h = 1 draws all
chains from one Gaussian, as an ensemble Kalman filter does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

import composeprob as cp
from filters.learned import Pairs, fitted
from filters.lorenz import noised
from filters.particles import Setting

FORCE = 8.0
LENGTH = 0.05
"""Units of time between observations, one step of Runge and Kutta's rule as in
DAPPER."""

SPIN_UP = 1000
STEPS = 300
FIRST = 0.3
"""Standard deviation of the first state."""

LAG = 5
LEVELS = cp.Schedule.log_snr(16, -8.0, 10.0)
"""Levels of standard normal noise, whose reverse steps are exact but for the widths
that 64 pilots measure. In 40 numbers log-weights vary by 1.8 for them on 8 levels, so
that chains are resampled at each observation, and by 0.8 on 16."""

FOLDER = Path(__file__).parent
FILE = FOLDER / "lorenz-96-series.npz"
"""Both series, so that all filters see the same one in all versions of JAX."""

WEIGHTS = FOLDER / "lorenz-96.safetensors"

Forecast = Callable[[Array], Array]
"""Function of one state: the state that follows, without noise."""


class Ring(NamedTuple):
    """A setting of DAPPER's: numbers, of which each ``every``-th is seen."""

    numbers: int
    every: int
    variance: float

    @property
    def seen(self) -> np.ndarray:
        """Places that are seen."""
        return np.arange(0, self.numbers, self.every)

    def setting(self, start: np.ndarray) -> Setting:
        """Return what filters by the equations need."""
        return Setting(jnp.asarray(start), FIRST, flow, self.every, self.variance)


RINGS = {"10": Ring(10, 2, 1.5), "40": Ring(40, 1, 1.0)}
"""The settings of Bocquet 2010 and of Sakov and Oke 2008."""


class Kernel(NamedTuple):
    """h and q of a transition."""

    width: float
    noise: float


def rates(x: Array) -> Array:
    """The time derivative of states, (…, numbers)."""
    ahead = jnp.roll(x, -1, -1)
    behind = jnp.roll(x, 1, -1)
    return (ahead - jnp.roll(x, 2, -1)) * behind - x + FORCE


@jax.jit
def flow(x: Array) -> Array:
    """States `LENGTH` units of time later."""
    h = LENGTH
    k1 = rates(x)
    k2 = rates(x + h / 2 * k1)
    k3 = rates(x + h / 2 * k2)
    k4 = rates(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Series(NamedTuple):
    """True states and observations, (T + 1, …), and the mean of the first state."""

    states: np.ndarray
    observations: np.ndarray
    start: np.ndarray


def simulated(ring: Ring, key: Array) -> Series:
    """Return a new series, whose dynamics have no noise, from a state that was drawn
    about a point of the attractor."""
    keys = jax.random.split(key, 3)
    x = FORCE + jax.random.normal(keys[0], (ring.numbers,))
    start = jax.lax.fori_loop(0, SPIN_UP, lambda _, x: flow(x), x)
    states = [noised(keys[1], start, FIRST)]
    for _ in range(STEPS):
        states.append(flow(states[-1]))
    truth = np.array(states)
    seen = jnp.asarray(truth[:, ring.seen])
    observations = noised(keys[2], seen, ring.variance**0.5)
    return Series(truth, np.asarray(observations), np.asarray(start))


def series(name: str) -> Series:
    """Return the series of a ring from the file; make the file if there is none."""
    if not FILE.is_file():
        parts = {}
        for number, (each, ring) in enumerate(RINGS.items()):
            made = simulated(ring, jax.random.key(1996 + number))
            for part, values in made._asdict().items():
                parts[f"{each} {part}"] = values.astype(np.float32)
        np.savez_compressed(FILE, **parts)
    known = np.load(FILE)
    return Series(*(known[f"{name} {part}"] for part in Series._fields))


class LocalForecast(eqx.Module):
    """Network of the state that follows, for rings of any size: two midpoint steps by a
    network of one number's rate given its five neighbours, itself included.

    Args:
        width: of its layers.
        key: for the initial weights.
    """

    network: eqx.nn.MLP
    scale: float = eqx.field(static=True)

    def __init__(self, width: int, key: Array):
        self.network = eqx.nn.MLP(5, "scalar", width, 2, jax.nn.swish, key=key)
        self.scale = 4.0

    def rates(self, u: Array) -> Array:
        neighbours = [jnp.roll(u, shift) for shift in (2, 1, 0, -1, -2)]
        return jax.vmap(self.network)(jnp.stack(neighbours, -1))

    def __call__(self, x: Array) -> Array:
        u = x / self.scale
        for _ in range(2):
            middle = u + 0.25 * self.rates(u)
            u = u + 0.5 * self.rates(middle)
        return self.scale * u


def pairs() -> Pairs:
    """Return states of the ring of 10 near its attractor, and the states after them."""
    key = jax.random.key(10)
    x = FORCE + jax.random.normal(key, (20_000, RINGS["10"].numbers))
    x = jax.lax.fori_loop(0, SPIN_UP, lambda _, x: flow(x), x)
    even = jnp.arange(len(x)) % 2 == 0
    width = jnp.where(even, 1.0, 0.2)[:, None]
    before = noised(jax.random.fold_in(key, 1), x, width)
    return Pairs(before, flow(before))


def learned_forecast(iterations: int) -> LocalForecast:
    """Read the forecast's weights, or train it and write them if there are none."""
    network = LocalForecast(32, jax.random.key(11))
    if WEIGHTS.is_file():
        return cp.training.load_weights(network, WEIGHTS)
    network = fitted(network, pairs(), iterations)
    cp.training.save_weights(network, WEIGHTS)
    return network


class Spread(NamedTuple):
    """Mean of chains' forecasts, and a root of the kernel's covariance."""

    mean: np.ndarray
    root: np.ndarray


def spread(
    forecasts: np.ndarray, weights: np.ndarray, kernel: Kernel, seen: np.ndarray
) -> Spread:
    """Return what the kernel needs of the chains."""
    mean = weights @ forecasts
    away = forecasts - mean
    covariance = (away * weights[:, None]).T @ away
    noise = kernel.noise**2 * np.eye(len(mean))
    root = np.linalg.cholesky(kernel.width**2 * covariance + noise)
    # In these coordinates the data make the entries of the noise no less independent,
    # so that reverse steps that see them are exact.
    _, _, axes = np.linalg.svd(root[seen])
    return Spread(mean, root @ axes.T)


def programs(forecast: Forecast, ring: Ring, start: np.ndarray) -> tuple[Any, Any]:
    """Return the programs of the first state and of a step."""
    seen = ring.seen
    standard = dist.Normal(0.0, 1.0).expand([ring.numbers]).to_event(1)

    def observed(x: Any, y: Any) -> None:
        cp.observe("y", dist.Normal(x[seen], ring.variance**0.5).to_event(1), y)

    @cp.program
    def first(y: Any) -> None:
        noise = cp.sample("noise", cp.Analytic(standard, LEVELS))
        x = numpyro.deterministic("x", jnp.asarray(start) + FIRST * noise)
        observed(x, y)

    @cp.program
    def step(y: Any, mean: Any, root: Any, kept: Any) -> None:
        # Of the prior only the shape counts: an earlier result gives the values.
        past = cp.sample("past", dist.Normal(0.0, 9.0).expand([len(start)]).to_event(1))
        centre = mean + kept * (forecast(past) - mean)
        noise = cp.sample("noise", cp.Analytic(standard, LEVELS))
        x = numpyro.deterministic("x", centre + root @ noise)
        observed(x, y)

    return first, step


def extensions(
    density: cp.AnnealedDensity,
    forecast: Forecast,
    ring: Ring,
    data: Series,
    kernel: Kernel,
    chains: int,
    key: Array,
) -> Iterator[cp.Result]:
    """The results after each observation; ``density`` is that of the first one."""
    _, step = programs(forecast, ring, data.start)
    foretell = jax.jit(jax.vmap(forecast))
    first_key, key = jax.random.split(key)
    result = cp.infer(density, first_key, num_chains=chains, progress=False)
    yield result
    kept = jnp.float32((1 - kernel.width**2) ** 0.5)
    for t, y in enumerate(data.observations[1:], start=1):
        forecasts = np.asarray(foretell(jnp.asarray(result["x"])), float)
        known = spread(forecasts, weights_of(result), kernel, ring.seen)
        mean = jnp.asarray(known.mean, jnp.float32)
        root = jnp.asarray(known.root, jnp.float32)
        density = cp.compile(step, y, mean, root, kept)
        step_key = jax.random.fold_in(key, t)
        result = result.extend(density, step_key, given={"past": "x"}, keep=LAG)
        yield result


def weights_of(result: cp.Result) -> np.ndarray:
    """Normalised weights of the chains."""
    weights = np.exp(result.log_weights - result.log_weights.max())
    return weights / weights.sum()


def by_extension(
    forecast: Forecast,
    ring: Ring,
    data: Series,
    kernel: Kernel,
    chains: int,
    seed: int,
) -> dict[str, Any]:
    """Go on with one observation after another by `Result.extend`."""
    began = time.monotonic()
    first, _ = programs(forecast, ring, data.start)
    density = cp.compile(first, data.observations[0])
    key = jax.random.key(seed)
    means = []
    evidence = []
    statuses = []
    for result in extensions(density, forecast, ring, data, kernel, chains, key):
        means.append(weights_of(result) @ np.asarray(result["x"], float))
        evidence.append(float(result.log_evidence))
        statuses.append(str(result.status.code))
    return {
        "means": np.array(means).tolist(),
        "log_evidence": evidence,
        "seconds": time.monotonic() - began,
        "stated": float(result.log_evidence_error),
        "ok": statuses.count("ok") / len(statuses),
        "evaluations": result.evaluations,
    }
