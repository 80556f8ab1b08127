"""Calibrations as files, and the zoo's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob import model_zoo
from composeprob.calibration import load_calibration, save_calibration
from composeprob.factors.calibrated import TABLES, Calibrated
from composeprob.models.making import calibrate_model
from refusals import refused
from sampling_cases import run, single

SCHEDULE = cp.Schedule.log_snr(8)
CALIBRATED = [
    name
    for name in cp.zoo()
    if (model_zoo.models_folder() / name / "calibration.safetensors").exists()
]


def log_bump(x, level):
    return 3.0 - 0.5 * jnp.sum(x**2)


BUMP = cp.Energy(log_bump, SCHEDULE, event_shape=(1,), label="bump")


@pytest.fixture(scope="module")
def calibrated():
    return cp.calibrate(BUMP, jax.random.key(0))


@pytest.fixture
def files(tmp_path, calibrated):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    calibration = tmp_path / "calibration.safetensors"
    save_calibration(calibrated, calibration, weights=weights)
    return weights, calibration


def test_round_trip(calibrated, files):
    weights, calibration = files
    again = load_calibration(BUMP, calibration, weights=weights)
    assert again.tables.keys() == calibrated.tables.keys() == set(TABLES)
    for name, table in calibrated.tables.items():
        np.testing.assert_array_equal(again.tables[name], table)
    exact = 3.0 + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(calibrated.log_normaliser, exact, atol=1e-5)


def test_a_model_without_an_energy_is_not_calibrated():
    refused(
        lambda: calibrate_model("ring2d-score"),
        cp.errors.CapabilityError,
    )


def test_stale_damaged_and_foreign_files(calibrated, files):
    weights, calibration = files
    misshapen = {name: np.zeros((2, 1)) for name in TABLES}
    save_calibration(Calibrated(BUMP, misshapen), calibration)
    refused(
        lambda: load_calibration(BUMP, calibration),
        cp.errors.LoadError,
    )
    refused(lambda: load_calibration(BUMP, weights), cp.errors.LoadError)
    weights.write_bytes(b"other weights")
    save_calibration(calibrated, calibration, weights=calibration)
    refused(
        lambda: load_calibration(BUMP, calibration, weights=weights),
        cp.errors.LoadError,
        fix="calibrate.py bump",
    )


@pytest.mark.parametrize("name", CALIBRATED)
def test_models_of_the_zoo_integrate_to_one(name):
    factor = cp.load(name)
    assert isinstance(factor, Calibrated)
    assert "normalised" in cp.zoo(name).capabilities
    assert factor.standard_error.max() < 5e-3  # edges as sharp as the noise of level 0
    level = 20  # with noise enough for a regular grid
    noise = factor.schedule.at(level)
    axis = jnp.linspace(-1, 1, 81) * (1.5 * noise.alpha + 5 * noise.sigma)
    points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)

    def log_density(x):
        log_f, _ = factor.evaluate(x, noise, factor.call_conditions())
        return log_f

    log_f = jax.jit(jax.vmap(log_density))(points)
    mass = jnp.sum(jnp.exp(log_f)) * (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(mass, 1.0, atol=5e-3)


def test_ring_and_bar_are_calibrated():
    assert {"ring2d", "bar2d"} <= set(CALIBRATED)
    cp.mixture([cp.load("bar2d"), cp.load("ring2d")], weights=[0.2, 0.8])


@pytest.mark.skipif(
    not {"bar2d-left", "bar2d-right"} <= set(CALIBRATED), reason="not calibrated"
)
@pytest.mark.slow
def test_learned_bars_mix_by_shares():
    names = ("bar2d-left", "bar2d-right")
    mixture = cp.mixture([cp.load(name) for name in names], weights=[0.2, 0.8])
    result = run(cp.compile(single, mixture), 0, 8000, sampler=None)
    centres = [model_zoo.reference(name).mean for name in names]
    shares = cp.metrics.mode_weights(result["x"], centres, result.log_weights)
    assert cp.metrics.total_variation(shares, [0.2, 0.8]) <= 0.02
