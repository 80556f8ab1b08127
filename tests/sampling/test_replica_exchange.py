"""Replica exchange: swaps leave every level's law what it is, and modes come down in their proportions."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import CapabilityError, InvalidValueError, WrongTypeError
from composeprob.kernels.gibbs import GibbsState
from composeprob.samplers.rungs import apart
from composeprob.samplers.swaps import Hop, Swap, swapped
from sampling_cases import SCHEDULE, both, normal
from zscores import LIMIT, assert_agrees, assert_disagrees, z_scores

CHAINS = 4096
LEVELS = np.array([3, 9, 12, 20])
MEAN, VARIANCE, OTHER = 1.2, 0.3, 2.0


@pytest.fixture(scope="module")
def density():
    """N(1.2, 0.3) times N(0, 2): at level k their noised laws' product."""
    return cp.compile(both, normal(MEAN, np.sqrt(VARIANCE)), normal(0.0, np.sqrt(OTHER)))


def law(level):
    """Mean and variance of π_k."""
    alpha, sigma = float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])
    precisions = 1 / (alpha**2 * np.array([VARIANCE, OTHER]) + sigma**2)
    return alpha * MEAN * precisions[0] / precisions.sum(), 1 / precisions.sum()


def after_a_swap(density, odd, energies, levels=LEVELS):
    """x/sd of every rung's replica, (chains, L), after one swap from exact draws, and the chances of its swaps."""
    swap = Swap(energies)
    means, variances = np.array([law(level) for level in levels]).T
    rungs = jnp.asarray(levels)

    def one(key):
        first, other = jax.random.split(key)
        x = means + np.sqrt(variances) * jax.random.normal(first, (len(levels),))
        evaluation = jax.vmap(lambda x, level: swap.target(density, level)({"x": x}))(x, rungs)
        states, came, chance = swapped(other, GibbsState({"x": x}, evaluation, ()), rungs, odd, swap, density)
        return states.position["x"], came, chance

    x, came, chance = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), CHAINS))
    return (np.asarray(x) - means) / np.sqrt(variances), np.asarray(came), np.asarray(chance)


def moments(z):
    values = {
        f"{name} of rung {j}": z[:, j] ** power
        for j in range(z.shape[1])
        for name, power in (("mean", 1), ("square", 2))
    }
    return z_scores(values, {name: float("square" in name) for name in values})


@pytest.mark.parametrize("odd", [0, 1])
def test_swaps_by_energies_leave_every_level_what_it_is(density, odd):
    z, came, chance = after_a_swap(density, odd, True)
    assert_agrees(moments(z))
    pairs = [(0, 1), (2, 3)] if odd == 0 else [(1, 2)]
    for low, high in pairs:
        assert np.all((came[:, low] == high) == (came[:, high] == low))
        assert np.mean(came[:, low] == high) == pytest.approx(np.mean(chance[:, low]), abs=0.05)
        assert np.mean(chance[:, low]) > 0.1
    assert np.all(np.isnan(chance[:, [j for j in range(4) if (j, j + 1) not in pairs]]))


def test_without_the_law_of_the_hop_a_swap_is_wrong(density, monkeypatch):
    monkeypatch.setattr(Hop, "log_density", lambda self, x, density, end: jnp.zeros(()))
    assert_disagrees(moments(after_a_swap(density, 0, True)[0]))


def test_swaps_by_path_weights_are_right_where_levels_are_near(density):
    near = np.array([9, 10, 11, 12])
    z, _, chance = after_a_swap(density, 0, False, near)
    assert np.abs(z.mean(0)).max() < 0.08
    assert np.abs(z.var(0) - 1).max() < 0.12
    assert np.nanmean(chance) > 0.8


def test_path_weights_of_the_wrong_sign_are_found_out(density, monkeypatch):
    half = Swap.half
    monkeypatch.setattr(Swap, "half", lambda self, *rest: -3 * half(self, *rest))
    z, *_ = after_a_swap(density, 0, False, np.array([9, 12, 14, 17]))
    assert max(np.abs(z.mean(0)).max(), np.abs(z.var(0) - 1).max()) > 0.12


@pytest.fixture(scope="module")
def result():
    """Two narrow modes far apart, times a Gaussian."""
    modes = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.25, 0.75])), dist.Normal(jnp.array([-1.0, 1.0]), 0.1))
    target = cp.compile(both, cp.Analytic(modes, SCHEDULE), normal(0.5, 1.0))
    sampler = cp.ReplicaExchange(num_levels=8, sweeps=80)
    return cp.infer(target, jax.random.key(0), num_chains=64, sampler=sampler, draws=60, progress=False)


def test_shares_of_modes(result):
    parts = np.array([0.25, 0.75]) * np.exp(-0.5 * (np.array([-1.0, 1.0]) - 0.5) ** 2 / 1.01)
    shares = np.mean(np.asarray(result["x"]) > 0, axis=1)
    assert abs(shares.mean() - parts[1] / parts.sum()) < LIMIT * shares.std(ddof=1) / 8
    assert result.status.ok


def test_what_it_tells(result):
    assert result["x"].shape == (64, 60)
    assert result.log_snr.shape == result.swaps.shape == result.acceptance.shape == (8,)
    np.testing.assert_allclose(result.log_snr[[0, -1]], np.asarray(SCHEDULE.log_snr)[[0, -1]], atol=1e-4)
    assert np.isnan(result.swaps[-1])
    assert np.all(result.swaps[:-1] > 0.1)
    assert result.round_trips > 1.0
    assert result.evaluations == 8 * 2 * 8 + 80 * 16 + 3 * 8 + 60 * 16
    assert "round trips of each chain's replicas" in str(result.summary())


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i >= 4 else []) for i in range(20)])
def test_rungs_are_different_levels_with_both_ends_among_them(seed):
    rng = np.random.default_rng(seed)
    count, levels = int(rng.integers(2, 12)), int(rng.integers(12, 40))
    wanted = np.sort(rng.integers(0, levels, count))
    found = np.asarray(apart(jnp.asarray(wanted, jnp.int32), levels))
    assert found[0] == 0
    assert found[-1] == levels - 1
    assert np.all(np.diff(found) > 0)


def test_refusals(density):
    for words, options in {
        "Unknown swap 'weights'": {"swap": "weights"},
        "num_levels must be a whole number ≥ 2; got 1": {"num_levels": 1},
        "sweeps must be a whole number ≥ 4; got 2.5": {"sweeps": 2.5},
        "cannot measure a metric": {"kernel": cp.MALA(metric="full")},
    }.items():
        with pytest.raises(InvalidValueError, match=words):
            cp.ReplicaExchange(**options)
    with pytest.raises(WrongTypeError, match="needs a kernel"):
        cp.ReplicaExchange("mala")
    with pytest.raises(InvalidValueError, match="40 rungs do not fit on 32 levels"):
        cp.infer(density, jax.random.key(0), num_chains=4, sampler=cp.ReplicaExchange(num_levels=40))
    score = cp.Diffusion(lambda x, t: -x, SCHEDULE, event_shape=(), parameterization="score", time="log_snr")
    only = cp.compile(both, score, normal())
    with pytest.raises(CapabilityError, match="needs `energy`"):
        cp.infer(only, jax.random.key(0), num_chains=4, sampler=cp.ReplicaExchange(swap="energy"))
    with pytest.raises(CapabilityError, match="needs a kernel"):
        cp.infer(only, jax.random.key(0), num_chains=4, sampler=cp.ReplicaExchange())
