"""The powers to which likelihoods are raised above level 0, and what they see of x, as the docs state them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from sampling_cases import normal

SCHEDULE = cp.Schedule.log_snr(24, min=-8.0, max=10.0)
LAMBDA = np.asarray(SCHEDULE.log_snr, float)
ALPHA = np.asarray(SCHEDULE.alpha, float)
X, Y, SD = 0.7, 1.2, 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@cp.program
def seen(f, anneal, latent):
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.0, 1.0)) if latent else 0.0
    cp.observe("y", dist.Normal(x + m, SD), Y, anneal=anneal)


POWER = sigmoid(LAMBDA - 4) / sigmoid(LAMBDA[0] - 4)
"""Of observations that are no sharper than s = 0.14."""


@pytest.mark.parametrize("latent", [False, True], ids=["data alone", "with a latent"])
@pytest.mark.parametrize("policy", ["tempered", "denoised"])
def test_powers_are_those_of_the_docs(policy, latent):
    """Under N(0, 1) the Tweedie mean of x_k is α_k·x."""
    density = cp.compile(seen, normal(0.0, 1.0, SCHEDULE), policy, latent)
    position = {"x": jnp.float32(X), **({"m": jnp.float32(0.0)} if latent else {})}
    potential = jax.jit(jax.vmap(lambda k: density.evaluator(position, k).parts.log_potential))
    found = np.asarray(potential(jnp.arange(SCHEDULE.num_levels)), float)
    looked_at = ALPHA * X if policy == "denoised" else X / ALPHA
    looked_at[0] = X / ALPHA[0]  # level 0 is the posterior, whichever way led there
    expected = POWER * np.asarray(dist.Normal(looked_at, SD).log_prob(Y), float)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
