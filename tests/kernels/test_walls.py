"""A density of 0 beyond a wall: chains outside walk until they come in, and those inside stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.density.evaluation import Evaluation, Wall
from kernel_chains import start, steps_of, transitions

WALL = 1.0


def walled(position):
    x = position["a"]
    log_f, log_g = -0.5 * x**2, jnp.where(x > WALL, 0.0, -jnp.inf)
    return Evaluation(log_f + log_g, {"a": -x}, Wall(jnp.isneginf(log_g), log_f))


@pytest.mark.parametrize("kernel", [cp.MALA(0.3), cp.HMC(0.3, 3), cp.ULA(0.2)], ids=lambda k: type(k).__name__)
def test_chains_outside_come_in_and_stay(kernel):
    states = start(kernel, walled, jax.random.key(0), {"a": jnp.full(200, -3.0)})
    states, info = transitions(kernel, walled, jax.random.key(1), states, steps_of(kernel), 100)
    x = states.position["a"]
    assert np.mean(x > WALL) > 0.5  # without a walk outside none ever comes in
    assert not np.any(info.non_finite)
    again, _ = transitions(kernel, walled, jax.random.key(2), states, steps_of(kernel), 20)
    assert np.all(again.position["a"][x > WALL] > WALL)


def test_the_walk_outside_is_that_of_the_rest():
    """A wall that lets nothing in: MALA leaves the normal beyond it invariant."""

    def never(position):
        e = walled(position)
        return Evaluation(jnp.asarray(-jnp.inf), e.score, Wall(jnp.asarray(True), e.log_open))

    kernel, x = cp.MALA(1.0), jax.random.normal(jax.random.key(3), (4000,))
    states = start(kernel, never, jax.random.key(0), {"a": x})
    states, info = transitions(kernel, never, jax.random.key(1), states, steps_of(kernel), 20)
    assert 0.5 < np.mean(info.accepted) < 0.99
    assert abs(np.var(states.position["a"]) - 1.0) < 0.1  # accepted without a test: variance 2 at this step


@pytest.mark.parametrize("kernel", [cp.MALA(1.0), cp.HMC(1.0, 3)], ids=lambda k: type(k).__name__)
def test_a_step_far_too_long_is_not_taken_for_a_density_that_is_no_number(kernel):
    """In log s, where s = 1e-3 is far too small: the kick is of 10¹¹ nats, and e to where it ends overflows."""

    def scale(position):
        def log_density(u):
            return 5 * u - 5 * u - 0.5 * jnp.exp(-2 * u) - 0.5 * jnp.exp(2 * u) + jnp.where(u > 80.0, jnp.nan, 0.0)

        value, slope = jax.value_and_grad(log_density)(position["a"])
        return Evaluation(value, {"a": slope})

    def share(u):
        states = start(kernel, scale, jax.random.key(0), {"a": jnp.full(200, u)})
        states, info = transitions(kernel, scale, jax.random.key(1), states, steps_of(kernel), 1)
        return np.mean(info.non_finite), states.position["a"]

    found, stayed = share(-7.0)
    assert found == 0
    np.testing.assert_array_equal(stayed, -7.0)
    beyond = lambda position: Evaluation(jnp.where(jnp.abs(position["a"]) > 0.1, jnp.nan, 0.0), {"a": jnp.zeros(())})
    states = start(kernel, beyond, jax.random.key(0), {"a": jnp.zeros(200)})
    _, info = transitions(kernel, beyond, jax.random.key(1), states, steps_of(kernel), 1)
    assert np.mean(info.non_finite) > 0.5  # a negative control: no kick explains these
