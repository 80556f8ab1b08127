"""Every option of every file of a folder, with values that nobody can mean: refused by name, or harmless."""

import json
import math

import pytest

from composeprob.errors import LoadError
from composeprob.pretrained import schedulers, tensors
from composeprob.pretrained.load import AUTOENCODERS, ENCODERS, NETWORKS
from pretrained.test_goldens import DATA

VALUES = (None, "x", -1, 0, 2, 1.5, [], [2], {}, True)
FILES = (
    "ddpm/unet", "labels/unet", "sd/unet", "sdxl/unet", "dit/transformer", "sd3/transformer", "sd/vae", "dit/vae",
    "sd/text_encoder", "sd/scheduler", "labels/scheduler", "edm/scheduler", "fourier/scheduler", "sd3/scheduler",
)  # fmt: skip


def read(name):
    (file,) = (DATA / name).glob("*config.json")
    return json.loads(file.read_text())


def build(name, config):
    """What `from_diffusers` makes of a file, before it reads any weight."""
    if "scheduler" in name:
        return schedulers.trained(config, "config.json")
    known = NETWORKS | AUTOENCODERS | ENCODERS
    kind = read(name).get("_class_name", "CLIPTextModel")
    return known[kind](config, tensors.Arrays(tensors.weights(DATA / name), "weights"), "config.json")


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch):
    """A network is traced once, however many values of an option mean the same."""
    trace, taken = tensors.Arrays.trace, {}

    def once(self, compute, *inputs, **named):
        key = getattr(compute, "__self__", compute), getattr(compute, "__name__", ""), inputs, tuple(named.items())
        if key not in taken:
            taken[key] = trace(self, compute, *inputs, **named), frozenset(self._taken)
        self._taken |= taken[key][1]
        return taken[key][0]

    monkeypatch.setattr(tensors.Arrays, "trace", once)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", FILES)
def test_values_that_nobody_can_mean(name):
    """Whatever the value, the file is refused in words of this library or the network is built as the file says."""
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
    ("name", "option", "value", "told"),
    [
        ("ddpm/unet", "layers_per_block", "2", r"has layers_per_block='2', but the weights .* layers_per_block=\[1, 1"),
        ("ddpm/unet", "layers_per_block", 2, r"has layers_per_block=2, but the weights .* layers_per_block=\[1, 1"),
        ("ddpm/unet", "down_block_types", 3, "has down_block_types=3, which is not supported"),
        ("ddpm/unet", "norm_num_groups", 3, "has 8 channels, which 3 groups of a norm cannot split"),
        ("sd/unet", "attention_head_dim", 0, "has attention_head_dim=0, which is not supported"),
        ("sd/unet", "transformer_layers_per_block", 3, "has transformer_layers_per_block=3, but the weights"),
        ("dit/transformer", "num_layers", 28, "has num_layers=28, but the weights .* num_layers=2"),
        ("sd3/transformer", "num_layers", 24, "has num_layers=24, but the weights"),
        ("sd/vae", "scaling_factor", None, "has scaling_factor=None, which is not supported"),
        ("sd/text_encoder", "num_hidden_layers", 12, "has num_hidden_layers=12, but the weights"),
        ("sd/text_encoder", "layer_norm_eps", [], r"has layer_norm_eps=\[\], which is not supported"),
        ("sd/scheduler", "beta_end", 2.0, "gives β from 0.00085 to 2"),
        ("sd/scheduler", "trained_betas", [math.nan] * 1000, r"(?s)has trained_betas=\[nan, .*a list, each a number"),
        ("sd/scheduler", "num_train_timesteps", 0, "num_train_timesteps=0, which is not supported"),
        ("sd/scheduler", "num_train_timesteps", -5, "num_train_timesteps=-5, which is not supported"),
        ("sd/scheduler", "num_train_timesteps", 10**15, "num_train_timesteps=1000000000000000, which is not supp"),
        ("labels/scheduler", "num_train_timesteps", "1000", "num_train_timesteps='1000', which is not supported"),
        ("edm/scheduler", "sigma_max", math.inf, "has sigma_max=inf, which is not supported"),
        ("edm/scheduler", "sigma_max", 0.001, "gives no levels of noise"),
        ("fourier/scheduler", "sigma_max", -1, "has sigma_max=-1, which is not supported"),
    ],
)
def test_the_option_at_fault_is_named(name, option, value, told):
    with pytest.raises(LoadError, match=told):
        build(name, {**read(name), option: value})
