"""The reverse step: DDPM at η = 1, DDIM at η = 0, and for a Gaussian the exact law in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.sampling.reverse import reverse_step
from sampling_cases import N, normal, single
from zscores import assert_agrees, z_scores

K = 40
SCHEDULE = cp.Schedule.cosine(K)


@pytest.fixture(scope="module")
def density():
    return cp.compile(single, normal(0.3, 0.5, SCHEDULE))


def marginal(level):
    """Mean and variance of the factor at a level."""
    alpha, sigma = float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])
    return alpha * 0.3, alpha**2 * 0.25 + sigma**2


@pytest.mark.parametrize("level", [1, 17, K - 1])
def test_is_ddpm_and_ddim(density, level):
    x, score = 0.7, -1.3
    a, a_next = float(SCHEDULE.alpha[level]), float(SCHEDULE.alpha[level - 1])
    s, s_next = float(SCHEDULE.sigma[level]), float(SCHEDULE.sigma[level - 1])

    def step(seed, eta):
        return reverse_step(jax.random.key(seed), {"x": jnp.float32(x)}, {"x": jnp.float32(score)}, density, level, eta)

    ddim = step(0, 0.0)["x"]
    assert ddim == step(1, 0.0)["x"]
    assert np.isclose(float(ddim), a_next / a * (x + s**2 * score) - s_next * s * score, rtol=1e-4)

    beta = 1 - (a / a_next) ** 2
    draws = jax.vmap(lambda seed: step(seed, 1.0)["x"])(jnp.arange(20_000))
    mean = (x + beta * score) / np.sqrt(1 - beta)  # Ho et al. 2020, equations 7 and 11
    variance = beta * s_next**2 / s**2
    assert_agrees(z_scores({"mean": draws, "variance": (draws - mean) ** 2}, {"mean": mean, "variance": variance}))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_law_on_a_gaussian_follows_the_recursion(density, eta):
    """With an affine score the chain stays Gaussian: its mean and variance obey a recursion, level by level."""
    result = cp.infer(density, jax.random.key(0), num_chains=8 * N, sampler=cp.Ancestral(eta=eta), progress=False)
    mean, variance = 0.0, float(SCHEDULE.sigma[K - 1]) ** 2
    for k in range(K - 1, 0, -1):
        a, a_next = float(SCHEDULE.alpha[k]), float(SCHEDULE.alpha[k - 1])
        s, s_next = float(SCHEDULE.sigma[k]), float(SCHEDULE.sigma[k - 1])
        noise = eta**2 * (1 - (a / a_next) ** 2) * s_next**2 / s**2
        m, v = marginal(k)
        on_score = a_next / a * s**2 - np.sqrt(max(s_next**2 - noise, 0)) * s
        slope, shift = a_next / a - on_score / v, on_score * m / v
        mean, variance = slope * mean + shift, slope**2 * variance + noise
    x = np.asarray(result["x"], float)
    assert_agrees(z_scores({"mean": x, "variance": (x - mean) ** 2}, {"mean": mean, "variance": variance}))
    exact_mean, exact_variance = marginal(0)  # and the recursion ends near the factor's own law
    assert abs(mean - exact_mean) < 0.05
    assert abs(variance / exact_variance - 1) < 0.15


def test_a_non_finite_score_leaves_the_chain_where_it_is(density):
    moved = reverse_step(jax.random.key(0), {"x": jnp.float32(0.7)}, {"x": jnp.float32(jnp.nan)}, density, 5)
    assert float(moved["x"]) == pytest.approx(0.7)
