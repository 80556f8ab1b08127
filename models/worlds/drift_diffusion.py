"""The drift-diffusion model of two-choice response times: one subject's 200 trials.

Evidence starts midway between two boundaries that lie a apart and drifts at rate v with
noise of unit variance. It starts t0 seconds into a trial, which ends where it first
reaches a boundary. θ = (v, log a, log t0). As the start lies midway, the decision time
is independent of the boundary that was reached, and in units of a² its law depends on
v·a alone:

    g(u) = 2·cosh(va/2)·exp(−(va)²u/2)·f(u),    P(upper) = 1/(1 + exp(−va)),

with f the first-passage density without drift at one of the boundaries, the series of
Navarro and Fuss. Trials are drawn by the inverse of g's distribution function, from a
table: without steps of time, and without their error.

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
LOCATION = (1.0, 0.3, -1.2)
SCALE = (2.0, 0.4, 0.4)
"""Location and scale of the broad normal prior of (v, log a, log t0)."""
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
"""Edges of the groups of ordered response times whose means are summaries.

The first groups are small, as the earliest times determine t0.
"""
SUMMARIES = len(EDGES) + 2
"""Number of summaries of one subject."""
LOGITS = np.linspace(-14.0, 14.0, 449)
PRODUCTS = np.sinh(np.linspace(0.0, 4.2, 169))
"""Logits of probabilities, and values of |va|, of the table of quantiles."""


def prior() -> dist.Distribution:
    """Return the broad prior of θ, shape (3,)."""
    return dist.Normal(jnp.array(LOCATION), jnp.array(SCALE)).to_event(1)


def log_passage(u: Array) -> Array:
    """Return log f(u), the first-passage density without drift at one boundary.

    u is in units of a²; log f is −∞ for u ≤ 0. Both of its series are of one form, 1 −
    3·e^{−8q} + 5·e^{−24q} − 7·e^{−48q} …, with q = 1/(8u) for small u and q = π²u/2 for
    large.
    """
    late = u > 0.3
    # Each series is evaluated on its own side only, so that gradients stay finite.
    short = jnp.clip(u, 1e-6, 0.3)
    long = jnp.maximum(u, 0.3)
    q = jnp.where(late, jnp.pi**2 * long / 2, 1 / (8 * short))
    series = sum(
        (-1) ** j * (2 * j + 1) * jnp.exp(-((2 * j + 1) ** 2 - 1) * q)
        for j in range(1, 5)
    )
    first_of_short = -1.5 * jnp.log(short) - 0.5 * jnp.log(8 * jnp.pi)
    first = jnp.where(late, jnp.log(jnp.pi), first_of_short)
    return jnp.where(u > 0, first - q + jnp.log1p(series), -jnp.inf)


def log_likelihood(theta: Array, times: Array, choices: Array) -> Array:
    """Return log p(times, choices | θ) of one subject's trials (n,) under one θ (3,).

    Choices are 1 for the upper boundary.
    """
    v = theta[0]
    a = jnp.exp(theta[1])
    t0 = jnp.exp(theta[2])
    t = times - t0
    return jnp.sum(
        v * a * (choices - 0.5) - 0.5 * v**2 * t - 2 * theta[1] + log_passage(t / a**2)
    )


@functools.cache
def _quantiles() -> np.ndarray:
    """Return log u at each of `PRODUCTS` and `LOGITS`.

    The distribution function is that of the density by the trapezoidal rule, on a fine
    grid of log u.
    """
    log_u = np.linspace(np.log(1e-3), np.log(12.0), 6001)
    u = np.exp(log_u)
    # Simulators are traced, and the table is a constant of theirs.
    with jax.ensure_compile_time_eval():
        log_f = np.asarray(log_passage(jnp.asarray(u)), float)
    rows = []
    for m in PRODUCTS:
        density = np.exp(m / 2 + np.log1p(np.exp(-m)) - 0.5 * m**2 * u + log_f + log_u)
        cell = 0.5 * (density[1:] + density[:-1]) * (log_u[1] - log_u[0])
        # Each tail is summed from its own end: small probabilities keep their digits.
        below = np.append(0.0, np.cumsum(cell))
        above = np.append(np.cumsum(cell[::-1])[::-1], 0.0)
        logit = np.log(np.maximum(below, 1e-300)) - np.log(np.maximum(above, 1e-300))
        inside = (below > 1e-12) & (above > 1e-12)
        rows.append(np.interp(LOGITS, logit[inside], log_u[inside]))
    return np.array(rows, np.float32)


def trials(key: Array, theta: Array) -> tuple[Array, Array]:
    """Draw response times and choices, each (n, 200), for each θ (n, 3).

    Times are in order, which loses no information.
    """
    time_key, choice_key = jax.random.split(key)
    shape = (theta.shape[0], TRIALS)
    a = jnp.exp(theta[:, 1])
    product = theta[:, 0] * a
    upper = jax.random.bernoulli(choice_key, jax.nn.sigmoid(product)[:, None], shape)
    # Places in the table: PRODUCTS are even in arsinh, LOGITS as they are.
    row = jnp.clip(jnp.arcsinh(jnp.abs(product)) / 4.2, 0.0, 1.0) * (len(PRODUCTS) - 1)
    # Uniform numbers in order are sums of exponential ones over their total: nothing is
    # sorted.
    spacings = jax.random.exponential(time_key, (theta.shape[0], TRIALS + 1))
    below = jnp.cumsum(spacings, axis=1)[:, :-1]
    above = jnp.cumsum(spacings[:, ::-1], axis=1)[:, ::-1][:, 1:]
    logit = jnp.log(below) - jnp.log(above)
    share = jnp.clip((logit - LOGITS[0]) / (LOGITS[-1] - LOGITS[0]), 0.0, 1.0)
    column = share * (len(LOGITS) - 1)
    u = jnp.exp(_interpolated(jnp.asarray(_quantiles()), row, column))
    return jnp.exp(theta[:, 2:]) + a[:, None] ** 2 * u, upper.astype(jnp.float32)


def _interpolated(table: Array, row: Array, column: Array) -> Array:
    """Return a table's values at rows (n,) and columns (n, t), bilinearly."""
    i = jnp.minimum(row.astype(int), table.shape[0] - 2)
    j = jnp.minimum(column.astype(int), table.shape[1] - 2)
    between = (row - i)[:, None]
    lines = (1 - between) * table[i] + between * table[i + 1]
    lower = jnp.take_along_axis(lines, j, axis=1)
    upper = jnp.take_along_axis(lines, j + 1, axis=1)
    return lower + (column - j) * (upper - lower)


def summaries(times: Array, choices: Array) -> Array:
    """Return the summaries (n, 25) of n subjects' response times and choices (n, 200).

    They are the logit of the share of upper choices, the mean and log standard
    deviation of the log times, and the log times in order, averaged within groups. As
    times are independent of choices, they contain nearly all of the information.
    """
    return _of_ordered(jnp.sort(jnp.log(times), axis=-1), choices)


def _of_ordered(log_times: Array, choices: Array) -> Array:
    """Return the summaries of log times that are in order."""
    count = choices.sum(-1, keepdims=True)
    share = jnp.log((count + 0.5) / (TRIALS - count + 0.5))
    groups = [
        log_times[:, i:j].mean(-1, keepdims=True) for i, j in itertools.pairwise(EDGES)
    ]
    mean = log_times.mean(-1, keepdims=True)
    deviation = log_times.std(-1, keepdims=True)
    return jnp.concatenate([share, mean, jnp.log(deviation), *groups], axis=-1)


def simulate(key: Array, theta: Array) -> Array:
    """Draw the summaries (n, 25) of one subject for each θ (n, 3)."""
    times, choices = trials(key, theta)
    return _of_ordered(jnp.log(times), choices)
