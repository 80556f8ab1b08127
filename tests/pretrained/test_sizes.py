"""Networks of known sizes without weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import composeprob as cp
from benchmarks.sizes import of_size, sd15
from composeprob.pytree import is_array


@pytest.mark.parametrize(("name", "weights"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_sizes_are_those_of_the_models(name, weights):
    """The numbers of weights that the models' authors tell; none of them is in memory."""
    model, prompt = of_size(name)
    leaves = [leaf for leaf in jax.tree.leaves(model.network) if is_array(leaf)]
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == weights
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == "bfloat16" for leaf in leaves)
    assert prompt == {"sd15": (77, 768), "sdxl": (78, 2048)}[name]


def test_two_prompts_are_compiled_as_far_as_a_density():
    density = cp.compile(sd15)
    assert "2 evaluations in 1 batches" in str(density)
    assert density.sites["x"].shape == (64, 64, 4)


def test_sizes_that_are_not_known():
    with pytest.raises(cp.errors.InvalidValueError, match="No size 'sd9' is known"):
        of_size("sd9")
