"""Exponents that grow as noise falls: their formula, the expressions in which they
grow, and the gain in accuracy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.compiler.pipeline import lowered
from composeprob.ir.leaves import leaves
from sampling_cases import modes, single

pytestmark = pytest.mark.usefixtures("double_precision")

SCHEDULE = cp.Schedule.log_snr(13, min=-8.0, max=9.0)
S = (np.asarray(SCHEDULE.sigma, float) / np.asarray(SCHEDULE.alpha, float)) ** 2
S -= S[0]
LEVELS = [0, 3, 6, 9, 12]
X = jnp.array([0.4, -1.1])


def analytic(seed, size=2, wider=1.0):
    rng = np.random.default_rng(seed)
    sds = wider * rng.uniform(0.4, 0.9, (2, size))
    return cp.Analytic(modes([0.3, 0.7], rng.normal(size=(2, size)), sds), SCHEDULE)


def network(form="score"):
    """The score of N(0, 1) at every level, or an energy."""
    functions = {"score": lambda x, t: -x, "energy": lambda x, t: 0.5 * jnp.sum(x**2)}
    return cp.Diffusion(
        functions[form], SCHEDULE, event_shape=(2,), parameterization=form
    )


@functools.cache
def log_densities():
    """log f_k(X) of each factor, by level."""
    values = {}
    for name, factor in {"F": F, "G": G, "H": H}.items():
        density = cp.compile(single, factor)
        values[name] = {k: density.log_density({"x": X}, k) for k in LEVELS}
    return values


def power(w):
    """w_k of a factor of exponent w that starts from 1."""
    return w * (1 + S) / (1 + w * S)


def falling(w, kappa):
    """An exponent that grows from 0 to w."""
    return w / (1 + kappa * S)


F = analytic(0)
G = analytic(1, wider=2.5)
H = analytic(2, wider=2.5)
ONE = np.ones_like(S)
GROWING = {
    "power": (F**7, {"F": power(7)}),
    "power below 1": (F**0.4, {"F": power(0.4)}),
    "guidance": (F**7 / G**6, {"F": power(7), "G": falling(-6, 7)}),
    "negation": (F / G**0.6, {"F": ONE, "G": falling(-0.6, 1)}),
    "several powers": (
        F**3 * G**1.5 * H**0.5,
        {"F": power(3), "G": power(1.5), "H": 0.5 * ONE},
    ),
    "powers that sum to less than 1": (
        F**0.2 * G**0.3,
        {"F": 0.4 - falling(0.2, 0.5), "G": 0.6 - falling(0.3, 0.5)},
    ),
    "more than Bayes' rule takes": (
        F**2 * G / H**2,
        {"F": power(2), "G": ONE, "H": -1 - falling(1, 2)},
    ),
}
CONSTANT = {
    "a product": (F * G, {"F": ONE, "G": ONE}),
    "geometric mean": (F**0.5 * G**0.5, {"F": 0.5 * ONE, "G": 0.5 * ONE}),
    "Bayes' rule": (F * G / H, {"F": ONE, "G": ONE, "H": -ONE}),
}


@pytest.mark.parametrize("name", [*GROWING, *CONSTANT])
def test_exponents_are_those_of_the_docs(name):
    """log F_k = Σ w_k·log f_k, and w_0 = w: the powers that the user wrote, on any
    path."""
    factor, exponents = {**GROWING, **CONSTANT}[name]
    density = cp.compile(single, factor)
    for level in LEVELS:
        value = density.log_density({"x": X}, level)
        terms = [w[level] * log_densities()[f][level] for f, w in exponents.items()]
        np.testing.assert_allclose(value, sum(terms), rtol=1e-10)
    for level in (0, 12):
        power = density.top.at(level).power["x"]
        expected = sum(w[level] for w in exponents.values())
        np.testing.assert_allclose(power, expected, rtol=1e-10)
    assert ("exponents grow" in str(density)) == (name in GROWING)


def test_the_power_of_a_gaussian_is_followed_exactly():
    """N(m, 1)^w is N(m, 1/w), and F_k its noised marginal: it has the score of that,
    and a rate that does not depend on x."""
    w = 5.0
    mean = jnp.array([1.0, -0.5])
    clean = float(SCHEDULE.sigma[0] / SCHEDULE.alpha[0]) ** 2
    factor = cp.Analytic(dist.Normal(mean, np.sqrt(1 - clean)), SCHEDULE)
    density = cp.compile(single, factor**w)
    for level in LEVELS:
        alpha, sigma = float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])
        variance = alpha**2 * (1 / w - clean) + sigma**2
        points = [
            {"x": alpha * mean + jnp.sqrt(variance) * z} for z in (X, 2 * X[::-1])
        ]
        score, rate = density.score_and_rate(points[0], level)
        _, elsewhere = density.score_and_rate(points[1], level)
        expected = -(points[0]["x"] - alpha * mean) / variance
        np.testing.assert_allclose(score["x"], expected, rtol=1e-6)
        np.testing.assert_allclose(rate, elsewhere, rtol=1e-6)
    # The negative control.
    factor = cp.Analytic(dist.Normal(mean, 1.0), SCHEDULE)
    constant = lowered(single, (factor**w,), {}, growing=False)
    rates = [constant.score_and_rate(x, 6)[1] for x in points]
    assert abs(rates[0] - rates[1]) > 1.0


@pytest.mark.parametrize(
    ("factor", "tracked"),
    [
        (lambda: network() ** 3, (0,)),
        (lambda: network("energy") ** 3, (0,)),
        (lambda: F**3 / network() ** 2, (1,)),
        (lambda: network() ** 3 / F, (0,)),
    ],
    ids=["score", "learned energy", "known over score", "score over known"],
)
def test_exponents_of_factors_without_a_logdensity_grow_in_weighted_runs(
    factor, tracked
):
    """Chains carry log f; without that every exponent is constant."""
    density = cp.compile(single, factor())
    assert "in SMC, whose chains carry log f, exponents grow" in str(density)
    assert density.tracks
    assert density.top.stacked
    (site,) = density.graph.sites
    assert site.root.growth.tracked == tracked
    constant = density.untracked()
    assert "exponents grow" not in str(constant)
    assert not constant.top.stacked
    np.testing.assert_allclose(
        density.score({"x": X}, 0)["x"], constant.score({"x": X}, 0)["x"], rtol=1e-6
    )


@pytest.mark.parametrize("number", [2, 3, 4])
def test_many_learned_factors_grow_as_the_power_of_one(number):
    """Together they are its power; two have constant exponents."""
    factors = [network() for _ in range(number)]
    (site,) = cp.compile(single, cp.product(*factors)).graph.sites
    growth = site.root.growth
    if number == 2:
        assert growth is None
        return
    assert growth.tracked == tuple(range(number))
    for level in LEVELS:
        exponents = growth(S[level] + growth.clean)
        np.testing.assert_allclose(exponents.sum(), power(number)[level], rtol=1e-6)
        np.testing.assert_allclose(exponents, exponents[0])


def test_many_known_factors_have_constant_exponents():
    density = cp.compile(single, cp.product(F, G, H))
    assert "exponents grow" not in str(density)


@pytest.mark.parametrize("name", ["F", "G"])
def test_a_tracked_rate_is_that_of_the_closed_form(name):
    """With the true log f of the one, the rate is that of all closed forms."""
    known = {"F": F, "G": G}
    analytic_form = cp.compile(single, F**3 / G**2)

    def network_of(factor):
        def learned(x, t):
            return cp.compile(single, factor).score({"x": x}, t)["x"]

        return cp.Diffusion(
            learned, SCHEDULE, event_shape=(2,), parameterization="score"
        )

    one = {**known, name: network_of(known[name])}
    density = cp.compile(single, one["F"] ** 3 / one["G"] ** 2)
    for level in LEVELS:
        evaluation = density.evaluate({"x": X}, level)
        value = log_densities()[name][level]
        rate = evaluation.tracked.with_values(value[None]).rate + evaluation.terms.rate
        expected = analytic_form.evaluate({"x": X}, level).terms.rate
        np.testing.assert_allclose(rate, expected, rtol=1e-5)


def test_windows_that_do_not_meet_are_on_their_own():
    """Each has the exponents that it would have alone."""
    halves = [
        cp.window(F, (4,), (0,)) ** 5 / cp.window(G, (4,), (0,)) ** 4,
        cp.window(H, (4,), (2,)) ** 0.5,
    ]
    density = cp.compile(single, halves[0] * halves[1])
    both = jnp.concatenate([X, X])
    alone = [cp.compile(single, factor) for factor in (F**5 / G**4, H**0.5)]
    for level in LEVELS:
        value = density.log_density({"x": both}, level)
        expected = sum(half.log_density({"x": X}, level) for half in alone)
        np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_potentials_keep_their_exponents():
    """A classifier is not a density: its power is a part of G, and does not stop others
    from growing."""
    judge = cp.Classifier(
        lambda x, t: jnp.array([x[0], 0.0]), SCHEDULE, event_shape=(2,)
    ).given(label=0)
    judged = cp.compile(single, F**2 * judge**4)
    alone = cp.compile(single, F**2)
    for level in LEVELS:
        terms = judged.evaluate({"x": X}, level).terms
        log_marginal = alone.log_density({"x": X}, level)
        np.testing.assert_allclose(terms.log_marginal, log_marginal, rtol=1e-10)
        log_potential = 4 * jax.nn.log_sigmoid(X[0])
        np.testing.assert_allclose(terms.log_potential, log_potential, rtol=1e-6)


def test_what_is_calibrated_keeps_the_path_of_its_normalisers():
    product = cp.calibrate(analytic(0, 1) ** 2, jax.random.key(0))
    density = cp.compile(single, product)
    assert "exponents grow" not in str(density)
    x = np.linspace(-12, 12, 4001)
    for level in (0, 5, 12):

        def at_point(x, level=level):
            return density.log_density({"x": x[None]}, level)

        log_density = jax.jit(jax.vmap(at_point))(x)
        integral = np.trapezoid(np.exp(log_density), x)
        np.testing.assert_allclose(integral, 1.0, rtol=2e-3)
    assert len(leaves(density.graph.sites[0].root)) == 2


@pytest.mark.parametrize(
    "factor",
    [
        lambda: (
            cp.mixture(
                [analytic(0) / cp.window(analytic(1, 1) ** 2, (2,), (1,))] * 2,
                log_weights=[0.0, 0.3],
            )
            * analytic(2) ** 2
        ),
        lambda: cp.mixture(
            [analytic(0) ** 2, analytic(1) * analytic(2)], log_weights=[0.0, 0.3]
        ),
    ],
    ids=["multiplies and divides", "equal powers at level 0 alone"],
)
def test_parts_with_several_powers_have_finite_levels(factor):
    density = cp.compile(single, factor())
    assert "exponents grow" in str(density)
    assert all(
        np.isfinite(density.log_density({"x": X}, level)) for level in (0, 5, 12)
    )


def test_strong_guidance_by_default():
    """Two mixtures whose modes pull apart, where under constant exponents chains
    descended from a few ancestors: the share and the evidence of guidance 7 within
    their errors, which are those of 1,000 chains."""
    schedule = cp.Schedule.log_snr(60)
    f = modes([0.55, 0.45], [-2.0, 2.0], [0.5, 0.45])
    g = modes([0.5, 0.5], [-1.5, 1.5], [0.9, 0.75])
    x = np.linspace(-8, 8, 16001)
    guided = np.exp(np.asarray(7 * f.log_prob(x) - 6 * g.log_prob(x)))
    share = guided[x > 0].sum() / guided.sum()
    log_z = np.log(np.trapezoid(guided, x))
    with jax.enable_x64(False):
        guidance = cp.Analytic(f, schedule) ** 7 / cp.Analytic(g, schedule) ** 6
        density = cp.compile(single, guidance)
        for key in range(3):
            result = cp.infer(
                density, jax.random.key(key), num_chains=1000, progress=False
            )
            estimate = result.probability(lambda values: values["x"] > 0)
            assert estimate.error < 0.02
            assert abs(estimate.value - share) < 4 * estimate.error
            assert result.log_evidence_error < 0.04
            assert abs(result.log_evidence - log_z) < 4 * result.log_evidence_error
            assert result.effective_chains > 600
