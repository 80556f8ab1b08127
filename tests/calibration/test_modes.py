"""The relative depth of modes: an energy with the right score whose modes stand at wrong heights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.factors.calibrated import CENTRES, KNOTS, LOG_NORMALISER, OFFSET, nearest
from composeprob.schedule import Noise
from zscores import LIMIT

SPEC = importlib.util.spec_from_file_location("known", Path(__file__).with_name("known.py"))
known = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(known)

KEY = jax.random.key(0)
SHARE = 0.3


def crooked(mean, deviation):
    """Two modes of which the first is up to e³ too high where they are apart; its score is exact all the same."""
    exact = cp.Analytic(known.two_modes(mean, deviation, SHARE), known.SCHEDULE)

    def energy(x, log_snr):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        marginal = exact.at(Noise(jnp.zeros((), int), alpha, sigma))
        too_high = 3.0 * jax.nn.sigmoid(2 * (log_snr - 4.0)) * (x @ jnp.asarray(mean) > 0)
        return -sigma * (marginal.log_prob(x) + 2.0 + too_high)

    return cp.Diffusion(
        energy,
        known.SCHEDULE,
        event_shape=exact.event_shape,
        parameterization="energy",
        time="log_snr",
        mode_depth=True,  # a false claim, by which density weights accept it
        label="crooked",
    )


def share_of_first(factor, centres, chains=4000):
    density = cp.compile(known.single, factor)
    sampler = cp.SMC(weights="density")
    result = cp.infer(density, jax.random.key(2), num_chains=chains, sampler=sampler, progress=False)
    return cp.metrics.mode_weights(result["x"], centres, result.log_weights)[0]


@pytest.fixture(scope="module")
def plane():
    centres = np.array([[0.5, 0.2], [-0.5, -0.2]])
    return crooked(centres[0], 0.1), centres


@pytest.fixture(scope="module")
def mended(plane):
    return cp.calibrate(plane[0], KEY, modes=plane[1])


def true_log_z(knots):
    too_high = 3.0 / (1 + np.exp(-2 * (knots - 4.0)))
    return 2.0 + np.log1p(SHARE * np.expm1(too_high))


def test_every_mode_gets_its_share(mended):
    log_z, offset = mended.fixed[LOG_NORMALISER], mended.fixed[OFFSET]
    clean = mended.fixed[KNOTS] > 4.5  # where cells hold one mode each, and only that
    assert np.abs(log_z - true_log_z(mended.fixed[KNOTS]))[clean].max() < 1e-3
    # What the calibrated density has in the cells: their own integrals, the first too high by e³ before.
    too_high = 3.0 / (1 + np.exp(-2 * (mended.fixed[KNOTS] - 4.0)))
    exact = np.stack([-2.0 - too_high, np.full_like(too_high, -2.0)], axis=1)
    share_error = np.sqrt((1 - SHARE) / SHARE / 10_000)
    assert np.abs(offset - exact)[clean].max() < LIMIT * share_error
    assert {"mode_depth", "normalised"} <= mended.capabilities
    assert "shares of 2 modes known" in repr(mended)


@pytest.mark.slow
def test_the_score_stays(plane, mended):
    for x in jax.random.normal(KEY, (4, 2)):
        noise = known.SCHEDULE.at(5)
        scores = [f.evaluate(x, noise, f.call_conditions())[1] for f in (plane[0], mended)]
        np.testing.assert_array_equal(*scores)


@pytest.mark.slow
def test_density_weights_need_the_depth(plane, mended):
    factor, centres = plane
    wrong = SHARE * np.exp(3) / (SHARE * np.exp(3) + 1 - SHARE)
    assert abs(share_of_first(factor, centres) - wrong) < 0.05  # the negative control
    assert abs(share_of_first(mended, centres) - SHARE) < 0.02


def test_the_nearest_centre_is_found_far_away():
    """Where noise is strong x/α is large, and ‖x − c‖² has no digits left for c."""
    centres = jnp.array([[0.3], [-0.3]])
    assert [int(nearest(jnp.array([x], jnp.float32), centres)) for x in (9e3, -9e3, 0.01, -0.01)] == [0, 1, 0, 1]


def test_a_centre_that_is_no_mode_is_refused(plane):
    factor, centres = plane
    with pytest.raises(cp.errors.InvalidValueError, match=r"Mode 2 at \[5\.0, 5\.0\] got 0 of 1000"):
        cp.calibrate(factor, KEY, modes=[*centres, [5.0, 5.0]], num_chains=100)


@pytest.mark.slow
def test_ten_dimensions():
    centres = np.stack([np.full(10, 0.3), np.full(10, -0.3)])
    found = cp.calibrate(crooked(centres[0], 0.2), KEY, modes=centres)
    knots = found.fixed[KNOTS]
    assert np.abs(found.fixed[LOG_NORMALISER] - true_log_z(knots))[knots > 4.5].max() < 0.1
    at = int(np.argmin(np.abs(knots - 9.0)))
    np.testing.assert_allclose(found.fixed[OFFSET][at], [-5.0, -2.0], atol=0.1)
    assert found.fixed[CENTRES].shape == (2, 10)
