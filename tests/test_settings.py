"""Settings of JAX with which others look for mistakes in code of their own do not stop a run."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from sampling_cases import SAMPLER, both

LEVELS = cp.Schedule.log_snr(8)


def product():
    mean, ones = jnp.zeros(3), jnp.ones(3)
    law = dist.MixtureSameFamily(dist.Categorical(ones / 3), dist.Normal(mean, ones))  # of more ranks than one
    return cp.compile(both, cp.Analytic(law, LEVELS), cp.Analytic(dist.Normal(mean[0], ones[0]), LEVELS))


@cp.program
def observed(f, y):
    cp.observe("y", dist.Normal(cp.sample("x", f), 0.5), y)


def ran(density):
    result = cp.infer(density, jax.random.key(0), num_chains=64, sampler=SAMPLER, progress=False)
    return result["x"]


def test_a_run_is_the_same_under_settings_that_look_for_mistakes():
    at = {"x": jnp.float32(0.3)}
    density = product()
    expected, log_density = ran(density), density.log_density(at, 0)
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        density = product()
        np.testing.assert_array_equal(ran(density), expected)
        assert density.log_density(at, 0) == log_density
        cp.compile(observed, cp.Analytic(dist.Uniform(-3.0, 3.0), LEVELS), jnp.float32(1.0))
        assert cp.load("ring2d").event_shape == (2,)


def test_the_settings_of_a_process_are_its_own_again():
    with jax.debug_nans(True):
        product()
        with pytest.raises(FloatingPointError):
            jnp.log(jnp.float32(-1.0))
