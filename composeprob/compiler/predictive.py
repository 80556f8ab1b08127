"""What a program predicts about data: draws of its observed sites, and the log-likelihood of each observed number.

Latents are given as the program's statements see them: constrained, noised sites in the data's units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from composeprob.compiler.build import draw
from composeprob.compiler.likelihood import Likelihood
from composeprob.language.interpret import Provide, Redraw, Statement, unwrap


def data(likelihood: Likelihood) -> dict[str, Array]:
    """The observed values."""
    return {s.name: s.value for s in _observed(likelihood, draw())}


def predict(likelihood: Likelihood, key: Array, values: dict[str, Array]) -> dict[str, Array]:
    """The observed sites drawn in the program's order, each seen by the statements after it."""
    count = 0

    def redraw(name: str, distribution: dist.Distribution, value: Array) -> Array:
        nonlocal count
        if soft(distribution):
            return value
        count += 1
        batch = jnp.shape(value)[: jnp.ndim(value) - distribution.event_dim]  # data may repeat one distribution
        whole = distribution if distribution.batch_shape == batch else distribution.expand(batch)
        return whole.sample(jax.random.fold_in(key, count))

    return {s.name: s.value for s in _observed(likelihood, _from_values(values), redraw)}


def log_likelihood(likelihood: Likelihood, values: dict[str, Array]) -> dict[str, Array]:
    """log p of every observed number, of the batch shape of its site's distribution."""
    return {s.name: s.distribution.log_prob(s.value) for s in _observed(likelihood, _from_values(values))}


def soft(distribution: dist.Distribution) -> bool:
    """Whether an observed statement is soft evidence (`factor`) and no data."""
    return isinstance(unwrap(distribution), dist.Unit)


def _from_values(values: dict[str, Array]) -> Provide:
    return lambda kind, name, distribution: values[name]


def _observed(likelihood: Likelihood, provide: Provide, redraw: Redraw | None = None) -> list[Statement]:
    statements = likelihood.source.run(provide, 0, redraw)
    return [s for s in statements.values() if s.kind == "observed" and not (s.substituted or soft(s.distribution))]
