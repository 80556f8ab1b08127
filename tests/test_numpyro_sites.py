"""`cp.as_distribution`: factors as sites of NumPyro's own models, with log-densities
and draws in closed form.

The factor is N(0, I)·N((1, 0), I), which is N((½, 0), ½·I) up to its normaliser; level
0 adds a little noise to each. Refusals are rows of tests/test_mistakes.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import potential_energy

import composeprob as cp
from sampling_cases import SCHEDULE, normal
from zscores import assert_agrees, z_scores

N = 1000
MEAN = np.array([0.5, 0.0])
SD = np.sqrt(0.5)
SAMPLER = cp.AnnealedMCMC(cp.MALA(lambda schedule: 0.5 * schedule.sigma**2), 4)
PRODUCT = normal([0.0, 0.0]) * normal([1.0, 0.0])


@pytest.fixture(scope="module")
def prior():
    return cp.as_distribution(PRODUCT, sampler=SAMPLER)


def model(prior, y=None):
    x = numpyro.sample("x", prior)
    s = numpyro.sample("s", dist.LogNormal(-0.5, 0.2))
    with numpyro.plate("copy", 3):
        z = numpyro.sample("z", prior)
    numpyro.sample("y", dist.Normal(x + z.sum(0), s), obs=y)


def log_probability(prior, values):
    return -potential_energy(model, (prior, jnp.array([1.0, -0.5])), {}, values)


def test_log_prob_and_its_gradient_are_the_factors_up_to_one_constant(prior):
    """In a model with other sites, plates and data: the same as with the closed form,
    but for 4 constants."""
    exact = dist.Normal(jnp.array(MEAN), SD).to_event(1)
    keys = jax.random.split(jax.random.key(0), 3)
    values = {
        "x": jax.random.normal(keys[0], (4, 2)),
        "z": jax.random.normal(keys[1], (4, 3, 2)),
        "s": jax.random.normal(keys[2], (4,)),
    }

    def difference(values):
        log_probability_and_slope = jax.value_and_grad(log_probability, 1)
        actual = log_probability_and_slope(prior, values)
        expected = log_probability_and_slope(exact, values)
        return jax.tree.map(jnp.subtract, actual, expected)

    constants, slopes = jax.jit(jax.vmap(difference))(values)
    # N(0; 1, 2) and N(0; 0, 2): the normalisers of both entries' products.
    wide = dist.Normal(0.0, np.sqrt(2))
    normaliser = wide.log_prob(1.0) + wide.log_prob(0.0)
    np.testing.assert_allclose(constants, 4 * normaliser, atol=1e-3)
    assert all(np.abs(slope).max() < 0.01 for slope in slopes.values())
    assert prior.log_prob(values["z"]).shape == (4, 3)
    assert prior.event_shape == (2,)
    assert prior.support.event_dim == 1


def test_log_prob_is_that_of_the_cleanest_level():
    """There are few levels, and the next one is much noisier."""
    coarse = cp.Schedule.log_snr(3)
    law = dist.Normal(jnp.zeros(2), 0.1).to_event(1)
    prior = cp.as_distribution(cp.Analytic(law, coarse) ** 2)
    near, far = prior.log_prob(jnp.array([[0.0, 0.0], [0.2, 0.1]]))
    variance = 0.1**2 + (coarse.sigma[0] / coarse.alpha[0]) ** 2
    np.testing.assert_allclose(near - far, 0.05 / variance, rtol=1e-3)


@pytest.mark.slow
def test_predictive_draws_what_the_sampler_draws(prior):
    """Every site and every copy in a plate has its own draws, of the right law."""
    predictive = Predictive(model, num_samples=N, parallel=True)
    drawn = predictive(jax.random.PRNGKey(1), prior)
    x = np.asarray(drawn["x"]) - MEAN
    z = np.asarray(drawn["z"]) - MEAN
    assert z.shape == (N, 3, 2)
    values = {
        "x0": x[:, 0],
        "x1": x[:, 1],
        "z": z,
        "xx": x**2,
        "zz": z**2,
        "x z": x[:, None] * z,
        "z z": z[:, 0] * z[:, 1],
        "x0 x1": x[:, 0] * x[:, 1],
    }
    expected = dict.fromkeys(values, 0.0) | {"xx": SD**2, "zz": SD**2}
    assert_agrees(z_scores(values, expected))


@pytest.mark.slow
def test_draws_under_transformations():
    prior = cp.as_distribution(PRODUCT, sampler=cp.Ancestral())
    key = jax.random.key(5)
    direct = prior.sample(key, (2, 3))
    assert direct.shape == (2, 3, 2)
    compiled = jax.jit(prior.sample, static_argnums=1)(key, (2, 3))
    np.testing.assert_allclose(direct, compiled, atol=1e-4)
    assert prior.sample(key, (0,)).shape == (0, 2)
    mapped = jax.vmap(jax.vmap(prior.sample))(jax.random.split(key, (2, 3)))
    assert mapped.shape == (2, 3, 2)
    assert len(np.unique(mapped)) == mapped.size
    of_more_chains = cp.as_distribution(
        PRODUCT, sampler=cp.Ancestral(), num_chains=20
    ).sample(key, (6,))
    assert len(np.unique(of_more_chains)) == of_more_chains.size == 12


def test_an_analytic_factor_may_depend_on_latents():
    """It is its own normalised distribution: hierarchical models are NumPyro's own."""

    def of_factor(m, s):
        return cp.as_distribution(cp.Analytic(dist.Normal(m, s), SCHEDULE))

    def exact(m, s):
        noise = SCHEDULE.at(0)
        variance = (noise.alpha * s) ** 2 + noise.sigma**2
        return dist.Normal(noise.alpha * m, jnp.sqrt(variance))

    def hierarchy(law):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        x = numpyro.sample("x", law(m, s))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=0.4)

    @functools.partial(jax.jit, static_argnums=0)
    def energy_and_slope(law, values):
        return jax.value_and_grad(potential_energy, 3)(hierarchy, (law,), {}, values)

    values = {"m": jnp.array(0.4), "s": jnp.array(-0.3), "x": jnp.array(0.9)}
    energy, slope = energy_and_slope(of_factor, values)
    expected_energy, expected_slope = energy_and_slope(exact, values)
    np.testing.assert_allclose(energy, expected_energy, rtol=1e-5)
    for name in values:
        np.testing.assert_allclose(slope[name], expected_slope[name], rtol=1e-4)
    drawn = Predictive(hierarchy, num_samples=N)(jax.random.key(0), of_factor)
    residual = np.asarray((drawn["x"] - drawn["m"]) / drawn["s"])
    assert_agrees(z_scores({"r": residual, "rr": residual**2}, {"r": 0.0, "rr": 1.0}))


def test_inside_a_program_it_is_the_factor(prior):
    @cp.program
    def nested():
        numpyro.sample("x", prior)

    density = cp.compile(nested)
    assert density.sites["x"].kind == "noised"
    assert len(density.described.offers) == 2
