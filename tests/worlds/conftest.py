"""Scenes for the tests of this folder: one compilation for all of them."""

import jax
import numpy as np
import pytest

from composeprob.models.worlds import shapes

N = 800


@pytest.fixture(scope="session")
def draw_scenes():
    """A function that draws 800 scenes."""
    return jax.jit(lambda key: shapes.draw(key, N))


@pytest.fixture(scope="session")
def scenes(draw_scenes):
    return jax.tree.map(np.asarray, draw_scenes(jax.random.key(1)))
