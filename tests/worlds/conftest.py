"""Scenes that the tests of this folder look at: one compilation for all of them."""

import jax
import numpy as np
import pytest

from composeprob.models.worlds import shapes

N = 800


@pytest.fixture(scope="session")
def draw_scenes():
    """Draws 800 scenes with a key."""
    return jax.jit(lambda key: shapes.draw(key, N))


@pytest.fixture(scope="session")
def scenes(draw_scenes):
    return jax.tree.map(np.asarray, draw_scenes(jax.random.key(1)))
