"""Noised marginals against brute-force convolutions, near and far, and against exact
draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import special, stats

import composeprob as cp
from composeprob import tuning
from composeprob.factors.one_dimension import log_normal_mass
from sampling_cases import modes, single, slow

SCHEDULE = cp.Schedule.log_snr(9, min=-8.0, max=11.0)


def noises():
    """Noises from little to much, of new schedules in the precision of the test."""
    vp = cp.Schedule.log_snr(9, min=-8.0, max=11.0)
    ve = cp.Schedule.edm(9, sigma_min=0.005, sigma_max=10.0)
    return vp.at(0), vp.at(4), vp.at(8), ve.at(0), ve.at(5)


def mixing():
    return dist.Categorical(probs=jnp.array([0.3, 0.7]))


def boxes():
    parts = [dist.Uniform(-1.0, -0.8), dist.Uniform(0.5, 0.9)]
    return dist.MixtureGeneral(mixing(), parts, support=dist.constraints.real)


# Laws with a closed form at every level; and the same law in SciPy, or the components
# of a mixture by their shares.
CLOSED = {
    "normal": (lambda: dist.Normal(0.3, 0.4), stats.norm(0.3, 0.4)),
    "uniform": (lambda: dist.Uniform(-0.5, 1.0), stats.uniform(-0.5, 1.5)),
    "thin box": (lambda: dist.Uniform(0.0, 1e-3), stats.uniform(0.0, 1e-3)),
    "mixture": (
        lambda: modes([0.3, 0.7], [-1.0, 1.0], [0.2, 0.5]),
        {0.3: stats.norm(-1.0, 0.2), 0.7: stats.norm(1.0, 0.5)},
    ),
    "mixture of boxes": (
        boxes,
        {0.3: stats.uniform(-1.0, 0.2), 0.7: stats.uniform(0.5, 0.4)},
    ),
    "general mixture": (
        lambda: dist.MixtureGeneral(
            mixing(), [dist.Normal(0.0, 0.2), dist.Normal(1.0, 0.6)]
        ),
        {0.3: stats.norm(0.0, 0.2), 0.7: stats.norm(1.0, 0.6)},
    ),
}
BOUNDED = {  # bounded priors and heavy tails, by quadrature
    "half-normal": (lambda: dist.HalfNormal(0.7), stats.halfnorm(scale=0.7)),
    "left-truncated": (
        lambda: dist.TruncatedNormal(0.4, 0.6, low=-0.5),
        stats.truncnorm(-1.5, np.inf, 0.4, 0.6),
    ),
    "right-truncated": (
        lambda: dist.TruncatedNormal(0.4, 0.6, high=-0.2),
        stats.truncnorm(-np.inf, -1.0, 0.4, 0.6),
    ),
    "truncated": (
        lambda: dist.TruncatedNormal(2.0, 0.5, low=-1.0, high=1.0),
        stats.truncnorm(-6.0, -2.0, 2.0, 0.5),
    ),
    "log-normal": (
        lambda: dist.LogNormal(-0.3, 0.8),
        stats.lognorm(0.8, scale=np.exp(-0.3)),
    ),
    "gamma without a top": (lambda: dist.Gamma(0.4, 2.0), stats.gamma(0.4, scale=0.5)),
    "narrow gamma": (
        lambda: dist.Gamma(900.0, 700.0),
        stats.gamma(900.0, scale=1 / 700),
    ),
    "inverse gamma": (
        lambda: dist.InverseGamma(3.0, 2.0),
        stats.invgamma(3.0, scale=2.0),
    ),
    "Weibull": (lambda: dist.Weibull(0.7, 1.6), stats.weibull_min(1.6, scale=0.7)),
    "half-Cauchy": (lambda: dist.HalfCauchy(0.7), stats.halfcauchy(scale=0.7)),
    "Student's t": (lambda: dist.StudentT(3.0, 0.3, 0.4), stats.t(3.0, 0.3, 0.4)),
    "arcsine": (lambda: dist.Beta(0.5, 0.5), stats.beta(0.5, 0.5)),
    "moved beta": (
        lambda: dist.TransformedDistribution(
            dist.Beta(2.0, 0.8), dist.transforms.AffineTransform(1.0, -3.0)
        ),
        stats.beta(0.8, 2.0, loc=-2.0, scale=3.0),
    ),
}
LAWS = CLOSED | BOUNDED


def points(alpha, sigma):
    """Points inside, at a wall, and outside of it by a few and by many standard
    deviations of the noise."""
    return np.concatenate(
        [
            alpha * np.array([0.02, 0.3, 1.4, 4.0, -0.4]),
            sigma * np.array([-3.0, -12.0, 1.0, 9.0]),
        ]
    )


def convolution(law, x, alpha, sigma):
    """log f and its slope at one x, by 20-point Gauss–Legendre on very many pieces; of
    a mixture, by its components."""
    if isinstance(law, dict):
        components = [convolution(part, x, alpha, sigma) for part in law.values()]
        values, slopes = np.array(components).T
        logs = np.log(list(law)) + values
        return special.logsumexp(logs), special.softmax(logs) @ slopes
    edges = pieces(law, x, alpha, sigma)
    z, w = np.polynomial.legendre.leggauss(20)
    half = np.diff(edges)[:, None] / 2
    centre = (edges[1:] + edges[:-1])[:, None] / 2
    u = (centre + half * z).ravel()
    weights = (half * w).ravel()
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = np.log(weights) + law.logpdf(u) - 0.5 * ((x - alpha * u) / sigma) ** 2
    finite = np.isfinite(joint)  # not at the very walls
    u = u[finite]
    joint = joint[finite]
    top = joint.max()
    shares = np.exp(joint - top)
    value = top + np.log(shares.sum()) - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    return value, np.sum(shares * (alpha * u - x)) / shares.sum() / sigma**2


def pieces(law, x, alpha, sigma):
    """Ends of pieces of a law's support, dense at its middle, at its walls, and where x
    came from."""
    low, high = law.support()
    scale = min(law.std(), 10.0) if np.isfinite(law.std()) else 1.0
    steps = np.geomspace(1e-14, 60.0, 160) * scale
    near = x / alpha + sigma / alpha * np.linspace(-12.0, 12.0, 49)
    middle = law.median()
    edges = [middle + steps, middle - steps, near]
    if np.isfinite(low):
        edges.append(low + steps)
    if np.isfinite(high):
        edges.append(high - steps)
    elif np.isfinite(low):
        edges.append([low + 1e4 * scale])
    reach = 60 * scale
    if law.dist.name == "t":
        reach = 1e4 * scale
    begin = max(low, middle - reach)
    end = min(high, middle + 1e4 * scale)
    return np.unique(np.clip(np.concatenate(edges), begin, end))


SLOW = ("left-truncated", "right-truncated", "inverse gamma", "Weibull")
"""Laws that take the same code as the others."""


@functools.cache
def evaluator(name):
    """log f and its slope at many x under one noise; compiled once for all tests of a
    precision."""
    schedule = cp.Schedule.log_snr(2)

    def evaluate(x, noise):
        return cp.Analytic(LAWS[name][0](), schedule).evaluate(x, noise, {})

    return jax.jit(jax.vmap(evaluate, (0, None)))


@pytest.mark.parametrize(
    "name", [name for name in LAWS if name not in SLOW] + [slow(name) for name in SLOW]
)
def test_noised_densities_are_convolutions(name, double_alone):
    """The density and the score, from which the Tweedie mean (x + σ²·score)/α
    follows."""
    evaluate = evaluator(name)
    law = LAWS[name][1]
    if name in CLOSED:
        of_value = (1e-7, 1e-7)
        of_score = (1e-5, 5e-8)
    else:
        of_value = (1e-5, 2e-6)
        of_score = (1e-4, 2e-5)
    for noise in noises():
        alpha = float(noise.alpha)
        sigma = float(noise.sigma)
        x = points(alpha, sigma)
        value, score = evaluate(x, noise)
        exact = np.array([convolution(law, at, alpha, sigma) for at in x])
        exact_value, exact_score = exact.T
        likely = exact_value > -80
        np.testing.assert_allclose(value[likely], exact_value[likely], *of_value)
        np.testing.assert_allclose(
            score[likely] * sigma, exact_score[likely] * sigma, *of_score
        )
        # Elsewhere the score leads back.
        np.testing.assert_array_equal(
            np.sign(score[~likely]), np.sign(exact_score[~likely])
        )


@pytest.mark.parametrize(
    "name",
    [
        "log-normal",
        "gamma without a top",
        "narrow gamma",
        "half-Cauchy",
        "Student's t",
        "arcsine",
    ],
)
def test_single_precision_takes_enough_of_its_fewer_nodes(name):
    """At likely points, and at noises that are not so small that x itself has too few
    digits."""
    evaluate = evaluator(name)
    law = LAWS[name][1]
    for noise in noises()[1:3] + noises()[4:]:
        alpha = float(noise.alpha)
        sigma = float(noise.sigma)
        x = points(alpha, sigma)
        value, score = evaluate(x, noise)
        assert value.dtype == jnp.float32
        rounded = x.astype(np.float32).astype(float)
        exact = np.array([convolution(law, at, alpha, sigma) for at in rounded])
        exact_value, exact_score = exact.T
        likely = exact_value > -15
        np.testing.assert_allclose(
            value[likely], exact_value[likely], rtol=2e-5, atol=5e-5
        )
        np.testing.assert_allclose(
            score[likely] * sigma, exact_score[likely] * sigma, rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize(
    "name",
    [
        "half-normal",
        "truncated",
        "log-normal",
        "gamma without a top",
        "arcsine",
        "uniform",
        "thin box",
    ],
)
def test_far_away_and_much_noised_nothing_is_nan(name):
    """In single precision; at 10⁴ standard deviations of the noise a box is narrower
    than its distance is rounded."""
    far = 1e4 if name in BOUNDED else 60.0
    for noise in map(cp.Schedule.log_snr(9, min=-20.0, max=11.0).at, range(9)):
        away = noise.sigma * np.array([-far, far, -60.0])
        others = np.array([50.0, 0.0, 3.0, -5.0, -30.0, 40.0])
        value, score = evaluator(name)(np.append(away, others), noise)
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(score))


def test_a_prior_that_lies_at_its_walls_under_wide_noise(double_alone):
    """Beta of 0.1 and 0.1, whose density falls by e over ten units of the logit; by
    200,000 points of it."""
    z = np.linspace(-500, 500, 200_001)
    log_q = 0.1 * (special.log_expit(z) + special.log_expit(-z))
    log_q = log_q - special.betaln(0.1, 0.1)
    noise = SCHEDULE.at(5)
    alpha = float(noise.alpha)
    sigma = float(noise.sigma)
    x = np.array([-50.0, 0.3, 90.0]) * sigma / 25
    log_joint = log_q + stats.norm.logpdf(x[:, None], alpha * special.expit(z), sigma)
    exact = special.logsumexp(log_joint, axis=1) + np.log(z[1] - z[0])
    prior = cp.Analytic(dist.Beta(0.1, 0.1), SCHEDULE).at(noise)
    log_density = jax.jit(jax.vmap(prior.log_prob))(jnp.asarray(x, float))
    np.testing.assert_allclose(log_density, exact, atol=1e-9)


# The rule of derivatives is one; beta's gamma functions take long to compile.
@pytest.mark.parametrize("name", ["log-normal", "Student's t", slow("beta")])
def test_second_derivatives_of_many_values_keep_no_array_over_nodes(
    name, double_alone, monkeypatch
):
    """Derivatives by a prior's two parameters and the value, against differences of the
    gradient."""
    laws = {
        "log-normal": dist.LogNormal,
        "Student's t": lambda a, b: dist.StudentT(4.0, a, b),
        "beta": dist.Beta,
    }
    x = jnp.linspace(0.1, 1.0, 500)

    def log_prob(parameters):
        a, b, by = parameters
        prior = cp.Analytic(laws[name](a, b).expand(x.shape), SCHEDULE)
        return jnp.sum(prior.at(SCHEDULE.at(4)).log_prob(x + by))

    at = jnp.array([0.7, 0.9, 0.05])
    compiled = jax.jit(jax.hessian(log_prob)).lower(at).compile()
    gradient = jax.jit(jax.grad(log_prob))
    steps = 1e-5 * jnp.eye(3)
    differences = [(gradient(at + step) - gradient(at - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(compiled(at), differences, rtol=1e-6, atol=1e-6 * x.size)
    few, many = tuning.QUADRATURE.nodes
    monkeypatch.setattr(
        tuning, "QUADRATURE", tuning.QUADRATURE._replace(nodes=(few, 4 * many))
    )
    # A new function, which JAX traces anew, with the other number of nodes.
    more = jax.jit(lambda at: jax.hessian(log_prob)(at)).lower(at).compile()
    sizes = [run.memory_analysis().temp_size_in_bytes for run in (compiled, more)]
    assert sizes[1] - sizes[0] < 3 * many * x.nbytes


def test_a_noised_cauchy_distribution_is_voigts(double_alone):
    def noised(x, noise, scale):
        factor = cp.Analytic(dist.Cauchy(0.3, scale), SCHEDULE)
        return factor.evaluate(x, noise, {})

    evaluate = jax.jit(jax.vmap(noised, (0, None, None)))
    for scale, noise in itertools.product((1e-3, 0.1, 5.0), noises()):
        alpha = float(noise.alpha)
        sigma = float(noise.sigma)
        x = np.array([-900.0, -20.0, -1.0, 0.0, 0.3 * alpha, 2.0, 1e4])
        value, score = evaluate(x, noise, scale)
        away = x - 0.3 * alpha
        exact = np.log(special.voigt_profile(away, sigma, alpha * scale))
        np.testing.assert_allclose(value, exact, rtol=1e-6)
        assert np.all(score[away != 0] * away[away != 0] < 0)


def test_a_noised_t_distribution_of_many_degrees_of_freedom_is_nearly_normal(
    double_alone,
):
    """log t = log N + (x⁴ − 2·x² − 1)/(4·ν) + …, less where there is noise."""

    @jax.jit
    def both(x, noise, df):
        width = jnp.sqrt((noise.alpha * 0.01) ** 2 + noise.sigma**2)
        laws = (dist.StudentT(df, 0.2, 0.01), dist.Normal(0.2, 0.01))
        return [
            cp.Analytic(law, SCHEDULE).at(noise).log_prob(noise.alpha * 0.2 + width * x)
            for law in laws
        ]

    for df, noise in itertools.product((1e4, 1e7), noises()):
        heavy, light = both(jnp.array([-5.0, -0.3, 0.0, 2.0]), noise, df)
        np.testing.assert_allclose(heavy, light, atol=200 / df + 1e-7)


def test_the_posterior_of_ninety_observations_under_a_box_is_finite_everywhere():
    """Each posterior is a truncated normal; in single precision, at all levels, inside
    and far outside of the box."""
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

    sigma = np.asarray(schedule.sigma)
    alpha = np.asarray(schedule.alpha)
    for x in (
        0.3 * alpha,
        -alpha,
        40 * sigma,
        -200 * sigma,
        alpha + 8 * sigma,
        np.full(40, 30.0),
    ):
        value, score = composed(x, schedule.levels)
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(score))


COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
POINTS = np.array([[0.0, 0.0], [1.0, -1.0], [0.4, 2.0]])


def bivariate():
    """Laws by name: (the law, its components as (weight, mean, covariance))."""
    mvn = [
        dist.MultivariateNormal(jnp.array(m), jnp.array(COVARIANCE))
        for m in ([0.0, 1.0], [-1.0, 0.0])
    ]
    batch = dist.MultivariateNormal(
        jnp.array([[0.0, 1.0], [-1.0, 0.0]]), jnp.array(COVARIANCE)
    )
    two = [(0.3, [0.0, 1.0], COVARIANCE), (0.7, [-1.0, 0.0], COVARIANCE)]
    return {
        "mvn": (mvn[0], [(1.0, [0.0, 1.0], COVARIANCE)]),
        "batched normal": (
            dist.Normal(jnp.array([0.2, -0.3]), 0.5),
            [(1.0, [0.2, -0.3], 0.25 * np.eye(2))],
        ),
        "expanded": (
            dist.Normal(0.2, 0.5).expand([2]).to_event(1),
            [(1.0, [0.2, 0.2], 0.25 * np.eye(2))],
        ),
        "mixture of mvn": (dist.MixtureSameFamily(mixing(), batch), two),
        "general mixture of mvn": (dist.MixtureGeneral(mixing(), mvn), two),
        "delta": (
            dist.Delta(jnp.array([0.5, 1.0])),
            [(1.0, [0.5, 1.0], np.zeros((2, 2)))],
        ),
        "points": (POINTS, [(1 / 3, p, np.zeros((2, 2))) for p in POINTS]),
    }


def gaussian_pdf(components, x):
    return sum(w * stats.multivariate_normal.pdf(x, m, c) for w, m, c in components)


@pytest.mark.parametrize("name", bivariate())
def test_bivariate_marginals(name, double_alone):
    law, components = bivariate()[name]
    f = cp.Analytic(law, SCHEDULE)
    value_and_score = jax.jit(cp.compile(single, f).value_and_score)
    assert f.event_shape == (2,)
    for level in (2, 5, 8):
        alpha = float(SCHEDULE.alpha[level])
        sigma = float(SCHEDULE.sigma[level])
        noised = [
            (w, alpha * np.asarray(m), alpha**2 * np.asarray(c) + sigma**2 * np.eye(2))
            for w, m, c in components
        ]
        x = alpha * np.array([0.3, 0.6])
        value, score = value_and_score({"x": x}, level)
        np.testing.assert_allclose(value, np.log(gaussian_pdf(noised, x)), rtol=1e-8)
        h = 1e-5 * sigma
        slope = []
        for e in np.eye(2):
            ratio = gaussian_pdf(noised, x + h * e) / gaussian_pdf(noised, x - h * e)
            slope.append(np.log(ratio) / (2 * h))
        np.testing.assert_allclose(score["x"], slope, rtol=1e-4, atol=1e-4)


def law_and_moments(name):
    """A law, and share, mean and variance of each of its components."""
    if name in LAWS:
        make, clean = LAWS[name]
        components = clean.items() if isinstance(clean, dict) else [(1.0, clean)]
        return make(), [(share, part.mean(), part.var()) for share, part in components]
    law, components = bivariate()[name]
    return law, [
        (share, np.asarray(mean), np.diag(covariance))
        for share, mean, covariance in components
    ]


@pytest.mark.parametrize(
    "name",
    ["uniform", "mixture", "truncated", "moved beta", "points", "mixture of mvn"],
)
def test_draws_have_the_moments_of_noised_data(name, double_alone):
    """`at(noise)` draws α·X + σ·ε: its mean and variance are α·E X and α²·Var X +
    σ²."""
    law, moments = law_and_moments(name)
    mean = sum(share * mean for share, mean, _ in moments)
    square = sum(share * (variance + mean**2) for share, mean, variance in moments)
    spread = square - mean**2
    n = 40_000
    for level in (2, 7):
        noise = SCHEDULE.at(level)
        draws = cp.Analytic(law, SCHEDULE).at(noise).sample(jax.random.key(level), (n,))
        variance = noise.alpha**2 * spread + noise.sigma**2
        z = (jnp.mean(draws, 0) - noise.alpha * mean) / jnp.sqrt(variance / n)
        assert jnp.all(jnp.abs(z) < 4.5)
        fourth = jnp.mean((draws - jnp.mean(draws, 0)) ** 4, 0)
        z = (jnp.var(draws, 0) - variance) / jnp.sqrt((fourth - variance**2) / n)
        assert jnp.all(jnp.abs(z) < 4.5)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_boxes_keep_their_digits(x64):
    """log[Φ(b) − Φ(a)] and its gradient for narrow intervals and far tails, where
    differences would lose them."""
    with jax.enable_x64(x64):
        digits = 1e-9 if x64 else 3e-5
        grad = jax.jit(
            jax.value_and_grad(lambda m, w: log_normal_mass(m - w / 2, m + w / 2, w))
        )
        for middle in (0.0, 0.7, -3.0, 12.0, -60.0, 300.0):
            for width in (1e-6, 1e-3, 0.05, 0.9, 1.1, 4.0, 40.0):
                value, slope = grad(
                    jnp.asarray(middle, float), jnp.asarray(width, float)
                )
                mass, mean = tilted(middle, width)
                np.testing.assert_allclose(value, mass, rtol=digits, atol=digits)
                # d/dm log mass = −E[z] under the truncated normal, here to the size of
                # z.
                np.testing.assert_allclose(
                    slope, -mean, rtol=digits, atol=digits * max(1.0, abs(middle))
                )


def tilted(middle, width):
    """log ∫ φ and E[z] over an interval, by quadrature about its most probable
    point."""
    low = middle - width / 2
    high = middle + width / 2
    top = min(max(0.0, low), high)
    reach = 40.0 / max(1.0, abs(top))
    a = max(low, top - reach)
    b = min(high, top + reach)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = 0.5 * (a + b) + 0.5 * (b - a) * nodes
    weights = 0.5 * (b - a) * weights
    density = np.exp(0.5 * (top - z) * (top + z))
    mass = weights @ density
    log_mass = np.log(mass) - 0.5 * top**2 - 0.5 * np.log(2 * np.pi)
    return log_mass, (weights * density) @ z / mass


def test_a_prior_of_several_entries_is_one_event(double_alone):
    law = dist.Independent(dist.Beta(jnp.array([2.0, 3.0]), 1.5), 1)
    f = cp.Analytic(law, SCHEDULE)
    each = [cp.Analytic(dist.Beta(a, 1.5), SCHEDULE) for a in (2.0, 3.0)]
    noise = SCHEDULE.at(4)
    x = jnp.array([0.3, 0.8])
    assert f.event_shape == (2,)

    @jax.jit
    def log_densities():
        pairs = [(f, x), *zip(each, x, strict=True)]
        return [factor.at(noise).log_prob(value) for factor, value in pairs]

    joint, *of_entries = log_densities()
    np.testing.assert_allclose(joint, sum(of_entries), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
def test_points_are_events_of_any_shape(shape):
    assert cp.Analytic(np.zeros((5, *shape)), SCHEDULE).event_shape == shape
