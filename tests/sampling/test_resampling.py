"""Resampling: effective sample size, and indices that are right on average and nearly right always."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from composeprob.sampling.resampling import log_mean_weight, relative_ess, systematic
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
    chosen = jax.vmap(systematic, (0, None))(keys, weights)
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
