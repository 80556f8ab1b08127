"""The drift-diffusion model of two-choice response times: one subject's 200 trials.

Evidence starts midway between two boundaries that lie a apart and drifts at rate v with
noise of unit variance. It sets out t0 seconds into a trial, which ends where it first
meets a boundary. θ = (v, log a, log t0). As the start lies midway, the decision time
does not depend on which boundary was met, and in units of a² its law depends on v·a
alone:

    g(u) = 2·cosh(va/2)·exp(−(va)²u/2)·f(u),    P(upper) = 1/(1 + exp(−va)),

with f the first-passage density without drift at one of the boundaries, the series of
Navarro and Fuss. Trials are drawn by the inverse of g's distribution function, from a
table: no steps of time, and none of their error.

References:
    Ratcliff 1978, *A theory of memory retrieval*; Navarro and Fuss 2009, *Fast and
    accurate calculations for first-passage times in Wiener diffusion models*.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

SIZE = 3
"""Parameters."""
TRIALS = 200
"""Trials of one subject."""
LOCATION, SCALE = (1.0, 0.3, -1.2), (2.0, 0.4, 0.4)
"""Of the broad normal prior of (v, log a, log t0)."""
EDGES = (
    0,
    1,
    2,
    4,
    7,
    11,
    16,
    24,
    34,
    46,
    60,
    76,
    94,
    112,
    130,
    146,
    160,
    172,
    182,
    190,
    196,
    199,
    200,
)
"""Of the groups of ordered response times whose means are summaries; the earliest,
which tell t0, are few."""
SUMMARIES = len(EDGES) + 2
"""Numbers that the summaries of one subject have."""
LOGITS, PRODUCTS = np.linspace(-14.0, 14.0, 449), np.sinh(np.linspace(0.0, 4.2, 169))
"""Of the table of quantiles: its probabilities and values of |va|."""


def prior() -> dist.Distribution:
    """The broad prior of θ, shape (3,)."""
    return dist.Normal(jnp.array(LOCATION), jnp.array(SCALE)).to_event(1)


def log_passage(u: Array) -> Array:
    """log f(u), the first-passage density without drift at one of two boundaries, u in
    units of a²; −∞ for u ≤ 0.

    Both of its series are of one form, 1 − 3·e^{−8q} + 5·e^{−24q} − 7·e^{−48q} …, with
    q = 1/(8u) for small u and q = π²u/2 for large.
    """
    late = u > 0.3
    short, long = jnp.clip(u, 1e-6, 0.3), jnp.maximum(u, 0.3)
    q = jnp.where(late, jnp.pi**2 * long / 2, 1 / (8 * short))
    series = sum(
        (-1) ** j * (2 * j + 1) * jnp.exp(-((2 * j + 1) ** 2 - 1) * q)
        for j in range(1, 5)
    )
    first = jnp.where(
        late, jnp.log(jnp.pi), -1.5 * jnp.log(short) - 0.5 * jnp.log(8 * jnp.pi)
    )
    return jnp.where(u > 0, first - q + jnp.log1p(series), -jnp.inf)


def log_likelihood(theta: Array, times: Array, choices: Array) -> Array:
    """log p(times, choices | θ) of one subject's trials (n,) under one θ (3,); choices
    are 1 for the upper boundary."""
    v, a, t0 = theta[0], jnp.exp(theta[1]), jnp.exp(theta[2])
    t = times - t0
    return jnp.sum(
        v * a * (choices - 0.5) - 0.5 * v**2 * t - 2 * theta[1] + log_passage(t / a**2)
    )


@functools.cache
def _quantiles() -> np.ndarray:
    """log u at each of `PRODUCTS` and `LOGITS`, from the density by the trapezoidal
    rule on a fine grid of log u."""
    log_u = np.linspace(np.log(1e-3), np.log(12.0), 6001)
    u = np.exp(log_u)
    with jax.ensure_compile_time_eval():  # simulators are traced
        log_f = np.asarray(log_passage(jnp.asarray(u)), float)
    rows = []
    for m in PRODUCTS:
        density = np.exp(m / 2 + np.log1p(np.exp(-m)) - 0.5 * m**2 * u + log_f + log_u)
        cell = 0.5 * (density[1:] + density[:-1]) * (log_u[1] - log_u[0])
        below, above = (
            np.append(0.0, np.cumsum(cell)),
            np.append(np.cumsum(cell[::-1])[::-1], 0.0),
        )
        logit = np.log(np.maximum(below, 1e-300)) - np.log(np.maximum(above, 1e-300))
        inside = (below > 1e-12) & (above > 1e-12)
        rows.append(np.interp(LOGITS, logit[inside], log_u[inside]))
    return np.array(rows, np.float32)


def trials(key: Array, theta: Array) -> tuple[Array, Array]:
    """Response times and choices, each (n, 200), for each θ (n, 3); the times in order,
    which tells nothing else."""
    time_key, choice_key = jax.random.split(key)
    shape = (theta.shape[0], TRIALS)
    product, a = theta[:, 0] * jnp.exp(theta[:, 1]), jnp.exp(theta[:, 1])
    upper = jax.random.bernoulli(choice_key, jax.nn.sigmoid(product)[:, None], shape)
    row = jnp.clip(jnp.arcsinh(jnp.abs(product)) / 4.2, 0.0, 1.0) * (len(PRODUCTS) - 1)
    # Uniform numbers in order are sums of exponential ones over their total: nothing is
    # sorted.
    spacings = jax.random.exponential(time_key, (theta.shape[0], TRIALS + 1))
    below, above = (
        jnp.cumsum(spacings, axis=1)[:, :-1],
        jnp.cumsum(spacings[:, ::-1], axis=1)[:, ::-1][:, 1:],
    )
    logit = jnp.log(below) - jnp.log(above)
    column = jnp.clip((logit - LOGITS[0]) / (LOGITS[-1] - LOGITS[0]), 0.0, 1.0) * (
        len(LOGITS) - 1
    )
    u = jnp.exp(_interpolated(jnp.asarray(_quantiles()), row, column))
    return jnp.exp(theta[:, 2:]) + a[:, None] ** 2 * u, upper.astype(jnp.float32)


def _interpolated(table: Array, row: Array, column: Array) -> Array:
    """Bilinear, at rows (n,) and columns (n, t)."""
    i = jnp.minimum(row.astype(int), table.shape[0] - 2)
    j = jnp.minimum(column.astype(int), table.shape[1] - 2)
    between = (row - i)[:, None]
    lines = (1 - between) * table[i] + between * table[i + 1]
    lower, upper = (jnp.take_along_axis(lines, at, axis=1) for at in (j, j + 1))
    return lower + (column - j) * (upper - lower)


def summaries(times: Array, choices: Array) -> Array:
    """What an estimator sees of n subjects, (n, 25), from response times and choices
    (n, 200).

    The logit of the share of upper choices, the mean and standard deviation of the log
    times, and the log times in order, averaged within groups. As times do not depend on
    choices, nearly all that they tell is in these.
    """
    return _of_ordered(jnp.sort(jnp.log(times), axis=-1), choices)


def _of_ordered(log_times: Array, choices: Array) -> Array:
    count = choices.sum(-1, keepdims=True)
    share = jnp.log((count + 0.5) / (TRIALS - count + 0.5))
    groups = [
        log_times[:, i:j].mean(-1, keepdims=True) for i, j in itertools.pairwise(EDGES)
    ]
    mean, deviation = (
        log_times.mean(-1, keepdims=True),
        log_times.std(-1, keepdims=True),
    )
    return jnp.concatenate([share, mean, jnp.log(deviation), *groups], axis=-1)


def simulate(key: Array, theta: Array) -> Array:
    """The summaries (n, 25) of one subject for each θ (n, 3)."""
    times, choices = trials(key, theta)
    return _of_ordered(jnp.log(times), choices)
