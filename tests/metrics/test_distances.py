"""Distances and diagnostics of samples, against closed forms and brute force."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.metrics import (
    covariance_error,
    ksd,
    mmd,
    mode_weights,
    nested_rhat,
    total_variation,
    tuning,
    wasserstein,
)
from refusals import refused, rows
from sampling_cases import single

RNG = np.random.default_rng


def gram(x, y, h):
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * h**2))


def brute_force_mmd(x, y, h):
    def within(z):
        n = len(z)
        return (gram(z, z, h).sum() - n) / (n * (n - 1))

    between = gram(x, y, h).sum() / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


@pytest.mark.parametrize("rows", [tuning.GRAM_ROWS, 7])
def test_mmd_is_the_u_statistic(monkeypatch, rows):
    """Arrays may have any shape, and blocks of rows any size."""
    monkeypatch.setattr(tuning, "GRAM_ROWS", rows)
    rng = RNG(0)
    x = rng.normal(size=(37, 3, 1))
    y = rng.normal(size=(29, 3, 1))
    expected = brute_force_mmd(x[..., 0], y[..., 0], 0.7)
    assert mmd(x, y, 0.7) == pytest.approx(expected, abs=1e-12)


def test_mmd_with_weights_that_repeat_samples():
    """Draws of N(0, 4) with importance weights for N(0, 1)."""
    rng = RNG(2)
    h = 0.8
    wide = 2 * rng.normal(size=(3000, 1))
    y = rng.normal(size=(3000, 1))
    log_weights = -0.5 * (wide**2 - wide**2 / 4)[:, 0]
    assert abs(mmd(wide, y, h, log_weights)) < 0.002
    assert mmd(wide, y, h) > 0.05
    same = mmd(wide[:30], y[:30], h, np.full(30, -7.0))
    assert same == pytest.approx(mmd(wide[:30], y[:30], h), abs=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_wasserstein_is_the_best_matching(p):
    x, y = RNG(3).normal(size=(2, 6, 2))
    cost = np.linalg.norm(x[:, None] - y[None], axis=-1) ** p
    rows = np.arange(6)
    best = min(cost[rows, list(order)].mean() for order in permutations(range(6)))
    assert wasserstein(x, y, p) == pytest.approx(best ** (1 / p), rel=1e-12)


def test_wasserstein_in_one_dimension_matches_sorted_samples():
    x, y = RNG(4).normal(size=(2, 300, 1))
    expected = np.sqrt(np.mean((np.sort(x, 0) - np.sort(y, 0)) ** 2))
    assert wasserstein(x, y) == pytest.approx(expected, rel=1e-12)


def test_wasserstein_distance_of_a_shift_is_its_length():
    """The normalisation: it is the same for any number of samples."""
    for n in (10, 500):
        x = RNG(5).normal(size=(n, 2))
        assert wasserstein(x, x + np.array([3.0, 4.0])) == pytest.approx(5.0, rel=1e-9)


def test_wasserstein_of_weighted_samples_and_of_sets_of_different_size():
    points = [[0.0], [1.0], [5.0]]
    log_weights = np.log([0.25, 0.75, 1e-300])
    equal = [[0.0], [1.0], [1.0], [1.0]]
    assert wasserstein(points, equal, log_weights=log_weights) == 0.0
    assert wasserstein([[0.0], [1.0]], [[0.0], [0.0], [1.0], [1.0]]) == 0.0
    assert wasserstein([[2.0]], [[0.0], [0.0], [0.0]]) == 2.0


def test_covariance_error_per_mode():
    rng = RNG(7)
    n = 40_000
    centers = np.array([[-5.0, 0.0], [5.0, 0.0]])
    factors = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.3, 0.0], [0.0, 1.2]]])
    mode = rng.integers(2, size=n)
    normal = rng.normal(size=(n, 2))
    samples = centers[mode] + np.einsum("nij,nj->ni", factors[mode], normal)
    truth = factors @ factors.transpose(0, 2, 1)
    assert covariance_error(samples, centers, truth).max() < 0.03
    errors = covariance_error(samples, centers, 2 * truth)
    assert errors == pytest.approx([0.5, 0.5], abs=0.02)
    assert covariance_error(samples, centers, np.eye(2)).shape == (2,)


def test_covariance_error_is_unbiased_and_takes_weights():
    x = RNG(8).normal(size=(7, 3))
    centers = np.zeros((1, 3))
    truth = np.cov(x, rowvar=False)
    assert covariance_error(x, centers, truth) == pytest.approx([0.0], abs=1e-12)
    log_weights = np.where(np.arange(7) < 5, 0.0, -np.inf)
    truth = np.cov(x[:5], rowvar=False)
    assert covariance_error(x, centers, truth, log_weights) == pytest.approx([0.0])


def test_covariance_error_without_samples_is_nan():
    x = [[0.0], [1.0], [np.nan], [9.0]]
    centers = [[0.0], [10.0]]
    errors = covariance_error(x, centers, [[[0.5]], [[1.0]]])
    assert errors[0] == pytest.approx(0.0)
    assert np.isnan(errors[1])  # one sample has no covariance
    assert mode_weights(x, centers).tolist() == [0.5, 0.25]


# ── Stein discrepancy and nested R̂ ───────────────────────────────────────────────────


def by_definition(x, score, beta, length, w):
    """KSD by derivatives of its kernel."""

    def kernel(a, b):
        return (length**2 + jnp.sum((a - b) ** 2)) ** beta

    def stein_kernel(a, b):
        mixed = jnp.trace(jax.jacfwd(jax.grad(kernel, 1), 0)(a, b))
        s = score(a)
        t = score(b)
        first = jax.grad(kernel, 0)(a, b) @ t
        second = jax.grad(kernel, 1)(a, b) @ s
        return mixed + first + second + kernel(a, b) * (s @ t)

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
    exact = by_definition(x, score, beta, length, w)
    assert ksd(x, score, beta, length, log_weights) == pytest.approx(exact, rel=1e-4)
    exact = by_definition(x, score, beta, length, jnp.full(12, 1 / 12))
    assert ksd(x, jax.vmap(score)(x), beta, length) == pytest.approx(exact, rel=1e-4)


def test_ksd_of_a_density():
    schedule = cp.Schedule.log_snr(12)
    normal = dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)
    density = cp.compile(single, cp.Analytic(normal, schedule))
    x = RNG(4).normal(size=(100, 2))
    # The schedule is variance preserving: N(0, I) at every level.
    assert ksd(x, density) == pytest.approx(ksd(x, lambda x: -x), rel=1e-4)
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
            of_means = np.sum((chain_means - means[k]) ** 2) / 2
            of_chains = [np.sum((x[k, m] - chain_means[m]) ** 2) / 4 for m in range(3)]
            within += (of_means + np.mean(of_chains)) / 4
        expected = np.sqrt(1 + between / within)
        assert nested_rhat(draws)[e] == pytest.approx(expected, rel=1e-12)


def test_nested_rhat_of_single_draws_tells_mixed_from_stuck():
    """E R̂² of mixed chains is about 1 + 1/M, and far more for stuck ones.

    These keep 90 % of their superchain's start.
    """
    rng = RNG(7)
    superchains, chains = 200, 16
    mixed = rng.normal(size=(superchains, chains, 1))
    assert float(nested_rhat(mixed)) == pytest.approx(np.sqrt(1 + 1 / chains), abs=0.02)
    stuck = 0.9 * rng.normal(size=(superchains, 1, 1)) + np.sqrt(1 - 0.81) * mixed
    assert nested_rhat(stuck) > 1.8
    assert np.isfinite(nested_rhat(rng.normal(size=(3, 1, 10))))
    assert np.isnan(nested_rhat(np.zeros((3, 2, 1))))


TWO = [[0.0], [1.0]]
REFUSED = {
    InvalidValueError: {
        "one positive number": lambda: mmd(TWO, TWO, bandwidth=0.0),
        "1 of 2 samples in x": lambda: mmd([[0.0], [np.nan]], TWO, 1.0),
        "all the weight": lambda: mmd(TWO, TWO, 1.0, [0.0, -np.inf]),
        "p ≥ 1": lambda: wasserstein([[0.0]], [[0.0]], p=0.5),
        "numbers or −∞": lambda: wasserstein(TWO, [[0.0]], log_weights=[0.0, np.nan]),
        "−1 < β < 0": lambda: ksd([[0.0]], lambda x: -x, beta=-1.5),
        "c > 0": lambda: ksd([[0.0]], lambda x: -x, length=0.0),
        "in scores are not finite": lambda: ksd([[0.0]], [[np.nan]]),
        "are not finite": lambda: nested_rhat(np.full((2, 2, 2), np.nan)),
        "counts": lambda: total_variation([10, 20], [30, 40]),
        "negative shares": lambda: total_variation([0.5, 0.5], [1.5, -0.5]),
        "shares that are NaN": lambda: total_variation([0.5, np.nan], [0.5, 0.5]),
    },
    WrongTypeError: {
        "a name": lambda: mode_weights("x", TWO),
    },
    ShapeError: {
        "two samples": lambda: mmd([[0.0]], TWO, 1.0),
        "2 and of 1 numbers": lambda: wasserstein([[0.0, 1.0]], [[0.0]]),
        "shape (1,)": lambda: wasserstein(TWO, [[0.0]], log_weights=[0.0]),
        "leading axis": lambda: wasserstein(1.0, [[0.0]]),
        "shape (2,)": lambda: covariance_error([[0.0]], [[0.0]], [1.0, 2.0]),
        "centres of shape (1,)": lambda: covariance_error(
            [[0.0, 1.0]], [[0.0]], [[1.0]]
        ),
        "scores of shape (2, 2)": lambda: ksd(TWO, [[0.0, 1.0], [1.0, 0.0]]),
        "no samples": lambda: mode_weights([], TWO),
        "got (1, 2)": lambda: nested_rhat([[0.0, 1.0]]),
        "got (1, 4, 4)": lambda: nested_rhat(np.zeros((1, 4, 4))),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_bad_input_is_refused(kind, call):
    refused(call, kind)
