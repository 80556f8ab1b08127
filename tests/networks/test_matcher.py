"""The matcher: the mean over places of exp of a scalar product, and what it sees."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from composeprob.models.networks.matcher import Matcher
from networks.test_unet import random_weights


def small(rngs):
    return Matcher(3, 6, width=8, blocks=1, embedding=16, rngs=rngs)


def test_a_text_fits_as_well_as_its_vector_says():
    network = eqx.filter_jit(random_weights(small))
    x = jax.random.normal(jax.random.key(0), (16, 8, 3))
    vector = jax.random.normal(jax.random.key(1), (6,))
    np.testing.assert_allclose(network(x, jnp.float32(0.0), vector=jnp.zeros(6)), 0.0, atol=1e-5)
    fits = [float(network(x, jnp.float32(0.0), vector=scale * vector)) for scale in (1.0, 40.0, 80.0)]
    assert fits[0] != 0
    # The best place decides where the vector is long: then the fit grows as the vector does.
    np.testing.assert_allclose(fits[2] + np.log(32), 2 * (fits[1] + np.log(32)), rtol=0.1)


def test_image_noise_and_place_count():
    network = eqx.filter_jit(random_weights(small))
    x = jnp.zeros((48, 48, 3)).at[16:20, 16:20].set(1.0)  # farther from the border than a patch's surroundings reach
    changed = [(x, 0.0), (x + 0.5, 0.0), (x, 2.0), (jnp.roll(x, 8, axis=1), 0.0), (jnp.roll(x, 8, axis=0), 0.0)]
    fits = np.array([network(image, jnp.float32(t), vector=jnp.ones(6)) for image, t in changed])
    assert np.all(np.abs(fits[1:] - fits[0]) > 1e-4), fits - fits[0]
