"""Simulation-based calibration: under data drawn from the program, the truth's rank among posterior draws is uniform.

One noised site and two static ones. Posterior draws are independent chains (`AnnealedMCMC` with fixed steps), so that
ranks have no correlation to allow for: those of `SMC`, which shares ancestors, would.

References:
    Talts, Betancourt, Simpson, Vehtari and Gelman (2018), validating Bayesian inference algorithms with
    simulation-based calibration.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from sampling_cases import normal
from zscores import LIMIT, assert_agrees, assert_disagrees, z_scores

SCHEDULE = cp.Schedule.log_snr(12, min=-6.0, max=8.0)
FACTOR = normal([0.0, 0.5], [1.0, 0.7], SCHEDULE)
ALPHA, SIGMA = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
DRAWS = 31
SITES = ("x0", "x1", "m", "log s")


@cp.program
def measured(f, y, trust):
    """Readings of two numbers behind a shift, with a noise of unknown size that a ``trust`` other than 1 misstates."""
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.3, 0.5))
    s = cp.sample("s", dist.LogNormal(-0.5, 0.4))
    cp.observe("y", dist.Normal(x + m, s / trust), y)


KERNEL = cp.Gibbs({"x": cp.HMC(0.25, num_leapfrog=4), ("m", "s"): cp.HMC(0.25, num_leapfrog=4)})


def simulate(rng):
    """Truth and data: x as it is at level 0, noise included; readings look at x/α."""
    x = ALPHA * np.array([0.0, 0.5]) + np.sqrt((ALPHA * np.array([1.0, 0.7])) ** 2 + SIGMA**2) * rng.normal(size=2)
    m, s = 0.3 + 0.5 * rng.normal(), np.exp(-0.5 + 0.4 * rng.normal())
    y = x / ALPHA + m + s * rng.normal(size=(3, 2))
    return np.array([*x, m, np.log(s)]), y


def ranks(replicates, trust=1.0, seed=0):
    """Of each replicate the share of draws below the truth, in (0, 1), ties broken by chance: (replicates, sites)."""
    rng = np.random.default_rng(seed)
    found = []
    for r in range(replicates):
        truth, y = simulate(rng)
        density = cp.compile(measured, FACTOR, jnp.asarray(y, jnp.float32), jnp.float32(trust))
        sampler = cp.AnnealedMCMC(KERNEL, 4)
        result = cp.infer(density, jax.random.key(r), num_chains=DRAWS, sampler=sampler, progress=False)
        draws = np.column_stack([result["x"], result["m"], np.log(result["s"])])
        found.append(((draws < truth).sum(0) + rng.uniform(size=4)) / (DRAWS + 1))
    return np.array(found)


def scores(found):
    """z-scores of the ranks' means, variances and χ² over eight bins: each standard normal if they are uniform."""
    values = dict(zip(SITES, found.T, strict=True))
    values |= {f"{name} spread": (value - 0.5) ** 2 for name, value in values.items()}
    expected = {name: 1 / 12 if "spread" in name else 0.5 for name in values}
    counts = [np.histogram(found[:, i], bins=8, range=(0, 1))[0] for i in range(len(SITES))]
    bins = {f"{name} bins": stats.norm.isf(stats.chisquare(c).pvalue) for name, c in zip(SITES, counts, strict=True)}
    return z_scores(values, expected) | bins


@pytest.mark.slow
def test_few_replicates_find_a_noise_taken_for_a_third():
    assert_agrees(scores(ranks(16)))
    assert_disagrees(scores(ranks(16, trust=3.0)))


@pytest.mark.slow
def test_ranks_are_uniform():
    found = scores(ranks(200, seed=1))
    assert_agrees(found)
    assert max(abs(z) for z in found.values()) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("trust", [2.0, 0.5])
def test_a_wrong_scale_of_the_likelihood_is_found(trust):
    assert_disagrees(scores(ranks(200, trust, seed=1)))
