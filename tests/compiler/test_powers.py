"""The powers to which likelihoods are raised above level 0, and what they see of x, as the docs state them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from sampling_cases import normal

SCHEDULE = cp.Schedule.log_snr(21, min=-8.0, max=10.0)
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


POWERS = {
    "tempered": sigmoid(LAMBDA - 4) / sigmoid(LAMBDA[0] - 4),
    "denoised": (np.exp(-4) + sigmoid(-LAMBDA[0])) / (np.exp(-4) + sigmoid(-LAMBDA)),
}
MET = np.clip((LAMBDA - LAMBDA[-1]) / (-2 - LAMBDA[-1]), 0, 1) ** 2
"""How far static sites meet what is denoised: from 0 at the noisiest level to 1 at log-SNR −2."""


@pytest.mark.parametrize("latent", [False, True], ids=["data alone", "with a latent"])
@pytest.mark.parametrize("policy", POWERS)
def test_powers_are_those_of_the_docs(policy, latent):
    """Under N(0, 1) the Tweedie mean of x_k is α_k·x."""
    density = cp.compile(seen, normal(0.0, 1.0, SCHEDULE), policy, latent)
    position = {"x": jnp.float32(X), **({"m": jnp.float32(0.0)} if latent else {})}
    potential = jax.jit(jax.vmap(lambda k: density.evaluator(position, k).log_potential))
    found = np.asarray(potential(jnp.arange(SCHEDULE.num_levels)), float)
    looked_at = ALPHA * X if policy == "denoised" else X / ALPHA
    looked_at[0] = X / ALPHA[0]  # level 0 is the posterior, whichever way led there
    power = POWERS[policy] * (MET if latent and policy == "denoised" else 1.0)
    expected = power * np.asarray(dist.Normal(looked_at, SD).log_prob(Y), float)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
    assert power[0] == pytest.approx(1.0)
