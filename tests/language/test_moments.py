"""Observations annealed by the first two moments of x₀ given x_k: closed forms,
refusals, and whole posteriors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import CapabilityError
from messages import check_wording
from refusals import refused
from sampling_cases import run, single

SCHEDULE = cp.Schedule.log_snr(40)
SPREAD = np.array([[1.0, 0.4, 0.0], [0.4, 0.5, -0.2], [0.0, -0.2, 0.8]])
A = np.array([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]])
Y = np.array([0.7, -1.1])
X = np.array([0.3, -0.6, 1.1])


def gaussian(spread, schedule=SCHEDULE, mean=0.0):
    """N(mean, spread) by its score alone."""
    widths, basis = np.linalg.eigh(spread)

    def score(x, level):
        noise = schedule.at(level)
        rotated = basis.T @ (x - noise.alpha * mean)
        return -basis @ (rotated / (noise.alpha**2 * widths + noise.sigma**2))

    return cp.Diffusion(
        score, schedule, event_shape=(len(spread),), parameterization="score"
    )


PRIOR = gaussian(SPREAD)


@cp.program
def linear(f, y, noise, anneal=None, a=A, g=None, b=None):
    mean = a @ cp.sample("x", f)
    if g is not None:
        mean = mean + b @ cp.sample("w", g)
    if np.ndim(noise):
        law = dist.MultivariateNormal(mean, noise)
    else:
        law = dist.Normal(mean, noise).to_event(1)
    cp.observe("y", law, y, anneal=anneal)


def log_likelihood(density, level, position):
    return density.evaluate(position, level).terms.log_potential


def log_normal(residual, covariance):
    centred = dist.MultivariateNormal(np.zeros(len(residual)), covariance)
    return centred.log_prob(residual)


def moments(spread, x, level, schedule=SCHEDULE):
    """E and Cov of the x₀/α₀ of level 0 given x_k under N(0, spread), by conditioning
    of a joint Gaussian."""
    variance = np.asarray((schedule.sigma / schedule.alpha) ** 2, np.float64)
    y = x / float(schedule.alpha[level])
    first = spread + variance[0] * np.eye(len(spread))
    gain = first @ np.linalg.inv(spread + variance[level] * np.eye(len(spread)))
    return gain @ y, trusted(first - gain @ first, level, schedule)


def trusted(covariance, level, schedule=SCHEDULE):
    """The covariance as the library takes it: mixed with that of data of unit variance
    by the trust in a Jacobian."""
    variance = np.asarray((schedule.sigma / schedule.alpha) ** 2, np.float64)
    s = variance[level]
    first = variance[0]
    trust = (1 - tuning.MOMENTS.least) / (1 + (tuning.MOMENTS.error * (1 + s)) ** 2)
    unit = (s - first) * (1 + first) / (1 + s)
    return trust * covariance + (1 - trust) * unit * np.eye(len(covariance))


SUMMED = {"g": gaussian(np.array([[0.7]])), "b": np.array([[1.5], [-0.5]])}
CORRELATED = np.array([[0.2, 0.1], [0.1, 0.3]])


@pytest.mark.parametrize(
    ("level", "noise", "summed"),
    [
        *[(level, 0.3, {}) for level in (0, 1, 5, 17, 30, 39)],
        (12, CORRELATED, {}),
        (9, 0.3, SUMMED),
    ],
)
def test_it_is_the_density_of_the_value_under_a_gaussian_prior(level, noise, summed):
    """Noise may be correlated; covariances of sites that are summed add up, y = A·x +
    B·w + noise."""
    mean, covariance = moments(SPREAD, X, level)
    residual = Y - A @ mean
    of_noise = noise if np.ndim(noise) else noise**2 * np.eye(2)
    whole = of_noise + A @ covariance @ A.T
    position = {"x": X}
    if summed:
        position["w"] = np.array([0.4])
        mean, covariance = moments(np.array([[0.7]]), position["w"], level)
        residual = residual - summed["b"] @ mean
        whole = whole + summed["b"] @ covariance @ summed["b"].T
    density = cp.compile(linear, PRIOR, Y, noise, **summed)
    value = log_likelihood(density, level, position)
    np.testing.assert_allclose(value, log_normal(residual, whole), rtol=2e-4)


def bent(x, level):
    """The score of a mixture of two Gaussians, whose covariance given x_k depends on
    x_k."""
    noise = SCHEDULE.at(level)
    centres = noise.alpha * jnp.array([[1.0, 0.5, 0.0], [-1.0, 0.0, 0.3]])
    variance = 0.1 * noise.alpha**2 + noise.sigma**2

    def log_density(x):
        return jax.nn.logsumexp(-0.5 * jnp.sum((x - centres) ** 2, 1) / variance)

    return jax.grad(log_density)(x)


BENT = cp.Diffusion(bent, SCHEDULE, event_shape=(3,), parameterization="score")


def test_its_score_treats_the_covariance_as_constant():
    """∇ = (∂m/∂x)ᵀ·Aᵀ·(Σ + A·V·Aᵀ)⁻¹·(y − A·m)."""
    density = cp.compile(linear, BENT, Y, 0.3)
    prior = cp.compile(single, BENT)
    x = jnp.asarray(X)
    for level in (0, 8, 20):
        noise = SCHEDULE.at(level)
        left = noise.variance - SCHEDULE.at(0).variance

        def mean(x, noise=noise, left=left, level=level):
            return x / noise.alpha + left * noise.alpha * bent(x, level)

        slope = np.asarray(jax.jacobian(mean)(x))
        of_x = trusted(np.asarray(left * noise.alpha) * slope, level)
        covariance = 0.09 * np.eye(2) + A @ of_x @ A.T
        solved = np.linalg.solve(covariance, Y - A @ np.asarray(mean(x)))
        expected = slope.T @ A.T @ solved
        score = density.score({"x": X}, level)["x"] - prior.score({"x": X}, level)["x"]
        np.testing.assert_allclose(score, expected, rtol=2e-3, atol=1e-4)


def test_latents_get_the_whole_gradient():
    """∂ log p/∂z of a noise and a matrix that depend on z, by differences."""

    @cp.program
    def scaled(f):
        z = cp.sample("z", dist.Normal(0.0, 1.0))
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal((1 + z) * (A @ x), jnp.exp(0.3 * z)).to_event(1), Y)

    density = cp.compile(scaled, BENT)

    def log_joint(z):
        value = log_likelihood(density, 3, {"x": X, "z": jnp.asarray(z)})
        return value + dist.Normal().log_prob(z)

    score = density.score({"x": X, "z": jnp.asarray(0.2)}, 3)["z"]
    difference = (log_joint(0.21) - log_joint(0.19)) / 0.02
    np.testing.assert_allclose(score, difference, rtol=5e-3)


def test_many_measurements_are_seen_in_a_krylov_space():
    """A matrix of rank 5 has a Krylov space of 6 dimensions, which leaves out only a
    determinant that is constant at a level."""
    rng = np.random.default_rng(5)
    spread = np.diag(np.linspace(0.5, 2.0, 6))  # all directions are different
    matrix = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 6)) / 3
    assert len(matrix) > tuning.MOMENTS.directions
    x = np.linspace(-1.0, 1.0, 6)
    y = np.linspace(-1.0, 2.0, len(matrix))
    f = gaussian(spread)
    density = cp.compile(linear, f, y, 0.5, a=matrix)
    prior = cp.compile(single, f)
    of_x = jax.grad(lambda x, level: log_likelihood(density, level, {"x": x}))
    by_grad = jax.jit(of_x)
    for level in (0, 2, 12, 25):
        values = np.zeros(2)
        expected = np.zeros(2)
        for i, at in enumerate((x, x[::-1] + 0.5)):
            mean, covariance = moments(spread, at, level)
            whole = 0.25 * np.eye(len(y)) + matrix @ covariance @ matrix.T
            expected[i] = log_normal(y - matrix @ mean, whole)
            values[i] = log_likelihood(density, level, {"x": at})
        np.testing.assert_allclose(
            np.diff(values), np.diff(expected), rtol=2e-3, atol=2e-3
        )
        relative = np.eye(len(y)) + 4 * matrix @ covariance @ matrix.T
        _, volume = np.linalg.slogdet(relative)
        assert abs(values[0] - expected[0]) < 0.5 * volume + 1e-3
        score = density.score({"x": x}, level)["x"] - prior.score({"x": x}, level)["x"]
        gradient = by_grad(jnp.asarray(x), level)
        np.testing.assert_allclose(score, gradient, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("level", [12, 20])
def test_few_directions_do_however_uneven_the_measurements_are(level, monkeypatch):
    """Singular values of A from 1 to 1,000, more of them than directions, and data
    drawn from their density: the gradient is that of the whole matrix. Without the
    eigenvectors of A·Aᵀ, the negative control, it is not."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 60)))[0] for n in (60, 70))
    matrix = (left * np.linspace(1.0, 1e3, 60)) @ right.T
    spread = np.diag(np.linspace(0.5, 2.0, 70))
    x = rng.standard_normal(70)
    mean, covariance = moments(spread, x, level)
    covariance = np.eye(60) + matrix @ covariance @ matrix.T
    residual = np.linalg.cholesky(covariance) @ rng.standard_normal(60)
    shifted = np.stack([moments(spread, x + unit, level)[0] for unit in np.eye(70)])
    slope = shifted - mean
    expected = slope @ matrix.T @ np.linalg.solve(covariance, residual)
    prior = cp.compile(single, gaussian(spread)).score({"x": x}, level)["x"]

    def relative_error():
        y = matrix @ mean + residual
        density = cp.compile(linear, gaussian(spread), y, 1.0, a=matrix)
        error = density.score({"x": x}, level)["x"] - prior - expected
        return np.linalg.norm(error) / np.linalg.norm(expected)

    assert relative_error() < 0.02
    monkeypatch.setattr(tuning, "MOMENTS", tuning.MOMENTS._replace(most=0))
    assert relative_error() > 0.2


def test_the_determinant_of_many_measurements():
    """A mask of independent numbers of one variance: Lanczos' quadrature is exact."""
    spread = 0.7 * np.eye(24)
    x = np.linspace(-1.0, 1.0, 24)
    mask = np.eye(24)[:20]
    y = np.linspace(-1.0, 2.0, 20)
    density = cp.compile(linear, gaussian(spread), y, 0.2, a=mask)
    for level in (0, 5, 25):
        mean, covariance = moments(spread, x, level)
        whole = 0.04 * np.eye(20) + mask @ covariance @ mask.T
        expected = log_normal(y - mask @ mean, whole)
        value = log_likelihood(density, level, {"x": x})
        np.testing.assert_allclose(value, expected, rtol=1e-3)


def test_what_is_no_covariance_gives_numbers():
    """A network whose Jacobian has the wrong sign at low noise: V would be negative."""

    def wrong(x, level):
        noise = SCHEDULE.at(level)
        return jnp.where(level < 10, -2.0, -1.0) * x / noise.sigma**2

    f = cp.Diffusion(wrong, SCHEDULE, event_shape=(3,), parameterization="score")
    density = cp.compile(linear, f, Y, 0.01)
    for level in (0, 5, 20):
        evaluation = density.evaluate({"x": X}, level)
        assert np.isfinite(evaluation.terms.log_potential)
        assert np.all(np.isfinite(evaluation.score["x"]))


def policy(density):
    (observation,) = density.graph.observations
    return str(observation.anneal)


def energy(x, level):
    return 0.5 * jnp.sum(x**2) * SCHEDULE.at(level).sigma


OTHERS = {
    "scores alone": (PRIOR, "moments"),
    "an energy": (
        cp.Diffusion(energy, SCHEDULE, event_shape=(3,), parameterization="energy"),
        "tempered",
    ),
    "a power": (PRIOR**2, "tempered"),
    "guidance": (PRIOR**3 / gaussian(np.eye(3)) ** 2, "moments"),
    "a closed form": (cp.Analytic(dist.Normal(jnp.zeros(3), 1.0), SCHEDULE), "exact"),
}


@pytest.mark.parametrize(("factor", "expected"), OTHERS.values(), ids=OTHERS)
def test_scores_alone_take_it_by_default_and_others_if_they_ask(factor, expected):
    density = cp.compile(linear, factor, Y, 0.3)
    assert policy(density) == expected
    if factor is PRIOR:
        assert "y moments" in str(density)
        check_wording(str(density))
    by_name = cp.compile(linear, factor, Y, 0.3, anneal="moments")
    assert policy(by_name) == "moments"
    assert np.isfinite(log_likelihood(by_name, 8, {"x": X}))


@jax.custom_vjp
def backwards(x):
    return -x


backwards.defvjp(lambda x: (-x, None), lambda _, g: (-g,))


def measured(law):
    return lambda x: cp.observe("y", law(x), 1.0, anneal="moments")


REFUSED = {
    "not linear": measured(lambda x: dist.Normal(x**2, 0.3)),
    "not Gaussian": measured(lambda x: dist.Cauchy(x, 0.3)),
    "soft": lambda x: cp.factor("y", -x, anneal="moments"),
    "stopped": measured(lambda x: dist.Normal(jax.lax.stop_gradient(x), 0.3)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_has_no_moments_is_refused(make):
    program = cp.program(lambda f: make(cp.sample("x", f)[0]))
    refused(lambda: cp.compile(program, PRIOR), CapabilityError, "'y'")


def test_a_network_without_forward_derivatives_is_tempered():
    f = cp.Diffusion(
        lambda x, t: backwards(x), SCHEDULE, event_shape=(3,), parameterization="score"
    )
    density = cp.compile(linear, f, Y, 0.3)
    assert policy(density) == "tempered"
    assert "has no Jacobian–vector product" in str(density)
    refused(
        lambda: cp.compile(linear, f, Y, 0.3, anneal="moments"),
        CapabilityError,
    )


def test_its_cost_is_one_evaluation_and_the_products():
    """The network is evaluated once, and its linearisation once for all products; by
    differences of the text."""

    def exponentials(density):
        evaluate = eqx.filter_make_jaxpr(lambda d, x: d.evaluate({"x": x}, 3))
        jaxpr, *_ = evaluate(density, jnp.asarray(X))
        return str(jaxpr).count(" exp ")

    with_data = exponentials(cp.compile(linear, BENT, Y, 0.3))
    without = exponentials(cp.compile(single, BENT))
    assert without <= with_data <= without + 1


def posterior(spread, matrix, y, noise):
    precision = np.linalg.inv(spread) + matrix.T @ matrix / noise**2
    covariance = np.linalg.inv(precision)
    evidence = log_normal(y, matrix @ spread @ matrix.T + noise**2 * np.eye(len(y)))
    return covariance @ matrix.T @ y / noise**2, covariance, float(evidence)


def test_four_numbers_seen_with_noise():
    """N(0, I), y = 2 with noise 1: mean 1, variance ½, and an exact log-evidence. Only
    a line integral gives chains different weights, and 500 of 1,000 are effective."""
    unit = np.eye(4)
    y = np.full(4, 2.0)
    prior = gaussian(unit, cp.Schedule.log_snr(60))
    density = cp.compile(linear, prior, y, 1.0, a=unit)
    result = run(density, 0, 1000, sampler=None)
    mean, covariance, evidence = posterior(unit, unit, y, 1.0)
    assert result.effective_chains > 500
    error = np.sqrt(np.diag(covariance) / result.effective_chains)
    assert np.all(np.abs(result["x"].mean(0) - mean) < 4 * error)
    np.testing.assert_allclose(result["x"].var(0), np.diag(covariance), rtol=0.2)
    assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_error
