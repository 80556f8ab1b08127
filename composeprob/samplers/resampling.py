"""Resampling of weighted chains by exact sums, and errors that follow from the
genealogy of chains."""

from __future__ import annotations

import abc
import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

from composeprob.errors import WrongTypeError
from composeprob.kernels.step_size import as_scalar, check_range
from composeprob.samplers.random import threefry
from composeprob.user_code import array_from, is_own


class Resampler(eqx.Module):
    """A rule by which weighted chains are resampled: what `SMC` takes as ``resample=``.

    To write another one, say when to resample (`should_resample`) and which chain takes
    the place of each (`ancestors`): resampled chains have equal weights, so each must
    be chosen in proportion to its weight on average.
    """

    @abc.abstractmethod
    def should_resample(self, ess: Float[Array, ""], level: Int[Array, ""]) -> Array:
        """Return whether chains are resampled at this level, a scalar boolean. At level
        0 they are in any case, as samples have to have equal weights.

        Args:
            ess: relative effective sample size of their weights, in [0, 1].
            level: of noise, down to 0.
        """

    @abc.abstractmethod
    def ancestors(
        self, words: UInt32[Array, " 2"], log_weights: Float[Array, " chains"]
    ) -> Int[Array, " chains"]:
        """Return the chain that takes the place of each, (N,) of 0 … N − 1.

        Args:
            words: random words of this level, (2,): `samplers.random` makes numbers and
                keys of them.
            log_weights: of all chains, (N,): finite or −∞; all are −∞ where every chain
                is lost.
        """

    def check(self, num_chains: int) -> None:
        """Refuse a rule of a user's own class whose methods do not return a boolean,
        and a chain for the place of each; nothing is computed."""
        if not is_own(self):
            return
        name = f"The resampler {type(self).__name__}"
        number = jax.ShapeDtypeStruct((), jnp.float32)
        level = jax.ShapeDtypeStruct((), jnp.int32)
        array_from(
            name,
            "should_resample(ess, level)",
            lambda: jax.eval_shape(self.should_resample, number, level),
            (),
        )
        words = jax.ShapeDtypeStruct((2,), jnp.uint32)
        log_weights = jax.ShapeDtypeStruct((num_chains,), jnp.float32)
        ancestors = array_from(
            name,
            f"ancestors(words, log_weights) of {num_chains} chains",
            lambda: jax.eval_shape(self.ancestors, words, log_weights),
            (num_chains,),
        )
        if not jnp.issubdtype(ancestors.dtype, jnp.integer):
            raise WrongTypeError(
                f"{name} returns ancestors of type {ancestors.dtype}.",
                fix="return whole numbers: an array .astype(int), or of jnp.argmax, "
                "jnp.searchsorted and the like.",
            )


class Resample(Resampler):
    """Systematic resampling where the relative effective sample size is below a
    threshold, and at level 0.

    Args:
        threshold: in (0, 1].

    Raises:
        InvalidValueError: a threshold outside.

    Example:
        >>> import composeprob as cp
        >>> cp.Resample(0.8)
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

    def should_resample(self, ess: Array, level: Array) -> Array:
        return jnp.asarray(ess < self.threshold)

    def ancestors(self, words: Array, log_weights: Array) -> Array:
        bits, _ = threefry(words, 0)
        return systematic(bits, log_weights)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({float(self.threshold):.3g})"


# Weights. They are taken relative to the largest one, so that no exponential overflows.


def relative_weights(
    log_weights: Float[Array, "*sets chains"],
) -> Float[Array, "*sets chains"]:
    """Weights in units of the largest one of their set; all 0 where none is
    positive."""
    return jnp.exp(log_weights - _largest(log_weights))


def _largest(log_weights: Float[Array, "*sets chains"]) -> Float[Array, "*sets 1"]:
    """Return the largest log-weight of each set; 0 if it is infinite."""
    largest = jnp.max(log_weights, axis=-1, keepdims=True)
    return jnp.nan_to_num(largest, posinf=0.0, neginf=0.0)


def log_mean_weight(log_weights: Float[Array, " chains"]) -> Float[Array, ""]:
    """Return the log of the mean weight."""
    mean = jnp.sum(relative_weights(log_weights)) / len(log_weights)
    return jnp.log(mean) + _largest(log_weights)[0]


def normalised_weights(log_weights: Float[Array, " chains"]) -> Float[Array, " chains"]:
    """Weights that add up to 1; equal ones where every weight is 0."""
    weights = relative_weights(log_weights)
    total = jnp.sum(weights)
    divisor = jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, weights / divisor, 1.0 / len(weights))


def relative_ess(log_weights: Float[Array, " chains"]) -> Float[Array, ""]:
    """Return the relative effective sample size, (Σ w)²/(N·Σ w²) in [0, 1]; 0 where
    every weight is 0 (Kong, Liu and Wong 1994)."""
    weights = relative_weights(log_weights)
    total, squares = jnp.sum(jnp.stack([weights, weights**2]), axis=1)
    return _ess(total, squares) / len(weights)


def _ess(total: Array, squares: Array) -> Array:
    """Return (Σ w)²/Σ w²."""
    return total**2 / jnp.maximum(squares, 1e-30)


# Systematic resampling


def systematic(
    bits: UInt32[Array, ""], log_weights: Float[Array, " chains"]
) -> Int[Array, " chains"]:
    """Indices of the resampled chains: one uniform number, of 32 random ``bits``, and
    evenly spaced ticks on the cumulated weights (Carpenter, Clifford and Fearnhead
    1999). Chain i appears ⌊N·w_i⌋ or ⌈N·w_i⌉ times, N·w_i on average, and never where
    w_i = 0. Where every weight is 0 each chain appears once.

    The expected copies N·w_i are rounded to multiples of 2⁻³² and added up as whole
    numbers. Such sums are exact, so they never fall and are the same on any number of
    devices. A cumulative sum of floats, computed in blocks, can fall from one entry to
    the next, and a tick between the two copies a chain whose weight is 0.
    """
    n = log_weights.shape[0]
    log_weights = jnp.where(jnp.isfinite(jnp.max(log_weights)), log_weights, 0.0)
    weights = relative_weights(log_weights)
    # The total is a sum of digits, too: exact, whatever the order. Halved weights have
    # all their digits behind the point.
    sums = jnp.sum(_digits(0.5 * weights), axis=1, dtype=jnp.uint32).astype(jnp.float32)
    total = 2 * (sums[0] + sums[1] * 2.0**-11 + sums[2] * 2.0**-22 + sums[3] * 2.0**-32)
    units, high, middle, low = jnp.cumsum(
        _digits(weights * (n / total)), axis=1, dtype=jnp.uint32
    )
    # Carries from each group of digits to the one above it.
    middle = middle + (low >> 10)
    high = high + (middle >> 11)
    copies = units + (high >> 11)
    fractions = ((high & 0x7FF) << 21) | ((middle & 0x7FF) << 10) | (low & 0x3FF)
    # Tick j stands at j + u: so many of them lie below each cumulated number of copies,
    # copies + fractions/2³².
    below = (copies + (bits < fractions)).astype(jnp.int32)
    # The last chain that has a weight takes the ticks that rounding of the total leaves
    # over.
    last = (fractions == fractions[-1]) & (copies == copies[-1])
    return jnp.searchsorted(jnp.where(last, n, below), jnp.arange(n), side="right")


def _digits(numbers: Float[Array, " n"]) -> UInt32[Array, "4 n"]:
    """Numbers ≥ 0 as units and digits of 11, 11 and 10 bits behind the point: up to 2²¹
    of each add up in 32 bits."""
    digits = []
    for bits in (11, 11, 10, 0):
        digits.append(jnp.floor(numbers))
        numbers = (numbers - digits[-1]) * 2.0**bits
    return jnp.stack(digits).astype(jnp.uint32)


# Statistics of a level


def have_descendants(ancestors: Int[Array, " chains"]) -> Int[Array, " chains"]:
    """Return 1 for each initial chain that has descendants among N chains, else 0."""
    return jnp.zeros_like(ancestors).at[ancestors].max(1)


class LevelStatistics(NamedTuple):
    """Statistics that a level reports of its weighted chains.

    Attributes:
        ess: `relative_ess`.
        log_mean: `log_mean_weight`.
        evidence_variance: the relative variance of the estimated evidence, from one
            run, Σ_e (W_e − 1/N)²·N/(N − 1), with W_e the share of the weight, before
            the last resampling, of all chains that descend from initial chain e (Lee
            and Whiteley 2018, *Variance estimation in the particle filter*).
        averaging: the change of the log-evidence at the level if log-weights were
            greater by a, log Σ W·e^a, and its variance; zeros where every weight is 0.
        weight_variance: how unequally the step to the level changed the weights: the
            relative variance of e^gain under the weights before it, Σ W·Σ W·w²/(Σ W·w)²
            − 1 = 1/CESS − 1 (Zhou, Johansen and Aston 2016), infinite where no chain is
            left.
        step_error: how far the step's correction moved the chains: the weighted mean of
            the finite errors.
    """

    ess: Float[Array, ""]
    log_mean: Float[Array, ""]
    evidence_variance: Float[Array, ""]
    averaging: Float[Array, " 2"]
    weight_variance: Float[Array, ""]
    step_error: Float[Array, ""]


def statistics(
    log_weights: Float[Array, " chains"],
    ancestors: Int[Array, " chains"],
    averaging: Float[Array, " chains"],
    before: Float[Array, " chains"],
    gains: Float[Array, " chains"],
    errors: Float[Array, " chains"],
) -> LevelStatistics:
    """Statistics of a level.

    Args:
        log_weights: of all chains.
        ancestors: the initial chain of 0 … N − 1 that each descends from.
        averaging: what the log-weights would be greater by.
        before: the log-weights before the step.
        gains: their increments by it; NaN of chains that are lost.
        errors: how far its correction moved each chain.
    """
    n = len(log_weights)
    gains = jnp.where(jnp.isnan(gains) | jnp.isneginf(before), -jnp.inf, gains)
    # A chain whose weight after the step is lost in the rounding of their sum tells
    # nothing of the step, however much it gained.
    rounding = math.log(jnp.finfo(log_weights.dtype).eps)
    counts = log_weights - _largest(log_weights) > rounding
    sets = jnp.stack([log_weights, before, jnp.where(counts, gains, -jnp.inf)])
    weights, earlier, growth = relative_weights(sets)
    averaged = jnp.exp(averaging)
    corrected = jnp.isfinite(errors)
    # One sum for all: a sum over many chains takes as long to compile as a network's
    # layer.
    columns = [
        weights,
        weights**2,
        weights * averaged,
        earlier,
        earlier * growth,
        earlier * growth**2,
        earlier * corrected,
        jnp.where(corrected, earlier * errors, 0.0),
    ]
    sums = jnp.sum(jnp.stack(columns), axis=1)
    total, squares, averages, all_before, grown, grown_squares, usable, error = sums

    shares = weights / jnp.maximum(total, 1e-30)
    by_ancestor = jnp.zeros((n,)).at[ancestors].add(shares)
    mean = averages / total
    deviations = [by_ancestor - 1 / n, weights / total * (averaged / mean - 1)]
    of_ancestors, of_averages = jnp.sum(jnp.stack(deviations) ** 2, axis=1)
    change = jnp.where(total > 0, jnp.stack([jnp.log(mean), of_averages]), 0.0)

    variance = all_before * grown_squares / grown**2 - 1
    variance = jnp.where(jnp.isnan(variance), jnp.inf, jnp.maximum(variance, 0.0))
    return LevelStatistics(
        ess=_ess(total, squares) / n,
        log_mean=jnp.log(total / n) + _largest(log_weights)[0],
        evidence_variance=of_ancestors * (n / max(n - 1, 1)),
        averaging=change,
        weight_variance=variance,
        step_error=error / jnp.maximum(usable, 1e-30),
    )
