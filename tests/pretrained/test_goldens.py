"""Networks of diffusers' classes against what the originals compute, on small folders
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
"""Whose outputs the folders hold."""
MOST = 1e-5
"""The greatest error that is let pass, relative to the greatest number of the
original."""


@functools.cache
def golden(name):
    return load_file(DATA / name / "golden.safetensors")


@functools.cache
def model(name):
    return cp.from_diffusers(DATA / name)


def error(found, wanted):
    assert np.shape(found) == np.shape(wanted)
    return float(
        np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()
    )


def conditions(name):
    """The conditions under which the original was evaluated, one for each of its two
    events."""
    g, found = golden(name), {}
    if "class_labels" in g:
        found["label"] = jnp.asarray(g["class_labels"], jnp.int32)
    if "hidden" in g:
        hidden = [
            jnp.asarray(h) for h in (g["hidden"][1:3] if "ids" in g else g["hidden"])
        ]
        pooled = g["pooled"][1:3] if name == "sdxl" else g.get("pooled")
        rows = (
            hidden
            if pooled is None
            else [
                with_pooled(h, jnp.asarray(p))
                for h, p in zip(hidden, pooled, strict=True)
            ]
        )
        found["prompt"] = jnp.stack(rows)
    if "sizes" in g:
        found["size"] = jnp.asarray(g["sizes"])
    return found


def noise_of(network_output, x, alpha, sigma, kind):
    """ε̂ of what the original returned, in double precision."""
    output, x = np.float64(network_output), np.float64(x)
    return {
        "epsilon": lambda: output,
        "x0": lambda: (x - alpha * output) / sigma,
        "v": lambda: alpha * output + sigma * x,
        "flow": lambda: x + alpha * output,
    }[kind]()


@jax.jit
def scores(factor, xs, levels, given):
    """The factor's score of every event at every one of its own levels."""

    def one(x, level, given):
        values = {**factor.call_conditions(), **given}
        return factor.evaluate(x, factor.schedule.at(level), values)[1]

    return jax.lax.map(
        lambda level: jax.vmap(one, (0, None, 0))(xs, level, given), levels
    )


@pytest.mark.parametrize("name", ["ddpm", "labels", "sd", "sd1", "sdxl", "dit", "sd3"])
def test_the_score_at_level_k_is_that_of_timestep_k(name):
    """−ε̂/σ, with ε̂ from the original's output and σ from its scheduler's table."""
    g, factor = golden(name), model(name)
    assert factor.schedule.num_levels == 1000
    xs = jnp.asarray(g["x"])
    found = scores(factor, xs, jnp.asarray(LEVELS), conditions(name))
    for i, k in enumerate(LEVELS):
        if "sigmas" in g:
            alpha, sigma = 1 - np.float64(g["sigmas"][k]), np.float64(g["sigmas"][k])
        else:
            squared = np.float64(g["alphas_cumprod"][k])
            alpha, sigma = np.sqrt(squared), np.sqrt(1 - squared)
        output = g["outputs"][i][..., : xs.shape[-1]]  # the rest is a learned variance
        wanted = (
            -noise_of(output, g["x"], alpha, sigma, factor.parameterization) / sigma
        )
        assert error(found[i], wanted) < 4 * MOST, f"level {k}"


@pytest.mark.parametrize(
    ("name", "form", "times", "wanted"),
    [("edm", "x0", "sigmas", "clean"), ("fourier", "score", "times", "outputs")],
)
def test_networks_of_variance_exploding_diffusions_are_told_sigma(
    name, form, times, wanted
):
    """Preconditioned ones give the clean image of x·σ."""
    g, factor = golden(name), model(name)
    assert (factor.parameterization, factor.time) == (form, "sigma")
    network = jax.jit(jax.vmap(factor.network, (0, None)))
    for sigma, output in zip(np.float32(g[times]), g[wanted], strict=True):
        assert (
            error(network(g["x"] * (sigma if name == "edm" else 1), sigma), output)
            < MOST
        )


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_autoencoders_both_ways(name):
    g, factor = golden(name), model(name)
    assert error(factor.encode(g["images"]), g["encoded"]) < MOST
    assert error(factor.decode(g["latents"]), g["decoded"]) < MOST
    assert factor.decode(np.zeros((2, 0, *g["latents"].shape[1:]))).shape == (
        2,
        0,
        *g["images"].shape[1:],
    )


PROMPTS = ("", "a cat on the left", "The  DOG's 2 cats, naïve – 日本", "the " * 30)


def test_text_encoders_and_tokenizers():
    g, factor = golden("sd"), model("sd")
    assert error(factor.text_encoder(g["ids"]), g["hidden"]) < MOST
    assert error(factor.text_encoder(g["ids"][2]), g["hidden"][2]) < MOST
    pytest.importorskip("tokenizers")
    for text, ids in zip(PROMPTS, g["ids"], strict=True):
        np.testing.assert_array_equal(factor.text_encoder.tokens(text), ids)
    assert error(factor.given(prompt=PROMPTS[1]).fixed["prompt"], g["hidden"][1]) < MOST
    one = g["ids"][1:2]  # as tokenizers return it
    for prompt in (PROMPTS[1], one):
        found, wanted = (
            factor.given(prompt=each).fixed["prompt"] for each in (prompt, one[0])
        )
        np.testing.assert_array_equal(found, wanted)
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
    g, factor = golden("sdxl"), model("sdxl")
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
