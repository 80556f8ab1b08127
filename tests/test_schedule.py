"""Schedules: their formulas, conventions, ranges, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, LevelError, ShapeError
from composeprob.schedule import log_snr_of
from refusals import refused
from registry import SCHEDULES


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    """A schedule of every constructor."""
    return SCHEDULES[request.param]()


def test_levels_go_from_clean_to_noisy(schedule):
    assert schedule.num_levels == schedule.alpha.shape[0] == schedule.sigma.shape[0]
    assert np.all(np.diff(schedule.log_snr) < 0)
    np.testing.assert_allclose(
        schedule.log_snr,
        np.log(schedule.alpha**2 / schedule.sigma**2),
        rtol=1e-4,
        atol=1e-5,
    )
    assert schedule.sigma[0] < 0.2 < schedule.sigma[-1]


def test_a_level_is_one_entry_also_traced(schedule):
    for level in (0, 3, schedule.num_levels - 1):
        for noise in (
            schedule.at(level),
            jax.jit(lambda k: schedule.at(k))(level),
            schedule.at(np.int64(level)),
        ):
            assert int(noise.index) == level
            np.testing.assert_allclose(noise.alpha, schedule.alpha[level], rtol=1e-6)
            np.testing.assert_allclose(noise.sigma, schedule.sigma[level], rtol=1e-6)
            np.testing.assert_allclose(
                noise.log_snr, schedule.log_snr[level], rtol=1e-4, atol=1e-4
            )


def test_beta_takes_one_level_to_the_next(schedule):
    """x_k = (α_k/α_{k−1})·x_{k−1} + √β_k·ε: σ_k² = (α_k/α_{k−1})²·σ_{k−1}² + β_k."""
    alpha = np.asarray(schedule.alpha, np.float64)
    sigma = np.asarray(schedule.sigma, np.float64)
    beta = np.asarray(schedule.beta, np.float64)
    ratio = alpha[1:] / alpha[:-1]
    np.testing.assert_allclose(
        beta[1:], sigma[1:] ** 2 - (ratio * sigma[:-1]) ** 2, rtol=2e-3
    )
    np.testing.assert_allclose(beta[0], sigma[0] ** 2, rtol=1e-5)
    assert np.all(beta > 0)


def test_schedules_are_pytrees_whose_levels_are_leaves(schedule):
    assert len(jax.tree.leaves(schedule)) == 3
    assert schedule.same_levels(jax.tree.map(jnp.asarray, schedule))
    assert f"Schedule({schedule.num_levels} levels, log-SNR" in repr(schedule)
    assert jax.jit(lambda s: repr(s) and s.sigma)(schedule).shape == (
        schedule.num_levels,
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "log_snr"])
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]()
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(schedule.drift_ratio, -0.5)


def test_linear_is_ddpm():
    schedule = cp.Schedule.linear(1000)
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(schedule.alpha**2, np.cumprod(1 - beta), rtol=1e-10)
    np.testing.assert_allclose(schedule.beta[1:], beta[1:], rtol=1e-3)
    shorter = cp.Schedule.linear(100)  # about the same range of noise
    np.testing.assert_allclose(shorter.log_snr[-1], schedule.log_snr[-1], atol=0.8)


def test_cosine_is_nichol_and_dhariwal():
    def alpha_bar(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    schedule = cp.Schedule.cosine(50)
    expected = alpha_bar(np.arange(1, 50) / 50) / alpha_bar(0.0)
    np.testing.assert_allclose(schedule.alpha[:-1] ** 2, expected, rtol=1e-10)
    np.testing.assert_allclose(schedule.beta[-1], 0.999, rtol=1e-5)


def test_vp_is_the_sde():
    schedule = cp.Schedule.vp(2, beta_min=0.2, beta_max=10.0)
    t = np.array([1e-3, 1.0])
    integral = 0.2 * t + 0.5 * t**2 * 9.8
    np.testing.assert_allclose(schedule.alpha, np.exp(-0.5 * integral), rtol=1e-12)


def test_edm_is_karras():
    schedule = cp.Schedule.edm(5, sigma_min=0.01, sigma_max=40.0, rho=3.0)
    np.testing.assert_allclose(schedule.alpha, 1.0)
    np.testing.assert_allclose(schedule.sigma[[0, -1]], [0.01, 40.0], rtol=1e-12)
    np.testing.assert_allclose(np.diff(schedule.sigma ** (1 / 3), n=2), 0.0, atol=1e-12)
    np.testing.assert_allclose(schedule.drift_ratio, 0.0)


def test_flow_is_a_straight_line():
    """α = 1 − t, σ = t; the shift is t ↦ s·t/(1 + (s−1)·t); f/g² is d log α/dt /
    (dσ²/dt − 2σ²·d log α/dt)."""
    unshifted = cp.Schedule.flow(41)
    shifted = cp.Schedule.flow(41, shift=3.0)
    t = np.linspace(1e-3, 0.999, 41)
    np.testing.assert_allclose(unshifted.sigma, t, rtol=1e-12)
    np.testing.assert_allclose(shifted.sigma, 3 * t / (1 + 2 * t), rtol=1e-12)
    for schedule in (unshifted, shifted):
        np.testing.assert_allclose(schedule.alpha + schedule.sigma, 1.0, rtol=1e-12)
        s = schedule.sigma
        np.testing.assert_allclose(
            schedule.drift_ratio,
            (-1 / (1 - s)) / (2 * s + 2 * s**2 / (1 - s)),
            rtol=1e-10,
        )
    alpha, _ = unshifted.noise_at(np.array([-3.0, 0.0, 5.0]))
    np.testing.assert_allclose(alpha, 1 / (1 + np.exp([1.5, 0.0, -2.5])), rtol=1e-12)


def test_log_snr_is_evenly_spaced_and_an_array_on_instances():
    schedule = cp.Schedule.log_snr(12, min=-4.0, max=16.0)
    np.testing.assert_allclose(schedule.log_snr, np.linspace(16.0, -4.0, 12), atol=2e-5)
    assert schedule.log_snr.shape == (12,)
    assert cp.Schedule.log_snr(12).num_levels == 12


def test_nothing_is_lost_where_alpha_is_almost_one():
    """σ = 10⁻⁵: in single precision α is 1, and log-SNR is still the given one."""
    schedule = cp.Schedule.log_snr(2, min=-5.0, max=23.0)
    np.testing.assert_allclose(schedule.at(0).log_snr, 23.0, rtol=1e-5)
    np.testing.assert_allclose(schedule.at(0).sigma, np.exp(-11.5), rtol=1e-5)
    noisy = cp.Schedule.log_snr(2, min=-40.0, max=5.0)
    np.testing.assert_allclose(noisy.at(1).log_snr, -40.0, rtol=1e-5)


def test_noise_at_any_log_snr():
    log_snr = np.array([7.0, 0.3, -5.0])
    for schedule in (cp.Schedule.cosine(5), cp.Schedule.edm(5), cp.Schedule.flow(5)):
        np.testing.assert_allclose(
            log_snr_of(*schedule.noise_at(log_snr)), log_snr, rtol=1e-12
        )
    np.testing.assert_allclose(
        cp.Schedule.cosine(5).noise_at(log_snr)[0], np.sqrt(1 / (1 + np.exp(-log_snr)))
    )
    np.testing.assert_allclose(cp.Schedule.edm(5).noise_at(log_snr)[0], 1.0)
    other = cp.Schedule.from_arrays([0.9, 0.3], [0.1, 1.0])
    middle = np.mean(2 * np.log([0.9 / 0.1, 0.3 / 1.0]))
    np.testing.assert_allclose(other.noise_at(np.array([middle]))[0], np.sqrt(0.27))


def test_same_levels():
    schedule = cp.Schedule.cosine(10)
    assert schedule.same_levels(
        cp.Schedule.from_arrays(np.float32(schedule.alpha), np.float32(schedule.sigma))
    )
    assert not schedule.same_levels(cp.Schedule.cosine(11))
    assert not schedule.same_levels(
        cp.Schedule.from_arrays(schedule.alpha, schedule.sigma * (1 + 1e-4))
    )


@pytest.mark.parametrize(
    ("step", "kept"),
    [(1, range(40)), (13, (0, 13, 26, 39)), (20, (0, 20, 39)), (39, (0, 39))],
)
def test_some_of_the_levels(schedule, step, kept):
    """Level 0 and the noisiest among them, and every field as it was: f/g² too, which
    differences would change."""
    some = schedule.every(np.int64(step))
    for field in ("alpha", "sigma", "drift_ratio"):
        np.testing.assert_array_equal(
            getattr(some, field), getattr(schedule, field)[list(kept)]
        )


@pytest.mark.parametrize(
    ("make", "error"),
    [
        pytest.param(
            lambda: cp.Schedule.cosine(1),
            InvalidValueError,
            id="at least 2 levels; got 1",
        ),
        pytest.param(
            lambda: cp.Schedule.linear(-3),
            InvalidValueError,
            id="at least 2 levels; got -3",
        ),
        pytest.param(
            lambda: cp.Schedule.log_snr(10.0),
            InvalidValueError,
            id="at least 2 levels; got 10.0",
        ),
        pytest.param(
            lambda: cp.Schedule.edm(True),
            InvalidValueError,
            id="at least 2 levels; got True",
        ),
        pytest.param(
            lambda: cp.Schedule.log_snr(12, min=3.0, max=-3.0),
            InvalidValueError,
            id="from clean to noisy",
        ),
        pytest.param(
            lambda: cp.Schedule.edm(5, sigma_min=2.0, sigma_max=1.0),
            InvalidValueError,
            id="sigma_min < sigma_max",
        ),
        pytest.param(
            lambda: cp.Schedule.edm(5, rho=0.0), InvalidValueError, id="rho > 0"
        ),
        pytest.param(
            lambda: cp.Schedule.vp(5, beta_min=-1.0),
            InvalidValueError,
            id="β must be positive",
        ),
        pytest.param(
            lambda: cp.Schedule.flow(5, shift=0.0),
            InvalidValueError,
            id="shift...must be positive; got 0.0",
        ),
        pytest.param(
            lambda: cp.Schedule.from_arrays([0.99, 0.01], [0.01, 0.02]),
            InvalidValueError,
            id="from 0.99 ...alphas_cumprod",
        ),
        pytest.param(
            lambda: cp.Schedule.from_arrays([1.0], [0.1, 0.2]),
            ShapeError,
            id="of one shape",
        ),
        pytest.param(lambda: cp.Schedule.from_arrays([], []), ShapeError, id="K ≥ 1"),
        pytest.param(
            lambda: cp.Schedule.from_arrays([1.0, 1.0], [0.0, 1.0]),
            InvalidValueError,
            id="finite and positive",
        ),
        pytest.param(
            lambda: cp.Schedule.from_arrays([1.0, np.nan], [0.1, 1.0]),
            InvalidValueError,
            id="finite and positive 2",
        ),
        pytest.param(
            lambda: cp.Schedule.from_arrays([1.0, 1.0], [1.0, 0.1]),
            InvalidValueError,
            id="from 0 at level 0 to 4.6",
        ),
        pytest.param(
            lambda: cp.Schedule.from_arrays([1.0, 1.0], [0.1, 0.1]),
            InvalidValueError,
            id="from clean to noisy 2",
        ),
        pytest.param(
            lambda: cp.Schedule.cosine(10).every(0),
            InvalidValueError,
            id="from 1 to 9; got 0",
        ),
        pytest.param(
            lambda: cp.Schedule.cosine(10).every(10),
            InvalidValueError,
            id="from 1 to 9; got 10",
        ),
        pytest.param(
            lambda: cp.Schedule.cosine(10).every(2.0), InvalidValueError, id="got 2.0"
        ),
        pytest.param(
            lambda: cp.Schedule.cosine(10).every(True), InvalidValueError, id="got True"
        ),
        pytest.param(
            lambda: cp.Schedule.cosine(10).at(10),
            LevelError,
            id="Level 10 does not exist...levels 0 .cleanest. to 9",
        ),
        pytest.param(lambda: cp.Schedule.cosine(10).at(-1), LevelError, id="Level -1"),
        pytest.param(
            lambda: cp.Schedule.cosine(10).at(1.0), LevelError, id="one integer"
        ),
        pytest.param(lambda: cp.Schedule.cosine(10).at([1]), LevelError, id="one int"),
    ],
)
def test_bad_arguments(make, error):
    refused(make, error)
