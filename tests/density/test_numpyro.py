"""`density.to_numpyro`: the arguments of NumPyro's samplers, which for a program of
NumPyro's are NumPyro's own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import initialize_model

import composeprob as cp
from composeprob.errors import CapabilityError, InvalidValueError, LevelError
from refusals import refused
from sampling_cases import SCHEDULE, modes, single

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([-1.0, 1.0])
SDS = np.array([0.5, 0.8])
SD = 0.7
Y = np.array([0.2, 0.9])


@cp.program
def model(f, y):
    x = cp.sample("x", f)
    m = cp.sample("m", dist.Normal(0.0, 0.6))
    numpyro.deterministic("total", x + m)
    cp.observe("y", dist.Normal(x + m, SD), y)


@pytest.fixture(scope="module")
def target():
    return cp.compile(
        model, cp.Analytic(modes(WEIGHTS, MEANS, SDS), SCHEDULE), jnp.array(Y)
    ).to_numpyro()


def test_the_gradient_is_the_score_and_samples_are_those_of_the_program(target):
    position = {"x": jnp.array(0.3), "m": jnp.array(-0.2)}

    @jax.jit
    def derivatives(position):
        reverse = jax.value_and_grad(target.potential_fn)(position)
        # NumPyro's forward_mode_differentiation=True
        forward = jax.jacfwd(target.potential_fn)(position)
        return reverse, forward, target.density.value_and_score(position, 0)

    (value, gradient), forward, (log_density, score) = derivatives(position)
    np.testing.assert_allclose(value, -log_density, rtol=1e-6)
    for name in score:
        np.testing.assert_allclose(
            [gradient[name], forward[name]], -score[name], rtol=1e-5
        )
    samples = {
        name: float(value) for name, value in target.postprocess_fn(position).items()
    }
    assert samples == pytest.approx(
        {"x": 0.3, "m": -0.2, "total": 0.3 / float(SCHEDULE.alpha[0]) - 0.2}
    )


def test_a_program_of_numpyro_alone_has_numpyros_own_potential():
    """The same potential, the same constraints: so NUTS on it is NumPyro's own NUTS."""

    def schools(y, sd):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("school", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sd), obs=y)
        numpyro.deterministic("effect", theta - mu)

    data = jnp.array([28.0, 8.0, -3.0]), jnp.array([15.0, 10.0, 16.0])
    numpyros = initialize_model(jax.random.key(0), schools, model_args=data)
    target = cp.compile(cp.program(schools), *data).to_numpyro()
    starts = target.init_params(jax.random.key(2), 5)
    potentials = jax.jit(jax.vmap(target.potential_fn))(starts)
    expected_potentials = jax.jit(jax.vmap(numpyros.potential_fn))(starts)
    np.testing.assert_allclose(potentials, expected_potentials, rtol=1e-5)
    assert np.ptp(potentials) > 1
    position = target.init_params(jax.random.key(2))
    expected = jax.jit(numpyros.postprocess_fn)(position)
    samples = jax.jit(target.postprocess_fn)(position)
    assert samples.keys() == expected.keys() == {"mu", "tau", "theta", "effect"}
    for name, value in expected.items():
        np.testing.assert_allclose(samples[name], value, rtol=1e-6)


def test_scores_alone_and_a_level_that_does_not_exist_are_refused(target):
    density = cp.compile(
        single, cp.Diffusion(lambda x, t: x, SCHEDULE, event_shape=(2,))
    )
    refused(density.to_numpyro, CapabilityError)
    refused(lambda: target.density.to_numpyro(level=SCHEDULE.num_levels), LevelError)
    refused(
        lambda: target.init_params(jax.random.key(0), 0),
        InvalidValueError,
    )
