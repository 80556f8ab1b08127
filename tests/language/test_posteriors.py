"""Conjugate posteriors: latents and noised sites together, under each annealing policy, by chains and by SMC.

One program holds four models that do not touch: in each a sum of Gaussians is observed, so its posterior is known.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from sampling_cases import SCHEDULE, normal
from zscores import assert_agrees, z_scores

SD, Y = 0.5, 1.2
ALPHA, SIGMA = jnp.asarray(SCHEDULE.alpha), jnp.asarray(SCHEDULE.sigma)
POLICIES = ("tempered", "denoised", "noised")


def likelihood(policy, x, m, level=None):
    """N(y; x₀ + m, SD²), or under "noised" what is known of y from x_k: its spread grows by that of x_k/α_k."""
    if policy != "noised":
        return dist.Normal(x + m, SD)

    def at(k):
        return dist.Normal(x / ALPHA[k] + m, jnp.sqrt(SD**2 + jnp.where(k == 0, 0.0, (SIGMA[k] / ALPHA[k]) ** 2)))

    return at


@cp.program
def four_models(f, y):
    for policy in POLICIES:
        with numpyro.handlers.scope(prefix=policy, divider="_"), cp.annealed(policy):
            x = cp.sample("x", f)
            m = cp.sample("m", dist.Normal(0.5, 0.8))
            cp.observe("y", likelihood(policy, x, m), y)
    rate = cp.sample("rate", dist.LogNormal(0.3, 0.6))
    numpyro.deterministic("log_rate", jnp.log(rate))
    cp.observe("count", dist.Normal(jnp.log(rate), 0.4), -0.2)


def conditioned(mean, covariance, y=Y, sd=SD):
    """The law of (x, m) given x + m + N(0, sd²) = y."""
    ones = np.ones(len(mean))
    gain = covariance @ ones / (ones @ covariance @ ones + sd**2)
    return mean + gain * (y - mean.sum()), covariance - np.outer(gain, ones @ covariance)


def expectations():
    """Means, second moments about the exact means, and the exact means themselves."""
    alpha, sigma = float(ALPHA[0]), float(SIGMA[0])
    prior = np.diag([1.0 + (sigma / alpha) ** 2, 0.8**2])  # of x/α, which is what observations see
    mean, covariance = conditioned(np.array([0.0, 0.5]), prior)
    log_rate, variance = conditioned(np.array([0.3]), np.array([[0.6**2]]), -0.2, 0.4)
    expected, centres = {}, {}
    for policy in POLICIES:
        for i, name in enumerate("xm"):
            expected[f"{policy} {name}"] = mean[i]
            expected[f"{policy} {name}²"] = covariance[i, i]
        expected[f"{policy} xm"] = covariance[0, 1]
        centres[policy] = mean
    expected |= {"log rate": log_rate[0], "log rate²": variance[0, 0]}
    return expected, mean, log_rate[0]


EXPECTED, MEAN, LOG_RATE = expectations()


def statistics(result):
    values = {}
    for policy in POLICIES:
        x, m = result[f"{policy}_x"] - MEAN[0], result[f"{policy}_m"] - MEAN[1]
        values |= {f"{policy} x": x + MEAN[0], f"{policy} x²": x**2, f"{policy} m": m + MEAN[1], f"{policy} m²": m**2}
        values[f"{policy} xm"] = x * m
    log_rate = result["log_rate"]
    return values | {"log rate": log_rate, "log rate²": (log_rate - LOG_RATE) ** 2}


@pytest.fixture(scope="module")
def density():
    return cp.compile(four_models, normal(), jnp.array(Y))


def test_chains_find_the_posterior(density):
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), num_leapfrog=4), 8)
    result = cp.infer(density, jax.random.key(0), num_chains=4096, sampler=sampler, progress=False)
    assert_agrees(z_scores(statistics(result), EXPECTED))
    assert result.status.ok


def test_smc_finds_the_posterior(density):
    sampler = cp.SMC(cp.HMC(cp.Adaptive(), num_leapfrog=4), 3)
    runs = [
        statistics(cp.infer(density, jax.random.key(seed), num_chains=1024, sampler=sampler, progress=False))
        for seed in range(30)
    ]
    averages = {name: np.array([run[name].mean() for run in runs]) for name in EXPECTED}
    assert_agrees(z_scores(averages, EXPECTED))


def test_new_data_reuse_compiled_code(density):
    from composeprob.sampling import infer as driver

    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), num_leapfrog=4), 8)
    cp.infer(density, jax.random.key(1), num_chains=16, sampler=sampler, progress=False)
    before = driver._advance._cached._cache_size()  # counted here: JAX forgets executables of tests long past
    other = cp.compile(four_models, normal(), jnp.array(0.3))
    cp.infer(other, jax.random.key(1), num_chains=16, sampler=sampler, progress=False)
    assert driver._advance._cached._cache_size() == before > 0


@cp.program
def static_only(y):
    m = cp.sample("m", dist.Normal(0.5, 0.8))
    k = numpyro.sample("k", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(m + k, SD), y)


def test_a_program_without_noised_sites_is_a_bayesian_model():
    density = cp.compile(static_only, Y)
    assert density.num_levels == 1
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=100), num_leapfrog=4), 50)
    result = cp.infer(density, jax.random.key(0), num_chains=4096, sampler=sampler, progress=False)
    mean, covariance = conditioned(np.array([0.5, 0.0]), np.diag([0.8**2, 1.0]))
    m, k = result["m"], result["k"]
    values = {"m": m, "k": k, "mm": (m - mean[0]) ** 2, "mk": (m - mean[0]) * (k - mean[1])}
    expected = {"m": mean[0], "k": mean[1], "mm": covariance[0, 0], "mk": covariance[0, 1]}
    assert_agrees(z_scores(values, expected))


def test_a_program_without_noised_sites_under_smc_is_importance_sampling():
    density = cp.compile(static_only, Y)
    sampler = cp.SMC(cp.HMC(cp.Adaptive(), num_leapfrog=4), 2, weights="density")
    runs = [
        cp.infer(density, jax.random.key(seed), num_chains=1024, sampler=sampler, progress=False) for seed in range(30)
    ]
    mean, _ = conditioned(np.array([0.5, 0.0]), np.diag([0.8**2, 1.0]))
    evidence = np.exp([run.log_evidence for run in runs])
    values = {"m": np.array([run["m"].mean() for run in runs]), "Z": evidence}
    marginal = np.exp(-0.5 * (Y - 0.5) ** 2 / (0.8**2 + 1 + SD**2)) / np.sqrt(2 * np.pi * (0.8**2 + 1 + SD**2))
    assert_agrees(z_scores(values, {"m": mean[0], "Z": marginal}))
