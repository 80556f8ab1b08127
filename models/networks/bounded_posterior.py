"""Scores of posteriors under a uniform prior: the noised prior's own, corrected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

from composeprob.factors.one_dimension import Noised

from .film_mlp import FiLMMLP

Inputs = Callable[[Array, Array, Array], tuple[Array, Array]]
"""Function ``inputs(event, x, width)``, with ``width`` σ/α.

It returns features of event and x, shape (f,), and the scale of the posterior for each
entry of the event.
"""


class BoundedPosterior(nnx.Module):
    """Network of the noise in α·θ + σ·ε, for θ with a uniform prior in a box.

    The schedule is variance preserving.

        ε̂ = σ·(F/d − ∇ log q_k),   so that  ∇ log p_k(θ_k | x) = ∇ log q_k(θ_k) − F/d,

    with q_k the noised prior, in closed form, F the network's output, and d² = α²·s² +
    σ² for a scale s of the posterior that is estimated from x. The network does not
    have to learn the walls of the box, and in Π_i p(θ|x_i)/p(θ) they cancel.

    Args:
        size: length of θ.
        bound: the prior is uniform on [−bound, bound] in each entry.
        data: ``data(x)`` returns ``data_size`` features of the data.
        inputs: see `Inputs`; there are ``input_size`` features.
        width, blocks, embedding: as in `FiLMMLP`.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        size: int,
        bound: float,
        *,
        data: Callable[[Array], Array],
        data_size: int,
        inputs: Inputs,
        input_size: int,
        width: int = 256,
        blocks: int = 4,
        embedding: int = 128,
        rngs: nnx.Rngs,
    ):
        self.bound = bound
        self.data = data
        self.inputs = inputs
        self.body = FiLMMLP(
            size + input_size,
            size,
            vector=data_size,
            width=width,
            blocks=blocks,
            embedding=embedding,
            rngs=rngs,
        )

    def __call__(self, event: Array, t: Array, x: Array) -> Array:
        """Return ε̂, shape (size,), for one event at log-SNR t and one observation x."""
        alpha = jnp.sqrt(jax.nn.sigmoid(t))
        sigma = jnp.sqrt(jax.nn.sigmoid(-t))
        prior: Any = Noised(dist.Uniform(-self.bound, self.bound), alpha, sigma)
        prior_score = jax.vmap(jax.grad(prior.log_prob))(event)
        features, scale = self.inputs(event / alpha, x, sigma / alpha)
        # Standard deviation of the noised prior.
        spread = jnp.sqrt(alpha**2 * self.bound**2 / 3 + sigma**2)
        inputs = jnp.concatenate([event / spread, features])
        correction = self.body(inputs, t, self.data(x))
        d = jnp.sqrt(alpha**2 * scale**2 + sigma**2)
        return sigma * (correction / d - prior_score)
