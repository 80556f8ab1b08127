"""Benchmark `plain-hierarchies`: its exact laws, and default runs of two programs."""

import jax.numpy as jnp
import numpy as np
import pytest
from exact.hierarchies import PRIORS, SHAPES, STRUCTURES, log_prior
from plain_hierarchies import WRONG, exact_errors

import composeprob as cp
from sampling_cases import run


@pytest.mark.parametrize("prior", PRIORS)
def test_priors_are_those_of_the_logarithm_of_a_scale(prior):
    log_tau = np.linspace(-14.0, 9.0, 20001)
    weight = np.exp(log_prior(prior, np.exp(log_tau)))
    mass = np.trapezoid(weight, log_tau)
    assert mass == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize("name", ["two layers", "crossed"])
def test_laws_are_those_of_the_covariance_of_all_data(name):
    """Var mu given scales, and the likelihood of these, by dense linear algebra."""
    structure = STRUCTURES[name]
    data = structure.data(30, "mixed")
    y = data.y.ravel()
    rows, columns = SHAPES[30]
    of_rows = np.kron(np.eye(rows), np.ones((columns, columns)))
    of_second = np.eye(rows * columns)
    if name == "crossed":
        of_second = np.kron(np.ones((rows, rows)), np.eye(columns))
    log_scales = np.linspace(-9.0, 3.0, 121)
    logs = np.empty((121, 121))
    of_mu = np.empty((121, 121, 2))
    noise = data.noise**2 * np.eye(len(y))
    ones = np.ones(len(y))
    for i, first in enumerate(np.exp(log_scales)):
        for j, second in enumerate(np.exp(log_scales)):
            covariance = noise + first**2 * of_rows + second**2 * of_second
            root = np.linalg.cholesky(covariance)
            a, b = np.linalg.solve(root, np.stack([ones, y], axis=1)).T
            precision = a @ a + 0.25
            mean = a @ b / precision
            logs[i, j] = 0.5 * (precision * mean**2 - b @ b - np.log(precision))
            logs[i, j] -= np.log(np.diagonal(root)).sum()
            of_mu[i, j] = mean, 1 / precision
    tau = np.exp(log_scales)
    logs += log_prior("Gamma", tau)[:, None] + log_prior("Gamma", tau)
    weight = np.exp(logs - logs.max())
    weight /= weight.sum()
    mean = (weight * of_mu[..., 0]).sum()
    variance = (weight * (of_mu[..., 1] + (of_mu[..., 0] - mean) ** 2)).sum()
    laws = structure.laws("Gamma", data)
    assert laws["mu"].mean == pytest.approx(mean, abs=1e-3)
    assert laws["mu"].variance == pytest.approx(variance, rel=5e-3)
    first, second = list(laws)[1:]
    assert laws[first].mean == pytest.approx(weight.sum(1) @ log_scales, abs=5e-3)
    assert laws[second].mean == pytest.approx(weight.sum(0) @ log_scales, abs=5e-3)


def test_exact_draws_are_right_by_the_errors_of_exact_draws():
    """The squares of a log-scale have a heavy tail: by errors that 64 exact draws state
    of themselves, one set of ten is wrong."""
    structure = STRUCTURES["two layers"]
    posterior = structure.posterior("HalfNormal", structure.data(5, "sharp"))
    rng = np.random.default_rng(0)
    points = rng.choice(len(posterior.weight), (2000, 64), p=posterior.weight)
    drawn = {name: values[points] for name, values in posterior.log_scales.items()}
    noise = rng.standard_normal(points.shape)
    drawn["mu"] = posterior.mean[points] + noise * posterior.variance[points] ** 0.5
    laws = posterior.laws()
    stated = np.zeros(2000)
    exact = np.zeros(2000)
    for place, (name, law) in enumerate(laws.items()):
        away = (drawn[name] - law.mean) / law.variance**0.5
        square = away**2 - 1
        off = np.abs(square.mean(1))
        error = exact_errors(laws, 64)[2 * place + 1]
        assert square.std() / 8 == pytest.approx(error, rel=0.1)
        own = square.std(1) / 8
        stated = np.maximum(stated, off / own)
        exact = np.maximum(exact, off / np.maximum(own, error))
    assert np.mean(stated > WRONG) > 0.08
    assert np.mean(exact > WRONG) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two layers", "crossed"])
def test_sharp_data_in_two_layers_and_crossed_effects(name):
    """Programs of which a default run said mu off by 3.9 errors with the status OK, or
    left a tenth of the chains where a scale was near 0."""
    structure = STRUCTURES[name]
    data = structure.data(30, "sharp")
    arrays = [jnp.asarray(array, jnp.float32) for array in data]
    density = cp.compile(structure.program("HalfNormal"), *arrays)
    result = run(density, chains=300, sampler=None)
    assert result.status.ok
    for site, law in structure.laws("HalfNormal", data).items():
        value = np.asarray(result[site], float)
        if site != "mu":
            value = np.log(value)
        away = (value - law.mean) / law.variance**0.5
        assert abs(away.mean()) < 4 / 300**0.5
        assert abs((away**2).mean() - 1) < 4 * (away**2).std() / 300**0.5
