"""Recipes of masked diffusion: networks of the conditionals of tokens in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from composeprob.core import MaskedDiffusion
from composeprob.errors import InvalidValueError, NetworkError
from composeprob.training.recipe import (
    EXAMPLES,
    Optimised,
    check_conditions,
    example_data,
)


class MaskedBatch(NamedTuple):
    """Events of tokens with their visible positions; every leaf has a leading batch
    axis.

    Attributes:
        tokens: events, (n, L).
        visible: truth values, (n, L).
        conditions: ``{name: (n, …)}``.
    """

    tokens: Int[Array, "n length"]
    visible: Bool[Array, "n length"]
    conditions: dict[str, Array]

    @property
    def share(self) -> Float[Array, " n"]:
        """Share of the positions of each event that is visible."""
        return jnp.mean(self.visible, axis=1)


@dataclass(frozen=True, kw_only=True)
class MaskedRecipe(Optimised):
    r"""A `MaskedRecipe` determines a trained `MaskedDiffusion`, up to the random key.

    An event x of L tokens is seen through a random set of visible positions: the first
    k of a random order σ, k uniform on 0 … L − 1. The loss is the mean cross-entropy of
    the hidden tokens, whose expectation is a bound on the event's log-likelihood,

    $$\mathbb{E}\Big[\tfrac{1}{L-k}\sum_{s \ge k} -\log q(x_{\sigma_s} \mid
      x_{\sigma_0} … x_{\sigma_{k-1}})\Big] = -\tfrac{1}{L}\,\mathbb{E}_\sigma \log
      q(x, \sigma) \ge -\tfrac{1}{L}\log q(x).$$

    Args:
        network: ``network(key)`` makes the untrained network, which is called as
            ``network(tokens, visible, **conditions)`` and returns logits (length,
            num_values). It must not look at tokens that are not visible.
        data: ``data(key, n)`` draws n events of tokens 0 … num_values − 1, shape (n,
            length); or a pair of events and a mapping of conditions, each with n
            values. It is traced by ``jax.jit``.
        length: L.
        num_values: the number of values of a token.
        conditions: names of the conditions.
        iterations: number of optimiser steps.
        batches: `Batches`, or the number of events of each step; masks have no
            antithetic pairs.
        learning_rate, ema: as in `Recipe`.

    Raises:
        InvalidValueError: a number out of range, or antithetic batches.

    Example:
        >>> import composeprob as cp, equinox as eqx, jax, jax.numpy as jnp
        >>> class Shares(eqx.Module):
        ...     logits: jax.Array
        ...     def __call__(self, tokens, visible):
        ...         return self.logits
        >>> recipe = cp.training.MaskedRecipe(
        ...     network=lambda key: Shares(jnp.zeros((5, 2))),
        ...     data=lambda key, n: jax.random.bernoulli(key, 0.2, (n, 5)).astype(int),
        ...     length=5,
        ...     num_values=2,
        ...     iterations=200,
        ...     batches=64,
        ...     learning_rate=0.1,
        ...     ema=0.9,
        ... )
        >>> run = cp.training.train(recipe, jax.random.key(0), progress=False)
        >>> shares = jax.nn.softmax(run.factor.network.logits)[:, 1]
        >>> bool(jnp.all(jnp.abs(shares - 0.2) < 0.1))
        True

    References:
        Uria, Murray and Larochelle 2014, *A deep and tractable density estimator*;
        Hoogeboom et al. 2022, *Autoregressive diffusion models*, for the loss.
    """

    data: Callable[[Array, int], object]
    length: int
    num_values: int
    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch.antithetic:
            raise InvalidValueError(
                "In a training recipe, masks have no antithetic pairs.",
                fix="leave antithetic out of Batches.",
            )
        for name in ("length", "num_values"):
            if getattr(self, name) < 2:
                raise InvalidValueError(
                    f"In a training recipe, {name} is {getattr(self, name)}.",
                    fix="use 2 or more.",
                )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event of the data.

        Raises:
            NetworkError: data that do not return tokens of this length.
            ConditionError: data with other conditions than the recipe's.
        """
        fix = (
            "write a function: data=lambda key, n: "
            "sequences[jax.random.randint(key, (n,), 0, len(sequences))]."
        )

        made = example_data(self.data, fix)
        wanted = (EXAMPLES, self.length)
        tokens = jax.tree.leaves(made)[0]
        whole = jnp.issubdtype(tokens.dtype, jnp.integer)
        if tokens.shape != wanted or not whole:
            raise NetworkError(
                f"The data of a training recipe returned {tokens.dtype} of shape "
                f"{tokens.shape} as data(key, {EXAMPLES}); tokens are integers of "
                f"shape {wanted}.",
                fix=fix,
            )
        check_conditions(made, self.conditions)
        return (self.length,)

    def factor(self, network: object, label: str = "") -> MaskedDiffusion:
        """Make the factor of this recipe with a given network."""
        return MaskedDiffusion(
            network,
            length=self.length,
            num_values=self.num_values,
            conditions=self.conditions,
            mask="boolean",
            label=label,
        )


def draw_masked(recipe: MaskedRecipe, key: Key[Array, ""], size: int) -> MaskedBatch:
    """Draw events of a recipe with their visible positions."""
    data_key, count_key, order_key = jax.random.split(key, 3)
    drawn = recipe.data(data_key, size)
    tokens, conditions = drawn if isinstance(drawn, tuple) else (drawn, {})
    # One number in each n-th of [0, 1): strata reduce the gradient's variance.
    uniform = jax.random.uniform(count_key, (size,))
    strata = (jnp.arange(size) + uniform) / size
    count = jnp.floor(recipe.length * strata).astype(int)
    noise = jax.random.uniform(order_key, (size, recipe.length))
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return MaskedBatch(tokens, rank < count[:, None], dict(conditions))


def cross_entropies(factor: MaskedDiffusion, batch: MaskedBatch) -> Float[Array, " n"]:
    """Compute the mean cross-entropy of each event's hidden tokens, in nats."""

    def of_event(event: MaskedBatch) -> Float[Array, ""]:
        logits = factor.network(event.tokens, event.visible, **event.conditions)
        log_q = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_q, event.tokens[:, None], axis=1)[:, 0]
        hidden = ~event.visible
        return -jnp.sum(jnp.where(hidden, own, 0.0)) / jnp.sum(hidden)

    return jax.vmap(of_event)(batch)
