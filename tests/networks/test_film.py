"""The residual block that is told the time by FiLM."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composeprob.models.networks.film import FiLMBlock


def test_the_first_half_is_the_gain_and_the_second_the_shift():
    rngs = nnx.Rngs(0)
    block = FiLMBlock(lambda: lambda x: x, lambda zero: nnx.Linear(5, 5, rngs=rngs), 5, 3, rngs=rngs)
    block.film.kernel[...] = jax.random.normal(jax.random.key(1), (3, 10))
    block.film.bias[...] = jnp.linspace(-1.0, 1.0, 10)
    x, embedding = jnp.linspace(-0.5, 0.8, 5), jnp.array([0.4, -0.3, 0.9])
    both = block.film(embedding)
    modulated = block.enter(nnx.swish(x)) * (1 + both[:5]) + both[5:]
    np.testing.assert_allclose(block(x, embedding), x + block.leave(nnx.swish(modulated)), rtol=1e-5)
