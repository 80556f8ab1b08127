"""Shares of modes that independent chains were frozen in, named where log-densities say otherwise."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp

import composeprob as cp
from composeprob import tuning
from composeprob.results.shares import _log_density, frozen_shares

KEYS = 20
RING = 3 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)


def drawn(rng, means, sds, held, n):
    """Points of Gaussians in shares that are held, and the log-density of equal shares."""
    which = rng.choice(len(means), n, p=held)
    x = means[which] + sds[which, None] * rng.normal(size=(n, means.shape[1]))
    squares = ((x[:, None] - means) ** 2).sum(-1) / sds**2
    return {"x": x}, logsumexp(-0.5 * squares - means.shape[1] * np.log(sds), axis=1)


@pytest.mark.parametrize("n", [64, 1000])
@pytest.mark.parametrize(
    ("means", "sds"),
    [(np.array([[-2.0], [2.0]]), np.array([0.3, 0.1])), (RING, np.linspace(0.1, 0.3, 8)), (np.eye(3), np.full(3, 0.1))],
    ids=["two", "ring", "3-d"],
)
def test_right_shares_are_not_named(means, sds, n):
    rng, equal = np.random.default_rng(0), np.full(len(means), 1 / len(means))
    assert not any(frozen_shares(*drawn(rng, means, sds, equal, n)) for _ in range(KEYS))


@pytest.mark.parametrize("d", [1, 2, 3, 6, 10])
def test_log_z_of_modes_of_any_shape_is_off_by_less_than_the_slack(d):
    rng = np.random.default_rng(0)
    laws = {
        "Gaussian": (rng.normal, lambda x: -0.5 * (x**2).sum(1) - 0.5 * d * np.log(2 * np.pi)),
        "exponential": (rng.exponential, lambda x: -x.sum(1)),
        "uniform": (rng.uniform, lambda x: 0.0),
    }
    for n in (max(20, 5 * d), 500):
        found = []
        for draw, log_density in laws.values():
            x = draw(size=(n, d))
            found.append(np.mean(log_density(x) - _log_density(x)))
        noise = 4 * np.sqrt(2 * (0.6 + 0.5 * d) / n)
        assert max(found) - min(found) < tuning.SHARES.slack * d + noise


def test_one_mode_is_not_named():
    rng = np.random.default_rng(0)
    for d in (1, 2, 20):
        x = rng.normal(size=(500, d)) ** 3
        assert not frozen_shares({"x": x, "y": x[:, 0]}, rng.normal(size=500))


def test_a_share_that_is_wrong_by_little_is_named_where_chains_are_many():
    """73 % held by what has half: 1 nat."""
    rng, means = np.random.default_rng(0), np.array([[-2.0], [2.0]])
    for _ in range(KEYS):
        assert frozen_shares(*drawn(rng, means, np.array([0.3, 0.1]), [0.73, 0.27], 1000))


def test_chains_that_stand_still_are_not_judged():
    x = np.repeat([[-1.0], [1.0]], 50, axis=0)
    assert not frozen_shares({"x": x}, x[:, 0])


@pytest.mark.parametrize("n", [64, 1000])
def test_wrong_shares_are_named(n):
    rng, means = np.random.default_rng(0), np.array([[-2.0], [2.0]])
    for _ in range(KEYS):
        sites, log_density = drawn(rng, means, np.array([0.3, 0.1]), [0.5, 0.5], n)
        ((code, text),) = frozen_shares(sites, log_density + 4.0 * (sites["x"][:, 0] > 0))
        assert code == "shares_frozen"
        assert 0.93 < float(re.search(r"should hold about ([\d.]+)%", text)[1]) / 100 < 0.995  # e⁴ to 1


@cp.program
def a_sign_that_is_lost(f, g, y):
    x = cp.sample("x", f * g)
    cp.observe("y", dist.Normal(x**2, 0.01), y)


def test_a_default_run_that_gives_way_says_so():
    """x = ±√y, and the prior has e⁷ times as much at the one as at the other: independent chains take either."""
    mixing = dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5]))
    law = dist.MixtureSameFamily(mixing, dist.Normal(jnp.array([-2.0, 0.0, 2.5]), jnp.array([0.2, 0.05, 0.4])))
    f = cp.Analytic(law, cp.Schedule.log_snr(100))
    density = cp.compile(a_sign_that_is_lost, f, f, jnp.float32(1.29))
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), 5, reverse_step=True)
    result = cp.infer(density, jax.random.key(0), num_chains=200, sampler=sampler, progress=False)
    assert 0.2 < np.mean(np.asarray(result["x"]) > 0) < 0.8
    assert result.status.has("shares_frozen")
    assert np.isnan(result.mean(lambda x: x["x"]).error)
