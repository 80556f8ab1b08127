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
