"""Exact posteriors: of a Bayesian model without noised sites, under an unknown spread,
of counts."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from sampling_cases import SCHEDULE, measured, modes, normal, run, slow
from zscores import assert_agrees, z_scores

SD, Y = 0.5, 1.2


PRIOR = np.diag([0.8**2, 1.0])
GAIN = PRIOR.sum(1) / (PRIOR.sum() + SD**2)
MEAN = np.array([0.5, 0.0]) + GAIN * (Y - 0.5)
COVARIANCE = PRIOR - np.outer(GAIN, PRIOR.sum(0))
"""Moments of (m, k) given m + k + N(0, SD²) = Y."""


@cp.program
def static_only(y):
    m = cp.sample("m", dist.Normal(0.5, 0.8))
    k = numpyro.sample("k", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(m + k, SD), y)


def test_a_program_without_noised_sites_is_a_bayesian_model():
    density = cp.compile(static_only, Y)
    assert density.num_levels == 1
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=100), num_leapfrog=4), 50)
    result = run(density, 0, 4096, sampler=sampler)
    m, k = result["m"], result["k"]
    values = {
        "m": m,
        "k": k,
        "mm": (m - MEAN[0]) ** 2,
        "mk": (m - MEAN[0]) * (k - MEAN[1]),
    }
    expected = {
        "m": MEAN[0],
        "k": MEAN[1],
        "mm": COVARIANCE[0, 0],
        "mk": COVARIANCE[0, 1],
    }
    assert_agrees(z_scores(values, expected))


def test_a_program_without_noised_sites_under_smc_is_importance_sampling():
    density = cp.compile(static_only, Y)
    sampler = cp.SMC(cp.HMC(cp.Adaptive(), num_leapfrog=4), 2, weights="density")
    runs = [run(density, seed, 1024, sampler=sampler) for seed in range(30)]
    evidence = np.exp([result.log_evidence for result in runs])
    values = {"m": np.array([result["m"].mean() for result in runs]), "Z": evidence}
    variance = 0.8**2 + 1 + SD**2
    marginal = np.exp(-0.5 * (Y - 0.5) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
    assert_agrees(z_scores(values, {"m": MEAN[0], "Z": marginal}))


OPERATOR = np.array([[1.0, 0.5], [0.2, -1.0], [0.4, 0.9]])
DATA = np.array([0.9, 0.4, 0.7])
SHARES = np.array([0.3, 0.7])
MEANS = np.array([[1.0, 0.2], [-0.6, -0.4]])
VARIANCES = np.array([0.2, 0.3])


@cp.program
def unknown_spread(f, y, policy=None):
    x = cp.sample("x", f)
    sd = cp.sample("sd", dist.HalfNormal(1.0))
    cp.observe("y", dist.Normal(jnp.asarray(OPERATOR) @ x, sd), y, anneal=policy)


def two_modes():
    return cp.Analytic(modes(SHARES, MEANS, np.sqrt(VARIANCES)), SCHEDULE)


def by_quadrature():
    """Evidence, and posterior expectations of x and sd: Gaussian given sd and the
    component, on a grid of sd."""
    grid = np.exp(np.linspace(-6.0, 2.0, 2000))
    weight = np.zeros((2, grid.size))
    x = np.zeros((2, grid.size, 2))
    for j, (share, mean, v) in enumerate(zip(SHARES, MEANS, VARIANCES, strict=True)):
        for i, sd in enumerate(grid):
            covariance = v * OPERATOR @ OPERATOR.T + sd**2 * np.eye(3)
            residual = DATA - OPERATOR @ mean
            solved = np.linalg.solve(covariance, residual)
            log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
            log_prior = (
                -0.5 * sd**2 + 0.5 * np.log(2 / np.pi) + np.log(sd)
            )  # per log sd
            log_joint = log_prior - 0.5 * log_det - 0.5 * residual @ solved
            weight[j, i] = share * np.exp(log_joint)
            x[j, i] = mean + v * OPERATOR.T @ solved
    posterior = weight / weight.sum()
    mean = np.einsum("ji,jid->d", posterior, x)
    evidence = weight.sum() * np.log(grid[1] / grid[0])
    mean_sd = posterior.sum(0) @ grid
    return {"Z": evidence, "x0": mean[0], "x1": mean[1], "sd": mean_sd}


def test_policies_are_one_density_at_level_0():
    position = {"x": jnp.array([0.3, -0.2]), "sd": jnp.array(-0.6)}

    def at_level_0(policy):
        density = cp.compile(unknown_spread, two_modes(), jnp.asarray(DATA), policy)
        return density.value_and_score(position, 0)

    exact_value, exact_score = at_level_0("exact")
    for policy in ("tempered", "denoised"):
        value, score = at_level_0(policy)
        np.testing.assert_allclose(value, exact_value, rtol=1e-5)
        for name in position:
            np.testing.assert_allclose(score[name], exact_score[name], rtol=1e-3)


@pytest.mark.parametrize("policy", ["exact", slow("tempered"), slow("denoised")])
def test_evidence_and_posterior_under_an_unknown_spread(policy):
    # The default is "exact".
    anneal = None if policy == "exact" else policy
    density = cp.compile(unknown_spread, two_modes(), jnp.asarray(DATA), anneal)
    assert ("y exact" in str(density)) == (policy == "exact")
    sampler = cp.SMC(cp.MALA(), 2, weights="density")
    runs = [run(density, seed, 1024, sampler=sampler) for seed in range(10)]
    x = np.array([result["x"].mean(0) for result in runs])
    values = {
        "Z": np.exp([result.log_evidence for result in runs]),
        "x0": x[:, 0],
        "x1": x[:, 1],
        "sd": np.array([result["sd"].mean() for result in runs]),
    }
    assert_agrees(z_scores(values, by_quadrature()))


@pytest.mark.slow
def test_counts_by_an_exponential():
    """At x/α their log-likelihood is −10¹⁸ where noise is large: the status was
    non_finite, log Z off by −1.7."""
    y = jnp.array([7, 4])
    x = jnp.linspace(-6.0, 6.0, 24001)
    of_counts = dist.Poisson(jnp.exp(2 * x)[:, None]).log_prob(y).sum(1)
    log_joint = dist.Normal(0.0, 1.0).log_prob(x) + of_counts
    evidence = float(jax.nn.logsumexp(log_joint)) + np.log(12.0 / 24000)
    mean = float(jnp.sum(jax.nn.softmax(log_joint) * x))
    density = cp.compile(
        measured, normal(0.0), lambda x: dist.Poisson(jnp.exp(2 * x)), y
    )
    result = run(density, 0, 1000, sampler=None)
    assert result.status.ok
    estimate = result.mean(lambda s: s["x"])
    z_mean = (estimate.value - mean) / estimate.error
    z_evidence = (result.log_evidence - evidence) / result.log_evidence_error
    assert_agrees({"mean": z_mean, "evidence": z_evidence})
