"""Noised marginals against quadrature of the convolution, and against exact draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.errors import InvalidValueError, ShapeError, WrongTypeError
from composeprob.factors.one_dimension import log_normal_mass
from refusals import refused
from sampling_cases import modes, single

pytestmark = pytest.mark.usefixtures("double_precision")

SCHEDULES = {"VP": cp.Schedule.log_snr(9, min=-6.0, max=6.0), "VE": cp.Schedule.edm(9, sigma_min=0.05, sigma_max=10.0)}
SCHEDULE = SCHEDULES["VP"]


def mixing():
    return dist.Categorical(probs=jnp.array([0.3, 0.7]))


UNIVARIATE = {
    "normal": (lambda: dist.Normal(0.3, 0.4), lambda u: stats.norm.pdf(u, 0.3, 0.4), (-4, 4)),
    "uniform": (lambda: dist.Uniform(-0.5, 1.0), lambda u: stats.uniform.pdf(u, -0.5, 1.5), (-0.5, 1.0)),
    "mixture": (
        lambda: modes([0.3, 0.7], [-1.0, 1.0], [0.2, 0.5]),
        lambda u: 0.3 * stats.norm.pdf(u, -1.0, 0.2) + 0.7 * stats.norm.pdf(u, 1.0, 0.5),
        (-5, 5),
    ),
    "mixture of boxes": (
        lambda: dist.MixtureGeneral(
            mixing(), [dist.Uniform(-1.0, -0.8), dist.Uniform(0.5, 0.9)], support=dist.constraints.real
        ),
        lambda u: 0.3 * stats.uniform.pdf(u, -1.0, 0.2) + 0.7 * stats.uniform.pdf(u, 0.5, 0.4),
        (-1.0, 0.9),
    ),
    "general mixture": (
        lambda: dist.MixtureGeneral(mixing(), [dist.Normal(0.0, 0.2), dist.Normal(1.0, 0.6)]),
        lambda u: 0.3 * stats.norm.pdf(u, 0.0, 0.2) + 0.7 * stats.norm.pdf(u, 1.0, 0.6),
        (-4, 5),
    ),
}


legendre = functools.cache(np.polynomial.legendre.leggauss)


def nodes_between(breaks):
    """Nodes and weights of 200-point Gauss–Legendre quadrature on each piece."""
    z, w = legendre(200)
    pieces = [((a + b) / 2 + (b - a) / 2 * z, (b - a) / 2 * w) for a, b in itertools.pairwise(breaks)]
    return tuple(np.concatenate(p) for p in zip(*pieces, strict=True))


@pytest.mark.parametrize("kind", ["VP", pytest.param("VE", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", UNIVARIATE)
def test_univariate_marginals_are_convolutions(name, kind):
    make, pdf, (low, high) = UNIVARIATE[name]
    schedule = SCHEDULES[kind]
    value_and_score = jax.jit(cp.compile(single, cp.Analytic(make(), schedule)).value_and_score)
    for level in (0, 4, 8):
        alpha, sigma = float(schedule.alpha[level]), float(schedule.sigma[level])
        for x in (-0.7 * alpha, 0.2, 1.1 * alpha):
            breaks = sorted({low, high} | {p for p in (x / alpha, -1.0, -0.8, 0.5, 0.9) if low < p < high})
            u, weights = nodes_between(breaks)
            joint = weights * pdf(u) * stats.norm.pdf(x, alpha * u, sigma)
            value, score = value_and_score({"x": x}, level)
            np.testing.assert_allclose(value, np.log(np.sum(joint)), rtol=1e-7, atol=1e-7)
            slope = np.sum(joint * (alpha * u - x)) / sigma**2 / np.sum(joint)
            np.testing.assert_allclose(score["x"], slope, rtol=1e-5, atol=1e-6)


COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
POINTS = np.array([[0.0, 0.0], [1.0, -1.0], [0.4, 2.0]])


def bivariate():
    """name → (the law, its components as (weight, mean, covariance))."""
    mvn = [dist.MultivariateNormal(jnp.array(m), jnp.array(COVARIANCE)) for m in ([0.0, 1.0], [-1.0, 0.0])]
    batch = dist.MultivariateNormal(jnp.array([[0.0, 1.0], [-1.0, 0.0]]), jnp.array(COVARIANCE))
    two = [(0.3, [0.0, 1.0], COVARIANCE), (0.7, [-1.0, 0.0], COVARIANCE)]
    return {
        "mvn": (mvn[0], [(1.0, [0.0, 1.0], COVARIANCE)]),
        "batched normal": (dist.Normal(jnp.array([0.2, -0.3]), 0.5), [(1.0, [0.2, -0.3], 0.25 * np.eye(2))]),
        "expanded": (dist.Normal(0.2, 0.5).expand([2]).to_event(1), [(1.0, [0.2, 0.2], 0.25 * np.eye(2))]),
        "mixture of mvn": (dist.MixtureSameFamily(mixing(), batch), two),
        "general mixture of mvn": (dist.MixtureGeneral(mixing(), mvn), two),
        "delta": (dist.Delta(jnp.array([0.5, 1.0])), [(1.0, [0.5, 1.0], np.zeros((2, 2)))]),
        "points": (POINTS, [(1 / 3, p, np.zeros((2, 2))) for p in POINTS]),
    }


def gaussian_pdf(components, x):
    return sum(w * stats.multivariate_normal.pdf(x, m, c) for w, m, c in components)


@pytest.mark.parametrize("name", bivariate())
def test_bivariate_marginals(name):
    law, components = bivariate()[name]
    f = cp.Analytic(law, SCHEDULE)
    value_and_score = jax.jit(cp.compile(single, f).value_and_score)
    assert f.event_shape == (2,)
    for level in (0, 4, 8):
        alpha, sigma = float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])
        noised = [(w, alpha * np.asarray(m), alpha**2 * np.asarray(c) + sigma**2 * np.eye(2)) for w, m, c in components]
        x = alpha * np.array([0.3, 0.6])
        value, score = value_and_score({"x": x}, level)
        np.testing.assert_allclose(value, np.log(gaussian_pdf(noised, x)), rtol=1e-8)
        h = 1e-5 * sigma
        slope = [np.log(gaussian_pdf(noised, x + h * e) / gaussian_pdf(noised, x - h * e)) / (2 * h) for e in np.eye(2)]
        np.testing.assert_allclose(score["x"], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["uniform", "mixture", "points", "mixture of mvn"])
def test_draws_have_the_moments_of_noised_data(name):
    """`at(noise)` draws α·X + σ·ε: its mean and variance are α·E X and α²·Var X + σ²."""
    law = UNIVARIATE[name][0]() if name in UNIVARIATE else bivariate()[name][0]
    clean = dist.MixtureSameFamily(  # the empirical law has no sampler of its own: its moments are the points'
        dist.Categorical(probs=jnp.ones(3) / 3), dist.Delta(jnp.asarray(POINTS), event_dim=1)
    ) if name == "points" else law  # fmt: skip
    n = 40_000
    for level in (1, 7):
        noise = SCHEDULE.at(level)
        draws = cp.Analytic(law, SCHEDULE).at(noise).sample(jax.random.key(level), (n,))
        variance = noise.alpha**2 * clean.variance + noise.sigma**2
        z = (jnp.mean(draws, 0) - noise.alpha * clean.mean) / jnp.sqrt(variance / n)
        assert jnp.all(jnp.abs(z) < 4.5)
        fourth = jnp.mean((draws - jnp.mean(draws, 0)) ** 4, 0)
        z = (jnp.var(draws, 0) - variance) / jnp.sqrt((fourth - variance**2) / n)
        assert jnp.all(jnp.abs(z) < 4.5)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_boxes_keep_their_digits(x64):
    """log[Φ(b) − Φ(a)] and its gradient for narrow intervals and far tails, where differences would lose them."""
    with jax.enable_x64(x64):
        digits = 1e-9 if x64 else 3e-5
        grad = jax.jit(jax.value_and_grad(lambda m, w: log_normal_mass(m - w / 2, m + w / 2, w)))
        for middle in (0.0, 0.7, -3.0, 12.0, -60.0, 300.0):
            for width in (1e-6, 1e-3, 0.05, 0.9, 1.1, 4.0, 40.0):
                value, slope = grad(jnp.asarray(middle, float), jnp.asarray(width, float))
                mass, mean = tilted(middle, width)
                np.testing.assert_allclose(value, mass, rtol=digits, atol=digits)
                # d/dm log mass = −E[z] under the truncated normal, here to the size of z
                np.testing.assert_allclose(slope, -mean, rtol=digits, atol=digits * max(1.0, abs(middle)))


def tilted(middle, width):
    """log ∫ φ and E[z] over an interval, by quadrature about its most probable point."""
    low, high = middle - width / 2, middle + width / 2
    top = min(max(0.0, low), high)
    reach = 40.0 / max(1.0, abs(top))
    a, b = max(low, top - reach), min(high, top + reach)
    nodes, weights = legendre(200)
    z, weights = 0.5 * (a + b) + 0.5 * (b - a) * nodes, 0.5 * (b - a) * weights
    density = np.exp(0.5 * (top - z) * (top + z))
    mass = weights @ density
    return np.log(mass) - 0.5 * top**2 - 0.5 * np.log(2 * np.pi), (weights * density) @ z / mass


def test_a_box_far_away_or_much_noised_has_a_finite_score():
    with jax.enable_x64(False):
        f = cp.Analytic(dist.Uniform(jnp.zeros(2), jnp.array([1e-3, 2.0])), cp.Schedule.log_snr(9, min=-20, max=11.0))
        value_and_score = jax.jit(cp.compile(single, f).value_and_score)
        for level in range(9):
            for x in (jnp.array([0.0, 1.0]), jnp.array([3.0, -5.0]), jnp.array([-30.0, 40.0])):
                value, score = value_and_score({"x": x}, level)
                assert jnp.isfinite(value)
                assert jnp.all(jnp.isfinite(score["x"]))


@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
def test_points_are_events_of_any_shape(shape):
    assert cp.Analytic(np.zeros((5, *shape)), SCHEDULE).event_shape == shape


def test_bad_arguments():
    laplace, words = dist.Laplace(1.0, 1.0), "A noised Laplace has no closed form here.*use Normal"
    refused(lambda: cp.Analytic(laplace, SCHEDULE), WrongTypeError, words)
    refused(lambda: cp.Analytic(dist.Normal(), 0.5), WrongTypeError, r"schedule must be a cp\.Schedule; got float")
    refused(lambda: cp.Analytic("a", SCHEDULE), WrongTypeError, "NumPyro distribution or an array of points; got str")
    refused(lambda: cp.Analytic(np.zeros((0, 2)), SCHEDULE), ShapeError, r"points of shape \(n, \*event\)")
    for broken in (dist.Normal(jnp.nan, 1.0, validate_args=False), np.array([[0.0, np.nan]])):
        refused(lambda: cp.Analytic(broken, SCHEDULE), InvalidValueError, "holds NaN")
