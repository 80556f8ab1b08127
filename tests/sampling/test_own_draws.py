"""Scores that are wrong where there is little noise: found by the factor's own draws, and named of runs that follow
them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.results.status import Code
from composeprob.runtime.own_draws import own_scores
from sampling_cases import single

SCHEDULE = cp.Schedule.log_snr(32)
SD = np.array([1.0, 0.5])


def gaussian(error):
    """The noise in x of N(0, diag(SD²)), with an error where there is little, which does not fall with it."""

    def epsilon(x, level):
        alpha, sigma = jnp.asarray(SCHEDULE.alpha)[level], jnp.asarray(SCHEDULE.sigma)[level]
        return sigma * x / (alpha**2 * SD**2 + sigma**2) + error * alpha**16 * x

    return cp.Diffusion(epsilon, SCHEDULE, event_shape=(2,), parameterization="epsilon", time="level")


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_a_score_is_held_against_its_own_draws(error):
    """Where the error is ε, the score of N(0, s²) is steeper than it should be by ε·s²/σ at level 0."""
    density = cp.compile(single, gaussian(error))
    positions = jax.vmap(density.initial)(jax.random.split(jax.random.key(0), 256))
    (found,) = own_scores(density, positions, jax.random.key(1)).values()
    assert found.wrong == (error > 0)
    if not error:
        assert found.right_from == 0
        return
    off = error / SCHEDULE.sigma  # of the wider number, before what its own draws are too narrow by
    assert 0.3 * off[0] < found.steepness - 1 < off[0]
    assert 0.1 < off[found.right_from] < 1


def test_a_run_that_follows_it_says_so():
    """The Metropolis test makes it N(0, 1/(1 + 0.1/σ)); reverse diffusion, which has no test, is close to N(0, 1)."""
    density = cp.compile(single, gaussian(0.1))
    result = cp.infer(density, jax.random.key(0), num_chains=1000, progress=False)
    assert result.status.has(Code.NETWORK_DOUBTED)
    assert "times as steep" in result.status.message
    assert np.isnan(result.mean(lambda s: s["x"]).error).all()
    assert result.unweighted()["x"][:, 0].std() < 0.5
    reverse = cp.infer(density, jax.random.key(0), num_chains=1000, sampler=cp.Ancestral(), progress=False)
    assert reverse["x"][:, 0].std() > 0.75
    right = cp.infer(cp.compile(single, gaussian(0.0)), jax.random.key(0), num_chains=1000, progress=False)
    assert right.status.ok
