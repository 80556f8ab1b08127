"""Log-normalisers against closed forms, and mixtures whose shares mean what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from calibration import known
from composeprob.calibration import quadrature
from composeprob.factors.calibrated import KNOTS, LOG_NORMALISER, interpolate
from refusals import refused
from sampling_cases import learned, run, single, slow
from zscores import LIMIT

KEY = jax.random.key(0)
LEFT, RIGHT, TWO_MODES = [-0.6, 0.0], [0.6, 0.0], known.two_modes([0.6, 0.1], 0.05, 0.3)
LOG_SNR = np.asarray(known.SCHEDULE.log_snr)


@pytest.fixture(scope="module")
def left():
    return known.raw(known.normal(LEFT, 0.1), 5.0, "left")


@pytest.fixture(scope="module")
def right():
    return known.raw(known.normal(RIGHT, 0.2), 0.0, "right")


@pytest.fixture(scope="module")
def pair(left, right):
    return cp.calibrate(left, KEY), cp.calibrate(right, KEY)


def shares(factor, sampler=None, schedule=None, chains=8000):
    density = cp.compile(single, factor, schedule=schedule)
    result = run(density, 1, chains, sampler=sampler)
    return cp.metrics.mode_weights(result["x"], [LEFT, RIGHT], result.log_weights)


@pytest.mark.parametrize(
    "distribution",
    [slow(known.normal([0.3], 0.02)), TWO_MODES, slow(dist.Uniform(jnp.full(2, -0.5), jnp.ones(2)))],
    ids=["line", "two modes", "box"],
)
def test_quadrature_is_exact(distribution):
    factor = known.raw(distribution, 5.0)
    found = cp.calibrate(factor, KEY)
    np.testing.assert_allclose(found.log_normaliser, known.log_constant(LOG_SNR, 5.0), atol=2e-4)
    assert found.standard_error.max() < 1e-4
    knots, values = (jnp.asarray(found.fixed[name]) for name in (KNOTS, LOG_NORMALISER))
    assert (float(knots[0]), float(knots[-1])) == (-12.0, 11.0)  # as far as the network was trained
    between = jnp.linspace(-12.0, 11.0, 301)
    curve = jax.jit(jax.vmap(interpolate, (None, None, 0)))(knots, values, between)
    np.testing.assert_allclose(curve, known.log_constant(between, 5.0), atol=5e-3)


def test_places_that_the_diffusion_never_visits_do_not_count():
    """A network may give any value where it was never trained."""
    good = known.raw(known.normal([0.3, 0.0], 0.1), 2.0)

    def energy(x, log_snr):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        spurious = 4.0 - 20 * jnp.sum((x / alpha - 3.0) ** 2) - 50 * jax.nn.sigmoid(-5 * (log_snr - 4.0))
        return -sigma * jnp.logaddexp(-good.network(x, log_snr) / sigma, spurious)

    found = cp.calibrate(learned(energy, "energy", known.SCHEDULE), KEY)
    np.testing.assert_allclose(found.log_normaliser, known.log_constant(LOG_SNR, 2.0), atol=1e-3)


def test_interpolation_is_exact_on_parabolas_and_straight_outside():
    knots = jnp.array([-3.0, -1.0, 0.0, 2.5, 4.0])
    parabola = lambda x: 2 + 3 * x - 0.5 * x**2
    at = jnp.array([-0.7, 0.4, 2.2])  # intervals whose slopes come from three knots
    found = jax.vmap(interpolate, (None, None, 0))(knots, parabola(knots), at)
    np.testing.assert_allclose(found, parabola(at), rtol=1e-5)
    line = lambda x: 1 - 2 * x
    for x in (-9.0, -3.0, 4.0, 30.0):
        np.testing.assert_allclose(interpolate(knots, line(knots), jnp.asarray(x)), line(x), rtol=1e-5)


@pytest.mark.slow
def test_ten_dimensions():
    found = cp.calibrate(known.raw(known.normal(np.linspace(-0.6, 0.6, 10), 0.3), 5.0), KEY, num_chains=500)
    error = found.log_normaliser - np.asarray(known.log_constant(LOG_SNR, 5.0))
    assert np.abs(error).max() <= 0.1
    # eight repeats tell their own error: Student's t with 7 degrees of freedom has heavier tails than z
    assert abs(error[0]) <= 2 * LIMIT * found.standard_error[0]


def test_mixture_has_the_shares_asked_for(pair):
    mixture = cp.mixture(list(pair), weights=[0.2, 0.8])
    assert {"normalised", "exact_marginals", "feynman_kac"} <= cp.compile(single, mixture).capabilities
    assert cp.metrics.total_variation(shares(mixture), [0.2, 0.8]) <= 0.02


@pytest.mark.slow
def test_without_calibration_the_shares_are_wrong(left, right):
    raw = cp.mixture([left, right], log_weights=np.log([0.2, 0.8]))
    sampler = cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=True)
    assert cp.metrics.total_variation(shares(raw, sampler, chains=500), [0.2, 0.8]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["own", "other"])
def test_calibrated_densities_integrate_to_one(left, levels):
    """By a plain grid, on the calibration's own levels and on variance-exploding ones between them."""
    wide = known.raw(known.normal([0.2, 0.0], 0.5), 1.0, "wide")
    schedule = None if levels == "own" else cp.Schedule.edm(15, 0.02, 20.0)
    for factor in (cp.calibrate(left, KEY), cp.calibrate(left * wide**1.7, KEY)):
        density = cp.compile(single, factor, schedule=schedule)
        for level in range(0, density.num_levels, 7):
            noise = density.schedule.at(level)
            width = jnp.sqrt(0.01 * noise.alpha**2 + noise.sigma**2)
            axis = jnp.linspace(-7, 7, 141)
            points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2) * width + noise.alpha * jnp.array(LEFT)
            values = jax.vmap(lambda x, k: density.log_density({"x": x}, k), (0, None))(points, level)
            mass = jnp.sum(jnp.exp(values)) * (width * (axis[1] - axis[0])) ** 2
            np.testing.assert_allclose(mass, 1.0, atol=5e-3)


@pytest.mark.slow
def test_a_calibrated_power_in_a_product_is_the_raw_one(left):
    """Normalisers change a product by a constant only."""
    other = known.raw(known.normal([0.2, 0.1], 0.5), 1.0, "other")
    x = jax.random.normal(KEY, (5, 2))
    product = cp.calibrate(left * other, KEY)
    raw, normal = (cp.compile(single, f) for f in ((left * other) ** 1.5, product**1.5))
    assert "normalised" not in normal.capabilities
    for level in (0, 20, 39):
        values = [jax.vmap(lambda x, d=d: d.log_density({"x": x}, level))(x) for d in (raw, normal)]
        np.testing.assert_allclose(values[0] - values[1], values[0][0] - values[1][0], rtol=2e-4)


def test_calibrated_siblings_share_their_network():
    def energy(x, log_snr, centre):
        sigma, alpha = jnp.sqrt(jax.nn.sigmoid(-log_snr)), jnp.sqrt(jax.nn.sigmoid(log_snr))
        return 0.5 * sigma * jnp.sum((x - alpha * centre) ** 2) / (0.04 * alpha**2 + sigma**2)

    network = learned(energy, "energy", known.SCHEDULE, (1,), conditions=("centre",))
    parts = [cp.calibrate(network.given(centre=c), KEY) for c in (-0.5, 0.5)]
    text = str(cp.compile(single, cp.mixture(parts, weights=[0.5, 0.5])))
    assert "2 evaluations in 1 batches" in text
    assert "centre=-0.5" in text
    words = r"leaves 'centre' open.*given\(centre=…\)"
    refused(lambda: cp.calibrate(network, KEY), cp.errors.ConditionError, words)
    refused(lambda: parts[0].given(centre=1.0), cp.errors.ConditionError, "given twice")


def test_calibrating_again_changes_nothing(left, pair):
    again = cp.calibrate(pair[0], KEY)
    np.testing.assert_array_equal(again.log_normaliser, pair[0].log_normaliser)
    assert type(again.uncalibrated) is type(left)
    assert "log Z" in repr(again)
    assert "±" in repr(again)


SHAPED = {"schedule": known.SCHEDULE, "event_shape": (2,)}
LEFT_ALONE = known.raw(known.normal(LEFT, 0.1), 5.0, "left")


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda: cp.Diffusion(lambda x, t: -x, **SHAPED, parameterization="score", label="cat"),
            cp.errors.CapabilityError, "'cat' offers only its score",
        ),
        (
            lambda: cp.Energy(lambda x, k: jnp.where(x[0] > 0, jnp.nan, -x @ x / 2), **SHAPED),
            cp.errors.InvalidValueError, "not finite at level 39",
        ),
        (lambda: cp.Energy(lambda x, k: 0.5 * x @ x, **SHAPED), cp.errors.ImproperError, "rises without bound"),
        (lambda: cp.Classifier(lambda x, t: x, **SHAPED).given(label=0), cp.errors.ImproperError, "improper"),
        (lambda: cp.Classifier(lambda x, t: x, known.SCHEDULE), cp.errors.ShapeError, "has no event shape"),
        (lambda: "ring", cp.errors.WrongTypeError, "takes a factor"),
        (
            lambda: cp.mixture([LEFT_ALONE * LEFT_ALONE, LEFT_ALONE], log_weights=[0.0, 0.0]),
            cp.errors.CapabilityError, "products of different numbers",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(make, error, said):
    refused(lambda: cp.calibrate(make(), KEY), error, said)


def test_bad_arguments(left):
    refused(lambda: cp.calibrate(left, 0), cp.errors.WrongTypeError, "typed random key")
    refused(lambda: cp.calibrate(left, KEY, repeats=1), cp.errors.InvalidValueError, "repeats")
    words = r"cp\.calibrate\(factor, key\)"
    refused(lambda: cp.mixture([left, left], weights=[0.5, 0.5]), cp.errors.CapabilityError, words)


def test_a_border_where_nothing_lies_ends_the_region():
    def log_f(cells, step):  # flat, nothing beyond 3, hardly anything below −8; so one neighbour is missing, at 4
        return np.where(cells[:, 0] > 3, -np.inf, np.where(cells[:, 0] < -8, -100.0, 0.0))

    grown, values = quadrature._spread(log_f, np.arange(-4, 4)[:, None], 0.1, 0)
    assert {-8, 4} <= set(grown[:, 0].tolist())
    assert np.sum(np.exp(values)) == pytest.approx(12)
