"""MMD, Wasserstein distance and covariance error against closed forms and brute force."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.metrics import covariance_error, mmd, mode_weights, wasserstein
from zscores import assert_agrees, assert_disagrees, z_scores

RNG = np.random.default_rng


def gram(x, y, h):
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * h**2))


def brute_force_mmd(x, y, h):
    n, m = len(x), len(y)
    own = [(gram(z, z, h).sum() - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return own[0] + own[1] - 2 * gram(x, y, h).sum() / (n * m)


def gaussian_mmd(apart, s2, t2, h, d):
    """MMD² of N(0, s2·I) and N(apart, t2·I): E k(X, Y) is a Gaussian integral."""

    def mean(distance2, variance):
        return (h**2 / (h**2 + variance)) ** (d / 2) * np.exp(-distance2 / (2 * (h**2 + variance)))

    return mean(0, 2 * s2) + mean(0, 2 * t2) - 2 * mean(np.sum(np.square(apart)), s2 + t2)


def test_mmd_is_the_u_statistic():
    rng = RNG(0)
    x, y = rng.normal(size=(37, 3)), rng.normal(size=(29, 3))
    assert mmd(x, y, 0.7) == pytest.approx(brute_force_mmd(x, y, 0.7), abs=1e-12)


def test_mmd_in_blocks(monkeypatch):
    x, y = RNG(0).normal(size=(2, 50, 2, 2))
    whole = mmd(x, y, 0.7)
    monkeypatch.setattr(tuning, "GRAM_ROWS", 7)
    assert mmd(x, y, 0.7) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize(("apart", "t"), [((0.0, 0.0), 1.0), ((0.4, -0.2), 1.0), ((0.0, 0.0), 1.4)])
def test_mmd_is_unbiased_for_gaussians(apart, t):
    """Over many small sets the mean is the closed form, with no term of order 1/n."""
    rng, h = RNG(1), 0.8
    values = [mmd(rng.normal(size=(20, 2)), apart + t * rng.normal(size=(25, 2)), h) for _ in range(400)]
    assert_agrees(z_scores({"mmd": np.array(values)}, {"mmd": gaussian_mmd(apart, 1.0, t**2, h, 2)}))
    with_itself = [v + 1 / 20 + 1 / 25 for v in values]  # about what the V-statistic adds
    assert_disagrees(z_scores({"mmd": np.array(with_itself)}, {"mmd": gaussian_mmd(apart, 1.0, t**2, h, 2)}))


def test_mmd_with_weights_that_repeat_samples():
    """Weights of an importance sampler: N(0, 1) seen through draws of N(0, 4)."""
    rng, h = RNG(2), 0.8
    wide, y = 2 * rng.normal(size=(3000, 1)), rng.normal(size=(3000, 1))
    log_weights = -0.5 * (wide**2 - wide**2 / 4)[:, 0]
    assert abs(mmd(wide, y, h, log_weights)) < 0.002
    assert mmd(wide, y, h) > 0.05
    same = mmd(wide[:30], y[:30], h, np.full(30, -7.0))
    assert same == pytest.approx(mmd(wide[:30], y[:30], h), abs=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_wasserstein_is_the_best_matching(p):
    x, y = RNG(3).normal(size=(2, 6, 2))
    cost = np.linalg.norm(x[:, None] - y[None], axis=-1) ** p
    best = min(np.mean([cost[i, j] for i, j in enumerate(order)]) for order in permutations(range(6)))
    assert wasserstein(x, y, p) == pytest.approx(best ** (1 / p), rel=1e-12)


def test_wasserstein_in_one_dimension_sorts():
    x, y = RNG(4).normal(size=(2, 300, 1))
    assert wasserstein(x, y) == pytest.approx(np.sqrt(np.mean((np.sort(x, 0) - np.sort(y, 0)) ** 2)), rel=1e-12)


def test_wasserstein_of_a_shift_is_its_length_for_any_number_of_samples():
    """The normalisation: a shifted copy is ‖shift‖ away, whether there are 10 samples or 500."""
    for n in (10, 500):
        x = RNG(5).normal(size=(n, 2))
        assert wasserstein(x, x + np.array([3.0, 4.0])) == pytest.approx(5.0, rel=1e-9)


def test_wasserstein_of_gaussians():
    """W2² = ‖m − m'‖² + Σ(s − s')² for commuting covariances; the samples' own error is seen from exact draws."""
    rng = RNG(6)
    x, y = rng.normal(size=(1200, 2)) * [1.0, 0.5] + [1.0, 0.0], rng.normal(size=(1200, 2)) * [0.5, 1.0]
    assert wasserstein(x, y) == pytest.approx(np.sqrt(1.0 + 0.25 + 0.25), abs=0.06)


def test_wasserstein_of_weighted_samples_and_of_sets_of_different_size():
    points, log_weights = [[0.0], [1.0], [5.0]], np.log([0.25, 0.75, 1e-300])
    assert wasserstein(points, [[0.0], [1.0], [1.0], [1.0]], log_weights=log_weights) == 0.0
    assert wasserstein([[0.0], [1.0]], [[0.0], [0.0], [1.0], [1.0]]) == 0.0
    assert wasserstein([[2.0]], [[0.0], [0.0], [0.0]]) == 2.0


def test_covariance_error_per_mode():
    rng, n = RNG(7), 40_000
    centers = np.array([[-5.0, 0.0], [5.0, 0.0]])
    factors = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.3, 0.0], [0.0, 1.2]]])
    which = rng.integers(2, size=n)
    samples = centers[which] + np.einsum("nij,nj->ni", factors[which], rng.normal(size=(n, 2)))
    truth = factors @ factors.transpose(0, 2, 1)
    assert covariance_error(samples, centers, truth).max() < 0.03
    assert covariance_error(samples, centers, 2 * truth) == pytest.approx([0.5, 0.5], abs=0.02)
    assert covariance_error(samples, centers, np.eye(2)).shape == (2,)


def test_covariance_error_is_unbiased_and_knows_weights():
    x = RNG(8).normal(size=(7, 3))
    truth = np.cov(x, rowvar=False)
    assert covariance_error(x, np.zeros((1, 3)), truth) == pytest.approx([0.0], abs=1e-12)
    log_weights = np.where(np.arange(7) < 5, 0.0, -np.inf)
    assert covariance_error(x, np.zeros((1, 3)), np.cov(x[:5], rowvar=False), log_weights) == pytest.approx([0.0])


def test_covariance_error_without_samples_is_nan():
    errors = covariance_error([[0.0], [1.0], [np.nan], [9.0]], [[0.0], [10.0]], [[[0.5]], [[1.0]]])
    assert errors[0] == pytest.approx(0.0)
    assert np.isnan(errors[1])  # one sample has no covariance
    assert mode_weights([[0.0], [1.0], [np.nan], [9.0]], [[0.0], [10.0]]).tolist() == [0.5, 0.25]


BAD = {
    "bandwidth": (lambda: mmd([[0.0], [1.0]], [[0.0], [1.0]], bandwidth=0.0), "one positive number"),
    "one sample": (lambda: mmd([[0.0]], [[0.0], [1.0]], 1.0), "two samples"),
    "nan": (lambda: mmd([[0.0], [np.nan]], [[0.0], [1.0]], 1.0), "1 of 2 samples in x"),
    "one weight": (lambda: mmd([[0.0], [1.0]], [[0.0], [1.0]], 1.0, [0.0, -np.inf]), "all the weight"),
    "dimension": (lambda: wasserstein([[0.0, 1.0]], [[0.0]]), "2 and of 1 numbers"),
    "order": (lambda: wasserstein([[0.0]], [[0.0]], p=0.5), "p ≥ 1"),
    "weights": (lambda: wasserstein([[0.0], [1.0]], [[0.0]], log_weights=[0.0]), "shape (1,)"),
    "nan weights": (lambda: wasserstein([[0.0], [1.0]], [[0.0]], log_weights=[0.0, np.nan]), "numbers or −∞"),
    "no axis": (lambda: wasserstein(1.0, [[0.0]]), "leading axis"),
    "covariances": (lambda: covariance_error([[0.0]], [[0.0]], [1.0, 2.0]), "shape (2,)"),
    "centres": (lambda: covariance_error([[0.0, 1.0]], [[0.0]], [[1.0]]), "centres of shape (1,)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(cp.errors.ComposeProbError) as raised:
        call()
    assert message in str(raised.value)
