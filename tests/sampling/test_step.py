"""The one Gaussian step: DDPM's and DDIM's at order 1, exact for Gaussians where slopes
are fitted, and reversed."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.samplers.layout import Layout
from composeprob.samplers.run import Visits, begin
from composeprob.samplers.step import Backward, Fit, Step, fixed_control
from refusals import refused
from sampling_cases import (
    N,
    Never,
    both,
    normal,
    run,
    single,
    slow,
    squared,
    unit_energy,
    visited,
)
from zscores import assert_agrees, assert_disagrees, z_scores

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

K = 40
SCHEDULE = cp.Schedule.cosine(K)
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])


def alpha_and_sigma(level):
    """α and σ of a level, as Python's floats."""
    return float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])


# ── order 1 ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", [1, 17, K - 1])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_it_is_ddpm_and_ddim(double_alone, level, eta):
    """The law of x' given x is that of Song et al. 2021, equation 12; at η = 1 Ho et
    al. 2020, equations 7 and 11."""
    x, score = 0.7, -1.3
    a, s = alpha_and_sigma(level)
    a_next, s_next = alpha_and_sigma(level - 1)
    beta = 1 - (a / a_next) ** 2
    variance = eta**2 * beta * s_next**2 / s**2
    mean = a_next / a * (x + s**2 * score) - np.sqrt(s_next**2 - variance) * s * score
    if eta == 1:
        np.testing.assert_allclose(
            mean, (x + beta * score) / np.sqrt(1 - beta), rtol=1e-7
        )
    s1 = jnp.asarray((s / a) ** 2)
    s0 = jnp.asarray((s_next / a_next) ** 2)
    step = Step.ddpm(s1, s0, eta)
    for z in (0.0, 1.0, -2.0):
        moved = step.draw(jnp.array([x / a]), jnp.array([a * score]), jnp.array([z]))
        expected = [mean + np.sqrt(variance) * z]
        np.testing.assert_allclose(a_next * moved, expected, rtol=1e-7)


def test_the_law_on_a_gaussian_follows_the_recursion():
    """With an affine score the chain stays Gaussian: its mean and variance obey a
    recursion, level by level."""
    eta = 0.5

    def marginal(level):
        alpha, sigma = alpha_and_sigma(level)
        return alpha * 0.3, alpha**2 * 0.25 + sigma**2

    density = cp.compile(single, normal(0.3, 0.5, SCHEDULE))
    result = run(density, chains=8 * N, sampler=cp.Ancestral(eta=eta))
    mean = 0.0
    variance = float(SCHEDULE.sigma[K - 1]) ** 2
    for k in range(K - 1, 0, -1):
        a, s = alpha_and_sigma(k)
        a_next, s_next = alpha_and_sigma(k - 1)
        noise = eta**2 * (1 - (a / a_next) ** 2) * s_next**2 / s**2
        m, v = marginal(k)
        on_score = a_next / a * s**2 - np.sqrt(max(s_next**2 - noise, 0)) * s
        slope = a_next / a - on_score / v
        mean = slope * mean + on_score * m / v
        variance = slope**2 * variance + noise
    x = np.asarray(result["x"], float)
    samples = {"mean": x, "variance": (x - mean) ** 2}
    assert_agrees(z_scores(samples, {"mean": mean, "variance": variance}))
    # And the recursion ends near the law of the factor.
    exact_mean, exact_variance = marginal(0)
    assert abs(mean - exact_mean) < 0.05
    assert abs(variance / exact_variance - 1) < 0.15


@pytest.mark.parametrize(
    "sampler",
    [
        cp.Ancestral(),
        cp.AnnealedMCMC(cp.ULA(1e-12), 1, reverse_step=FIRST_ORDER),
        cp.SMC(),
    ],
)
def test_a_score_that_is_not_finite_leaves_the_chain_where_it_is(sampler):
    """At the same x, beside one that moves."""

    def score(x, t):
        return jnp.where(x > 2, jnp.nan, -x + 0 * t)

    factor = cp.Diffusion(
        score, SCHEDULE, event_shape=(), parameterization="score", time="log_snr"
    )
    density = cp.compile(single, factor)
    visit = visited(sampler.prepare(density), density, [[4.0], [-0.5]], 5)
    after = visit.chains.position[:, 0]
    np.testing.assert_allclose(
        after[0] * SCHEDULE.alpha[5], 4.0 * SCHEDULE.alpha[6], rtol=1e-5
    )
    assert abs(after[1] * SCHEDULE.alpha[5] + 0.5 * SCHEDULE.alpha[6]) > 1e-3
    moves = 0 if sampler.kernel is None else 1  # which find no better
    assert int(visit.records.non_finite[5]) == 1 + moves


# ── the twist ─────────────────────────────────────────────────────────────────────────


@cp.program
def pulled(f, sd):
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x + m, sd).to_event(1), jnp.ones(3), anneal="tempered")


TURN3 = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]


@functools.cache
@jax.jit
def steps():
    """Steps of all kinds from level 5 to the next."""
    s1 = SCHEDULE.at(5).variance
    s0 = SCHEDULE.at(4).variance

    def slope(s):
        return -(TURN3 * jnp.stack([1 / (s + 0.1), 1 / (s + 2.0), 1.5 / s])) @ TURN3.T

    slopes = [slope(s1), slope(s0)]
    power = jnp.array([1.0, 2.0, 3.0])
    return {
        "ddpm": Step.ddpm(s1, s0, 1.0, jnp.ones(3)),
        "ddpm of powers": Step.ddpm(s1, s0, 0.7, power),
        "fitted": Step.fitted(*slopes, s1, s0, power, True),
        "diagonal": Step.fitted(*map(jnp.diag, slopes), s1, s0, power, True),
    }


KINDS = ("ddpm", "ddpm of powers", "fitted", "diagonal")


class Prediction(NamedTuple):
    """One step with the twist's limit at half the length of its noise."""

    moved: jax.Array  # the twisted step
    untwisted: jax.Array
    # Displacements from the untwisted step, in units of its noise and in its
    # coordinates: of the twisted one, and of one without a limit
    displacement: jax.Array
    unlimited: jax.Array
    shift: jax.Array  # as `Step.shift` states the displacement
    noise: jax.Array  # and as `Step.predict` does
    # log p/q, as `predict` states it and by densities; with a limit and without
    ratios: tuple[jax.Array, jax.Array]
    unlimited_ratios: tuple[jax.Array, jax.Array]


@jax.jit
def predicted(step, y, drift, score, z):
    """The `Prediction` of a step."""
    moved, twisted, log_ratio = step.predict(y, drift, score, z, 0.5)
    full, _, full_ratio = step.predict(y, drift, score, z, None)
    untwisted = step.draw(y, drift, z)
    shift = step.shift(drift, score, 0.5)

    def displacement(there):
        return step._coordinates(there - untwisted) / step.noise

    log_p = step.log_density(moved, y, drift)
    log_q = step.log_density(moved, y, drift, shift)
    full_log_p = step.log_density(full, y, drift)
    full_log_q = step.log_density(full, y, score)
    return Prediction(
        moved=moved,
        untwisted=untwisted,
        displacement=displacement(moved),
        unlimited=displacement(step.draw(y, score, z)),
        shift=shift,
        noise=step._coordinates(twisted - z),
        ratios=(log_ratio, log_p - log_q),
        unlimited_ratios=(full_ratio, full_log_p - full_log_q),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sd", "longest"), [(2.0, False), (0.01, True)], ids=["weak data", "sharp data"]
)
def test_a_step_is_twisted_towards_the_data_but_not_too_far(
    with_data, kind, sd, longest
):
    """The shift is the whole of G·∇log G, or half the length √(v·d) of the noise."""
    v, evaluate = with_data
    drift, score = evaluate(sd)
    z = jnp.array([0.5, -1.0, 0.2])
    prediction = predicted(steps()[kind], v[:3], drift, score[:3], z)
    limit = 0.5 * np.sqrt(3)
    length = np.linalg.norm(prediction.unlimited)
    expected = prediction.unlimited * min(1.0, limit / length)
    for shift in (prediction.displacement, prediction.shift, prediction.noise):
        np.testing.assert_allclose(shift, expected, rtol=2e-3, atol=2e-4)
    assert (length > limit) is np.bool_(longest)
    np.testing.assert_allclose(*prediction.ratios, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(*prediction.unlimited_ratios, rtol=1e-3, atol=1e-3)
    assert abs(prediction.ratios[0]) > 0.003


@pytest.fixture(scope="module")
def with_data():
    """A point v of level 5, and ∇_y log F and ∇_v log π there as a function of the
    standard deviation of the data."""

    @jax.jit
    def evaluate(v, density):
        evaluation = Layout.of_density(density).evaluate(density, v, 5)
        return evaluation.terms.drift, evaluation.score

    v = jnp.array([*(jnp.array([0.4, -0.2, 0.9]) / SCHEDULE.at(5).alpha), 0.3])

    def by_deviation(sd):
        prior = normal([0.3, 0.0, 0.1], 0.5, SCHEDULE)
        return evaluate(v, cp.compile(pulled, prior, jnp.float32(sd)))

    return v, by_deviation


def test_latents_are_for_the_kernel_to_move():
    density = cp.compile(
        pulled, normal([0.3, 0.0, 0.1], 0.5, SCHEDULE), jnp.float32(0.5)
    )
    sampler = cp.SMC(
        cp.ULA(1e-12),
        step=cp.ReverseStep(order=1),
        resample=Never(),
        check_levels=False,
    )
    points = np.array([[0.4, -0.2, 0.9, 0.3]])
    after = visited(sampler.prepare(density), density, points, 4)
    moved = np.abs(np.asarray(after.chains.position) - points)[0]
    assert moved[:3].min() > 1e-3
    assert moved[3] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "score",
    [(0.3, -0.1, 2.0), (np.nan,) * 3, (1e30,) * 3],
    ids=["none", "NaN", "no square"],
)
def test_without_data_or_their_finite_gradient_the_step_is_not_twisted(kind, score):
    drift = jnp.array([0.3, -0.1, 2.0])
    z = jnp.array([0.5, -1.0, 0.2])
    prediction = predicted(steps()[kind], 0 * z, drift, jnp.array(score), z)
    np.testing.assert_allclose(
        prediction.moved, prediction.untwisted, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(prediction.shift, 0.0)
    np.testing.assert_allclose(prediction.noise, 0.0, atol=1e-6)
    assert prediction.ratios[0] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_a_step_is_that_of_its_draws(kind):
    """N(y + U·G·Uᵀg, U·Q·Uᵀ), by SciPy; and with a shift that of the mean moved by
    U·√Q·shift."""
    y = np.array([0.2, -0.7, 1.1])
    g = np.array([0.5, 1.0, -2.0])
    shift = np.array([0.3, 0.1, -0.6])
    step = jax.tree.map(np.asarray, steps()[kind])
    basis = np.eye(3) if step.basis is None else step.basis
    mean = y + basis @ (step.gain * (basis.T @ g))
    covariance = basis * step.noise**2 @ basis.T
    log_density = jax.jit(Step.log_density)
    draw = jax.jit(Step.draw)
    np.testing.assert_allclose(draw(step, y, g, np.zeros(3)), mean, rtol=1e-4)
    for twist in (np.zeros(3), shift):
        twisted_mean = mean + basis @ (step.noise * twist)
        law = stats.multivariate_normal(twisted_mean, covariance, allow_singular=True)
        for z in np.random.default_rng(0).normal(size=(3, 3)):
            moved = draw(step, y, g, basis @ (twist + z))
            by_step = log_density(step, moved, y, g, twist)
            np.testing.assert_allclose(by_step, law.logpdf(moved), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_a_bridge_down_is_the_reversal_of_the_one_up(double_alone, power):
    """N(y₁)·down(y₀|y₁) = N(y₀)·up(y₁|y₀) everywhere, with N(0, s/P) at both ends and
    its score −P·y/s."""
    s1, s0 = jnp.asarray(3.0), jnp.asarray(0.5)
    powers = jnp.full(2, power)
    down = Step.bridge(s1, s0, powers)
    up = Step.bridge(s0, s1, powers)
    still = Step.bridge(s1, s1, powers)

    def score(y, s):
        return -power * y / s

    def log_marginal(y, s):
        return stats.norm(0, np.sqrt(s / power)).logpdf(y).sum()

    for y1, y0 in np.random.default_rng(0).normal(size=(5, 2, 2)):
        forth = log_marginal(y1, s1) + down.log_density(y0, y1, score(y1, s1))
        back = log_marginal(y0, s0) + up.log_density(y1, y0, score(y0, s0))
        np.testing.assert_allclose(forth, back, rtol=1e-9)
        assert np.isfinite(still.log_density(y0, y1, score(y1, s1)))


# ── fitted slopes, and order 2 ────────────────────────────────────────────────────────


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 90.0])
@pytest.mark.parametrize("width", [1e-6, 1.0])
def test_a_fitted_step_takes_a_gaussian_product_from_level_to_level(
    double_alone, power, width
):
    """K²·V₁ + Q = V₀ for V = (c + s)/P, under the slope −(P + 1)/2(c + s) of score and
    control."""
    s1, s0 = jnp.asarray(3.0), jnp.asarray(0.02)
    powers = power * jnp.ones(1)
    slopes = [-0.5 * (power + 1) / (width + s) * jnp.ones(1) for s in (s1, s0)]
    step = Step.fitted(*slopes, s1, s0, powers, True)
    variance = step.decay**2 * (width + s1) / power + step.noise**2
    np.testing.assert_allclose(variance, (width + s0) / power, rtol=1e-9)
    # Of equal Gaussians the slope at the end follows from the one at the start.
    guessed = Step.fitted(slopes[0], slopes[0], s1, s0, powers, False)
    np.testing.assert_allclose(guessed.decay, step.decay, rtol=1e-6)
    np.testing.assert_allclose(guessed.gain, (1 - step.decay) / -slopes[0], rtol=1e-6)
    assert step.decay < step.mean_decay < 1


def test_one_point_has_ddpms_step(double_alone):
    """n = s: K = s₀/s₁, Q = s₀·(s₁ − s₀)/s₁."""
    s1, s0 = jnp.asarray(3.0), jnp.asarray(0.5)
    ones = jnp.ones(2)
    step = Step.fitted(-1 / s1 * ones, -1 / s0 * ones, s1, s0, ones, True)
    ddpm = Step.ddpm(s1, s0)
    np.testing.assert_allclose(step.decay, s0 / s1, rtol=1e-12)
    np.testing.assert_allclose(step.noise**2, s0 * (s1 - s0) / s1, rtol=1e-12)
    np.testing.assert_allclose(step.gain, ddpm.gain * jnp.ones(2), rtol=1e-12)
    np.testing.assert_allclose(step.noise, ddpm.noise * jnp.ones(2), rtol=1e-12)


def test_the_second_order_is_heuns_method(double_alone):
    """Ever closer levels: the mean of the drifts at both ends and √h·z, whatever the
    factor and the slopes."""
    means = np.array([[-1.0, 0.3], [0.8, 0.0]])
    parts = dist.MultivariateNormal(means, np.array([[0.3, 0.1], [0.1, 0.2]]))
    mixture = dist.MixtureSameFamily(dist.Categorical(np.array([0.4, 0.6])), parts)
    y = np.array([0.4, -0.2])
    z = np.array([0.7, -1.1])

    @eqx.filter_jit
    def corrected(density, slopes):
        layout = Layout.of_density(density)
        k = density.num_levels // 2
        s1 = density.schedule.at(k).variance
        s0 = density.schedule.at(k - 1).variance
        h = s1 - s0
        slopes = slopes / s1
        power = 2 * jnp.ones(2)
        drift = layout.evaluate(density, y, k).terms.drift
        start = Step.fitted(slopes, slopes, s1, s0, power, False)
        step = Step.fitted(slopes, (1 + h) * slopes, s1, s0, power, True)
        there, noise, _ = start.predict(y, drift, drift, z, 0.5)
        end_drift = layout.evaluate(density, there, k - 1).terms.drift
        moved, error = step.correct(y, drift, there, end_drift, noise)
        away = step._coordinates(moved - there)
        expected_error = jnp.mean(away**2 / step.end_width)
        return h, drift, end_drift, moved, error, expected_error

    for levels, tolerance in ((400, 0.04), (4000, 0.004)):
        schedule = cp.Schedule.log_snr(levels)
        density = cp.compile(
            both, cp.Analytic(mixture, schedule), normal([0.2, 0.0], 0.7, schedule)
        )
        diagonal = np.array([-2.0, -1.5])
        dense = -(TURN * [1.5, 0.5] @ TURN.T)
        for slopes in (diagonal, dense):
            found = map(np.asarray, corrected(density, slopes))
            h, drift, end_drift, moved, *errors = found
            heun = y + 0.5 * h * (drift + end_drift) + np.sqrt(h) * z
            correction = np.linalg.norm(0.5 * h * (end_drift - drift))
            assert np.linalg.norm(moved - heun) < tolerance * correction
            np.testing.assert_allclose(*errors, rtol=1e-6)


def left_of_a_gaussian(levels, order, slope):
    """The variance of N(0, 1) at the end, as a recursion: steps are affine in y and in
    their noise."""
    schedule = cp.Schedule.log_snr(levels)
    s = np.asarray(schedule.sigma, float) ** 2 / np.asarray(schedule.alpha, float) ** 2

    def score(y, s):
        return -y / (1 + s)

    def step(s1, s0, y, z):
        first, last = slope(s1 + 0 * y), slope(s0 + 0 * y)
        start = Step.ddpm(s1, s0)
        if order == 2:
            start = Step.fitted(first, first, s1, s0, jnp.ones(1), False)
        moved, noise, _ = start.predict(y, score(y, s1), score(y, s1), z, 0.5)
        if order == 1:
            return moved[0]
        both_ends = Step.fitted(first, last, s1, s0, jnp.ones(1), True)
        corrected, _ = both_ends.correct(
            y, score(y, s1), moved, score(moved, s0), noise
        )
        return corrected[0]

    # The image of y = 1 without noise, and of noise 1 at y = 0: the two factors.
    of_levels = jax.jit(jax.vmap(step, (0, 0, None, None)))
    one = jnp.ones(1)
    decays = of_levels(s[:0:-1], s[-2::-1], one, 0 * one)
    noises = of_levels(s[:0:-1], s[-2::-1], 0 * one, one)
    variance = 1 + s[-1]
    for a, b in zip(decays, noises, strict=True):
        variance = a**2 * variance + b**2
    return float(variance) / (1 + s[0])


@pytest.mark.parametrize(
    ("levels", "first", "unfitted"), [(32, 0.737, 0.9696), (60, 0.848, 0.9910)]
)
def test_what_each_order_leaves_of_a_gaussians_variance(
    double_alone, levels, first, unfitted
):
    """All of it where its slope is fitted, but where that is next to none
    (`tuning.STEP.least_slope`); where chains are too few for a fit, and n = s stands
    for it, the missing part falls as the square of the distance of levels."""
    assert abs(left_of_a_gaussian(levels, 1, lambda s: -1 / s) - first) < 0.001
    assert abs(left_of_a_gaussian(levels, 2, lambda s: -1 / (1 + s)) - 1) < 1e-5
    assert abs(left_of_a_gaussian(levels, 2, lambda s: -1 / s) - unfitted) < 0.0005


STILL = cp.ULA(1e-6)
KEPT = {
    "weighted": (cp.SMC(step=cp.ReverseStep(order=2)), 60 + 59, 1.0),
    "independent": (
        cp.AnnealedMCMC(STILL, 1, cp.ReverseStep(control="none")),
        2 * 60 + 59,
        1.0,
    ),
    "first order": (cp.AnnealedMCMC(STILL, 1, reverse_step=FIRST_ORDER), 2 * 60, 0.85),
}


def unit_score(schedule):
    """A factor by the score of N(0, 1), which levels that preserve the variance leave
    alone."""
    return cp.Diffusion(
        lambda x, t: -x + 0 * t,
        schedule,
        event_shape=(),
        parameterization="score",
        time="log_snr",
    )


@pytest.mark.parametrize(("sampler", "cost", "variance"), KEPT.values(), ids=KEPT)
def test_the_second_order_keeps_the_variance_and_the_first_does_not(
    sampler, cost, variance
):
    """N(0, 1) over 60 levels; no kernel corrects the errors of the step."""
    density = cp.compile(single, unit_score(cp.Schedule.log_snr(60)))
    result = run(density, chains=8 * N, sampler=sampler)
    x = np.asarray(result["x"], float)
    assert_agrees(z_scores({"x": x, "x²": x**2}, {"x": 0.0, "x²": variance}))
    assert result.evaluations == cost
    if variance < 1:
        assert_disagrees(z_scores({"x²": x**2}, {"x²": 1.0}))


@pytest.mark.parametrize(
    "step",
    [slow(True), cp.ReverseStep(control="none")],
    ids=["first order", "second order"],
)
def test_densities_without_rates_are_stepped_by_their_score(step):
    """A user's energy of N(0, 1) at every level: without a rate there are no density
    terms."""
    schedule = cp.Schedule.log_snr(60)
    energy = cp.Energy(lambda x, k: -0.5 * x**2, schedule, event_shape=())
    density = cp.compile(single, energy)
    assert "feynman_kac" not in density.capabilities
    sampler = cp.AnnealedMCMC(cp.HMC(cp.Adaptive()), 5, step)
    x = np.asarray(run(density, chains=4 * N, sampler=sampler)["x"], float)
    assert_agrees(z_scores({"x": x, "x²": x**2}, {"x": 0.0, "x²": 1.0}))


def test_a_likelihood_of_the_path_needs_the_first_order():
    density = cp.compile(single, unit_score(SCHEDULE))

    def likelihood():
        cp.metrics.raise_log_likelihood(
            density, np.zeros(2), jax.random.key(0), sampler=cp.SMC()
        )

    refused(likelihood, cp.errors.CapabilityError)


def test_a_step_that_is_not_the_default_is_described():
    described = cp.SMC(step=cp.ReverseStep(1, "none")).describe()
    assert "step=ReverseStep(order=1, control='none')" in described
    assert "step" not in cp.SMC(step=cp.ReverseStep()).describe().replace("steps", "")


# ── the control ───────────────────────────────────────────────────────────────────────


def unit(size):
    """N(0, I) by an energy that knows neither its constants nor its modes' heights: its
    exponents do not grow."""
    return cp.Diffusion(
        unit_energy,
        cp.Schedule.log_snr(32),
        event_shape=(size,),
        parameterization="energy",
        time="sigma",
    )


def followed(density, x, level):
    """Drift that a step of a single chain follows, and its rate, both in x."""
    noise = density.schedule.at(level)
    descent = cp.SMC().phases(density, begin(jax.random.key(0), 1, Visits.every(9, 32)))
    evaluation = descent.layout.evaluate(density, x / noise.alpha, level)
    zero = jnp.zeros((2, x.size))
    fit = Fit(x, x, zero, zero, fixed=descent.fixed(noise))
    drift, _, rate = descent.followed(x / noise.alpha, evaluation, jnp.int32(0), fit)
    return drift / noise.alpha, rate / noise.alpha**2


def test_a_power_of_noise_has_a_constant_potential_under_the_control():
    """r + ∇·u + ⟨u, S⟩ of f² under N(0, I): the same at every x; without u it is a
    quadratic function. The drift that is followed is greater by u. Its exponent is
    constant here."""
    density = cp.compile(squared, unit(3)).untracked()
    points = jnp.array([[0.0, 0.0, 0.0], [1.0, -0.5, 0.3], [-2.0, 1.0, 0.1]])
    for level in (0, 12, 31):
        rates = [float(followed(density, x, level)[1]) for x in points]
        np.testing.assert_allclose(rates, rates[0], rtol=1e-3, atol=1e-4)
        terms = [density.evaluate({"x": x}, level).terms for x in points]
        assert np.ptp([float(of_x.rate) for of_x in terms]) > 0.3
        drift, _ = followed(density, points[1], level)
        noise = density.schedule.at(level)
        u = 0.5 * points[1] / (noise.alpha**2 + noise.sigma**2)
        np.testing.assert_allclose(drift, terms[1].drift["x"] + u, rtol=1e-5, atol=1e-6)


def test_powers_of_a_gaussian_lose_no_chain_and_have_the_right_evidence():
    """log ∫f² in ten dimensions on 32 levels, −5·log 4π, under constant exponents:
    exact to 1e-3, and no chain is ever copied."""
    density = cp.compile(squared, unit(10)).untracked()
    result = run(density, chains=64, sampler=cp.SMC(cp.MALA(0.05)))
    np.testing.assert_allclose(result.log_evidence, -5 * np.log(4 * np.pi), atol=2e-3)
    assert result.log_evidence_error < 0.02
    assert np.nanmin(result.ancestors) == 64
    sampler = cp.SMC(
        cp.MALA(0.05), step=cp.ReverseStep(control="none"), check_levels=False
    )
    assert np.nanmin(run(density, chains=64, sampler=sampler).ancestors) < 32


# ── the backward kernel ───────────────────────────────────────────────────────────────
# For Gaussians, whose weights the control makes equal, it is Bayes' rule for the step.

S1 = cp.Schedule.log_snr(40).at(20).variance
S0 = cp.Schedule.log_snr(40).at(19).variance


def ideal(s, power, covariance, mean):
    """The fit whose control, with the fixed one, is (P − 1)/2·(c + s)⁻¹·(y − m), for
    both halves."""
    whole = 0.5 * (power - 1) * np.linalg.inv(covariance + float(s) * np.eye(2))
    gain = whole - np.diag(fixed_control(jnp.full(2, power), s))

    def for_both_halves(a):
        return jnp.asarray(np.stack([a, a]), jnp.float32)

    return Fit(
        jnp.zeros(2), None, for_both_halves(gain), for_both_halves(-whole @ mean)
    )


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0, 20.0])
def test_of_powers_of_the_unit_normal(power):
    law = Backward.of_step(S1, S0, jnp.full(2, power), None, True)
    ratio = float((1 + S0) / (1 + S1))
    # The midpoint rule is less exact where the control is strong.
    rtol, rtol_of_variance = (0.02, 5e-3) if power > 10 else (1e-4, 1e-4)
    np.testing.assert_allclose(law.decay, ratio ** ((power - 1) / 2), rtol=rtol)
    variance = (1 + S1) / power * (1 - ratio**power)
    expected = np.full((2, 2), variance)
    np.testing.assert_allclose(law.root**2, expected, rtol=rtol_of_variance)


@pytest.mark.parametrize(("power", "width"), [(3.0, 1.0), (3.0, 0.05), (0.5, 3.0)])
def test_it_is_bayes_rule_for_the_step(power, width):
    """Cov(y_k, y_k') = V_k·K of the step, and R·V_k' of the backward kernel; and V_k =
    R·V_k'·Rᵀ + C."""
    variances = width**2 * np.array([1.0, 0.3])
    mean = np.array([0.7, -0.2])
    fits = tuple(ideal(s, power, TURN * variances @ TURN.T, mean) for s in (S1, S0))
    law = Backward.of_step(S1, S0, jnp.full(2, power), fits, True)
    above = (variances + float(S1)) / power
    below = (variances + float(S0)) / power
    slopes = [
        jnp.asarray(-0.5 * (power + 1) / (variances + float(s))) for s in (S1, S0)
    ]
    step = Step.fitted(*slopes, S1, S0, jnp.full(2, power), True)
    np.testing.assert_allclose(step.decay**2 * above + step.noise**2, below, rtol=1e-4)
    for half in (0, 1):
        decay = np.asarray(law.decay[half])
        root = np.asarray(law.root[half])
        shift = np.asarray(law.shift[half])
        by_bayes = np.diag(above * step.decay / below)
        np.testing.assert_allclose(TURN.T @ decay @ TURN, by_bayes, atol=2e-3)
        covariance = decay @ (TURN * below @ TURN.T) @ decay.T + root @ root.T
        variance = TURN.T @ covariance @ TURN
        atol = 2e-3 * above.min()
        np.testing.assert_allclose(variance, np.diag(above), rtol=2e-3, atol=atol)
        np.testing.assert_allclose(decay @ mean + shift, mean, atol=2e-3)


def test_without_a_finite_control_it_is_the_noise_that_enters():
    law = Backward.of_step(S1, S0, jnp.full(2, 3.0), None, False)
    y, z = jnp.array([0.3, -1.0]), jnp.array([1.0, -2.0])
    expected = y + jnp.sqrt(S1 - S0) * z
    for half in (0, 1):
        drawn = law.draw(y, z, jnp.asarray(half))
        np.testing.assert_allclose(drawn, expected, rtol=1e-5)
    fit = Fit(jnp.zeros(2), None, jnp.full((2, 2, 2), jnp.nan), jnp.zeros((2, 2)))
    law = Backward.of_step(S1, S0, jnp.full(2, 3.0), (fit, fit), True)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(law))
    np.testing.assert_allclose(law.decay, np.stack([np.eye(2)] * 2))
