"""Programs over other people's models: products of prompts, samplers, images, saved
results."""

import re

import equinox as eqx
import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob.schedule import Noise
from messages import check_wording
from pretrained.test_goldens import DATA, golden, model
from processes import said
from refusals import refused
from sampling_cases import run, single

SCHEDULE = cp.Schedule.log_snr(6, min=-12.0, max=6.0)


@cp.program
def scene(cat, dog, anything):
    return cp.sample("x", cat * dog / anything)


@pytest.fixture(scope="module")
def density():
    pytest.importorskip("tokenizers")
    factor = model("sd")
    return cp.compile(
        scene,
        factor.given(prompt="a cat"),
        factor.given(prompt="a dog"),
        factor,
        schedule=SCHEDULE,
    )


def score_at(density, level):
    return jax.jit(lambda density, x: density.score({"x": x}, level)["x"])(
        density, golden("sd")["x"][0]
    )


def score_of_model(level):
    """The score of the model at one of the program's levels, as a function of its
    prompt."""
    factor = model("sd")
    x = golden("sd")["x"][0]
    log_snr = np.asarray(SCHEDULE.log_snr[level], np.float64)
    noise = Noise(
        np.float32(factor.schedule.level_at(log_snr)),
        np.float32(SCHEDULE.alpha[level]),
        np.float32(SCHEDULE.sigma[level]),
    )
    score = jax.jit(lambda f, prompt: f.evaluate(x, noise, {"prompt": prompt})[1])
    return lambda text: score(factor, factor.given(prompt=text).fixed["prompt"])


def test_three_prompts_are_one_evaluation(density):
    """The sum of the factors' scores; the text names the prompts, and says that there
    is no energy."""
    text = str(density)
    formula = "anything(x | prompt='a cat')·anything(x | prompt='a dog')·anything(x)⁻¹"
    assert formula in text, "one network, by the name of the model itself"
    assert re.search("share: 3 .* 1 ", text)
    assert re.search("feynman_kac, score; .*cp.LineIntegral", text)
    check_wording(text)
    score = score_of_model(3)
    expected = score("a cat") + score("a dog") - score("")
    np.testing.assert_allclose(score_at(density, 3), expected, rtol=1e-4, atol=1e-4)


def test_prompts_cannot_be_mixed():
    """OR needs log-densities: refused as soon as it is written, with what to do instead
    (examples/text_to_image.py)."""
    factor = model("sd1")
    prompts = [np.float32(np.eye(5, 12)), np.float32(np.eye(5, 12, 3))]
    one, two = (factor.given(prompt=prompt) for prompt in prompts)
    label = {"label": 1}
    for mixed in (
        lambda: cp.mixture(
            [one.given(**label), two.given(**label)], weights=[0.5, 0.5]
        ),
        lambda: cp.mixture([cp.guide(one, 2.0, **label), two], log_weights=[0.0, 0.0]),
        lambda: cp.mixture(factor, over={"prompt": np.stack(prompts)}),
    ):
        refused(
            mixed,
            cp.errors.CapabilityError,
        )


def test_reverse_diffusion_and_images(density, tmp_path):
    """Images of the samples as the autoencoder decodes them; a saved result is the
    same, bit for bit."""
    result = run(density, 0, 2, sampler=cp.Ancestral())
    images = result.images()
    assert images.shape == (2, 16, 16, 3)
    decoded = np.asarray(model("sd").decode(result["x"]))
    np.testing.assert_allclose(images, np.clip(decoded / 2 + 0.5, 0, 1), atol=1e-6)
    assert 0 <= images.min() < images.max() <= 1
    loaded = cp.Result.load(result.save(tmp_path / "scene"))
    np.testing.assert_array_equal(loaded["x"], result["x"])
    np.testing.assert_array_equal(model("sd").decode(loaded["x"]), decoded)
    refused(
        lambda: loaded.images(),
        cp.errors.CapabilityError,
    )


@pytest.mark.parametrize(("name", "agree"), [("ddpm", True), ("sd", False)])
def test_models_of_pixels_agree_on_images_and_autoencoders_that_are_loaded_twice_do_not(
    name, agree
):
    one = cp.from_diffusers(DATA / name)
    other = cp.from_diffusers(DATA / name)
    density = cp.compile(cp.program(lambda f, g: cp.sample("x", f * g)), one, other)
    assert ("x" in density.described.pictures) == agree
    if agree:
        np.testing.assert_array_equal(
            density.described.pictures["x"](np.array([-1.0, 0.0, 3.0])), [0.0, 0.5, 1.0]
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        cp.SMC(),
        cp.SMC(cp.ULA(0.02)),
        cp.AnnealedMCMC(cp.MALA(0.02, log_ratio=cp.LineIntegral(2)), steps_per_level=1),
    ],
    ids=["SMC", "SMC with ULA", "MALA"],
)
def test_samplers(density, sampler, tmp_path):
    runs = [run(density, 1, 4, sampler=sampler) for _ in range(2)]
    np.testing.assert_array_equal(runs[0]["x"], runs[1]["x"])
    assert np.isfinite(runs[0]["x"]).all()
    assert runs[0].images().shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(
        cp.Result.load(runs[0].save(tmp_path / "run"))["x"], runs[0]["x"]
    )


def test_a_folder_that_says_what_its_output_means_is_believed():
    """A network that returns next to nothing looks like one of x₀; its scheduler says
    ε: a doubt, no refusal."""
    factor = model("ddpm")
    schedule = factor.schedule.every(250)
    weak = eqx.tree_at(
        lambda f: f.network.arrays["conv_out.weight"],
        factor,
        replace_fn=lambda w: 1e-3 * w,
    )
    (doubt,) = cp.compile(single, weak, schedule=schedule).graph.doubts
    assert "parameterization='epsilon'" in doubt
    check_wording(doubt, "doubt")
    own = cp.Diffusion(
        weak.network, factor.schedule, event_shape=factor.event_shape, time="real_level"
    )
    refused(
        lambda: cp.compile(single, own, schedule=schedule),
        cp.errors.NetworkError,
        "parameterization='x0'",
    )


ON_DEVICES = """
import jax, numpy as np, composeprob as cp, pathlib, sys
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
model = cp.from_diffusers("FOLDER")
ids = np.arange(16)
one, two = model.given(prompt=ids), model.given(prompt=ids[::-1].copy())
program = cp.program(lambda model: cp.sample("x", one * two / model))
schedule = cp.Schedule.log_snr(4, min=-12.0, max=6.0)
density = cp.compile(program, model, schedule=schedule)
mala = cp.MALA(0.02, log_ratio=cp.LineIntegral(2))
samplers = {
    "reverse": cp.Ancestral(),
    "SMC": cp.SMC(),
    "MALA": cp.AnnealedMCMC(mala, steps_per_level=1),
}

def run(sampler, count, chains, chunk):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("chains",))
    settings = dict(num_chains=chains, mesh=mesh, chunk=chunk, progress=False)
    result = cp.infer(density, jax.random.key(0), sampler=sampler, **settings)
    assert result.about.devices == count
    return result

def same(a, b):
    for name in ("acceptance", "ess"):
        np.testing.assert_array_equal(a.levels[name], b.levels[name])
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    np.testing.assert_array_equal(a["x"], b["x"])

for name, sampler in samplers.items():
    runs = [run(sampler, count, 8, 1) for count in (1, 2, 8)]
    for other in runs[1:]:
        same(runs[0], other)
        np.testing.assert_array_equal(runs[0].images(), other.images())
    loaded = cp.Result.load(runs[0].save(pathlib.Path("PLACE", name)))
    same(runs[2], loaded)
    np.testing.assert_array_equal(model.decode(loaded["x"]), model.decode(runs[2]["x"]))
# From 64 chains on steps are fitted over the chains of all devices.
same(*[run(cp.SMC(), count, 64, 8) for count in (2, 8)])
"""


@pytest.mark.slow
def test_the_same_bits_on_one_device_and_on_eight_and_after_loading(tmp_path):
    pytest.importorskip("tokenizers")
    said(
        ON_DEVICES.replace("FOLDER", str(DATA / "sd")).replace("PLACE", str(tmp_path)),
        devices=8,
    )


@pytest.mark.slow
def test_prompts_over_one_axis_and_guidance():
    """One leaf for all prompts, in blocks; guidance by the empty prompt, f(x | c)^s ·
    f(x)^(1−s)."""
    pytest.importorskip("tokenizers")
    factor = model("sd")
    score = score_of_model(3)
    product = cp.product(factor, over={"prompt": ["a cat", "a dog"]}, block=1)
    over = cp.compile(single, product, schedule=SCHEDULE)
    np.testing.assert_allclose(
        score_at(over, 3), score("a cat") + score("a dog"), rtol=1e-4, atol=1e-4
    )
    guidance = cp.guide(factor, 4.0, prompt="a cat")
    guided = cp.compile(single, guidance, schedule=SCHEDULE)
    np.testing.assert_allclose(
        score_at(guided, 3), 4 * score("a cat") - 3 * score(""), rtol=1e-4, atol=1e-3
    )


PICTURES = """import composeprob as cp

sampler, levels = cp.Ancestral(), [5.0, 0.0, -9.0]

@cp.program
def picture(model):
    return cp.sample('x', model)

@cp.program
def other(x=1):
    return x
"""


def test_the_command_line_gives_a_folder_to_the_program(tmp_path):
    """`--model FOLDER` is the value of the parameter `model`, and nothing for a program
    without one."""
    from typer.testing import CliRunner

    from composeprob.cli import app

    file = tmp_path / "pictures.py"
    file.write_text(PICTURES)
    arguments = ["--model", str(DATA / "ddpm"), "--chains", "2", "--no-cache"]
    arguments += ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["run", f"{file}:picture", *arguments])
    assert done.exit_code == 0, done.output
    assert "x: noised (8, 8, 3)" in done.output
    refused = CliRunner().invoke(app, ["run", f"{file}:other", *arguments])
    assert refused.exit_code == 2
    words = "--model was given, but program 'other' has no parameter"
    assert words in " ".join(refused.output.split())
