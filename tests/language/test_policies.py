"""Annealing policies as objects: those with short names, and one of the user's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.errors import InvalidValueError, WrongTypeError
from composeprob.language.policies import POLICIES, Denoised, Policy
from refusals import refused
from sampling_cases import single

SCHEDULE = cp.Schedule.log_snr(20)
PRIOR = cp.Analytic(dist.Normal(jnp.array([0.3, -0.4]), 0.5), SCHEDULE)
X = {"x": jnp.array([0.4, -0.2])}


@cp.program
def scene(f, y, anneal):
    x = cp.sample("x", f)
    cp.observe("y", dist.Normal(jnp.sin(x), 0.3), y, anneal=anneal)


@dataclasses.dataclass(frozen=True)
class Between(Policy):
    """Sees a point between x/α and the Tweedie mean; counts as signal does. What it says of level 0 is wrong."""

    share: float

    def seen(self, x, mean, noise):
        return jnp.where(noise.index == 0, jnp.nan, (1 - self.share) * x / noise.alpha + self.share * mean)

    def power(self, schedule, noise):
        return jnp.where(noise.index == 0, 7.0, noise.alpha**2)


def log_likelihood(anneal, level):
    density = cp.compile(scene, PRIOR, jnp.zeros(2), anneal)
    return density.evaluate(X, level).parts.log_potential


@pytest.mark.parametrize("level", [1, 9, 19])
def test_a_policy_of_the_users_is_what_it_says_above_level_0(level):
    noise = SCHEDULE.at(level)
    density = cp.compile(single, PRIOR)
    mean = (X["x"] + noise.sigma**2 * density.score(X, level)["x"]) / noise.alpha
    seen = 0.75 * X["x"] / noise.alpha + 0.25 * mean
    expected = noise.alpha**2 * dist.Normal(jnp.sin(seen), 0.3).log_prob(0.0).sum()
    np.testing.assert_allclose(log_likelihood(Between(0.25), level), expected, rtol=1e-5)


@pytest.mark.parametrize("anneal", ["tempered", "denoised", Between(0.25), Between(1.0), Denoised()], ids=str)
def test_level_0_is_the_posterior_whatever_a_policy_says(anneal):
    expected = dist.Normal(jnp.sin(X["x"] / SCHEDULE.alpha[0]), 0.3).log_prob(0.0).sum()
    np.testing.assert_allclose(log_likelihood(anneal, 0), expected, rtol=1e-6)
    density = cp.compile(scene, PRIOR, jnp.zeros(2), anneal)
    by_grad = jax.jit(jax.grad(lambda x, level: density.log_density({"x": x}, level)))
    for level in (0, 7):
        np.testing.assert_allclose(density.score(X, level)["x"], by_grad(X["x"], level), rtol=1e-4)


@pytest.mark.parametrize("name", ["tempered", "denoised"])
def test_short_names_stand_for_objects(name):
    for level in (0, 7, 19):
        np.testing.assert_array_equal(log_likelihood(name, level), log_likelihood(POLICIES[name], level))


def test_policies_are_printed_with_their_settings():
    assert "annealed 'between(share=0.25)'" in str(cp.compile(scene, PRIOR, jnp.zeros(2), Between(0.25)))
    assert "annealed 'denoised'" in str(cp.compile(scene, PRIOR, jnp.zeros(2), Denoised()))


def test_a_block_takes_an_object():
    @cp.program
    def blocked(f, y):
        x = cp.sample("x", f)
        with cp.annealed(Between(0.25)):
            cp.observe("y", dist.Normal(jnp.sin(x), 0.3), y)

    found = cp.compile(blocked, PRIOR, jnp.zeros(2)).evaluate(X, 9).parts.log_potential
    np.testing.assert_allclose(found, log_likelihood(Between(0.25), 9), rtol=1e-6)


def test_an_equal_policy_reuses_compiled_code():
    one, two, other = (cp.compile(scene, PRIOR, jnp.zeros(2), Between(share)) for share in (0.25, 0.25, 0.5))
    assert jax.tree.structure(one) == jax.tree.structure(two) != jax.tree.structure(other)


def test_what_is_no_policy_is_refused():
    refused(lambda: cp.compile(scene, PRIOR, jnp.zeros(2), 3), InvalidValueError, "policy 3")
    with pytest.raises(WrongTypeError, match=r"Between|between.*numbers or text"):
        cp.compile(scene, PRIOR, jnp.zeros(2), Between(jnp.ones(2)))
