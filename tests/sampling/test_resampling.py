"""Resampling: effective sample size, and indices that are right on average and nearly right always."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import composeprob as cp
from composeprob.samplers import smc
from composeprob.samplers.resampling import (
    cumulated,
    distinct,
    evidence_variance,
    log_mean_weight,
    relative_ess,
    systematic,
)
from sampling_cases import both, normal, run
from zscores import assert_agrees, z_scores

SIZE = 12
log_weights = st.lists(st.floats(-30, 30), min_size=SIZE, max_size=SIZE).map(np.array)
shifts = st.floats(-50, 50)
ess, mean, indices = jax.jit(relative_ess), jax.jit(log_mean_weight), jax.jit(systematic)


@given(log_weights, shifts)
@settings(deadline=None, max_examples=60)
def test_ess_is_the_formula_and_ignores_constants(weights, shift):
    w = np.exp(weights - weights.max())
    expected = w.sum() ** 2 / (w**2).sum() / SIZE
    assert np.isclose(float(ess(jnp.asarray(weights))), expected, rtol=1e-4)
    assert np.isclose(float(ess(jnp.asarray(weights + shift))), expected, rtol=1e-3)
    assert np.isclose(float(mean(jnp.asarray(weights))), np.log(np.mean(np.exp(weights))), atol=1e-4)


@given(log_weights, st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=60)
def test_copies_are_rounded_weights(weights, seed):
    chosen = np.asarray(indices(jax.random.key(seed), jnp.asarray(weights)))
    copies = np.bincount(chosen, minlength=SIZE)
    shares = SIZE * np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()
    assert copies.sum() == SIZE
    assert np.all(np.diff(chosen) >= 0)
    assert np.all(copies >= np.floor(shares - 1e-4))
    assert np.all(copies <= np.ceil(shares + 1e-4))


def test_copies_are_unbiased():
    weights = jnp.log(jnp.array([0.05, 0.3, 0.02, 0.25, 0.38]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    chosen = jax.jit(jax.vmap(systematic, (0, None)))(keys, weights)
    copies = {str(i): np.asarray((chosen == i).sum(1), float) for i in range(5)}
    assert_agrees(z_scores(copies, {str(i): float(5 * jnp.exp(w)) for i, w in enumerate(weights)}))


def test_equal_weights_keep_every_chain():
    assert np.array_equal(indices(jax.random.key(3), jnp.full(SIZE, -7.0)), np.arange(SIZE))
    assert float(ess(jnp.full(SIZE, -7.0))) == 1.0


def test_chains_of_weight_zero_die_and_a_population_of_them_does_not():
    some = jnp.where(jnp.arange(SIZE) < 3, 0.0, -jnp.inf)
    assert set(np.asarray(indices(jax.random.key(0), some)).tolist()) == {0, 1, 2}
    none = jnp.full(SIZE, -jnp.inf)
    assert np.array_equal(indices(jax.random.key(0), none), np.arange(SIZE))
    assert float(ess(none)) == 0.0  # a collapse, which the status reports; NaN would say nothing


@pytest.mark.parametrize("n", [1_000, 131_072])
def test_no_dead_chain_is_copied_however_many_there_are(n):
    """A cumulative sum of floats, computed in blocks, falls now and then: ticks between such entries copied chains of
    weight 0 in 95 of 100 resamplings of 131,072."""
    alive = jax.jit(lambda key: jax.random.bernoulli(key, 0.5, (n,)))
    for seed in range(10):
        key = jax.random.key(seed)
        weights = jnp.where(alive(jax.random.fold_in(key, 1)), jax.random.normal(key, (n,)), -jnp.inf)
        chosen = np.asarray(indices(key, weights))
        copies = np.bincount(chosen, minlength=n)
        shares = np.exp(np.asarray(weights, np.float64))
        shares *= n / shares.sum()
        assert copies.sum() == n
        assert not copies[np.isneginf(weights)].any()
        assert np.all(np.diff(chosen) >= 0)
        # 2e-2: N·w is a float, so ticks at the far end stand that much off.
        assert np.all(copies >= np.floor(shares - 2e-2))
        assert np.all(copies <= np.ceil(shares + 2e-2))


def test_sums_of_64_bits_are_exact():
    rng = np.random.default_rng(0)
    whole, parts = rng.integers(0, 5, 4_000), rng.integers(0, 2**32, 4_000)
    low, high = cumulated(jnp.asarray(whole, jnp.uint32), jnp.asarray(parts, jnp.uint32))
    exact = np.cumsum(whole.astype(object) * 2**32 + parts.astype(object))
    assert [int(h) * 2**32 + int(l) for h, l in zip(np.asarray(high), np.asarray(low), strict=True)] == list(exact)


def test_every_level_draws_its_own_uniform_number(monkeypatch):
    """The mutant that repeats one number at every level moves the same ticks again and again: a bias that averages
    over levels do not show."""
    used = []

    def watched(key, weights):
        jax.debug.callback(lambda data: used.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return systematic(key, weights)

    monkeypatch.setattr(smc, "systematic", watched)
    density = cp.compile(both, normal([0.0, 0.0]), normal([1.0, 0.0]))
    sampler = cp.SMC(cp.MALA(0.1), resample_threshold=1.0, check_levels=False)
    run(density, chains=10, sampler=sampler)
    jax.effects_barrier()
    assert len(set(used)) == len(used) > 10


def test_the_variance_of_the_evidence_follows_families():
    """Four families of weights 0.4, 0.3, 0.2, 0.1 among eight first chains: Σ(W − 1/8)²·8/7."""
    ancestors = jnp.array([0, 0, 3, 3, 5, 5, 6, 6])
    weights = jnp.log(jnp.array([0.2, 0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.0]))
    shares = np.array([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])
    found = float(evidence_variance(weights, ancestors))
    np.testing.assert_allclose(found, np.sum((shares - 1 / 8) ** 2) * 8 / 7, rtol=1e-5)
    assert float(evidence_variance(jnp.zeros(8), jnp.arange(8))) == 0.0
    assert int(distinct(ancestors)) == 4
