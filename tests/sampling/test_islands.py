"""Islands: chains that are resampled within groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError
from composeprob.results.estimates import island_variance
from composeprob.samplers.resampling import by_islands, log_mean_weight
from sampling_cases import normal
from zscores import LIMIT

LOG_WEIGHTS = jnp.log(jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 8.0, 0.0, 0.0, 1.0, 2.0, 3.0, 2.0]))
"""Three islands of four: equal weights, one chain alone, weights that differ a little."""


def resampled(islands=3, threshold=0.5):
    chosen, left = jax.jit(by_islands, static_argnums=2)(jax.random.key(0), LOG_WEIGHTS, islands, threshold)
    return np.asarray(chosen), np.asarray(left)


def test_only_islands_that_need_it_are_resampled_and_nobody_leaves_one():
    chosen, left = resampled()
    np.testing.assert_array_equal(chosen, [0, 1, 2, 3, 5, 5, 5, 5, 8, 9, 10, 11])
    mean = np.exp(LOG_WEIGHTS).mean()
    np.testing.assert_allclose(np.exp(left), np.array([1, 1, 1, 1, 2, 2, 2, 2, 1, 2, 3, 2]) / mean, rtol=1e-6)


def test_the_mean_weight_of_each_island_and_of_all_is_kept():
    for threshold in (0.0, 0.5, 1.1):
        _, left = resampled(threshold=threshold)
        before = np.exp(LOG_WEIGHTS).reshape(3, 4).mean(1)
        np.testing.assert_allclose(np.exp(left).reshape(3, 4).mean(1), before / before.mean(), rtol=1e-6)
        assert abs(float(log_mean_weight(jnp.asarray(left)))) < 1e-6


def test_an_island_without_weight_has_none_afterwards():
    weights = jnp.where(jnp.arange(8) < 4, -jnp.inf, 0.0)
    _, left = by_islands(jax.random.key(0), weights, 2, jnp.float32(0.5))
    np.testing.assert_array_equal(np.isneginf(left), np.arange(8) < 4)


def test_the_variance_of_a_mean_of_estimates():
    logs = np.random.default_rng(0).normal(0.0, 0.1, 400)
    values = np.exp(logs)
    assert island_variance(logs) == pytest.approx(values.var(ddof=1) / values.mean() ** 2 / 400, rel=1e-6)


@cp.program
def tail(f):
    x = cp.sample("x", f)
    cp.factor("beyond", -50.0 * jnp.maximum(3.0 - x, 0.0) ** 2)


@pytest.fixture(scope="module")
def result():
    sampler = cp.SMC(cp.MALA(cp.Adaptive()), islands=16, check_levels=False)
    return cp.infer(cp.compile(tail, normal()), jax.random.key(3), num_chains=1024, sampler=sampler, progress=False)


def test_a_tail_by_islands(result):
    """∫ N(x; 0, 1)·exp(−50·(3 − x)₊²) dx by quadrature."""
    x = np.linspace(-10, 12, 400_001)
    f = np.exp(-0.5 * x**2 - 50 * np.maximum(3 - x, 0) ** 2) / np.sqrt(2 * np.pi)
    log_evidence, mean = np.log(np.trapezoid(f, x)), np.trapezoid(x * f, x) / np.trapezoid(f, x)
    assert np.min(result.ess) < 0.5  # they were resampled on the way
    assert abs(result.log_evidence - log_evidence) < LIMIT * result.log_evidence_error
    found = result.mean(lambda s: s["x"])
    assert abs(found.value - mean) < LIMIT * found.error


def test_what_is_told_of_each_island(result):
    evidence, ancestors = result.islands.T
    assert evidence.shape == (16,)
    total = np.log(np.exp(evidence - evidence.max()).mean()) + evidence.max()
    assert total == pytest.approx(result.log_evidence, abs=1e-4)
    assert result.log_evidence_error == pytest.approx(np.sqrt(island_variance(evidence)), rel=1e-5)
    for i, left in enumerate(ancestors):
        assert left == len({a for a in result.first_ancestors if a // 64 == i})
    assert np.all(result.log_weights == 0.0)  # level 0 makes them equal
    assert "islands       16, log evidence" in str(result.summary())


@pytest.mark.parametrize("islands", [0, -1, 2.0, True, "8"])
def test_islands_are_counted_by_a_whole_number(islands):
    with pytest.raises(InvalidValueError, match="islands must be a whole number"):
        cp.SMC(islands=islands)


def test_islands_have_one_size():
    density = cp.compile(tail, normal())
    with pytest.raises(InvalidValueError, match="100 chains cannot be split into 16 islands"):
        cp.infer(density, jax.random.key(0), num_chains=100, sampler=cp.SMC(islands=16))
