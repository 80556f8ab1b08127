"""Every option of every file of a folder, with values that nobody can mean: refused by name, or harmless."""

from __future__ import annotations

import json

import pytest

from composeprob.errors import LoadError
from composeprob.pretrained import autoencoder, clip, dit, schedulers, sd3, tensors, tiny, unet_2d, unet_condition
from composeprob.pretrained.config import built
from composeprob.pretrained.load import IGNORED
from pretrained.test_goldens import DATA

VALUES = (None, "x", -1, 0, 2, 1.5, [], [2], {}, True)
FILES = {
    "ddpm/unet": unet_2d.build,
    "sd/unet": unet_condition.build,
    "dit/transformer": dit.build,
    "sd3/transformer": sd3.build,
    "sd/vae": autoencoder.build,
    "dit/vae": tiny.build,
    "sd/text_encoder": clip.build,
    "sd/scheduler": schedulers.trained,
    "labels/scheduler": schedulers.trained,
    "edm/scheduler": schedulers.trained,
    "fourier/scheduler": schedulers.trained,
    "sd3/scheduler": schedulers.trained,
}


def read(name):
    (file,) = (DATA / name).glob("*config.json")
    return json.loads(file.read_text())


def current(name):
    return tensors.current(name.removeprefix("text_model."))


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", FILES)
def test_values_that_nobody_can_mean(name):
    """Whatever the value, the file is refused in words of this library or the network is built as the file says."""
    config, build = read(name), FILES[name]
    stored = None if "scheduler" in name else tensors.weights(DATA / name)
    refused = []
    for option in config:
        for value in VALUES:
            try:
                found = built(build, {**config, option: value}, "config.json")
                if stored is not None:
                    tensors.check(getattr(found, "module", found), stored, "weights", rename=current, ignored=IGNORED)
            except LoadError as error:
                refused.append(error)
    assert len(refused) > len(config), "most values are refused"
    assert all(error.fix for error in refused)


@pytest.mark.parametrize(
    ("name", "option", "value", "told"),
    [
        ("ddpm/unet", "layers_per_block", "2", r"has layers_per_block='2' of which nothing .* TypeError"),
        ("ddpm/unet", "down_block_types", None, "has down_block_types=None of which nothing"),
        (
            "ddpm/unet",
            "norm_num_groups",
            3,
            "of which nothing can be made: ValueError: 8 channels cannot be split into 3",
        ),
        ("sd/unet", "attention_head_dim", 0, r"has attention_head_dim=0 of which .* ZeroDivisionError"),
        ("sd/vae", "scaling_factor", None, "has scaling_factor=None of which"),
        ("sd/text_encoder", "layer_norm_eps", [], r"has layer_norm_eps=\[\] of which"),
        ("sd/scheduler", "beta_end", 2.0, "gives β from 0.00085 to 2"),
        ("labels/scheduler", "num_train_timesteps", "1000", "num_train_timesteps='1000', which is not supported"),
        ("fourier/scheduler", "sigma_max", -1, "has sigma_max=-1 of which"),
    ],
)
def test_the_option_at_fault_is_named(name, option, value, told):
    with pytest.raises(LoadError, match=told):
        built(FILES[name], {**read(name), option: value}, "config.json")
