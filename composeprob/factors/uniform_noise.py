"""Uniform noise of tokens: each token is kept with probability a, and otherwise
replaced by a uniform value, so that q(v | u) = a·1{v = u} + (1 − a)/V.

Everything that a factor is asked follows from the conditionals of one position given
all others, c_i(v) = p_k(x_i = v | x_{−i}) at a level, and c'_i, in which position i
alone has the noise of a cleaner level.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from composeprob.schedule import Schedule


class UniformNoise(eqx.Module):
    """A level of uniform noise, and the one that follows it.

    Attributes:
        kept: a, the probability that a token is kept, at the level.
        kept_below: the same at the cleaner level that follows.
        power: the exponent of potentials that have no noised form, at the level: from 0
            at the noisiest to 1 at level 0.
        power_below: the same at the level that follows.
    """

    kept: Float[Array, ""]
    kept_below: Float[Array, ""]
    power: Float[Array, ""]
    power_below: Float[Array, ""]

    @classmethod
    def between(
        cls, schedule: Schedule, level: Int[Array, ""], below: Int[Array, ""]
    ) -> UniformNoise:
        """Return the noise of a level of a schedule, with that of a cleaner one."""
        kept = schedule.kept
        # Potentials come in as signal does. A single level has them whole.
        range_of_signal = kept[0] - kept[-1]
        power = jnp.where(
            range_of_signal > 0,
            (kept - kept[-1]) / jnp.where(range_of_signal > 0, range_of_signal, 1.0),
            1.0,
        )
        return cls(kept[level], kept[below], power[level], power[below])


class NoisedEvent(eqx.Module):
    """Tokens of one event under uniform noise.

    Attributes:
        tokens: the values.
        noise: the level.
    """

    tokens: Int[Array, " length"]
    noise: UniformNoise


class Noised(NamedTuple):
    """The values of a factor about noised tokens x.

    Attributes:
        rises: log f of x with another value at one position, less that of x.
        onward: the same, if that position alone has the noise of the level below.
        base: log f of x; None where it is not known from one evaluation.
        at_top: log f of x, if the level is the noisiest.
    """

    rises: Float[Array, "length values"]
    onward: Float[Array, "length values"]
    base: Float[Array, ""] | None
    at_top: Float[Array, ""]


def of_clean(
    clean: Float[Array, "length values"],
    event: NoisedEvent,
    base: Float[Array, ""] | None,
) -> Noised:
    """Return the values of a model from its probabilities of the clean token of each
    position given all *other* noised tokens: c = a·p + (1 − a)/V."""
    number = clean.shape[1]
    kept = event.noise.kept
    below = event.noise.kept_below
    here = kept * clean + (1 - kept) / number
    onward = below * clean + (1 - below) / number
    return _of_conditionals(here, onward, event.tokens, base)


def of_ratios(log_ratios: Float[Array, "length values"], event: NoisedEvent) -> Noised:
    """Return the values of a model from log p_k(y)/p_k(x) of its neighbours y: c is
    proportional to the ratios.

    c' = 1/V + (a'/a)·(c − 1/V) is positive for ratios of a distribution; for a
    network's it is kept so.
    """
    number = log_ratios.shape[1]
    own = jnp.arange(number) == event.tokens[:, None]
    here = jax.nn.softmax(jnp.where(own, 0.0, log_ratios), axis=1)
    growth = event.noise.kept_below / event.noise.kept
    onward = 1 / number + growth * (here - 1 / number)
    least = jnp.maximum(1 - event.noise.kept_below, 1e-7) / number
    onward = jnp.maximum(onward, least)
    onward = onward / jnp.sum(onward, axis=1, keepdims=True)
    return _of_conditionals(here, onward, event.tokens, None)


def without_own(
    posterior: Float[Array, "length values"], event: NoisedEvent
) -> Float[Array, "length values"]:
    """Return p(x₀ᵢ | x_{−i}) from p(x₀ᵢ | x): the latter less what token i says of
    itself, q(x_i | u)."""
    number = posterior.shape[1]
    own = jnp.arange(number) == event.tokens[:, None]
    kept = event.noise.kept
    likelihood = jnp.where(own, kept, 0.0) + (1 - kept) / number
    clean = posterior / likelihood
    return clean / jnp.sum(clean, axis=1, keepdims=True)


def tempered(
    potential: Float[Array, ""],
    neighbours: Float[Array, "length values"],
    noise: UniformNoise,
) -> Noised:
    """Return the values of a potential that has no noised form, with its exponent at
    the level.

    Args:
        potential: log f of the tokens.
        neighbours: the same with another value at one position.
        noise: the level.
    """

    def raised(values: Array, power: Array) -> Array:
        # An exponent of 0 lets what is impossible pass.
        return jnp.where(power > 0, power * values, 0.0)

    here = raised(potential, noise.power)
    possible = jnp.where(jnp.isneginf(here), 0.0, here)
    rises = raised(neighbours, noise.power) - possible
    onward = raised(neighbours, noise.power_below) - possible
    return Noised(rises, onward, here, here)


def _of_conditionals(
    here: Float[Array, "length values"],
    onward: Float[Array, "length values"],
    tokens: Int[Array, " length"],
    base: Float[Array, ""] | None,
) -> Noised:
    """The values of a model from c and c'."""
    log_here = jnp.log(here)
    own = jnp.take_along_axis(log_here, tokens[:, None], axis=1)
    # V^L·p_K(x) = 1 + a·Σ_i (V·p_i(x_i) − 1) + O(a²), and V·c_i(x_i) is 1 plus one
    # such term: so Π c_i(x_i) is p_K(x) up to a².
    at_top = jnp.sum(own)
    if base is not None:
        at_top = base
    return Noised(log_here - own, jnp.log(onward) - own, base, at_top)
