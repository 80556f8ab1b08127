"""Folders that cannot be loaded, nonsensical options, and values that a loaded model
refuses."""

import functools
import json
import math
import os
import shutil
import struct
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import composeprob as cp
from composeprob.errors import (
    CapabilityError,
    ConditionError,
    InvalidValueError,
    LoadError,
    NetworkError,
    ShapeError,
    WrongTypeError,
)
from composeprob.pretrained import schedulers, tensors
from composeprob.pretrained.load import AUTOENCODERS, ENCODERS, NETWORKS
from messages import check_wording
from pretrained.test_goldens import DATA, golden, model
from refusals import refused
from sampling_cases import single

WEIGHTS = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "sd"
    shutil.copytree(DATA / "sd", place)
    return place


def edit(name, **changes):
    """Change entries of a JSON file; the value … deletes one."""

    def change(folder):
        file = folder / name
        content = json.loads(file.read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        file.write_text(json.dumps(kept))

    return change


def remove(name):
    def change(folder):
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return change


def cut(name, keep):
    return lambda folder: os.truncate(folder / name, keep)


def retensor(**entry):
    """Change every entry in the header of the weights, byte for byte."""

    def change(folder):
        file = folder / WEIGHTS
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        for name in entries:
            if name != "__metadata__":
                entries[name] |= entry
        new = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return change


def two_files(folder):
    for name in ("a", "b"):
        shutil.copy(folder / WEIGHTS, folder / f"unet/{name}.safetensors")
    (folder / WEIGHTS).unlink()


def sharded(*files, **renamed):
    """Add an index that names the folder's weights by other names."""

    def change(folder):
        (folder / WEIGHTS).rename(folder / "unet/moved.safetensors")
        shutil.copy(
            folder / "unet/moved.safetensors", folder.parent / "outside.safetensors"
        )
        names = dict.fromkeys(
            load_file(folder / "unet/moved.safetensors"),
            renamed.get("file") or files[0](folder),
        )
        index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))

    return change


def rewrite(change):
    """Change arrays of the weights by their names."""

    def write(folder):
        arrays = load_file(folder / WEIGHTS)
        change(arrays)
        save_file(arrays, folder / WEIGHTS)

    return write


def widen(folder):
    """Make an inpainting network: the first layer takes a mask and an image beside the
    latents."""

    def change(arrays):
        kernel = arrays["conv_in.weight"]
        arrays["conv_in.weight"] = np.concatenate([kernel, kernel, kernel[:, :1]], 1)

    rewrite(change)(folder)
    edit("unet/config.json", in_channels=9)(folder)


def move_outside(folder):
    """Put a network beside the folder, and name it in the index as a component."""
    shutil.copytree(folder / "unet", folder.parent / "other")
    edit(
        "model_index.json",
        unet=...,
        **{"../other": ["diffusers", "UNet2DConditionModel"]},
    )(folder)


def drop(prefix):
    """Remove the weights whose names begin with a prefix."""

    def change(arrays):
        for name in list(arrays):
            if name.startswith(prefix):
                del arrays[name]

    return rewrite(change)


unet = functools.partial(edit, "unet/config.json")
vae = functools.partial(edit, "vae/config.json")
scheduler = functools.partial(edit, "scheduler/scheduler_config.json")
FOLDERS = {
    "no index": remove("model_index.json"),
    "broken index": lambda f: (f / "model_index.json").write_text("{"),
    "index of a list": lambda f: (f / "model_index.json").write_text("[]"),
    "no configuration": remove("unet/config.json"),
    "unknown class": unet(_class_name="UNet3DModel"),
    "no class": unet(_class_name=...),
    "unknown option": unet(brand_new=3),
    "dual attention": unet(dual_cross_attention=True),
    "gated attention": unet(attention_type="gated"),
    "distilled guidance": unet(time_cond_proj_dim=256),
    "unknown block": unet(down_block_types=["CrossAttnDownBlock2D", "KDownBlock2D"]),
    "activation": unet(act_fn="selu"),
    "number of blocks": unet(up_block_types=["UpBlock2D"]),
    "no size": unet(sample_size=None),
    "channels": unet(in_channels=9),
    "inpainting": widen,
    "no weights": remove(WEIGHTS),
    "pickle": lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"),
    "two files": two_files,
    "cut short": cut(WEIGHTS, 40_000),
    "cut in the header": cut(WEIGHTS, 100),
    "empty file": cut(WEIGHTS, 0),
    "unknown dtype": retensor(dtype="F8_E4M3"),
    "a missing file of several": sharded(
        file="diffusion_pytorch_model-00001-of-00002.safetensors"
    ),
    "an index that is none": (
        lambda f: (
            f / "unet/diffusion_pytorch_model.safetensors.index.json"
        ).write_text("{}")
    ),
    "a missing tensor": rewrite(lambda a: a.pop("conv_in.bias")),
    "a tensor too many": rewrite(lambda a: a.update({"lora.weight": np.zeros(3)})),
    "another width": unet(cross_attention_dim=16),
    "another shape": rewrite(
        lambda a: a.update({"conv_out.weight": np.zeros((4, 9, 3, 3), np.float16)})
    ),
    "another rank": rewrite(
        lambda a: a.update({"conv_in.weight": a["conv_in.weight"][0]})
    ),
    "no numbers at all": rewrite(
        lambda a: a.update({"conv_in.weight": np.zeros((0, 4, 3, 3), np.float16)})
    ),
    "whole numbers": rewrite(
        lambda a: a.update({"conv_in.bias": a["conv_in.bias"].astype(np.int32)})
    ),
    "a block less": drop("up_blocks.1."),
    "blocks less on the way up": lambda f: (
        drop("up_blocks.1.")(f),
        unet(up_block_types=...)(f),
    ),
    "no keys of a prompt": rewrite(
        lambda a: [a.pop(name) for name in list(a) if ".attn2." in name]
    ),
    "a layer less": drop("down_blocks.0.resnets.0.conv1"),
    "attention that is no more": drop("down_blocks.0.attentions"),
    "an offset that is negative": retensor(data_offsets=[-8, 0]),
    "an offset beyond the end": retensor(data_offsets=[10**12, 10**12 + 4]),
    "an offset that is no number": retensor(data_offsets=["0", "4"]),
    "a shape that is negative": retensor(shape=[-1, -8]),
    "a shape of fractions": retensor(shape=[1.5]),
    "a header of a list": lambda f: (f / WEIGHTS).write_bytes(
        struct.pack("<Q", 2) + b"[]"
    ),
    "a header of gigabytes": lambda f: (f / WEIGHTS).write_bytes(
        struct.pack("<Q", 2**62) + b"{}"
    ),
    "deep brackets": lambda f: (f / "unet/config.json").write_text("[" * 100_000),
    "a shard by an absolute path": sharded(
        lambda f: str(f.parent / "outside.safetensors")
    ),
    "a shard outside": sharded(file="../../outside.safetensors"),
    "a shard that is the folder": sharded(file=".."),
    "a shard on another system": sharded(file="..\\outside.safetensors"),
    "a component outside": move_outside,
    "betas of nan": scheduler(beta_end=float("nan")),
    "no scheduler": remove("scheduler"),
    "unknown scheduler": scheduler(_class_name="LCMScheduler"),
    "unknown betas": scheduler(beta_schedule="laplace"),
    "unknown prediction": scheduler(prediction_type="x"),
    "trained betas": scheduler(trained_betas=[0.1]),
    "autoencoder's class": vae(_class_name="VQModel"),
    "autoencoder's shape": vae(latent_channels=8),
    "text encoder's weights": remove("text_encoder"),
    "empty tokenizer": remove("tokenizer/merges.txt"),
    "broken tokenizer": lambda f: (f / "tokenizer/vocab.json").write_text("{"),
    "tokenizer without its end": edit(
        "tokenizer/tokenizer_config.json", pad_token="<pad>"
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_cannot_be_loaded(case, folder):
    if "tokenizer" in case:
        pytest.importorskip("tokenizers")
    change = FOLDERS[case]
    change(folder)
    error = refused(lambda: cp.from_diffusers(folder), LoadError)
    assert str(folder) in str(error), "which file"


def test_weights_that_are_no_numbers(folder):
    """A NaN in the network's file is found when it is loaded, and the array named."""
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-2:] = struct.pack("<e", float("nan"))
    file.write_bytes(data)
    refused(lambda: cp.from_diffusers(folder), InvalidValueError)


def test_nothing_is_read_before_everything_is_checked(folder, monkeypatch):
    """A wrong text encoder is refused although the network, whose weights are read
    first, is right."""
    edit("text_encoder/config.json", hidden_size=16)(folder)
    monkeypatch.setattr(
        "composeprob.pretrained.tensors.Stored.read",
        lambda self: pytest.fail("a weight was read"),
    )
    refused(
        lambda: cp.from_diffusers(folder),
        LoadError,
    )


def test_places_that_hold_no_model(tmp_path, monkeypatch):
    refused(
        lambda: cp.from_diffusers(tmp_path / "nothing"),
        LoadError,
    )
    refused(
        lambda: cp.from_diffusers(DATA / "sd" / "model_index.json"),
        LoadError,
    )
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused(lambda: cp.from_diffusers(tmp_path / "model.ckpt"), LoadError, "model.ckpt")
    refused(
        lambda: cp.from_diffusers(DATA / "ddpm" / "unet", component="unet"),
        InvalidValueError,
        "unet",
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        lambda: cp.from_diffusers("someone/some-model"), LoadError, "huggingface_hub"
    )


def test_names_on_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    downloads = []

    def download(name, allow_patterns):
        downloads.append((name, allow_patterns))
        return str(DATA / "ddpm")

    def fail(name, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert cp.from_diffusers("someone/some-model").event_shape == (8, 8, 3)
    name, patterns = downloads[0]
    assert name == "someone/some-model"
    for pattern in patterns:
        assert "bin" not in pattern, "pickles stay on the hub"
        assert pattern != "*"
    monkeypatch.setattr(hub, "snapshot_download", fail)
    refused(lambda: cp.from_diffusers("someone/some-model"), LoadError, "offline")


def test_a_prompt_without_a_tokenizer(folder):
    """A text is refused; token ids and hidden states are not; without any, the network
    cannot be called."""
    shutil.rmtree(folder / "tokenizer")
    factor = cp.from_diffusers(folder)
    refused(lambda: factor.given(prompt="a cat"), ConditionError, "'a cat'")
    assert factor.given(prompt=golden("sd")["ids"][0]).fixed["prompt"].shape == (16, 12)
    refused(
        lambda: cp.compile(single, factor),
        NetworkError,
    )


stable = functools.partial(cp.from_diffusers, DATA / "sd")


def prompted(name, prompt):
    return lambda: model(name).given(prompt=prompt)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        pytest.param(
            lambda: stable(component="vae"),
            LoadError,
            id="vae/config.json has _class_name='AutoencoderKL'",
        ),
        pytest.param(
            lambda: stable(component="decoder"),
            InvalidValueError,
            id="no component 'decoder'; it has: ...component='unet'",
        ),
        pytest.param(
            lambda: stable(dtype="int8"), InvalidValueError, id="Unknown dtype 'int8'"
        ),
        pytest.param(
            lambda: stable(dtype=object()), InvalidValueError, id="Unknown dtype"
        ),
        pytest.param(
            lambda: stable(schedule=60),
            WrongTypeError,
            id="must be a cp.Schedule; got int",
        ),
        pytest.param(
            prompted("sd", np.arange(99)),
            InvalidValueError,
            id="takes 1 to 16 tokens; got 99",
        ),
        pytest.param(
            prompted("sd", np.array([3, 10_000])),
            InvalidValueError,
            id="go from 3 to 10000, but",
        ),
        pytest.param(
            prompted("sd", np.zeros((2, 16), int)),
            ShapeError,
            id="ids have shape (length,); got (2, 16)",
        ),
        pytest.param(
            prompted("sd", np.zeros((16, 7))),
            ShapeError,
            id="shape (length, 12); got (16, 7)",
        ),
        pytest.param(
            prompted("sd1", "a cat"),
            ConditionError,
            id="a text encoder, and the model's folder has none",
        ),
        pytest.param(
            prompted("sdxl", np.zeros((16, 7))),
            ShapeError,
            id="last row the pooled vector's 10 numbers",
        ),
        pytest.param(
            lambda: model("dit").given(label=7),
            InvalidValueError,
            id="from 0 to 6; got 7",
        ),
        pytest.param(
            lambda: model("dit").given(label=-1),
            InvalidValueError,
            id="from 0 to 6; got -1",
        ),
        pytest.param(
            lambda: model("labels").given(label=5),
            InvalidValueError,
            id="from 0 to 4; got 5",
        ),
        pytest.param(
            lambda: model("labels").given(label=1.5),
            InvalidValueError,
            id="from 0 to 4; got 1.5",
        ),
        pytest.param(
            prompted("dit", "a cat"),
            ConditionError,
            id="no condition 'prompt'; its conditions are: 'label'",
        ),
        pytest.param(
            lambda: model("sd").decode(np.zeros((8, 8, 3))),
            ShapeError,
            id="Latents...4); got (8, 8, 3)",
        ),
        pytest.param(
            lambda: model("sd").decode(np.zeros((8, 4))), ShapeError, id="Latents"
        ),
        pytest.param(
            lambda: model("sd").encode(np.zeros((15, 16, 3))),
            ShapeError,
            id="sides multiples of 2; got (15, 16, 3)",
        ),
        pytest.param(
            lambda: model("sd").encode(np.zeros((3, 16, 16))),
            ShapeError,
            id="channels come last",
        ),
        pytest.param(
            lambda: model("sd").encode(np.full((16, 16, 3), 9, np.uint8)),
            InvalidValueError,
            id="uint8 values from 9 to 9",
        ),
        pytest.param(
            lambda: model("sd").encode(np.full((16, 16, 3), 255.0)),
            InvalidValueError,
            id="values from 255 to 255",
        ),
        pytest.param(
            prompted("sd", ["a cat", "a dog"]), ShapeError, id="two texts of a prompt"
        ),
        pytest.param(
            lambda: model("ddpm").encode(np.zeros((8, 8, 3))),
            CapabilityError,
            id="has no autoencoder",
        ),
        pytest.param(
            lambda: model("ddpm").text_encoder,
            CapabilityError,
            id="has no text encoder",
        ),
        pytest.param(
            lambda: model("sd").text_encoder_2,
            CapabilityError,
            id="no second text encoder",
        ),
        pytest.param(
            lambda: model("sd").text_encoder(np.zeros(3)),
            InvalidValueError,
            id="Token ids are whole numbers",
        ),
    ],
)
def test_arguments_conditions_images_and_latents_that_are_not_taken(call, error):
    refused(call, error)


# every option of every file of a folder, with nonsensical values
# ------------------------------------------------------------------------------------


VALUES = (None, "x", -1, 0, 2, 1.5, [], [2], {}, True)
FILES = (
    "ddpm/unet",
    "labels/unet",
    "sd/unet",
    "sdxl/unet",
    "dit/transformer",
    "sd3/transformer",
    "sd/vae",
    "dit/vae",
    "sd/text_encoder",
    "sd/scheduler",
    "labels/scheduler",
    "edm/scheduler",
    "fourier/scheduler",
    "sd3/scheduler",
)


def read(name):
    (file,) = (DATA / name).glob("*config.json")
    return json.loads(file.read_text())


def build(name, config):
    """The network or the levels of a file, as `from_diffusers` builds them before it
    reads any weight."""
    if "scheduler" in name:
        return schedulers.trained(config, "config.json")
    builders = NETWORKS | AUTOENCODERS | ENCODERS
    kind = read(name).get("_class_name", "CLIPTextModel")
    arrays = tensors.Arrays(tensors.weights(DATA / name), "weights")
    return builders[kind](config, arrays, "config.json")


@pytest.fixture
def traced_once(monkeypatch):
    """A network is traced once, however many values of an option mean the same."""
    trace = tensors.Arrays.trace
    traces = {}

    def once(self, compute, *inputs, **named):
        key = (
            getattr(compute, "__self__", compute),
            getattr(compute, "__name__", ""),
            inputs,
            tuple(named.items()),
        )
        if key not in traces:
            shape = trace(self, compute, *inputs, **named)
            traces[key] = shape, frozenset(self._taken)
        shape, taken = traces[key]
        self._taken |= taken
        return shape

    monkeypatch.setattr(tensors.Arrays, "trace", once)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", FILES)
def test_nonsensical_values(name):
    """For every value, the file is refused by an error of this library, or the network
    is built as the file says."""
    config = read(name)
    refused = []
    for option in config:
        for value in VALUES:
            try:
                build(name, {**config, option: value})
            except LoadError as error:
                refused.append(error)
    assert len(refused) > len(config), "most values are refused"
    assert all(error.fix for error in refused)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ddpm/unet", "layers_per_block", "2"),
        ("ddpm/unet", "layers_per_block", 2),
        ("ddpm/unet", "down_block_types", 3),
        ("ddpm/unet", "norm_num_groups", 3),
        ("sd/unet", "attention_head_dim", 0),
        ("sd/unet", "transformer_layers_per_block", 3),
        ("dit/transformer", "num_layers", 28),
        ("sd3/transformer", "num_layers", 24),
        ("sd/vae", "scaling_factor", None),
        ("sd/text_encoder", "num_hidden_layers", 12),
        ("sd/text_encoder", "layer_norm_eps", []),
        ("sd/scheduler", "beta_end", 2.0),
        ("sd/scheduler", "trained_betas", [math.nan] * 1000),
        ("sd/scheduler", "num_train_timesteps", 0),
        ("sd/scheduler", "num_train_timesteps", -5),
        ("sd/scheduler", "num_train_timesteps", 10**15),
        ("labels/scheduler", "num_train_timesteps", "1000"),
        ("edm/scheduler", "sigma_max", math.inf),
        ("edm/scheduler", "sigma_max", 0.001),
        ("fourier/scheduler", "sigma_max", -1),
    ],
)
def test_the_option_at_fault_is_named(name, option, value):
    with pytest.raises(LoadError) as caught:
        build(name, {**read(name), option: value})
    check_wording(str(caught.value))


def test_a_model_of_labels_needs_one():
    """Without a label the network would leave its embedding out, and compute something
    that it was not trained for."""
    factor = model("labels")
    refused(
        lambda: cp.compile(single, factor),
        NetworkError,
        fix=r"given\(label=…\)",
    )
    assert cp.compile(single, factor.given(label=0))
