"""The reverse step: DDPM at η = 1, DDIM at η = 0, and for a Gaussian the exact law in between."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.samplers.reverse import LEAN, leaning, log_ratio_of_leaning, reverse_law, reverse_step, second_order
from sampling_cases import N, normal, single
from zscores import assert_agrees, assert_disagrees, z_scores

K = 40
SCHEDULE = cp.Schedule.cosine(K)


@pytest.fixture(scope="module")
def density():
    return cp.compile(single, normal(0.3, 0.5, SCHEDULE))


def marginal(level):
    """Mean and variance of the factor at a level."""
    alpha, sigma = float(SCHEDULE.alpha[level]), float(SCHEDULE.sigma[level])
    return alpha * 0.3, alpha**2 * 0.25 + sigma**2


@pytest.mark.parametrize("level", [1, 17, K - 1])
def test_is_ddpm_and_ddim(density, level):
    x, score = 0.7, -1.3
    a, a_next = float(SCHEDULE.alpha[level]), float(SCHEDULE.alpha[level - 1])
    s, s_next = float(SCHEDULE.sigma[level]), float(SCHEDULE.sigma[level - 1])

    def step(seed, eta):
        return reverse_step(jax.random.key(seed), {"x": jnp.float32(x)}, {"x": jnp.float32(score)}, density, level, eta)

    ddim = step(0, 0.0)["x"]
    assert ddim == step(1, 0.0)["x"]
    assert np.isclose(float(ddim), a_next / a * (x + s**2 * score) - s_next * s * score, rtol=1e-4)

    beta = 1 - (a / a_next) ** 2
    draws = jax.jit(jax.vmap(lambda seed: step(seed, 1.0)["x"]))(jnp.arange(20_000))
    mean = (x + beta * score) / np.sqrt(1 - beta)  # Ho et al. 2020, equations 7 and 11
    variance = beta * s_next**2 / s**2
    assert_agrees(z_scores({"mean": draws, "variance": (draws - mean) ** 2}, {"mean": mean, "variance": variance}))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_law_on_a_gaussian_follows_the_recursion(density, eta):
    """With an affine score the chain stays Gaussian: its mean and variance obey a recursion, level by level."""
    result = cp.infer(density, jax.random.key(0), num_chains=8 * N, sampler=cp.Ancestral(eta=eta), progress=False)
    mean, variance = 0.0, float(SCHEDULE.sigma[K - 1]) ** 2
    for k in range(K - 1, 0, -1):
        a, a_next = float(SCHEDULE.alpha[k]), float(SCHEDULE.alpha[k - 1])
        s, s_next = float(SCHEDULE.sigma[k]), float(SCHEDULE.sigma[k - 1])
        noise = eta**2 * (1 - (a / a_next) ** 2) * s_next**2 / s**2
        m, v = marginal(k)
        on_score = a_next / a * s**2 - np.sqrt(max(s_next**2 - noise, 0)) * s
        slope, shift = a_next / a - on_score / v, on_score * m / v
        mean, variance = slope * mean + shift, slope**2 * variance + noise
    x = np.asarray(result["x"], float)
    assert_agrees(z_scores({"mean": x, "variance": (x - mean) ** 2}, {"mean": mean, "variance": variance}))
    exact_mean, exact_variance = marginal(0)  # and the recursion ends near the factor's own law
    assert abs(mean - exact_mean) < 0.05
    assert abs(variance / exact_variance - 1) < 0.15


def test_a_non_finite_score_leaves_the_chain_where_it_is(density):
    moved = reverse_step(jax.random.key(0), {"x": jnp.float32(0.7)}, {"x": jnp.float32(jnp.nan)}, density, 5)
    assert float(moved["x"]) == pytest.approx(0.7)


@cp.program
def pulled(f, sd):
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x + m, sd).to_event(1), jnp.ones(3), anneal="tempered")


@pytest.fixture(scope="module")
def with_data():
    return lambda sd: cp.compile(pulled, normal([0.3, 0.0, 0.1], 0.5, SCHEDULE), jnp.float32(sd))


POINT = {"x": jnp.array([0.4, -0.2, 0.9]), "m": jnp.array(0.3)}


@pytest.mark.parametrize(("sd", "longest"), [(2.0, False), (0.01, True)], ids=["weak data", "sharp data"])
def test_a_weighed_step_leans_towards_the_data_but_not_too_far(with_data, sd, longest):
    level, compiled = 5, with_data(sd)
    evaluation = compiled.evaluator(POINT, level)
    followed = leaning(POINT, evaluation.parts.drift, evaluation.score, compiled, level)
    plain, variance = reverse_law(POINT, evaluation.parts.drift, compiled, level)
    full, _ = reverse_law(POINT, evaluation.score, compiled, level)
    leaned, _ = reverse_law(POINT, followed, compiled, level)
    shift, whole = np.asarray(leaned["x"] - plain["x"]), np.asarray(full["x"] - plain["x"])
    limit = LEAN * np.sqrt(3 * float(variance))
    expected = whole * min(1.0, limit / np.linalg.norm(whole))
    np.testing.assert_allclose(shift, expected, rtol=1e-3, atol=1e-6)
    assert (np.linalg.norm(whole) > limit) is np.bool_(longest)
    assert followed["m"] == 0.0  # latents are for the kernel to move

    moved = {"x": plain["x"] + jnp.array([0.02, -0.01, 0.03]), "m": POINT["m"]}
    laws = [stats.norm(np.asarray(law["x"], float), np.sqrt(float(variance))) for law in (plain, leaned)]
    p, q = (law.logpdf(np.asarray(moved["x"], float)).sum() for law in laws)
    found = log_ratio_of_leaning(POINT, evaluation.parts.drift, followed, moved, compiled, level)
    np.testing.assert_allclose(found, p - q, rtol=1e-3, atol=1e-5)


def test_without_data_the_step_is_the_plain_one(density):
    position = {"x": jnp.float32(0.4)}
    evaluation = density.evaluator(position, 5)
    followed = leaning(position, evaluation.parts.drift, evaluation.score, density, 5)
    assert followed["x"] == evaluation.parts.drift["x"]
    moved = {"x": jnp.float32(0.5)}
    assert log_ratio_of_leaning(position, evaluation.parts.drift, followed, moved, density, 5) == 0.0


def test_a_gradient_that_is_not_finite_is_not_followed(with_data):
    compiled = with_data(1.0)
    evaluation = compiled.evaluator(POINT, 5)
    broken = dataclasses.replace(evaluation, score={**evaluation.score, "x": jnp.full(3, jnp.nan)})
    np.testing.assert_array_equal(
        leaning(POINT, broken.parts.drift, broken.score, compiled, 5)["x"], evaluation.parts.drift["x"]
    )


@eqx.filter_jit
def to_second_order(compiled, position, k):
    """The score, the moved position and the score there, and what the second order adds."""
    score = compiled.evaluator(position, k).parts.drift
    plain, variance = reverse_law(position, score, compiled, k)
    moved = {"x": plain["x"] + jnp.sqrt(variance) * jnp.array([0.7, -1.1])}
    at_end = compiled.evaluator(moved, k - 1).parts.drift
    found = second_order(moved, at_end, position, score, compiled, k)["x"] - moved["x"]
    return score["x"], moved["x"], at_end["x"], found


def test_second_order_is_heuns_method():
    """Ever closer levels: x̂_0 enters by the average of both ends, whatever the factor."""
    for levels, tolerance in ((400, 0.03), (4000, 0.003)):
        schedule = cp.Schedule.log_snr(levels)
        parts = dist.MultivariateNormal(jnp.array([[-1.0, 0.3], [0.8, 0.0]]), jnp.array([[0.3, 0.1], [0.1, 0.2]]))
        mixture = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.4, 0.6])), parts)
        compiled = cp.compile(single, cp.Analytic(mixture, schedule) * normal([0.2, 0.0], 0.7, schedule))
        k = levels // 2
        x = jnp.array([0.2, -0.1])
        score, moved, at_end, found = to_second_order(compiled, {"x": x}, jnp.int32(k))

        (a, s), (a_next, s_next) = ((float(schedule.alpha[i]), float(schedule.sigma[i])) for i in (k, k - 1))
        began, ended = (x + s**2 * score) / a, (moved + s_next**2 * at_end) / a_next
        weight = a_next * (1 - (a / a_next) ** 2) / s**2  # of x_0 in the mean of x_{k−1}, Ho et al. 2020, equation 7
        expected = 0.5 * weight * np.asarray(ended - began)
        assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("levels", "first", "second"), [(32, 0.737, 0.002), pytest.param(60, 0.848, 0.0003, marks=pytest.mark.slow)]
)
def test_what_each_order_leaves_of_a_gaussians_variance(levels, first, second):
    """Steps are affine in x and in their noise, so that variances follow a recursion: here that of N(0, 1)."""
    schedule = cp.Schedule.log_snr(levels)
    compiled = cp.compile(single, normal(0.0, 1.0, schedule))

    def slopes(k, x, noise, order):
        position = {"x": x}
        evaluation = compiled.evaluator(position, k)
        mean, variance = reverse_law(position, evaluation.parts.drift, compiled, k)
        moved = {"x": mean["x"] + jnp.sqrt(variance) * noise}
        ended = compiled.evaluator(moved, k - 1).parts.drift
        return (second_order(moved, ended, position, evaluation.parts.drift, compiled, k) if order == 2 else moved)["x"]

    zero, one = jnp.zeros(()), jnp.ones(())
    for order, left in ((1, first), (2, 1.0)):
        of = jax.vmap(lambda k, order=order: (slopes(k, one, zero, order), slopes(k, zero, one, order)))
        on_x, on_noise = (np.asarray(part, float)[::-1] for part in jax.jit(of)(jnp.arange(1, levels)))
        variance = 1.0
        for a, b in zip(on_x, on_noise, strict=True):
            variance = a**2 * variance + b**2
        assert abs(variance - left) < (0.001 if order == 1 else second)


@pytest.mark.parametrize("order", [1, 2])
def test_second_order_keeps_the_variance(order):
    """No kernel mends what the step does: N(0, 1) is left with 0.85 of its variance after 60 levels, or with all."""
    schedule = cp.Schedule.log_snr(60)
    score = cp.Diffusion(lambda x, t: -x + 0 * t, schedule, event_shape=(), parameterization="score", time="log_snr")
    sampler = cp.SMC(second_order=order == 2)
    result = cp.infer(cp.compile(single, score), jax.random.key(0), num_chains=8 * N, sampler=sampler, progress=False)
    x = np.asarray(result["x"], float)
    if order == 2:
        assert_agrees(z_scores({"x": x, "x²": x**2}, {"x": 0.0, "x²": 1.0}))
        assert result.evaluations == 60 + 59
    else:
        levels = jax.device_get(schedule.levels)
        variance = 1.0
        for k in range(59, 0, -1):
            beta = 1 - (levels.alpha[k] / levels.alpha[k - 1]) ** 2
            variance = (1 - beta) * variance + beta * levels.sigma[k - 1] ** 2 / levels.sigma[k] ** 2
        assert_agrees(z_scores({"x": x, "x²": x**2}, {"x": 0.0, "x²": variance}))
        assert_disagrees(z_scores({"x²": x**2}, {"x²": 1.0}))
        assert result.evaluations == 60


def test_a_likelihood_of_the_path_needs_the_first_order():
    score = cp.Diffusion(lambda x, t: -x + 0 * t, SCHEDULE, event_shape=(), parameterization="score", time="log_snr")
    with pytest.raises(cp.errors.CapabilityError, match="second_order=False"):
        cp.metrics.raise_log_likelihood(cp.compile(single, score), np.zeros(2), jax.random.key(0), sampler=cp.SMC())
