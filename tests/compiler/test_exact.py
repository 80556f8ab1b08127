"""Exact annealing: programs that the compiler recognises as linear and Gaussian, and
the closed form against the integral."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp

import composeprob as cp
from composeprob.factors.whitening import log_normal, log_normal_of_sum, whitener
from messages import check_wording
from sampling_cases import SCHEDULE, measured, modes, normal

LEVEL = 13  # log-SNR 2.6: neither the prior nor x decides alone
ALPHA, SIGMA = float(SCHEDULE.alpha[LEVEL]), float(SCHEDULE.sigma[LEVEL])
A = np.array([[1.0, 0.5], [0.2, -1.0], [0.4, 0.9]])
B = np.array([0.1, 0.0, -0.3])
Y = np.array([0.3, 0.2, 0.5])
X = np.array([0.35, 0.15])
SD = 0.4
COVARIANCE = np.array([[0.3, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.4]])


def mixture(seed, full=False):
    """Two components in the plane."""
    rng = np.random.default_rng(seed)
    means = jnp.asarray(0.8 * rng.normal(size=(2, 2)))
    roots = rng.normal(size=(2, 2, 2)) * 0.3
    if not full:
        return modes([0.3, 0.7], means, rng.uniform(0.4, 0.8, (2, 2)))
    covariances = jnp.asarray(roots @ roots.swapaxes(1, 2) + 0.2 * np.eye(2))
    components = dist.MultivariateNormal(means, covariances)
    shares = dist.Categorical(probs=jnp.array([0.3, 0.7]))
    return dist.MixtureSameFamily(shares, components)


def independent(seed):
    """Two mixtures, one an entry."""
    rng = np.random.default_rng(seed)
    means = jnp.asarray(rng.normal(size=(2, 3)))
    components = dist.Normal(means, jnp.asarray(rng.uniform(0.4, 0.8, (2, 3))))
    shares = dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5]))
    return dist.MixtureSameFamily(shares, components)


def general():
    parts = [
        dist.Normal(jnp.zeros(2), 0.5).to_event(1),
        dist.MultivariateNormal(jnp.ones(2), 0.3 * jnp.eye(2) + 0.1),
    ]
    mixing = dist.Categorical(probs=jnp.array([0.6, 0.4]))
    return dist.MixtureGeneral(mixing, parts, support=dist.constraints.real_vector)


F = mixture(1)
G = mixture(2, full=True)
H = independent(3)
LINE = dist.Normal(jnp.array([0.2]), 0.6)
WIDE = dist.Normal(jnp.zeros(2), 0.9)


def analytic(distribution):
    return cp.Analytic(distribution, SCHEDULE)


PRIORS = {  # the factor, and log p(x₀) up to a constant
    "mixture": (analytic(F), F.log_prob),
    "full": (analytic(G), G.log_prob),
    "independent": (analytic(H), lambda x: H.log_prob(x).sum(-1)),
    "general": (analytic(general()), general().log_prob),
    "product": (analytic(F) * analytic(G), lambda x: F.log_prob(x) + G.log_prob(x)),
    "power": (
        analytic(F) * analytic(WIDE) ** -0.5,
        lambda x: F.log_prob(x) - 0.5 * WIDE.log_prob(x).sum(-1),
    ),
    "shares": (
        cp.mixture([analytic(F), analytic(F) * analytic(G)], log_weights=[0.0, 0.7]),
        lambda x: jnp.logaddexp(F.log_prob(x), 0.7 + F.log_prob(x) + G.log_prob(x)),
    ),
    "windows": (
        cp.window(analytic(LINE), (2,), (0,))
        * cp.window(analytic(LINE), (2,), (1,))
        * analytic(F),
        lambda x: F.log_prob(x) + LINE.log_prob(x).sum(-1),
    ),
}


@cp.program
def every_prior(factors, y, policy=None):
    """Three measurements of each site under a latent spread, and of one more that
    correlated noise disturbs."""
    sd = cp.sample("sd", dist.HalfNormal(1.0))
    for name, factor in factors.items():
        x = cp.sample(name, factor)
        mean = jnp.asarray(A) @ x + B
        cp.observe(f"{name} y", dist.Normal(mean, sd).to_event(1), y, anneal=policy)
        if name == "full":
            cp.observe(
                f"{name} w",
                dist.MultivariateNormal(mean, jnp.asarray(COVARIANCE)),
                y,
                anneal=policy,
            )


FACTORS = {name: factor for name, (factor, _) in PRIORS.items()}


@pytest.fixture(scope="module")
def density():
    return cp.compile(every_prior, FACTORS, jnp.asarray(Y))


POSITION = {**{name: jnp.asarray(X) for name in FACTORS}, "sd": jnp.log(SD)}


def by_quadrature(name):
    """log ∫ L(x₀)·p(x₀ | x_k) dx₀ on a grid, and its slopes in x_k and log sd, from
    definitions alone."""
    _, log_prior = PRIORS[name]
    axis = np.linspace(-4.5, 4.5, 181)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    away = Y - grid @ A.T - B
    second = np.zeros(len(grid))
    if name == "full":
        log_det = np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]
        second = (
            -0.5 * np.einsum("ni,ij,nj->n", away, np.linalg.inv(COVARIANCE), away)
            - 0.5 * log_det
        )
    clean = np.asarray(jax.jit(log_prior)(jnp.asarray(grid)), np.float64)

    def at(x, log_sd):
        first = (
            -0.5 * (away * np.exp(-log_sd)) ** 2 - log_sd - 0.5 * np.log(2 * np.pi)
        ).sum(1)
        joint = clean - 0.5 * ((x - ALPHA * grid) ** 2).sum(1) / SIGMA**2
        return logsumexp(joint + first + second) - logsumexp(joint)

    u = np.log(SD)
    h = 1e-4
    slope = np.array([at(X + s, u) - at(X - s, u) for s in h * np.eye(2)]) / (2 * h)
    slope_in_u = (at(X, u + h) - at(X, u - h)) / (2 * h)
    return at(X, u), slope, slope_in_u


@cp.program
def priors_alone(factors):
    for name, factor in factors.items():
        cp.sample(name, factor)


def test_the_closed_form_is_the_integral(density):
    evaluation = density.evaluate(POSITION, LEVEL)
    noised = {name: POSITION[name] for name in FACTORS}
    prior = cp.compile(priors_alone, FACTORS).evaluate(noised, LEVEL)
    exact = {name: by_quadrature(name) for name in PRIORS}
    log_exact = sum(value for value, *_ in exact.values())
    np.testing.assert_allclose(evaluation.terms.log_exact, log_exact, rtol=1e-4)
    for name, (_, slope, _) in exact.items():
        drift = evaluation.terms.drift[name]
        of_data = drift - prior.terms.drift[name]
        np.testing.assert_allclose(of_data, slope, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(evaluation.score[name], drift, rtol=1e-5)
    of_prior = 1 - SD**2  # of HalfNormal(1), per log sd
    of_data = sum(slope for *_, slope in exact.values())
    np.testing.assert_allclose(evaluation.score["sd"], of_prior + of_data, rtol=1e-3)
    # At the noisiest level static sites are not moved by the data.
    top = density.evaluate(POSITION, SCHEDULE.num_levels - 1)
    without_data = top.terms.log_marginal + top.terms.log_prior
    np.testing.assert_allclose(top.log_density, without_data, rtol=1e-4)
    np.testing.assert_allclose(evaluation.terms.log_potential, 0.0)


@cp.program
def plates(f, y, coupled=False):
    with numpyro.plate("objects", 12):
        x = cp.sample("x", f)
        cp.observe("y", of_object(x), y)
    if coupled:
        cp.observe("sum", dist.Normal(x.sum(), 0.3), 0.1)


def of_object(x):
    return dist.Normal(x @ jnp.array([1.0, 0.5]), 0.3)


@pytest.mark.slow
def test_objects_that_share_no_measurement_stay_apart():
    y = jnp.linspace(-1.0, 1.0, 12)
    x = jax.random.normal(jax.random.key(0), (12, 2))
    whole = cp.compile(plates, analytic(F), y)
    (stack,) = whole.evaluator.likelihood.exact.stacks
    # Twelve mixtures of two components, not one of 2¹².
    assert stack.means.shape == (12, 2, 2)
    drift = whole.evaluate({"x": x}, LEVEL).terms.drift["x"]
    for i in (0, 7):
        alone = cp.compile(measured, analytic(F), of_object, y[i])
        of_one = alone.evaluate({"x": x[i]}, LEVEL).terms.drift["x"]
        np.testing.assert_allclose(drift[i], of_one, rtol=1e-4)
    text = str(cp.compile(plates, analytic(F), y, True))
    assert re.search("y exact; sum tempered.* 4,096 components", text)


def test_an_entry_of_the_data_may_see_no_site():
    """Its likelihood is a constant: here N(0.1; 0.2, 0.5²)."""

    def law(x):
        mean = jnp.stack([x[0], jnp.float32(0.2)])
        return dist.Normal(mean, 0.5).to_event(1)

    factor = analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    entry = cp.compile(measured, factor, lambda x: dist.Normal(x[0], 0.5), 0.3)
    both = cp.compile(measured, factor, law, jnp.array([0.3, 0.1]))
    assert "y exact" in str(both)
    x = {"x": jnp.array([0.4, -0.2])}
    constant = dist.Normal(0.2, 0.5).log_prob(0.1)
    for level in (0, LEVEL):
        ratio = both.log_density(x, level) - entry.log_density(x, level)
        np.testing.assert_allclose(ratio, constant, rtol=1e-5)


@cp.program
def two_sites(f, g, y, mixed):
    """Scaled sources that are measured together, or under noise that they share, where
    z is far out: no draw shows it."""
    x = cp.sample("x", f)
    w = cp.sample("w", g)
    z = cp.sample("z", dist.Normal(0.0, 1.0))
    if mixed:
        mean = 2.0 * x + jnp.maximum(z - 30.0, 0.0) * w
        cp.observe("mixed", dist.Normal(mean, 0.3), y)
    below_diagonal = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    root = jnp.eye(2) + jnp.where(z > 30.0, 0.8, 0.0) * below_diagonal
    law = dist.MultivariateNormal(jnp.stack([x, w]), scale_tril=root)
    cp.observe("both", law, jnp.array([y, y]))


@pytest.mark.parametrize(("z", "mixed"), [(0.0, True), (31.0, True), (31.0, False)])
def test_a_measurement_that_looks_elsewhere_than_it_did_is_seen(z, mixed):
    clean = analytic(modes([0.5, 0.5], [-1.0, 1.0], 0.3))
    density = cp.compile(two_sites, clean, clean, 0.4, mixed)
    assert f"anneal: {'mixed exact; ' * mixed}both exact\n" in str(density)
    x = np.array([0.2, -0.1])
    far = float(z > 30)
    at = {"x": jnp.array(x[0]), "w": jnp.array(x[1]), "z": jnp.array(z)}
    evaluation = density.evaluate(at, LEVEL)
    axis = np.linspace(-3.0, 3.0, 601)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    away = 0.4 - grid
    covariance = np.array([[1.0, 0.8 * far], [0.8 * far, 1.0 + 0.64 * far]])  # |Σ| = 1
    squares = np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away)
    log_likelihood = -0.5 * squares - np.log(2 * np.pi)
    of_mixed = ((0.4 - grid @ [2.0, far]) / 0.3) ** 2
    of_mixed = -0.5 * of_mixed - np.log(0.3) - 0.5 * np.log(2 * np.pi)
    log_likelihood += mixed * of_mixed
    prior = np.logaddexp(*(-0.5 * ((grid - m) / 0.3) ** 2 for m in (-1.0, 1.0))).sum(1)
    joint = prior - 0.5 * ((x - ALPHA * grid) ** 2).sum(1) / SIGMA**2
    log_exact = logsumexp(joint + log_likelihood) - logsumexp(joint)
    np.testing.assert_allclose(evaluation.terms.log_exact, log_exact, rtol=1e-4)
    # An entry of A that no group reads is not a silent error.
    nothing = np.zeros((2 + mixed, 2), bool)
    blind = eqx.tree_at(lambda d: d.evaluator.likelihood.exact.inside, density, nothing)
    assert np.isnan(blind.evaluate(at, LEVEL).log_density)


NOT_EXACT = {
    "Poisson, not Normal": lambda x, z: dist.Poisson(jnp.exp(x)),
    # A step has no slope.
    "its mean is not a linear": lambda x, z: dist.Normal(
        jnp.where(x > 0.5, 2.0, 0.0), 0.7
    ),
    "not a linear function": lambda x, z: dist.Normal(x**2, 1.0).to_event(1),
    "not a linear function of": lambda x, z: dist.Normal(
        x - jax.lax.stop_gradient(jnp.sin(x)), 1.0
    ),
    "spread of its noise depends": lambda x, z: dist.Normal(x, 1.0 + x**2),
    "derivative of its mean": lambda x, z: dist.Normal(_custom(x), 1.0),
    # Linear as a function, but not by its equations, which divide by x.
    "square over itself": lambda x, z: dist.Normal(x * x / x, 1.0),
}


@jax.custom_vjp
def _custom(x):
    return 2 * x


_custom.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@cp.program
def seen(f, make, policy=None):
    x = cp.sample("x", f)
    z = cp.sample("z", dist.Normal(0.0, 1.0))
    cp.observe("y", make(x, z), jnp.array([1.0, 2.0]), anneal=policy)


@pytest.mark.parametrize("why", NOT_EXACT)
def test_what_is_not_linear_and_gaussian_is_tempered_and_said_so(why):
    text = str(cp.compile(seen, analytic(F), NOT_EXACT[why]))
    assert "y tempered" in text
    check_wording(text)
    match = r"'y'[\s\S]*test_exact"
    with pytest.raises(cp.errors.CapabilityError, match=match) as caught:
        cp.compile(seen, analytic(F), NOT_EXACT[why], "exact")
    check_wording(str(caught.value))


@pytest.mark.parametrize(
    "prior",
    [
        cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(2,)),
        analytic(dist.Uniform(-jnp.ones(2), 1.0)),
        analytic(F) * analytic(G) ** 2,
        analytic(F) * analytic(jnp.zeros((3, 2))),
        cp.window(normal([0.0]), (2,), (0,), scale=2) * analytic(F),
    ],
    ids=["learned", "box", "power of a mixture", "points", "averages"],
)
def test_other_priors_are_named(prior):
    text = str(cp.compile(seen, prior, lambda x, z: dist.Normal(x, 1.0)))
    assert "y exact" not in text
    check_wording(text)


def test_a_prior_whose_parameters_are_latents_is_not_taken_for_constant():
    @cp.program
    def moving():
        m = cp.sample("m", dist.Normal(0.0, 1.0))
        x = cp.sample("x", cp.Analytic(dist.Normal(m, 1.0), SCHEDULE))
        cp.observe("y", dist.Normal(x, 1.0), 0.5)

    text = str(cp.compile(moving))
    assert "y exact" not in text
    assert "'Normal'" in text
    check_wording(text)


def test_handlers_keep_their_meaning():
    @cp.program
    def scaled(f):
        x = cp.sample("x", f)
        with numpyro.handlers.scale(scale=2.0):
            cp.observe("y", dist.Normal(x, 1.0), jnp.zeros(2))

    text = str(cp.compile(scaled, analytic(F)))
    assert "y tempered" in text
    check_wording(text)


@pytest.mark.parametrize("size", [1, 5, 39])
def test_the_whitener_is_the_inverse_of_the_cholesky_factor(size):
    root = np.random.default_rng(0).normal(size=(3, 2, size, size))
    covariance = root @ root.swapaxes(-1, -2) + np.eye(size)
    moved = covariance + 0.1 * covariance.swapaxes(-1, -2)

    def differently(c):
        return jnp.linalg.inv(jnp.linalg.cholesky(c))

    @jax.jit
    def with_changes(covariance, moved):
        functions = (whitener, differently)
        return [jax.jvp(f, (covariance,), (moved,)) for f in functions]

    single_precision = [np.float32(covariance), np.float32(moved)]
    (value, change), (_, expected_change) = with_changes(*single_precision)
    expected = np.linalg.inv(np.linalg.cholesky(covariance))
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(change, expected_change, rtol=2e-3, atol=1e-4)


@jax.jit
def both_ways(residual, noise, loadings, whole):
    """The density of a sum, and as if its covariance were one matrix."""
    of_sum = log_normal_of_sum(residual, whitener(noise), loadings)
    return of_sum, log_normal(residual, whole)


@pytest.mark.parametrize(("m", "n"), [(5, 1), (2, 3), (20, 20)])
@pytest.mark.parametrize("sd", [1.0, 2e-3])
def test_the_density_of_a_sum_stands_noise_that_is_small_beside_it(m, n, sd):
    """Against double precision; with one covariance for the sum, rounding took hundreds
    of nats."""
    rng = np.random.default_rng(0)
    rank = min(n, 3)
    loadings = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
    residual = rng.normal(size=(4, m))
    noise = sd**2 * np.diag(rng.uniform(0.5, 2.0, m))
    whole = noise + loadings @ loadings.T
    solved = np.einsum("ia,ab,ib->i", residual, np.linalg.inv(whole), residual)
    exact = -0.5 * (solved + np.linalg.slogdet(2 * np.pi * whole)[1])
    of_sum, naive = both_ways(residual, noise, loadings, whole)
    singular = sd < 1 and m > 3  # to rounding
    rtol = 5e-3 if singular and m <= n else 3e-5
    np.testing.assert_allclose(of_sum, exact, rtol=rtol, atol=1e-4)
    # The negative control.
    assert bool(np.all(np.abs(naive - exact) < 1)) is not singular


@cp.program
def spread(f, y):
    x = cp.sample("x", f)
    s = cp.sample("s", dist.HalfCauchy(1.0))
    cp.observe("y", dist.Normal(x, s).expand([5]).to_event(1), y)


def test_a_tiny_scale_of_the_noise_costs_no_accuracy():
    """log p(y | x_k, s) of one entry that is measured five times, written out: −10⁵ and
    −10¹⁷, of which a power of 0 must leave nothing."""
    y = np.array([1.2, 0.7, 1.9, 1.4, 0.2])
    density = cp.compile(spread, analytic(dist.Normal(0.2, 0.6)), jnp.asarray(y))
    top = SCHEDULE.num_levels - 1
    for log_sd, level in ((-6.0, LEVEL), (-6.0, top), (-20.0, top)):
        position = {"x": jnp.asarray(0.3), "s": jnp.asarray(log_sd)}
        evaluation = density.evaluate(position, level)
        alpha, sigma = float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])
        noise = float(np.exp(2 * log_sd))
        whole = alpha**2 * 0.36 + sigma**2
        blur = sigma**2 * 0.36 / whole
        r = y - 0.2 - alpha * 0.36 / whole * (0.3 - alpha * 0.2)
        # Equal entries are an eigenvector; orthogonal to it there is noise alone.
        along = 5 * r.mean() ** 2 / (1 + 5 * blur / noise)
        solved = (np.sum((r - r.mean()) ** 2) + along) / noise
        log_det = 8 * log_sd + np.log(noise + 5 * blur)
        exact = -0.5 * (solved + log_det + 5 * np.log(2 * np.pi))
        terms = evaluation.terms
        np.testing.assert_allclose(terms.log_exact, exact, rtol=1e-6)
        if level == top:
            assert evaluation.log_density == terms.log_marginal + terms.log_prior
            # The score of the prior, in log s.
            np.testing.assert_allclose(evaluation.score["s"], 1.0, atol=1e-3)


def test_no_routine_of_lapack_is_called_for_a_batch_of_chains(density):
    positions = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *x.shape)), POSITION)
    of_chains = jax.jit(jax.vmap(lambda p: density.value_and_score(p, LEVEL)))
    assert "trsm" not in of_chains.lower(positions).as_text()
