"""Networks of known sizes without weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import composeprob as cp
from composeprob.cli import app, hardware
from composeprob.pretrained.sizes import of_size
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
    density = hardware.two_prompts("sd15")
    assert "2 evaluations in 1 batches" in str(density)
    assert density.sites["x"].shape == (64, 64, 4)


def test_what_the_command_refuses():
    with pytest.raises(cp.errors.InvalidValueError, match="No size 'sd9' is known"):
        of_size("sd9")
    refused = CliRunner().invoke(app, ["devices", "--model", "sd15"])
    assert refused.exit_code == 2
    assert "sd15 was given, but nothing to compile it for" in " ".join(refused.output.split())
    both = CliRunner().invoke(app, ["devices", "scene.py", "--model", "sd15", "--compile", "v5e:4x4"])
    assert "scene.py and --model sd15 were given" in " ".join(both.output.split())
