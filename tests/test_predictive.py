"""Data from a program: posterior and prior predictive, pointwise log-likelihoods, and
their groups in ArviZ.

No sampler runs: posterior samples are drawn from closed forms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from numpyro.infer import log_likelihood as numpyro_log_likelihood

import composeprob as cp
from composeprob.errors import CapabilityError, InvalidValueError, ShapeError
from refusals import refused
from sampling_cases import SCHEDULE, normal, single
from test_result import make
from zscores import assert_agrees, assert_disagrees, z_scores

N = 4000
SD, LAG, CORRELATION = 0.5, 0.7, 0.6
Y = np.array([0.4, 1.1, -0.3])
PAIR = np.array([0.2, 0.6])
ALPHA = float(SCHEDULE.alpha[0])


@cp.program
def model(f, y, pair, shift=0.0):
    x = cp.sample("x", f)
    scale = cp.sample("scale", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("visit", 3):
        first = cp.observe("first", dist.Normal(x, SD), y)
        cp.observe("second", dist.Normal(x + LAG * first, 0.1), y)
    covariance = jnp.array([[1.0, CORRELATION], [CORRELATION, 1.0]])
    cp.observe("pair", dist.MultivariateNormal(x * jnp.ones(2), covariance), pair)
    cp.observe("repeated", dist.Normal(shift, scale), y)
    cp.factor("soft", -0.5 * x**2)


@pytest.fixture(scope="module")
def density():
    return cp.compile(model, normal(), jnp.array(Y), jnp.array(PAIR))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(0.8, 0.6, N).astype(np.float32),
        "scale": np.full(N, 2.0, np.float32),
    }


def test_predictions_have_the_programs_law(density, samples):
    """x/α ~ N(0.8, 0.6²)/α; a later statement sees the prediction of an earlier one,
    not its datum."""
    predicted = density.predict(jax.random.key(1), samples)
    shapes = {"first": (N, 3), "second": (N, 3), "pair": (N, 2), "repeated": (N, 3)}
    assert {name: values.shape for name, values in predicted.items()} == shapes
    mean = 0.8 / ALPHA
    variance = 0.36 / ALPHA**2
    first, second, pair, repeated = (np.asarray(predicted[name]) for name in shapes)
    x = samples["x"][:, None] / ALPHA
    innovation = second - x - LAG * first
    # By name: values whose mean is tested, and the exact mean.
    pairs = {
        "first": (first, mean),
        "first²": ((first - mean) ** 2, variance + SD**2),
        "innovation": (innovation * first, 0.0),
        "innovation²": (innovation**2, 0.01),
        "pair": (pair, mean),
        "within": ((pair[:, 0] - x[:, 0]) * (pair[:, 1] - x[:, 0]), CORRELATION),
        "shared": ((first - mean) * (x - mean), variance),
        "uncorrelated": ((first[:, 0] - x[:, 0]) * (first[:, 1] - x[:, 0]), 0.0),
        "repeated²": (repeated**2, 4.0),
        "repeated uncorrelated": (repeated[:, 0] * repeated[:, 1], 0.0),
    }
    values = {name: values for name, (values, _) in pairs.items()}
    exact = {name: exact for name, (_, exact) in pairs.items()}
    assert_agrees(z_scores(values, exact))
    # As if the data were used.
    assert_disagrees(z_scores({"data": second - x - LAG * Y}, {"data": 0.0}))


def test_log_likelihood_is_that_of_each_number(density, samples):
    log_likelihood = density.log_likelihood(samples)
    x = samples["x"] / ALPHA
    first = dist.Normal(x[:, None], SD).log_prob(Y)
    second = dist.Normal(x[:, None] + LAG * Y, 0.1).log_prob(Y)
    np.testing.assert_allclose(log_likelihood["first"], first, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_likelihood["second"], second, rtol=1e-4, atol=0.01)
    assert log_likelihood["pair"].shape == (N,)
    assert log_likelihood["repeated"].shape == (N, 3)
    assert "soft" not in log_likelihood
    np.testing.assert_array_equal(density.observed()["first"], np.float32(Y))


def test_the_prior_is_the_program_without_its_observations(density):
    prior = cp.prior(density)
    position = {"x": jnp.array(0.7), "scale": jnp.array(0.2)}
    log_density = jax.jit(lambda d, x, k: d.log_density(x, k))
    for level in (0, 20):
        sd = jnp.sqrt(SCHEDULE.alpha[level] ** 2 + SCHEDULE.sigma[level] ** 2)
        of_x = dist.Normal(0.0, sd).log_prob(0.7)
        expected = of_x + dist.Normal(0.0, 0.3).log_prob(0.2)
        of_prior = log_density(prior, position, level)
        np.testing.assert_allclose(of_prior, expected, rtol=1e-5)
        assert abs(log_density(density, position, level) - expected) > 0.1
    assert "first" not in str(prior)
    latents = {"x": jnp.zeros(5), "scale": jnp.ones(5)}
    predicted = prior.predict(jax.random.key(0), latents)
    assert predicted["first"].shape == (5, 3)
    alone = cp.compile(single, normal())
    assert cp.prior(alone) is alone


def test_numpyros_predictive_agrees():
    """A model of NumPyro's statements alone, which both take."""

    def schools(y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfNormal(2.0))
        with numpyro.plate("school", 3):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.StudentT(5.0, theta, tau), obs=y)

    rng = np.random.default_rng(3)
    tau = rng.uniform(0.5, 2, N)
    posterior = {
        "mu": rng.normal(size=N),
        "tau": tau,
        "theta": rng.normal(np.arange(3), size=(N, 3)),
    }
    posterior = {
        name: jnp.asarray(value, jnp.float32) for name, value in posterior.items()
    }
    density = cp.compile(cp.program(schools), jnp.array(Y))
    ours = np.asarray(density.predict(jax.random.key(0), posterior)["y"])
    theirs = np.asarray(Predictive(schools, posterior)(jax.random.key(1))["y"])
    values = {}
    for j in range(3):
        values[f"y{j}"] = ours[:, j] - theirs[:, j]
        values[f"|y{j}|"] = np.abs(ours[:, j] - j) - np.abs(theirs[:, j] - j)
    assert_agrees(z_scores(values, dict.fromkeys(values, 0.0)))
    ours = density.log_likelihood(posterior)["y"]
    theirs = numpyro_log_likelihood(schools, posterior, y=jnp.array(Y))["y"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_predictions_that_are_refused(density, samples):
    key = jax.random.key(0)
    alone = cp.compile(single, normal())
    refused(
        lambda: alone.predict(key, {"x": jnp.zeros(4)}),
        CapabilityError,
    )
    refused(
        lambda: density.predict(key, {"x": samples["x"]}),
        ShapeError,
    )
    refused(
        lambda: density.predict(key, samples | {"scale": 1.0}),
        ShapeError,
    )
    refused(
        lambda: make(samples).predictive(key),
        InvalidValueError,
    )


def result_of(density, samples, **changes):
    changes = {"log_weights": np.zeros(len(samples["x"])), **changes}
    return make(samples, density=density, dims=dict(density.graph.dims), **changes)


def test_weighted_samples_count_by_their_weights(density):
    """Half of the samples lie at 3 and have no weight."""
    low = np.arange(400) % 2 == 0
    samples = {
        "x": np.where(low, 0.0, 3.0).astype(np.float32),
        "scale": np.ones(400, np.float32),
    }
    result = result_of(density, samples, log_weights=np.where(low, 0.0, -50.0))
    first = result.predictive(jax.random.key(2))["first"]
    assert first.shape == (400, 3)
    assert_agrees(z_scores({"first": first}, {"first": 0.0}))


def test_arviz_has_plates_as_axes_and_every_group(density, samples):
    import arviz

    result = result_of(density, samples)
    data = result.to_arviz(
        dims={"pair": ("sensor",)},
        coords={"visit": ["a", "b", "c"]},
        predictive=jax.random.key(0),
    )
    assert data.observed_data["first"].dims == ("visit",)
    assert data.observed_data["pair"].dims == ("sensor",)
    assert data.log_likelihood["pair"].dims == ("chain", "draw")  # one event
    assert data.posterior_predictive["pair"].dims == ("chain", "draw", "sensor")
    assert data.log_likelihood["second"].sel(visit="b").shape == (1, N)
    predicted = result.predictive(jax.random.key(0))["first"]
    np.testing.assert_array_equal(data.posterior_predictive["first"][0], predicted)
    assert arviz.summary(data, kind="stats").shape[0] == 2
    loo = arviz.loo(data, var_name="first", pointwise=True)
    # ArviZ 1.0 has another name for it.
    of_visits = loo.loo_i if hasattr(loo, "loo_i") else loo.elpd_i
    assert of_visits.dims == ("visit",)
    other = result_of(density, {**samples, "x": samples["x"] + 3.0}).to_arviz()
    table = arviz.compare({"right": data, "wrong": other}, var_name="first")
    assert table.index[0] == "right"


def test_arviz_without_a_density_has_the_samples(density, samples, tmp_path):
    loaded = cp.Result.load(result_of(density, samples).save(tmp_path / "result"))
    assert loaded.about.dims["first"] == ("visit",)
    data = loaded.to_arviz()
    assert "posterior" in data
    assert "log_likelihood" not in data


def test_axes_that_do_not_fit_are_refused(density, samples):
    result = result_of(density, samples)
    refused(
        lambda: result.to_arviz(dims={"z": ("a",)}),
        InvalidValueError,
    )
    refused(
        lambda: result.to_arviz(dims={"pair": ("a", "b")}),
        InvalidValueError,
    )
    refused(
        lambda: result.to_arviz(coords={"visit": ["a", "b"]}),
        InvalidValueError,
        "'visit'.* 2 .*'first'.* 3",
    )
