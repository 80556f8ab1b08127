"""Bounded priors and heavy tails: noised half-lines and intervals against brute-force convolutions, near and far."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import special, stats

import composeprob as cp
from composeprob import tuning
from sampling_cases import slow

SCHEDULES = (cp.Schedule.log_snr(9, min=-8.0, max=11.0), cp.Schedule.edm(9, sigma_min=0.005, sigma_max=10.0))
LEVELS = [(SCHEDULES[0], 0), (SCHEDULES[0], 4), (SCHEDULES[0], 8), (SCHEDULES[1], 0), (SCHEDULES[1], 5)]
LAWS = {
    "half-normal": (dist.HalfNormal(0.7), stats.halfnorm(scale=0.7)),
    "left-truncated": (dist.TruncatedNormal(0.4, 0.6, low=-0.5), stats.truncnorm(-1.5, np.inf, 0.4, 0.6)),
    "right-truncated": (dist.TruncatedNormal(0.4, 0.6, high=-0.2), stats.truncnorm(-np.inf, -1.0, 0.4, 0.6)),
    "truncated": (dist.TruncatedNormal(2.0, 0.5, low=-1.0, high=1.0), stats.truncnorm(-6.0, -2.0, 2.0, 0.5)),
    "log-normal": (dist.LogNormal(-0.3, 0.8), stats.lognorm(0.8, scale=np.exp(-0.3))),
    "gamma without a top": (dist.Gamma(0.4, 2.0), stats.gamma(0.4, scale=0.5)),
    "narrow gamma": (dist.Gamma(900.0, 700.0), stats.gamma(900.0, scale=1 / 700)),
    "inverse gamma": (dist.InverseGamma(3.0, 2.0), stats.invgamma(3.0, scale=2.0)),
    "Weibull": (dist.Weibull(0.7, 1.6), stats.weibull_min(1.6, scale=0.7)),
    "half-Cauchy": (dist.HalfCauchy(0.7), stats.halfcauchy(scale=0.7)),
    "Student's t": (dist.StudentT(3.0, 0.3, 0.4), stats.t(3.0, 0.3, 0.4)),
    "arcsine": (dist.Beta(0.5, 0.5), stats.beta(0.5, 0.5)),
    "moved beta": (
        dist.TransformedDistribution(dist.Beta(2.0, 0.8), dist.transforms.AffineTransform(1.0, -3.0)),
        stats.beta(0.8, 2.0, loc=-2.0, scale=3.0),
    ),
}


def points(alpha, sigma):
    """Inside, at a wall, and outside of it by a few and by many standard deviations of the noise."""
    return np.concatenate([alpha * np.array([0.02, 0.3, 1.4, 4.0, -0.4]), sigma * np.array([-3.0, -12.0, 1.0, 9.0])])


def convolution(law, x, alpha, sigma):
    """log f and its slope at one x, by 20-point Gauss–Legendre on very many pieces."""
    low, high = law.support()
    scale = min(law.std(), 10.0) if np.isfinite(law.std()) else 1.0
    steps = np.geomspace(1e-14, 60.0, 160) * scale
    near = x / alpha + sigma / alpha * np.linspace(-12.0, 12.0, 49)
    middle = law.median()
    edges = [middle + steps, middle - steps, near]
    edges += [low + steps] if np.isfinite(low) else []
    edges += [high - steps] if np.isfinite(high) else []
    edges += [[low + 1e4 * scale]] if not np.isfinite(high) and np.isfinite(low) else []
    reach = scale * (1e4 if law.dist.name == "t" else 60)
    edges = np.unique(np.clip(np.concatenate(edges), max(low, middle - reach), min(high, middle + 1e4 * scale)))
    z, w = np.polynomial.legendre.leggauss(20)
    half, centre = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    u, weights = (centre + half * z).ravel(), (half * w).ravel()
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = np.log(weights) + law.logpdf(u) - 0.5 * ((x - alpha * u) / sigma) ** 2
    u, joint = u[np.isfinite(joint)], joint[np.isfinite(joint)]  # not at the very walls
    top = joint.max()
    shares = np.exp(joint - top)
    value = top + np.log(shares.sum()) - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    return value, np.sum(shares * (alpha * u - x)) / shares.sum() / sigma**2


SLOW = ("left-truncated", "right-truncated", "inverse gamma", "Weibull")
"""Laws whose rules are those of the others."""


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in LAWS])
def test_noised_densities_are_convolutions(name, double_alone):
    """The density and the score, from which the Tweedie mean (x + σ²·score)/α follows."""
    made, law = LAWS[name]
    made = jax.tree.map(lambda a: jnp.asarray(a, float) if isinstance(a, float) else a, made)
    evaluate = jax.jit(jax.vmap(lambda x, noise: cp.Analytic(made, SCHEDULES[0]).evaluate(x, noise, {}), (0, None)))
    for schedule, level in LEVELS:
        noise = schedule.at(level)
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        x = points(alpha, sigma)
        value, score = evaluate(x, noise)
        wanted = np.array([convolution(law, at, alpha, sigma) for at in x]).T
        likely = wanted[0] > -80
        np.testing.assert_allclose(value[likely], wanted[0][likely], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(score[likely] * sigma, wanted[1][likely] * sigma, rtol=1e-4, atol=2e-5)
        np.testing.assert_array_equal(np.sign(score[~likely]), np.sign(wanted[1][~likely]))  # elsewhere it leads back


@pytest.mark.parametrize(
    "name", ["log-normal", "gamma without a top", "narrow gamma", "half-Cauchy", "Student's t", "arcsine"]
)
def test_single_precision_takes_enough_of_its_fewer_nodes(name):
    """Where a point is likely, and the noise is not so small that x itself has too few digits."""
    made, law = LAWS[name]
    evaluate = jax.jit(jax.vmap(lambda x, noise: cp.Analytic(made, SCHEDULES[0]).evaluate(x, noise, {}), (0, None)))
    for schedule, level in LEVELS[1:3] + LEVELS[4:]:
        noise = schedule.at(level)
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        x = points(alpha, sigma)
        value, score = evaluate(x, noise)
        assert value.dtype == jnp.float32
        wanted = np.array([convolution(law, at, alpha, sigma) for at in x.astype(np.float32).astype(float)]).T
        likely = wanted[0] > -15
        np.testing.assert_allclose(value[likely], wanted[0][likely], rtol=2e-5, atol=5e-5)
        np.testing.assert_allclose(score[likely] * sigma, wanted[1][likely] * sigma, rtol=2e-4, atol=2e-4)


def test_a_prior_that_lies_at_its_walls_under_wide_noise(double_alone):
    """Beta of 0.1 and 0.1, whose density falls by e over ten units of the logit; by 200,000 points of it."""
    z = np.linspace(-500, 500, 200_001)
    log_q = 0.1 * (special.log_expit(z) + special.log_expit(-z)) - special.betaln(0.1, 0.1)
    noise = SCHEDULES[0].at(5)
    x, alpha, sigma = np.array([-50.0, 0.3, 90.0]), float(noise.alpha), float(noise.sigma)
    log_joint = log_q + stats.norm.logpdf(x[:, None] * sigma / 25, alpha * special.expit(z), sigma)
    wanted = special.logsumexp(log_joint, axis=1) + np.log(z[1] - z[0])
    prior = cp.Analytic(dist.Beta(0.1, 0.1), SCHEDULES[0]).at(noise)
    np.testing.assert_allclose(jax.vmap(prior.log_prob)(jnp.asarray(x * sigma / 25, float)), wanted, atol=1e-9)


@pytest.mark.parametrize("name", ["log-normal", "Student's t", "beta"])
def test_second_derivatives_of_many_values_keep_no_array_over_nodes(name, double_alone, monkeypatch):
    """In a prior's two parameters and the value; against differences of the gradient."""
    laws = {"log-normal": dist.LogNormal, "Student's t": lambda a, b: dist.StudentT(4.0, a, b), "beta": dist.Beta}
    schedule, x = SCHEDULES[0], jnp.linspace(0.1, 1.0, 500)

    def log_prob(parameters):
        a, b, by = parameters
        prior = cp.Analytic(laws[name](a, b).expand(x.shape), schedule)
        return jnp.sum(prior.at(schedule.at(4)).log_prob(x + by))

    at = jnp.array([0.7, 0.9, 0.05])
    compiled = jax.jit(jax.hessian(log_prob)).lower(at).compile()
    gradient, steps = jax.jit(jax.grad(log_prob)), 1e-5 * jnp.eye(3)
    differences = [(gradient(at + step) - gradient(at - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(compiled(at), differences, rtol=1e-6, atol=1e-6 * x.size)
    few, many = tuning.QUADRATURE.nodes
    monkeypatch.setattr(tuning, "QUADRATURE", tuning.QUADRATURE._replace(nodes=(few, 4 * many)))
    more = jax.jit(lambda at: jax.hessian(log_prob)(at)).lower(at).compile()
    sizes = [run.memory_analysis().temp_size_in_bytes for run in (compiled, more)]
    assert sizes[1] - sizes[0] < 3 * many * x.nbytes


@pytest.mark.parametrize("scale", [1e-3, 0.1, 5.0])
def test_a_noised_cauchy_distribution_is_voigts(scale, double_alone):
    noised = cp.Analytic(dist.Cauchy(jnp.asarray(0.3, float), scale), SCHEDULES[0])
    for schedule, level in LEVELS:
        noise = schedule.at(level)
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        x = np.array([-900.0, -20.0, -1.0, 0.0, 0.3 * alpha, 2.0, 1e4])
        value, score = jax.vmap(lambda x, noise=noise: noised.evaluate(x, noise, {}))(x)
        away = x - 0.3 * alpha
        np.testing.assert_allclose(value, np.log(special.voigt_profile(away, sigma, alpha * scale)), rtol=1e-6)
        assert np.all(score[away != 0] * away[away != 0] < 0)


@pytest.mark.parametrize("df", [1e4, 1e7])
def test_a_noised_t_distribution_of_many_degrees_of_freedom_is_nearly_normal(df, double_alone):
    """log t = log N + (x⁴ − 2·x² − 1)/(4·ν) + …, less where there is noise."""
    for schedule, level in LEVELS:
        noise, x = schedule.at(level), jnp.array([-5.0, -0.3, 0.0, 2.0])
        laws = (dist.StudentT(df, 0.2, 0.01), dist.Normal(0.2, 0.01))
        width = jnp.sqrt((noise.alpha * 0.01) ** 2 + noise.sigma**2)
        heavy, light = (cp.Analytic(law, schedule).at(noise).log_prob(noise.alpha * 0.2 + width * x) for law in laws)
        np.testing.assert_allclose(heavy, light, atol=200 / df + 1e-7)


def test_the_posterior_of_ninety_observations_under_a_box_is_finite_everywhere():
    """Each posterior is a truncated normal; in single precision, at all levels, inside and far outside of the box."""
    schedule = cp.Schedule.log_snr(40, min=-12.0, max=12.0)
    means = jnp.linspace(-1.5, 1.5, 90)
    each = cp.Analytic(dist.TruncatedNormal(means, 0.3, low=-1.0, high=1.0), schedule)
    prior = cp.Analytic(dist.Uniform(-1.0, 1.0), schedule)

    @jax.jit
    @jax.vmap
    def composed(x, noise):
        def log_density(x):
            posteriors = each.at(noise).log_prob(jnp.full(90, x))
            return jnp.sum(posteriors) - 89 * prior.at(noise).log_prob(x)

        return jax.value_and_grad(log_density)(x)

    sigma, alpha = np.asarray(schedule.sigma), np.asarray(schedule.alpha)
    for x in (0.3 * alpha, -alpha, 40 * sigma, -200 * sigma, alpha + 8 * sigma, np.full(40, 30.0)):
        for found in composed(x, schedule.levels):
            assert np.all(np.isfinite(found))


@pytest.mark.parametrize("name", ["half-normal", "truncated", "log-normal", "gamma without a top", "arcsine"])
def test_far_away_nothing_is_nan(name):
    """In single precision."""
    f = cp.Analytic(LAWS[name][0], SCHEDULES[0])
    levels = SCHEDULES[0].levels
    evaluate = jax.jit(jax.vmap(lambda x, noise: f.evaluate(x, noise, {})))
    for x in (-1e4 * levels.sigma, 1e4 * levels.sigma, -60 * levels.sigma, jnp.full(9, 50.0), jnp.zeros(9)):
        for found in evaluate(x, levels):
            assert np.all(np.isfinite(found))


def test_draws_are_of_the_noised_law():
    noise = SCHEDULES[0].at(4)
    for name in ("truncated", "moved beta"):
        made, law = LAWS[name]
        draws = cp.Analytic(made, SCHEDULES[0]).at(noise).sample(jax.random.key(0), (20_000,))
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        expected = alpha * law.mean(), np.sqrt(alpha**2 * law.var() + sigma**2)
        assert abs(float(draws.mean()) - expected[0]) < 4.5 * expected[1] / np.sqrt(20_000)
        np.testing.assert_allclose(draws.std(), expected[1], rtol=0.03)


def test_a_prior_of_several_entries_is_one_event():
    law = dist.Independent(dist.Beta(jnp.array([2.0, 3.0]), 1.5), 1)
    f = cp.Analytic(law, SCHEDULES[0])
    each = [cp.Analytic(dist.Beta(a, 1.5), SCHEDULES[0]) for a in (2.0, 3.0)]
    noise, x = SCHEDULES[0].at(4), jnp.array([0.3, 0.8])
    assert f.event_shape == (2,)
    whole, *parts = jax.jit(lambda: [g.at(noise).log_prob(at) for g, at in [(f, x), *zip(each, x, strict=True)]])()
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)
