"""The kernel Stein discrepancy against its definition by automatic differentiation, and nested R̂ against its."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.metrics import ksd, nested_rhat
from sampling_cases import single
from zscores import assert_agrees, z_scores

RNG = np.random.default_rng


def by_definition(x, score, beta, length, w):
    def kernel(a, b):
        return (length**2 + jnp.sum((a - b) ** 2)) ** beta

    def stein_kernel(a, b):
        mixed = jnp.trace(jax.jacfwd(jax.grad(kernel, 1), 0)(a, b))
        s, t = score(a), score(b)
        return mixed + jax.grad(kernel, 0)(a, b) @ t + jax.grad(kernel, 1)(a, b) @ s + kernel(a, b) * (s @ t)

    matrix = jax.jit(jax.vmap(jax.vmap(stein_kernel, (None, 0)), (0, None)))(x, x)
    return float(jnp.sqrt(w @ matrix @ w))


@pytest.mark.parametrize(("beta", "length"), [(-0.5, 1.0), (-0.3, 0.4)])
def test_ksd_is_its_definition(monkeypatch, beta, length):
    x = jnp.asarray(RNG(0).normal(size=(12, 3)))

    def score(x):
        return -(x**3) + jnp.sin(x[::-1])

    monkeypatch.setattr(tuning, "GRAM_ROWS", 5)
    log_weights = RNG(1).normal(size=12)
    w = jnp.asarray(np.exp(log_weights) / np.exp(log_weights).sum())
    found = ksd(x, score, beta, length, log_weights)
    assert found == pytest.approx(by_definition(x, score, beta, length, w), rel=1e-4)
    assert ksd(x, jax.vmap(score)(x), beta, length) == pytest.approx(
        by_definition(x, score, beta, length, jnp.full(12, 1 / 12)), rel=1e-4
    )


def test_stein_identity_on_exact_draws():
    """E k₀ = 0 for independent pairs: KSD² of n draws is E k₀(x, x)/n, which for N(0, I_d) is (d + d)/n at c = 1."""
    rng, n, d = RNG(2), 100, 2
    squares = np.array([ksd(rng.normal(size=(n, d)), lambda x: -x) ** 2 for _ in range(300)])
    assert_agrees(z_scores({"ksd²": n * squares}, {"ksd²": 2.0 * d}))


def test_ksd_of_wrong_samples_stays_and_of_missing_modes_does_not():
    rng = RNG(3)
    exact = rng.normal(size=(1000, 2))
    assert ksd(exact, lambda x: -x) < 0.08
    assert ksd(1.3 * exact, lambda x: -x) > 0.15
    assert ksd(exact + np.array([0.5, 0.0]), lambda x: -x) > 0.3

    def two_modes(x):
        logs = lambda x: -0.5 * jnp.sum((x - jnp.array([[-6.0, 0.0], [6.0, 0.0]])) ** 2, -1)
        return jax.grad(lambda x: jax.nn.logsumexp(logs(x)))(x)

    assert ksd(exact + np.array([6.0, 0.0]), two_modes) < 0.08  # blind to the mode that is missing


def test_ksd_of_a_density():
    schedule = cp.Schedule.log_snr(4)
    density = cp.compile(single, cp.Analytic(dist.Independent(dist.Normal(jnp.zeros(2), jnp.ones(2)), 1), schedule))
    x = RNG(4).normal(size=(100, 2))
    assert ksd(x, density) == pytest.approx(ksd(x, lambda x: -x), rel=1e-4)  # variance preserving
    assert ksd({"x": x}, density) == pytest.approx(ksd(x, density), rel=1e-6)


def test_nested_rhat_is_its_definition():
    draws = RNG(5).normal(size=(4, 3, 5, 2)) + RNG(6).normal(size=(4, 1, 1, 2))
    for e in range(2):
        x = draws[..., e]
        means = x.mean((1, 2))
        between = np.sum((means - means.mean()) ** 2) / 3
        within = 0.0
        for k in range(4):
            chain_means = x[k].mean(1)
            within += np.sum((chain_means - means[k]) ** 2) / 2 / 4
            within += np.mean([np.sum((x[k, m] - chain_means[m]) ** 2) / 4 for m in range(3)]) / 4
        assert nested_rhat(draws)[e] == pytest.approx(np.sqrt(1 + between / within), rel=1e-12)


def test_nested_rhat_of_single_draws_tells_mixed_from_stuck():
    """Mixed chains: E R̂² is about 1 + 1/M. Chains that keep 90 % of their superchain's start are far above."""
    rng, superchains, chains = RNG(7), 200, 16
    mixed = rng.normal(size=(superchains, chains, 1))
    assert float(nested_rhat(mixed)) == pytest.approx(np.sqrt(1 + 1 / chains), abs=0.02)
    stuck = 0.9 * rng.normal(size=(superchains, 1, 1)) + np.sqrt(1 - 0.81) * mixed
    assert nested_rhat(stuck) > 1.8
    assert np.isfinite(nested_rhat(rng.normal(size=(3, 1, 10))))
    assert np.isnan(nested_rhat(np.zeros((3, 2, 1))))


BAD = {
    "beta": (lambda: ksd([[0.0]], lambda x: -x, beta=-1.5), "−1 < β < 0"),
    "length": (lambda: ksd([[0.0]], lambda x: -x, length=0.0), "c > 0"),
    "scores": (lambda: ksd([[0.0], [1.0]], [[0.0, 1.0], [1.0, 0.0]]), "scores of shape (2, 2)"),
    "nan score": (lambda: ksd([[0.0]], [[np.nan]]), "in scores are not finite"),
    "axes": (lambda: nested_rhat([[0.0, 1.0]]), "got (1, 2)"),
    "one superchain": (lambda: nested_rhat(np.zeros((1, 4, 4))), "got (1, 4, 4)"),
    "nan": (lambda: nested_rhat(np.full((2, 2, 2), np.nan)), "not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(cp.errors.ComposeProbError) as raised:
        call()
    assert message in str(raised.value)
