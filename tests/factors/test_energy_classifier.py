"""`Energy` and `Classifier`: values, scores and levels."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import ImproperError, InvalidValueError
from refusals import refused
from sampling_cases import single

SCHEDULE = cp.Schedule.cosine(12)
PRIOR = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0), SCHEDULE, label="prior")
X = jnp.array([0.5, -1.0])


def evaluate(f, level, **arguments):
    return cp.compile(single, f, **arguments).evaluate({"x": X}, level)


def test_an_energy_is_a_log_density_of_the_level():
    f = cp.Energy(
        lambda x, level: -0.5 * jnp.sum(x**2) * (1 + level), SCHEDULE, event_shape=(2,)
    )
    for level in (0, 5, 11):
        found = evaluate(f, level)
        np.testing.assert_allclose(
            found.log_density, -0.5 * 1.25 * (1 + level), rtol=1e-6
        )
        np.testing.assert_allclose(found.score["x"], -X * (1 + level), rtol=1e-6)
        np.testing.assert_allclose(found.terms.log_potential, found.log_density)
        np.testing.assert_allclose(found.terms.drift["x"], 0.0)
    assert f.capabilities == {"score", "energy", "conservative", "mode_depth"}


class Quadratic(eqx.Module):
    scale: jax.Array

    def __call__(self, x, level):
        return -0.5 * jnp.sum((x / self.scale) ** 2)


def test_an_energy_may_be_a_module_with_arrays():
    f = cp.Energy(Quadratic(jnp.array(2.0)), SCHEDULE, event_shape=(2,))
    assert jax.tree.leaves(f.fn) == [2.0]
    np.testing.assert_allclose(evaluate(f, 3).score["x"], -X / 4)
    broken = Quadratic(jnp.array(jnp.nan))
    refused(
        lambda: cp.Energy(broken, SCHEDULE, event_shape=(2,)),
        InvalidValueError,
    )


def test_a_bounded_energy_multiplies_but_does_not_stand_alone():
    half = cp.Energy(
        lambda x, level: -jnp.logaddexp(0.0, -20 * x[1]),
        SCHEDULE,
        event_shape=(2,),
        top_power=0.0,
    )
    both = evaluate(PRIOR * half, 4)
    prior = evaluate(PRIOR, 4)
    np.testing.assert_allclose(
        both.log_density - prior.log_density, -jnp.logaddexp(0.0, 20.0), rtol=1e-5
    )
    np.testing.assert_allclose(both.terms.drift["x"], prior.score["x"])
    np.testing.assert_allclose(both.terms.rate, 0.0)
    np.testing.assert_allclose(both.terms.log_marginal, prior.log_density)
    refused(
        lambda: cp.compile(single, half),
        ImproperError,
    )


@pytest.mark.parametrize("top_power", [0.0, 1.0, 0.5])
def test_on_other_levels_an_energy_is_rescaled_as_the_density_that_it_is(top_power):
    """x' = x·α'/α: a density gains d·log(α/α'), a bounded potential nothing, a power of
    a density its share."""
    trained = cp.Schedule.edm(12, sigma_min=0.05, sigma_max=20.0)

    def energy(x, level):
        return -0.1 * top_power * jnp.sum(x**2)

    f = cp.Energy(energy, trained, event_shape=(2,), top_power=top_power)
    # The same log-SNR with half the signal.
    alpha = 0.5
    schedule = cp.Schedule.from_arrays(alpha * trained.alpha, alpha * trained.sigma)
    found = evaluate(PRIOR * f, 3, schedule=schedule).terms.log_potential
    np.testing.assert_allclose(
        found, energy(X / alpha, 3) + top_power * 2 * np.log(1 / alpha), rtol=1e-5
    )


MATRIX = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]])


def logits(x, t):
    return MATRIX @ x + 0.1 * t


def classifier(**arguments):
    return cp.Classifier(logits, SCHEDULE, **arguments)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_condition_is_bayes_rule_to_a_power(scale):
    assert classifier(event_shape=(2,)).num_classes == 3
    probabilities = jax.nn.softmax(MATRIX @ X)
    for level in (0, 7):
        prior = evaluate(PRIOR, level)
        for label in range(3):
            found = evaluate(
                cp.condition(PRIOR, classifier(), label, scale=scale), level
            )
            share = scale * jnp.log(probabilities[label])
            pull = scale * (MATRIX[label] - probabilities @ MATRIX)
            np.testing.assert_allclose(
                found.log_density, prior.log_density + share, rtol=1e-5
            )
            np.testing.assert_allclose(
                found.score["x"], prior.score["x"] + pull, rtol=1e-5
            )
            np.testing.assert_allclose(found.terms.drift["x"], prior.terms.drift["x"])
            np.testing.assert_allclose(found.terms.log_potential, share, rtol=1e-5)


@pytest.mark.parametrize("time", ["level", "log_snr", "sigma"])
def test_a_classifier_receives_the_time(time):
    timed = cp.Classifier(lambda x, t: jnp.array([0.0, 1.0]) * t, SCHEDULE, time=time)
    value = {
        "level": 7.0,
        "log_snr": SCHEDULE.log_snr[7],
        "sigma": SCHEDULE.sigma[7] / SCHEDULE.alpha[7],
    }[time]
    found = evaluate(cp.condition(PRIOR, timed, 1), 7).terms.log_potential
    np.testing.assert_allclose(found, jax.nn.log_sigmoid(value), rtol=1e-4)


def test_on_other_levels_a_classifier_sees_its_own_coordinates():
    schedule = cp.Schedule.from_arrays(0.5 * SCHEDULE.alpha, 0.5 * SCHEDULE.sigma)
    found = evaluate(
        cp.condition(PRIOR, classifier(), 1), 6, schedule=schedule
    ).terms.log_potential
    np.testing.assert_allclose(
        found, jax.nn.log_softmax(MATRIX @ X / 0.5)[1], rtol=1e-5
    )
