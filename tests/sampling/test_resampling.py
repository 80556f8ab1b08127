"""Resampling: effective sample size, and indices that are right on average and nearly
right always."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import composeprob as cp
from composeprob.samplers.resampling import (
    Resample,
    have_descendants,
    log_mean_weight,
    relative_ess,
    relative_weights,
    statistics,
    systematic,
)
from messages import check_wording
from sampling_cases import both, normal, run, squared
from zscores import assert_agrees, z_scores

SIZE = 12
log_weights = st.lists(st.floats(-30, 30), min_size=SIZE, max_size=SIZE).map(np.array)
shifts = st.floats(-50, 50)
ess, mean = jax.jit(relative_ess), jax.jit(log_mean_weight)
chosen_by = jax.jit(systematic)


def indices(number, weights):
    """Resampled ancestors by these 32 bits."""
    return np.asarray(chosen_by(jnp.uint32(number), jnp.asarray(weights)))


def by_whole_numbers(number, weights):
    """The same by Python's integers: copies rounded down to multiples of 2⁻³², and a
    tick at j + u."""
    n = len(weights)
    relative = np.asarray(relative_weights(jnp.asarray(weights)), np.float32)
    # Half of each, so that all digits are behind the point.
    halves = [int(float(w) * 2**31) for w in relative]
    digits = (
        sum(w >> 21 for w in halves),
        sum(w >> 10 & 0x7FF for w in halves),
        sum(w & 0x3FF for w in halves),
    )
    high, middle, low = map(np.float32, digits)
    total = high * np.float32(2**-11)
    total = total + middle * np.float32(2**-22) + low * np.float32(2**-32)
    total = 2 * total
    copies = [int(float(w) * 2**32) for w in relative * (np.float32(n) / total)]
    sums = np.cumsum(np.asarray(copies, object))
    below = np.asarray(
        [total // 2**32 + (number < total % 2**32) for total in sums], int
    )
    below[sums == sums[-1]] = n
    return np.searchsorted(below, np.arange(n), side="right"), sums, total


@given(log_weights, shifts)
@settings(deadline=None, max_examples=60)
def test_ess_is_the_formula_and_ignores_constants(weights, shift):
    w = np.exp(weights - weights.max())
    expected = w.sum() ** 2 / (w**2).sum() / SIZE
    assert np.isclose(float(ess(jnp.asarray(weights))), expected, rtol=1e-4)
    assert np.isclose(float(ess(jnp.asarray(weights + shift))), expected, rtol=1e-3)
    assert np.isclose(
        float(mean(jnp.asarray(weights))), np.log(np.mean(np.exp(weights))), atol=1e-4
    )


def test_copies_are_unbiased():
    weights = jnp.log(jnp.array([0.05, 0.3, 0.02, 0.25, 0.38]))
    numbers = jax.random.bits(jax.random.key(0), (20_000,), jnp.uint32)
    chosen = jax.jit(jax.vmap(systematic, (0, None)))(numbers, weights)
    copies = {str(i): np.asarray((chosen == i).sum(1), float) for i in range(5)}
    assert_agrees(
        z_scores(copies, {str(i): float(5 * jnp.exp(w)) for i, w in enumerate(weights)})
    )


@pytest.mark.parametrize("number", [0, 3, 5, 2**31, 2**32 - 1])
def test_equal_weights_keep_every_chain_and_no_chain_of_weight_zero_is_copied(number):
    assert np.array_equal(indices(number, np.full(SIZE, -7.0)), np.arange(SIZE))
    assert float(ess(jnp.full(SIZE, -7.0))) == 1.0
    for alive in ([0, 1, 2], [9, 10, 11], [4], [0], [SIZE - 1]):
        some = np.where(np.isin(np.arange(SIZE), alive), 0.0, -np.inf)
        assert set(indices(number, some).tolist()) == set(alive)
    none = np.full(SIZE, -np.inf)
    assert np.array_equal(indices(number, none), np.arange(SIZE))
    # A collapse, which the status reports; NaN would not be reported.
    assert float(ess(jnp.asarray(none))) == 0.0


@pytest.mark.parametrize("n", [1_000, 100_000, 131_072])
def test_no_dead_chain_is_copied_however_many_there_are(n):
    """A cumulative sum of floats, computed in blocks, falls now and then: ticks between
    such entries copied chains of weight 0 in 95 of 100 resamplings of 131,072."""
    rng = np.random.default_rng(0)
    for number in rng.integers(0, 2**32, 10):
        weights = np.where(rng.random(n) < 0.5, rng.normal(size=n), -np.inf).astype(
            np.float32
        )
        chosen = indices(number, weights)
        copies = np.bincount(chosen, minlength=n)
        shares = np.exp(np.asarray(weights, np.float64))
        shares *= n / shares.sum()
        assert copies.sum() == n
        assert not copies[np.isneginf(weights)].any()
        assert np.all(np.diff(chosen) >= 0)
        # 2e-2: N·w is a float, so ticks at the far end stand that much off.
        assert np.all(copies >= np.floor(shares - 2e-2))
        assert np.all(copies <= np.ceil(shares + 2e-2))


@pytest.mark.parametrize(
    "scale", [0.0, 1.0, 8.0], ids=["equal", "unequal", "one rules"]
)
@pytest.mark.parametrize("n", [1, 7, 4_000, 100_000])
def test_sums_are_exact(n, scale):
    """The ancestors are those of the same sums in Python's integers, whatever the size
    and the order of the chains."""
    rng = np.random.default_rng(n)
    weights = np.where(rng.random(n) < 0.9, scale * rng.normal(size=n), -np.inf).astype(
        np.float32
    )
    weights[0] = 0.0
    for number in (0, 2**32 - 1, *map(int, rng.integers(0, 2**32, 3))):
        expected, sums, total = by_whole_numbers(number, weights)
        relative = np.asarray(relative_weights(jnp.asarray(weights)), np.float64)
        assert abs(float(total) / relative.sum() - 1) < 1e-6
        assert abs(float(sums[-1]) / 2**32 / n - 1) < 2e-6
        np.testing.assert_array_equal(indices(number, weights), expected)


def resampled_by(resample):
    """A run of ten chains that are resampled by this rule."""
    density = cp.compile(both, normal([0.0, 0.0]), normal([1.0, 0.0]))
    return run(
        density,
        chains=10,
        sampler=cp.SMC(cp.MALA(0.1), resample=resample, check_levels=False),
    )


def test_every_level_draws_its_own_uniform_number():
    """The mutant that repeats one number at every level moves the same ticks again and
    again: a bias that averages over levels do not show."""
    used = []

    class Watched(Resample):
        def ancestors(self, words, log_weights):
            jax.debug.callback(
                lambda words: used.append(tuple(np.asarray(words).tolist())), words
            )
            return super().ancestors(words, log_weights)

    resampled_by(Watched(1.0))
    jax.effects_barrier()
    assert len(set(used)) == len(used) > 10


def test_chains_are_resampled_at_level_0_whatever_the_rule_says():
    """Weights that are never passed on would leave samples of unequal weights, and the
    evidence of the initial weights."""

    class Idle(Resample):
        def should_resample(self, ess, level):
            return jnp.asarray(False)

    never = resampled_by(Idle())
    rarely = resampled_by(Resample(1e-9))
    assert float(never.log_evidence) == float(rarely.log_evidence) != 0.0
    np.testing.assert_array_equal(never["x"], rarely["x"])


def level_statistics(log_weights, ancestors=None, averaging=0.0, gains=0.0, errors=0.0):
    """Statistics of a level whose step changed the log-weights by the gains."""
    log_weights = jnp.asarray(log_weights)
    n = len(log_weights)
    if ancestors is None:
        ancestors = jnp.arange(n)
    averaging, gains, errors = (
        jnp.broadcast_to(jnp.asarray(values), n)
        for values in (averaging, gains, errors)
    )
    before = log_weights - jnp.nan_to_num(gains)
    return statistics(log_weights, ancestors, averaging, before, gains, errors)


def test_a_chain_of_no_weight_counts_for_nothing_in_the_variance_of_a_step():
    """It may gain any number of nats while it comes nearer to the others."""
    gains = 0.1 * np.random.default_rng(0).standard_normal(100)
    plain = level_statistics(gains, gains=gains).weight_variance
    assert 0.005 < plain < 0.02
    log_weights = gains.copy()
    gains[0] = 300.0
    log_weights[0] = -100.0  # after the step; −400 before it
    found = level_statistics(log_weights, gains=gains).weight_variance
    assert abs(found - plain) < 0.005
    # One that has weight after the step counts.
    log_weights[0] = 0.0
    assert level_statistics(log_weights, gains=gains).weight_variance > 1e6


def test_the_variance_of_the_evidence_follows_the_genealogy():
    """Descendants of four of eight initial chains, of weights 0.4, 0.3, 0.2 and 0.1:
    Σ(W − 1/8)²·8/7."""
    ancestors = jnp.array([0, 0, 3, 3, 5, 5, 6, 6])
    weights = jnp.log(jnp.array([0.2, 0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.0]))
    shares = np.array([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])
    variance = float(level_statistics(weights, ancestors).evidence_variance)
    expected = np.sum((shares - 1 / 8) ** 2) * 8 / 7
    np.testing.assert_allclose(variance, expected, rtol=1e-5)
    assert float(level_statistics(jnp.zeros(8)).evidence_variance) == 0.0
    np.testing.assert_array_equal(have_descendants(ancestors), [1, 0, 0, 1, 0, 1, 1, 0])


def test_the_change_of_the_evidence_by_other_weights_and_its_variance():
    """Weights 1, 1, 2 that would be 1, 2, 4 times as large: log 11/4, and Σ
    W²·(growth·4/11 − 1)²."""
    log_weights = jnp.log(jnp.array([1.0, 1.0, 2.0]))
    more = jnp.log(jnp.array([1.0, 2.0, 4.0]))
    growth = np.array([1, 2, 4]) * 4 / 11 - 1
    shares = np.array([1, 1, 2]) / 4
    expected = np.log(11 / 4), np.sum((shares * growth) ** 2)
    found = level_statistics(log_weights, averaging=more).averaging
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    nothing = level_statistics(jnp.full(3, -jnp.inf), averaging=more)
    assert not np.any(nothing.averaging)


def test_the_statistics_of_a_step():
    """Weights 1, 3, 0 that the step multiplied by 2, 1 and 5: 1/CESS − 1 of the first
    two; the mean of the errors of those that were corrected."""
    before = np.array([1.0, 3.0, 0.0])
    growth = np.array([2.0, 1.0, 5.0])
    with np.errstate(divide="ignore"):
        log_weights = np.log(before * growth)
    errors = jnp.array([0.5, jnp.inf, 7.0])
    of_step = level_statistics(log_weights, gains=np.log(growth), errors=errors)
    expected = 4 * (1 * 4 + 3 * 1) / (1 * 2 + 3 * 1) ** 2 - 1
    np.testing.assert_allclose(of_step.weight_variance, expected, rtol=1e-5)
    np.testing.assert_allclose(of_step.step_error, 0.5, rtol=1e-5)
    np.testing.assert_allclose(of_step.ess, relative_ess(log_weights), rtol=1e-5)
    np.testing.assert_allclose(of_step.log_mean, np.log(5 / 3), rtol=1e-5)
    lost = level_statistics(log_weights, gains=jnp.full(3, jnp.nan))
    assert lost.weight_variance == jnp.inf


def test_a_run_of_which_few_chains_count_says_so_and_is_ok():
    """A step without a control spreads the weights of a power, and nobody resamples."""
    step = cp.ReverseStep(control="none")
    density = cp.compile(squared, normal(0.0, 0.3, cp.Schedule.log_snr(12)))
    sampler = cp.SMC(cp.ULA(1e-6), resample=1e-6, step=step, check_levels=False)
    result = run(density, sampler=sampler)
    assert result.status.ok
    assert result.effective_chains < 32
    assert f" {result.effective_chains:.0f} " in str(result.status)
    check_wording(str(result.status), estimated=True)
