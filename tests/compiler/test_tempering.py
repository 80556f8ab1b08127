"""The powers of likelihoods above level 0, the points at which they are evaluated, and
the values that stand in for their zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import expit

import composeprob as cp
from composeprob.compiler import tempering as module
from messages import check_wording
from sampling_cases import measured, normal, weighed

SCHEDULE = cp.Schedule.log_snr(30)
BLUR = np.asarray(SCHEDULE.sigma) / np.asarray(SCHEDULE.alpha)
LAMBDA = np.asarray(SCHEDULE.log_snr, float)
ALPHA = np.asarray(SCHEDULE.alpha, float)
AT, Y, SD = 0.7, 1.2, 0.5


def tempering(log_weight, sd=1.0, mean=0.0):
    density = cp.compile(
        weighed, cp.Analytic(dist.Normal(mean, sd), SCHEDULE), log_weight
    )
    (term,) = density.evaluator.likelihood.evaluated
    return term.tempering


@pytest.mark.parametrize(
    ("s", "power_of"), [(0.3, np.exp(-2.0)), (0.01, 0.01)], ids=["blunt", "sharp"]
)
def test_the_power_is_that_of_an_instrument_as_sharp(s, power_of):
    power = tempering(lambda x: -0.5 * (x / s) ** 2).power
    expected = (power_of**2 + BLUR[0] ** 2) / (power_of**2 + BLUR**2)
    np.testing.assert_allclose(power, expected, rtol=0.02)
    assert power[0] == 1.0


def test_the_power_follows_the_slope_where_the_prior_is():
    """y = x² seen with noise s is as sharp as s/(2·mean), and sharper still where noise
    carries x further out."""
    s, mean = 0.1, 20.0

    def log_weight(x):
        return dist.Normal(x**2, s).log_prob(mean**2)

    power = np.asarray(tempering(log_weight, 0.1, mean).power)
    sharp = (s / (2 * mean)) ** 2
    near = BLUR < 1
    expected = (sharp + BLUR[0] ** 2) / (sharp + BLUR**2)
    np.testing.assert_allclose(power[near], expected[near], rtol=0.25)
    assert power[-1] < 0.2 * expected[-1]
    assert np.all(np.diff(power) <= 0)


def test_a_wall_that_divides_a_space_stands_at_every_level():
    powers = tempering(lambda x: jnp.where(x > 0, 0.0, -jnp.inf))
    assert np.all(np.isneginf(powers.stand_in["w"]))


def test_a_small_hole_opens_where_chains_can_be_in_it():
    offset = -300.0
    powers = tempering(lambda x: jnp.where((x > 0) & (x < 1), offset, -jnp.inf))
    stand_in = np.asarray(powers.stand_in["w"])
    stands = np.isneginf(stand_in)
    assert np.all(stands[BLUR < 0.3])
    assert not np.any(stands[BLUR > 5.0])
    # The walls are level with the hole.
    np.testing.assert_allclose(stand_in[~stands], offset)
    noise = SCHEDULE.at(29)
    outside = powers.log_likelihood("w", jnp.asarray(-jnp.inf), noise)
    inside = powers.log_likelihood("w", jnp.asarray(offset), noise)
    np.testing.assert_allclose(outside, inside, rtol=1e-6)


def test_only_the_look_at_a_program_is_compiled_for_that_program(monkeypatch):
    traces = []
    powers = module._powers

    def counted(*arguments):
        traces.append(1)
        return powers(*arguments)

    monkeypatch.setattr(module, "_powers", counted)
    tempering(lambda x: -(x**2))
    traces.clear()
    tempering(lambda x: -(x**4))
    assert not traces


def test_new_data_reuse_compiled_code():
    f = normal(schedule=SCHEDULE)

    def structure(y):
        density = cp.compile(
            measured, f, lambda x: dist.StudentT(3.0, x, 0.2), jnp.asarray(y)
        )
        return jax.tree.structure(density)

    # The structure of a density holds the trace of its program.
    assert structure(0.1) == structure(3.0)


def test_what_falls_as_an_exponential_sees_points_near_the_prior():
    """Poisson counts of mean exp(2x) are exp(−10¹⁸) at x/α = 20, which no power
    corrects."""

    def log_weight(x):
        return dist.Poisson(jnp.exp(2 * x)).log_prob(7.0)

    near = tempering(log_weight, sd=0.8, mean=0.3).near
    assert near is not None
    for blur in (0.0, 1.0, 1e3):
        # The mean of x₀ under N(0.3, 0.8²), seen with that blur.
        expected = 0.3 + 0.64 * (5.0 - 0.3) / (0.64 + blur**2)
        point = near({"x": jnp.asarray(5.0)}, jnp.asarray(blur))["x"]
        np.testing.assert_allclose(point, expected, rtol=1e-5)
    prior = dist.Normal(0.3, 0.8)
    density = cp.compile(weighed, cp.Analytic(prior, SCHEDULE), log_weight)
    check_wording(str(density))
    for level in (0, 15, 29):
        values = jax.vmap(lambda x, k=level: density.log_density({"x": x}, k))(
            jnp.linspace(-4.0, 4.0, 9)
        )
        assert np.all(np.asarray(values) > -1e6)
    # Level 0 is the posterior at x/α here too.
    x = jnp.asarray(0.9)
    density = density.on(cp.Schedule.log_snr(30, max=14.0))
    log_density = density.log_density({"x": x * density.schedule.alpha[0]}, 0)
    np.testing.assert_allclose(
        log_density, prior.log_prob(x) + log_weight(x), atol=1e-3
    )


NEAR = {
    f"power {power}": lambda x, power=power: -((x / 0.1) ** power)
    for power in (2, 4, 6)
}
NEAR["wall"] = lambda x: jnp.where(x > 0, 0.0, -jnp.inf)
NEAR["walls"] = lambda x: jnp.where((x > 0) & (x < 1), 0.0, -jnp.inf)


@pytest.mark.parametrize("name", NEAR)
def test_what_falls_as_a_power_or_is_a_wall_sees_x_itself(name):
    assert tempering(NEAR[name]).near is None


@cp.program
def seen(f, anneal, latent):
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.0, 1.0)) if latent else 0.0
    cp.observe("y", dist.Normal(x + m, SD), Y, anneal=anneal)


POWER = expit(LAMBDA - 4) / expit(LAMBDA[0] - 4)
"""Powers of observations that are not sharper than s = 0.14."""


@pytest.mark.parametrize("latent", [False, True], ids=["data alone", "with a latent"])
@pytest.mark.parametrize("policy", ["tempered", "denoised"])
def test_powers_are_those_of_the_docs(policy, latent):
    """Under N(0, 1) the Tweedie mean of x_k is α_k·x."""
    density = cp.compile(
        seen, cp.Analytic(dist.Normal(0.0, 1.0), SCHEDULE), policy, latent
    )
    position = {"x": jnp.float32(AT)}
    if latent:
        position["m"] = jnp.float32(0.0)
    potential = jax.jit(
        jax.vmap(lambda k: density.evaluator(position, k).terms.log_potential)
    )
    log_potential = np.asarray(potential(jnp.arange(SCHEDULE.num_levels)), float)
    point = ALPHA * AT if policy == "denoised" else AT / ALPHA
    point[0] = AT / ALPHA[0]  # level 0 is the posterior under every policy
    expected = POWER * np.asarray(dist.Normal(point, SD).log_prob(Y), float)
    np.testing.assert_allclose(log_potential, expected, rtol=2e-3, atol=1e-5)
