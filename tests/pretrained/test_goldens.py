"""Networks of diffusers' classes against the originals' outputs, on small folders
(tools/diffusers_goldens.py)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import composeprob as cp
from composeprob.pretrained.text_encoders import Tokenizer, with_pooled

DATA = Path(__file__).parent / "data"
LEVELS = (0, 1, 37, 500, 998, 999)
"""Levels of the outputs in the folders."""
MOST = 1e-5
"""Tolerance, relative to the greatest number of the original."""


@functools.cache
def golden(name):
    return load_file(DATA / name / "golden.safetensors")


@functools.cache
def model(name):
    return cp.from_diffusers(DATA / name)


def error(actual, expected):
    assert np.shape(actual) == np.shape(expected)
    difference = np.abs(np.asarray(actual, np.float64) - expected)
    return float(difference.max() / np.abs(expected).max())


def conditions(name):
    """The conditions under which the original was evaluated, one for each of its two
    events."""
    g = golden(name)
    values = {}
    if "class_labels" in g:
        values["label"] = jnp.asarray(g["class_labels"], jnp.int32)
    if "hidden" in g:
        # Where the file has token ids, its hidden states are those of all PROMPTS.
        rows = g["hidden"][1:3] if "ids" in g else g["hidden"]
        rows = [jnp.asarray(hidden) for hidden in rows]
        pooled = g["pooled"][1:3] if name == "sdxl" else g.get("pooled")
        if pooled is not None:
            rows = list(map(with_pooled, rows, map(jnp.asarray, pooled)))
        values["prompt"] = jnp.stack(rows)
    if "sizes" in g:
        values["size"] = jnp.asarray(g["sizes"])
    return values


def noise_of(network_output, x, alpha, sigma, parameterization):
    """ε̂ of the original's output, in double precision."""
    output = np.float64(network_output)
    x = np.float64(x)
    if parameterization == "epsilon":
        return output
    if parameterization == "x0":
        return (x - alpha * output) / sigma
    if parameterization == "v":
        return alpha * output + sigma * x
    assert parameterization == "flow"
    return x + alpha * output


@jax.jit
def scores(factor, xs, levels, given):
    """The factor's score of every event at every one of its levels."""

    def one(x, level, given):
        values = {**factor.call_conditions(), **given}
        return factor.evaluate(x, factor.schedule.at(level), values)[1]

    return jax.lax.map(
        lambda level: jax.vmap(one, (0, None, 0))(xs, level, given), levels
    )


@pytest.mark.parametrize("name", ["ddpm", "labels", "sd", "sd1", "sdxl", "dit", "sd3"])
def test_the_score_at_level_k_is_that_of_timestep_k(name):
    """−ε̂/σ, with ε̂ from the original's output and σ from its scheduler's table."""
    g = golden(name)
    factor = model(name)
    assert factor.schedule.num_levels == 1000
    xs = jnp.asarray(g["x"])
    actual = scores(factor, xs, jnp.asarray(LEVELS), conditions(name))
    for i, k in enumerate(LEVELS):
        if "sigmas" in g:
            sigma = np.float64(g["sigmas"][k])
            alpha = 1 - sigma
        else:
            squared = np.float64(g["alphas_cumprod"][k])
            alpha = np.sqrt(squared)
            sigma = np.sqrt(1 - squared)
        output = g["outputs"][i][..., : xs.shape[-1]]  # the rest is a learned variance
        noise = noise_of(output, g["x"], alpha, sigma, factor.parameterization)
        assert error(actual[i], -noise / sigma) < 4 * MOST, f"level {k}"


@pytest.mark.parametrize(
    ("name", "parameterization", "times", "expected"),
    [("edm", "x0", "sigmas", "clean"), ("fourier", "score", "times", "outputs")],
)
def test_networks_of_variance_exploding_diffusions_are_told_sigma(
    name, parameterization, times, expected
):
    """Preconditioned ones give the clean image of x·σ."""
    g = golden(name)
    factor = model(name)
    assert (factor.parameterization, factor.time) == (parameterization, "sigma")
    network = jax.jit(jax.vmap(factor.network, (0, None)))
    for sigma, output in zip(np.float32(g[times]), g[expected], strict=True):
        x = g["x"] * sigma if name == "edm" else g["x"]
        assert error(network(x, sigma), output) < MOST


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_autoencoders_both_ways(name):
    g = golden(name)
    factor = model(name)
    assert error(factor.encode(g["images"]), g["encoded"]) < MOST
    assert error(factor.decode(g["latents"]), g["decoded"]) < MOST
    none = factor.decode(np.zeros((2, 0, *g["latents"].shape[1:])))
    assert none.shape == (2, 0, *g["images"].shape[1:])


PROMPTS = ("", "a cat on the left", "The  DOG's 2 cats, naïve – 日本", "the " * 30)


def test_text_encoders_and_tokenizers():
    g = golden("sd")
    factor = model("sd")
    assert error(factor.text_encoder(g["ids"]), g["hidden"]) < MOST
    assert error(factor.text_encoder(g["ids"][2]), g["hidden"][2]) < MOST
    pytest.importorskip("tokenizers")
    for text, ids in zip(PROMPTS, g["ids"], strict=True):
        np.testing.assert_array_equal(factor.text_encoder.tokens(text), ids)
    assert error(factor.given(prompt=PROMPTS[1]).fixed["prompt"], g["hidden"][1]) < MOST
    one = g["ids"][1:2]  # as tokenizers return it
    by_ids = factor.given(prompt=one[0]).fixed["prompt"]
    for prompt in (PROMPTS[1], one):
        encoded = factor.given(prompt=prompt).fixed["prompt"]
        np.testing.assert_array_equal(encoded, by_ids)
    assert error(factor.call_conditions()["prompt"], g["hidden"][0]) < MOST, (
        "without a prompt, the empty one"
    )


def test_only_the_first_line_of_merges_is_a_note(tmp_path):
    """``# #`` is a pair of signs like any other."""
    pytest.importorskip("tokenizers")
    words = ["<|startoftext|>", "<|endoftext|>", "#", "#</w>", "##</w>"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(words)})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\n# #</w>\n")
    np.testing.assert_array_equal(Tokenizer(tmp_path, 6)("## #"), [0, 4, 3, 1, 1, 1])


def test_both_text_encoders_of_sdxl():
    pytest.importorskip("tokenizers")
    g = golden("sdxl")
    factor = model("sdxl")
    width = g["pooled"].shape[-1]
    for i, text in enumerate(PROMPTS):
        np.testing.assert_array_equal(factor.text_encoder.tokens(text), g["ids"][i])
        np.testing.assert_array_equal(factor.text_encoder_2.tokens(text), g["ids_2"][i])
        prompt = factor.given(prompt=text).fixed["prompt"]
        assert error(prompt[:-1], g["hidden"][i]) < MOST
        assert error(prompt[-1, :width], g["pooled"][i]) < MOST
        assert not np.any(prompt[-1, width:])
    np.testing.assert_array_equal(factor.call_conditions()["size"], [8, 8, 0, 0, 8, 8])
    assert factor.text_encoder.pooled(g["ids"]).shape == (4, 8)
