"""tools/convert_guided_diffusion.py: networks of guided-diffusion against the
originals' outputs.

tools/guided_diffusion_goldens.py makes the files again.
"""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import composeprob as cp
from composeprob.errors import InvalidValueError, LoadError
from composeprob.pretrained import tensors
from pretrained.drawn import weights
from pretrained.test_goldens import DATA, error
from sampling_cases import slow
from tools.convert_guided_diffusion import Supplied, convert, main, write

FLAGS = {
    "adm": [
        "--num-head-channels",
        "16",
        "--use-new-attention-order",
        "--noise-schedule",
        "cosine",
    ],
    "legacy": ["--num-heads", "4"],
    "improved": [
        "--num-heads",
        "4",
        "--num-heads-upsample",
        "2",
        "--diffusion-steps",
        "4000",
        "--rescale-timesteps",
        "--predict-xstart",
        "--noise-schedule",
        "cosine",
    ],
    "wide": ["--num-head-channels", "32"],
}
MOST = 1e-5


@functools.cache
def original(name):
    """Outputs of the original, and its state dict."""
    with safe_open(DATA / "guided_diffusion" / f"{name}.safetensors", "numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        notes = file.metadata()
    return arrays, weights(json.loads(notes["shapes"]), int(notes["seed"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The file of a case's state dict."""

    @functools.cache
    def write(name):
        file = tmp_path_factory.mktemp(name) / f"{name}.safetensors"
        save_file(original(name)[1], file)
        return file

    return write


def command(*arguments):
    return main([str(argument) for argument in arguments])


def outputs(factor, given, xs, times):
    @jax.jit
    def all_times(network, xs, times, given):
        def at_time(t):
            return jax.vmap(lambda x, g: network(x, t, **g))(xs, given)

        return jax.lax.map(at_time, times)

    return all_times(factor.network, xs, times, given)


@pytest.mark.parametrize("name", FLAGS)
def test_converted_networks_give_the_originals_output(name, place, tmp_path):
    """Converted by the command and loaded, at every timestep, under labels; the levels
    are the original's too."""
    g = original(name)[0]
    assert command(place(name), tmp_path / name, "--image-size", 8, *FLAGS[name]) == 0
    factor = cp.from_diffusers(tmp_path / name)
    assert factor.event_shape == (8, 8, 3)
    parameterization = "x0" if "--predict-xstart" in FLAGS[name] else "epsilon"
    assert factor.parameterization == parameterization
    given = {"label": jnp.asarray(g["y"])} if "y" in g else {}
    assert set(factor.names) == set(given)
    times = jnp.asarray(g["times"], jnp.float32)
    actual = outputs(factor, given, jnp.asarray(g["x"]), times)
    assert error(actual, g["outputs"][..., :3]) < MOST
    schedule = factor.schedule
    np.testing.assert_allclose(schedule.alpha[g["times"]], g["alpha"], rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma[g["times"]], g["sigma"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (
            "adm",
            ["--num-head-channels", "16", "--noise-schedule", "cosine"],
        ),  # the old order
        slow("legacy", ["--num-heads", "2"]),
        slow(
            "improved",
            ["--num-heads", "4", "--diffusion-steps", "4000", "--rescale-timesteps"],
        ),  # heads on the way up
        slow(
            "improved",
            [
                "--num-heads",
                "4",
                "--num-heads-upsample",
                "2",
                "--diffusion-steps",
                "4000",
            ],
        ),
    ],
)
def test_what_weights_do_not_tell_matters(name, wrong, place, tmp_path):
    """Every option that has to be given changes the output by far more than the first
    test's tolerance."""
    g = original(name)[0]
    assert command(place(name), tmp_path / "out", "--image-size", 8, *wrong) == 0
    given = {"label": jnp.asarray(g["y"])} if "y" in g else {}
    factor = cp.from_diffusers(tmp_path / "out")
    times = jnp.asarray(g["times"], jnp.float32)
    actual = outputs(factor, given, jnp.asarray(g["x"]), times)
    assert error(actual, g["outputs"][..., :3]) > 100 * MOST


def test_precisions_of_files_are_kept(tmp_path):
    """Half precision stays what it is, bfloat16 too, and everything is read back bit
    for bit."""
    arrays = {
        "a": np.arange(3, dtype=np.float16),
        "b": np.asarray(jnp.ones((2, 5), jnp.bfloat16)),
        "c": np.float32(7),
    }
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    write(tmp_path / "some.safetensors", arrays)
    for name, entry in tensors.header(tmp_path / "some.safetensors").items():
        assert entry.dtype == arrays[name].dtype
        np.testing.assert_array_equal(np.asarray(entry.read()), arrays[name])


def change(**changes):
    """A state dict of the case "legacy" in which some arrays have another name, another
    shape, or are missing."""
    arrays = dict(original("legacy")[1])
    for name, new in changes.items():
        array = arrays.pop(name)
        if isinstance(new, str):
            arrays[new] = array
        elif new is not None:
            arrays[name] = np.zeros(new, np.float32)
    return arrays


def refuses(call, kind, match):
    with pytest.raises(kind, match=f"(?s){match}") as raised:
        call()
    assert raised.value.fix


HEADS = Supplied(8, 4)
TRANSFORMER = "middle_block.1.transformer_blocks.0.norm1.bias"

REFUSED = {
    "no heads": (
        {},
        Supplied(8),
        LoadError,
        r"attention over 32 channels.*num_heads=None.*weights do not contain",
    ),
    "heads that do not fit": (
        {},
        Supplied(8, 5),
        LoadError,
        "num_heads=5 cannot split",
    ),
    "channels that do not fit": (
        {},
        Supplied(8, None, 48),
        LoadError,
        "num_head_channels=48 cannot split",
    ),
    "size": (
        {},
        Supplied(10, 4),
        InvalidValueError,
        "image_size=10 cannot be halved .* not a multiple of 4",
    ),
    "no size": ({}, Supplied(0, 4), InvalidValueError, "image_size=0"),
    "steps": (
        {},
        Supplied(8, 4, diffusion_steps=1),
        LoadError,
        "diffusion_steps=1, which is not supported",
    ),
    "steps of a linear schedule": (
        {},
        Supplied(8, 4, diffusion_steps=20),
        LoadError,
        "from 21 with noise_schedule",
    ),
    "another layout": (
        {"time_embed.0.weight": "time_embedding.linear_1.weight"},
        HEADS,
        LoadError,
        "no time_emb",
    ),
    "a part": (
        {"middle_block.2.in_layers.2.bias": None},
        HEADS,
        LoadError,
        "mid_block.resnets.1.conv1.bias",
    ),
    "Stable Diffusion": (
        {"middle_block.1.proj_out.bias": TRANSFORMER},
        HEADS,
        LoadError,
        f"has {TRANSFORMER}, which",
    ),
    "another shape": (
        {"input_blocks.1.0.in_layers.2.weight": (32, 32, 1, 1)},
        HEADS,
        LoadError,
        "should be",
    ),
    "super-resolution": (
        {"input_blocks.0.0.weight": (32, 6, 3, 3)},
        HEADS,
        LoadError,
        "takes 6 channels",
    ),
    "classifier": (
        {"out.2.weight": (1000, 32, 1, 1)},
        HEADS,
        LoadError,
        "takes 3 channels and gives 1000",
    ),
    "blocks": (
        {
            f"output_blocks.1.1.in_layers.{i}.{part}": None
            for i in (0, 2)
            for part in ("weight", "bias")
        },
        HEADS,
        LoadError,
        "output_blocks of .* are not those",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_state_dicts_that_cannot_be_converted(case, tmp_path):
    """Refused before anything is written."""
    changes, supplied, kind, match = REFUSED[case]
    file = tmp_path / "weights.safetensors"
    save_file(change(**changes), file)
    refuses(lambda: convert(file, tmp_path / "out", supplied), kind, match)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_converted(place, tmp_path, capsys):
    def check(name, words):
        file = tmp_path / name
        refuses(lambda: convert(file, tmp_path / "out", HEADS), LoadError, words)

    check("nothing.safetensors", r"There is no .*nothing\.safetensors")
    (tmp_path / "adm.pt").write_bytes(b"")
    words = r"adm\.pt are a pickle.*torch\.load\('.*adm\.pt', weights_only=True"
    check("adm.pt", words)
    cut = tmp_path / "cut.safetensors"
    save_file(original("legacy")[1], cut)
    os.truncate(cut, cut.stat().st_size - 10)
    check("cut.safetensors", "not a complete safetensors file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = place("legacy"), tmp_path / "out", "--image-size", 8, "--num-heads", 4
    assert command(*arguments) == 2
    refusal = capsys.readouterr().err
    assert "is there already." in refusal
    fix = "Fix: write into another folder, or replace what is there with --replace."
    assert fix in refusal
    assert command(*arguments, "--replace") == 0
    words = "attention in the old order, a learned variance, which is not used"
    assert words in capsys.readouterr().out
