"""Log-normalisers against closed forms, and mixtures with the shares of their weights.

The normaliser of an energy is known at every level: exact noised marginals times a
constant of the level. Factors that cannot be calibrated are rows of
tests/test_mistakes.py.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.calibration import driver, quadrature
from composeprob.density.points import log_densities
from composeprob.factors.calibrated import (
    KNOTS,
    LOG_NORMALISER,
    CalibratedExpression,
    interpolate,
)
from composeprob.schedule import Noise
from refusals import refused
from sampling_cases import learned, modes, run, single, slow
from zscores import LIMIT

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

KEY = jax.random.key(0)
SCHEDULE = cp.Schedule.log_snr(40, min=-8.0, max=10.0)
LOG_SNR = np.asarray(SCHEDULE.log_snr)


def log_constant(log_snr, nats):
    """log Z of `raw` at a log-SNR."""
    return nats * (1 + 0.1 * jnp.sin(log_snr))


def raw(distribution, nats, label="raw"):
    """exp(log_constant)·(the noised distribution), as a network's energy."""
    exact = cp.Analytic(distribution, SCHEDULE)

    def energy(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        marginal = exact.at(Noise(jnp.zeros((), int), alpha, sigma))
        return -sigma * (marginal.log_prob(x) + log_constant(log_snr, nats))

    return learned(
        energy,
        "energy",
        SCHEDULE,
        exact.event_shape,
        log_snr_range=(-12.0, 11.0),
        label=label,
    )


def gaussian(mean, deviation):
    return dist.Normal(jnp.asarray(mean), deviation).to_event(1)


curve = jax.jit(jax.vmap(interpolate, (None, None, 0)))
LEFT = [-0.6, 0.0]
RIGHT = [0.6, 0.0]
TWO_MODES = modes([0.3, 0.7], [[0.6, 0.1], [-0.6, -0.1]], 0.05)
LEFT_RAW = raw(gaussian(LEFT, 0.1), 5.0, "left")


@pytest.fixture(scope="module")
def pair():
    right_raw = raw(gaussian(RIGHT, 0.2), 0.0, "right")
    return cp.calibrate(LEFT_RAW, KEY), cp.calibrate(right_raw, KEY)


def normalised_leaves(factor, done):
    return driver._normalised_leaves(factor, done, KEY, 8, 1)


def shares(factor, sampler=None, schedule=None, chains=8000):
    density = cp.compile(single, factor, schedule=schedule)
    result = run(density, 1, chains, sampler=sampler)
    return cp.metrics.mode_weights(result["x"], [LEFT, RIGHT], result.log_weights)


@pytest.mark.parametrize(
    "distribution",
    [
        slow(gaussian([0.3], 0.02)),
        TWO_MODES,
        slow(dist.Uniform(jnp.full(2, -0.5), jnp.ones(2))),
    ],
    ids=["line", "two modes", "box"],
)
def test_quadrature_is_exact(distribution):
    factor = raw(distribution, 5.0)
    calibrated = cp.calibrate(factor, KEY)
    exact = log_constant(LOG_SNR, 5.0)
    np.testing.assert_allclose(calibrated.log_normaliser, exact, atol=2e-4)
    assert calibrated.standard_error.max() < 1e-4
    knots = jnp.asarray(calibrated.fixed[KNOTS])
    values = jnp.asarray(calibrated.fixed[LOG_NORMALISER])
    # They cover the range in which the network was trained.
    assert (float(knots[0]), float(knots[-1])) == (-12.0, 11.0)
    between = jnp.linspace(-12.0, 11.0, 301)
    exact = log_constant(between, 5.0)
    np.testing.assert_allclose(curve(knots, values, between), exact, atol=5e-3)


def test_places_that_the_diffusion_never_visits_do_not_count():
    """A network may give any value where it was never trained."""
    good = raw(gaussian([0.3, 0.0], 0.1), 2.0)

    def energy(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        # A bump far from the data, at high log-SNR only.
        bump = 4.0 - 20 * jnp.sum((x / alpha - 3.0) ** 2)
        spurious = bump - 50 * jax.nn.sigmoid(-5 * (log_snr - 4.0))
        return -sigma * jnp.logaddexp(-good.network(x, log_snr) / sigma, spurious)

    calibrated = cp.calibrate(learned(energy, "energy", SCHEDULE), KEY)
    exact = log_constant(LOG_SNR, 2.0)
    np.testing.assert_allclose(calibrated.log_normaliser, exact, atol=1e-3)


def test_interpolation_is_exact_on_parabolas_and_straight_outside():
    def parabola(x):
        return 2 + 3 * x - 0.5 * x**2

    def line(x):
        return 1 - 2 * x

    knots = jnp.array([-3.0, -1.0, 0.0, 2.5, 4.0])
    inside = jnp.array([-0.7, 0.4, 2.2])  # intervals whose slopes come from three knots
    interpolated = curve(knots, parabola(knots), inside)
    np.testing.assert_allclose(interpolated, parabola(inside), rtol=1e-5)
    outside = jnp.array([-9.0, -3.0, 4.0, 30.0])
    extrapolated = curve(knots, line(knots), outside)
    np.testing.assert_allclose(extrapolated, line(outside), rtol=1e-5)


@pytest.mark.slow
def test_ten_dimensions():
    factor = raw(gaussian(np.linspace(-0.6, 0.6, 10), 0.3), 5.0)
    calibrated = cp.calibrate(factor, KEY, num_chains=500)
    error = calibrated.log_normaliser - np.asarray(log_constant(LOG_SNR, 5.0))
    assert np.abs(error).max() <= 0.1
    # The standard error is of eight repeats: Student's t with 7 degrees of freedom has
    # heavier tails than z.
    assert abs(error[0]) <= 2 * LIMIT * calibrated.standard_error[0]


def test_mixture_has_the_shares_asked_for(pair):
    mixture = cp.mixture(list(pair), weights=[0.2, 0.8])
    capabilities = cp.compile(single, mixture).capabilities
    assert {"normalised", "exact_marginals", "feynman_kac"} <= capabilities
    assert cp.metrics.total_variation(shares(mixture), [0.2, 0.8]) <= 0.02


@pytest.mark.slow
def test_without_calibration_the_shares_are_wrong(pair):
    factors = [factor.uncalibrated for factor in pair]
    uncalibrated = cp.mixture(factors, log_weights=np.log([0.2, 0.8]))
    sampler = cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=FIRST_ORDER)
    sampled = shares(uncalibrated, sampler, chains=500)
    assert cp.metrics.total_variation(sampled, [0.2, 0.8]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["own", "other"])
def test_calibrated_densities_integrate_to_one(levels):
    """A regular grid, at the calibration's levels and at variance-exploding ones."""
    wide = raw(gaussian([0.2, 0.0], 0.5), 1.0, "wide")
    schedule = None if levels == "own" else cp.Schedule.edm(15, 0.02, 20.0)
    for raw_factor in (LEFT_RAW, LEFT_RAW * wide**1.7):
        factor = cp.calibrate(raw_factor, KEY)
        density = cp.compile(single, factor, schedule=schedule)
        for level in range(0, density.num_levels, 7):
            noise = density.schedule.at(level)
            width = jnp.sqrt(0.01 * noise.alpha**2 + noise.sigma**2)
            axis = jnp.linspace(-7, 7, 141)
            grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
            points = grid * width + noise.alpha * jnp.array(LEFT)
            values = log_densities(density, {"x": points}, level)
            cell = (width * (axis[1] - axis[0])) ** 2
            mass = jnp.sum(jnp.exp(values)) * cell
            np.testing.assert_allclose(mass, 1.0, atol=5e-3)


@pytest.mark.slow
def test_a_calibrated_power_in_a_product_is_the_raw_one():
    """Normalisers change a product by a constant only."""
    other = raw(gaussian([0.2, 0.1], 0.5), 1.0, "other")
    x = jax.random.normal(KEY, (5, 2))
    product = cp.calibrate(LEFT_RAW * other, KEY)
    uncalibrated = cp.compile(single, (LEFT_RAW * other) ** 1.5)
    calibrated = cp.compile(single, product**1.5)
    assert "normalised" not in calibrated.capabilities
    for level in (0, 20, 39):
        log_raw = log_densities(uncalibrated, {"x": x}, level)
        log_calibrated = log_densities(calibrated, {"x": x}, level)
        difference = log_raw - log_calibrated
        np.testing.assert_allclose(difference, difference[0], rtol=2e-4)


def test_calibrated_siblings_share_their_network():
    def energy(x, log_snr, centre):
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        variance = 0.04 * alpha**2 + sigma**2
        return 0.5 * sigma * jnp.sum((x - alpha * centre) ** 2) / variance

    network = learned(energy, "energy", SCHEDULE, (1,), conditions=("centre",))
    factors = [cp.calibrate(network.given(centre=c), KEY) for c in (-0.5, 0.5)]
    text = str(cp.compile(single, cp.mixture(factors, weights=[0.5, 0.5])))
    assert re.search("share: 2 .* 1 ", text)
    assert "centre=-0.5" in text
    error = refused(lambda: cp.calibrate(network, KEY), cp.errors.ConditionError)
    assert "given(centre=" in error.fix
    refused(lambda: factors[0].given(centre=1.0), cp.errors.ConditionError)


def test_calibrating_again_changes_nothing(pair):
    again = cp.calibrate(pair[0], KEY)
    np.testing.assert_array_equal(again.log_normaliser, pair[0].log_normaliser)
    assert type(again.uncalibrated) is type(LEFT_RAW)
    assert "log Z" in repr(again)
    assert "±" in repr(again)


def test_parts_with_other_constants_would_be_another_factor():
    """Operands of raw multipliers, or of a calibrated expression, stay as they are.

    Others are calibrated, once each.
    """
    mixed = cp.mixture([LEFT_RAW, LEFT_RAW], log_weights=[0.0, 1.0])
    whole = CalibratedExpression(LEFT_RAW * LEFT_RAW, SCHEDULE, {}, 4.0, (2,))
    stored = cp.Analytic(gaussian(LEFT, 0.1), SCHEDULE)
    done = [(LEFT_RAW, stored)]
    assert normalised_leaves(mixed, done) is mixed
    assert normalised_leaves(whole, done) is whole
    assert normalised_leaves(LEFT_RAW * LEFT_RAW, done).children == (stored, stored)


def test_a_border_where_nothing_lies_ends_the_region():
    # Flat, nothing beyond 3, hardly anything below −8: one neighbour, 4, is missing.
    def log_f(grid):
        cells = grid.cells[:, 0]
        return np.where(cells > 3, -np.inf, np.where(cells < -8, -100.0, 0.0))

    start = quadrature.Grid(np.arange(-4, 4)[:, None], 0.1)
    grown, values = quadrature._spread(log_f, start, 0)
    assert {-8, 4} <= set(grown.cells[:, 0].tolist())
    assert np.sum(np.exp(values)) == pytest.approx(12)
