"""Tests that samples look like the data and agree with the measurement.

python -m pytest
"""

import jax
import jax.numpy as jnp
import network
import program

import composeprob as cp


def test_samples_have_the_measured_height_and_lie_on_the_crescents():
    """Compare 500 chains with the measurement and with draws of the data."""
    density = cp.compile(program.posterior, program.model, height=0.2)
    result = cp.infer(density, jax.random.key(0), num_chains=500, progress=False)
    print(result.summary())
    assert abs(result.mean(lambda sample: sample["x"][1]).value - 0.2) < 0.1
    data = network.data(jax.random.key(1), 5000)
    nearest = jnp.linalg.norm(result["x"][:, None] - data, axis=-1).min(1)
    assert jnp.mean(nearest < 0.1) > 0.9
