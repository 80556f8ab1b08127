"""What chains do together: resampling by exact sums, and errors from their
genealogy."""

from __future__ import annotations

import abc
from functools import partial

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from composeprob.kernels.step_size import as_scalar, check_range
from composeprob.samplers.random import threefry


class Resampler(eqx.Module):
    """How chains that weigh one another exchange places: what `SMC` takes as
    ``resample=``.

    To write another one, say when it is time (`due`) and which chain takes the place of
    each (`survivors`): chains that met weigh the same, and each must be chosen in
    proportion to its weight on average.
    """

    @abc.abstractmethod
    def due(self, ess: Array, level: Array) -> Array:
        """Whether chains meet at this level, a scalar boolean. At level 0 they do in
        any case, as samples have to weigh the same.

        Args:
            ess: relative effective sample size of their weights, in [0, 1].
            level: of noise, down to 0.
        """

    @abc.abstractmethod
    def survivors(self, words: Array, log_weights: Array) -> Array:
        """The chain that takes the place of each, (N,) of 0 … N − 1.

        Args:
            words: random words of this level, (2,): `samplers.random` makes numbers and
                keys of them.
            log_weights: of all chains, (N,): finite or −∞, where nothing is left all of
                them −∞.
        """


class Resample(Resampler):
    """Systematic resampling where the relative effective sample size is below a
    threshold, and at level 0.

    Args:
        threshold: in (0, 1].

    Raises:
        InvalidValueError: a threshold outside.

    Example:
        >>> import composeprob as cp
        >>> cp.SMC(resample=cp.Resample(0.8)).exchange
        Resample(0.8)

    References:
        Carpenter, Clifford and Fearnhead 1999, *Improved particle filter for nonlinear
            problems*.
    """

    threshold: Array | float = eqx.field(
        default=0.5, converter=partial(as_scalar, what="Resample(threshold=)")
    )

    def __check_init__(self) -> None:
        check_range(
            self.threshold, "Resample(threshold=)", 1.0 + 1e-6, fix="a number in (0, 1]"
        )

    def due(self, ess: Array, level: Array) -> Array:
        return jnp.asarray(ess < self.threshold)

    def survivors(self, words: Array, log_weights: Array) -> Array:
        return systematic(threefry(words, 0)[0], log_weights)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({float(self.threshold):.3g})"


def relative_ess(log_weights: Array) -> Array:
    """(Σ w)²/(N·Σ w²) in [0, 1], a scalar; 0 where every weight is 0 (Kong, Liu and
    Wong 1994)."""
    weights = relative_weights(log_weights)
    total, squares = jnp.sum(jnp.stack([weights, weights**2]), axis=1)
    return total**2 / (jnp.maximum(squares, 1e-30) * log_weights.shape[0])


def systematic(bits: Array, log_weights: Array) -> Array:
    """Indices (N,) of the chains that survive: one uniform number, of 32 random
    ``bits``, and evenly spaced ticks on the cumulated weights (Carpenter, Clifford and
    Fearnhead 1999). Chain i appears ⌊N·w_i⌋ or ⌈N·w_i⌉ times, N·w_i on average, and
    never where w_i = 0. Where every weight is 0 each survives once.

    The expected copies N·w_i are rounded to multiples of 2⁻³² and added up as whole
    numbers. Such sums are exact, so they never fall and are the same on any number of
    devices. A cumulative sum of floats, computed in blocks, can fall from one entry to
    the next, and a tick between the two copies a chain whose weight is 0.
    """
    n = log_weights.shape[0]
    log_weights = jnp.where(jnp.isfinite(jnp.max(log_weights)), log_weights, 0.0)
    weights = relative_weights(log_weights)
    sums = jnp.sum(_digits(0.5 * weights), axis=1, dtype=jnp.uint32).astype(jnp.float32)
    total = 2 * (sums[0] + sums[1] * 2.0**-11 + sums[2] * 2.0**-22 + sums[3] * 2.0**-32)
    units, high, middle, low = jnp.cumsum(
        _digits(weights * (n / total)), axis=1, dtype=jnp.uint32
    )
    middle = middle + (low >> 10)
    high = high + (middle >> 11)
    copies = units + (high >> 11)
    parts = ((high & 0x7FF) << 21) | ((middle & 0x7FF) << 10) | (low & 0x3FF)
    # Tick j stands at j + u: so many of them lie below each cumulated number of copies,
    # copies + parts/2³².
    below = (copies + (bits < parts)).astype(jnp.int32)
    # The last chain that has a weight takes the ticks that rounding of the total leaves
    # over.
    last = (parts == parts[-1]) & (copies == copies[-1])
    return jnp.searchsorted(jnp.where(last, n, below), jnp.arange(n), side="right")


def _digits(numbers: Array) -> Array:
    """Numbers ≥ 0 as units and digits of 11, 11 and 10 bits behind the point, (4, N),
    unsigned: up to 2²¹ of each add up in 32 bits."""
    digits = []
    for bits in (11, 11, 10, 0):
        digits.append(jnp.floor(numbers))
        numbers = (numbers - digits[-1]) * 2.0**bits
    return jnp.stack(digits).astype(jnp.uint32)


def relative_weights(log_weights: Array) -> Array:
    """Weights in units of the largest one, (N,); all 0 where none is positive."""
    return jnp.exp(log_weights - _largest(log_weights))


def _largest(log_weights: Array) -> Array:
    """The largest logarithm, a scalar; 0 where it is no number."""
    return jnp.nan_to_num(jnp.max(log_weights), posinf=0.0, neginf=0.0)


def log_mean_weight(log_weights: Array) -> Array:
    """log of the mean weight, a scalar."""
    return jnp.log(
        jnp.sum(relative_weights(log_weights)) / log_weights.shape[0]
    ) + _largest(log_weights)


def evidence_variance(log_weights: Array, ancestors: Array) -> Array:
    """The relative variance of the estimated evidence, from one run, a scalar: Σ_e (W_e
    − 1/N)²·N/(N − 1), with W_e the share of the weight, before the last resampling, of
    all chains that descend from first chain e, one of the ``ancestors``, (N,) of 0 … N
    − 1 (Lee and Whiteley 2018, *Variance estimation in the particle filter*)."""
    n = log_weights.shape[0]
    weights = relative_weights(log_weights)
    shares = (
        jnp.zeros((n,))
        .at[ancestors]
        .add(weights / jnp.maximum(jnp.sum(weights), 1e-30))
    )
    return jnp.sum((shares - 1 / n) ** 2) * (n / max(n - 1, 1))


def off_by_averaging(log_weights: Array, more: Array) -> Array:
    """By how much the log-evidence would grow at a level if chains weighed e^more as
    much, log Σ W·e^more, and the variance of that, (2,); zeros where no chain has a
    weight."""
    weights, growth = relative_weights(log_weights), jnp.exp(more)
    total = jnp.sum(weights)
    mean = jnp.sum(weights * growth) / total
    variance = jnp.sum((weights / total * (growth / mean - 1)) ** 2)
    return jnp.where(total > 0, jnp.stack([jnp.log(mean), variance]), 0.0)


def step_statistics(
    log_weights: Array, gains: Array, moved: Array
) -> tuple[Array, Array]:
    """How a step to a level changed the weights and moved the chains, two scalars: the
    relative variance of e^gain under the weights before it, Σ W·Σ W·w²/(Σ W·w)² − 1 =
    1/CESS − 1, infinite where no chain is left; and the weighted mean of how far its
    correction ``moved`` each chain, (N,), where that is finite."""
    weights, gains = (
        relative_weights(log_weights),
        jnp.where(jnp.isnan(gains), -jnp.inf, gains),
    )
    growth = relative_weights(jnp.where(weights > 0, gains, -jnp.inf))
    fine = jnp.isfinite(moved)
    terms = (
        weights,
        weights * growth,
        weights * growth**2,
        weights * fine,
        jnp.where(fine, weights * moved, 0.0),
    )
    total, grown, squares, finite, way = jnp.sum(jnp.stack(terms), axis=1)
    variance = total * squares / grown**2 - 1
    return jnp.where(
        jnp.isnan(variance), jnp.inf, jnp.maximum(variance, 0.0)
    ), way / jnp.maximum(finite, 1e-30)


def statistics(
    log_weights: Array,
    ancestors: Array,
    more: Array,
    before: Array,
    gains: Array,
    moved: Array,
) -> tuple[Array, ...]:
    """All that a level reports of its chains, by their weights, what these were before
    the step and what they gained: `relative_ess`, `log_mean_weight`,
    `evidence_variance`, `off_by_averaging`, and both `step_statistics`."""
    means = (
        relative_ess(log_weights),
        log_mean_weight(log_weights),
        evidence_variance(log_weights, ancestors),
    )
    return (
        *means,
        off_by_averaging(log_weights, more),
        *step_statistics(before, gains, moved),
    )


def num_distinct(ancestors: Array) -> Array:
    """How many different first chains are left, a scalar."""
    return jnp.sum(jnp.zeros((ancestors.shape[0],), jnp.int32).at[ancestors].max(1))


def shares(log_weights: Array) -> Array:
    """Weights that add up to 1, (N,); equal ones where every weight is 0."""
    weights = relative_weights(log_weights)
    total = jnp.sum(weights)
    return jnp.where(
        total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / len(weights)
    )
