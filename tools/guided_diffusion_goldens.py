"""Compute test data: outputs of guided-diffusion's own networks, with random weights.

Run it in an environment of its own, with torch (CPU), beside a checkout of
guided-diffusion:

    PYTHONPATH=CHECKOUT:tests/pretrained python tools/guided_diffusion_goldens.py
    tests/pretrained/data/guided_diffusion

A file holds no weights: both sides draw the same weights from the names and shapes in
its metadata.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn import weights
from guided_diffusion import script_util
from safetensors.numpy import save_file

SMALL = {
    "image_size": 8,
    "num_channels": 32,
    "attention_resolutions": "4",
    "channel_mult": "1,2",
}
CASES: dict[str, dict[str, Any]] = {
    # Like the networks of ImageNet.
    "adm": {
        "num_res_blocks": 2,
        "num_head_channels": 16,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "class_cond": True,
        "learn_sigma": True,
        "noise_schedule": "cosine",
    },
    # Like those of ImageNet 128: a number of heads, each with its queries, keys and
    # values side by side.
    "legacy": {
        "num_res_blocks": 1,
        "num_heads": 4,
        "resblock_updown": True,
        "learn_sigma": True,
        "channel_mult": "1,2,2",
        "attention_resolutions": "8,4",
    },
    # Like those of improved-diffusion: convolutions change the resolution, 4,000 steps.
    "improved": {
        "num_res_blocks": 1,
        "num_heads": 4,
        "num_heads_upsample": 2,
        "use_scale_shift_norm": False,
        "diffusion_steps": 4000,
        "rescale_timesteps": True,
        "predict_xstart": True,
        "noise_schedule": "cosine",
    },
    # Like that of ImageNet 512, whose first block is narrower than the embedding;
    # attention in the middle only.
    "wide": {
        "num_res_blocks": 1,
        "num_channels": 64,
        "num_head_channels": 32,
        "attention_resolutions": "1",
        "channel_mult": "half",
        "resblock_updown": True,
    },
}


def networks(options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the original network and its diffusion."""
    # Half of the channels are not an option of the original's command line.
    half = options["channel_mult"] == "half"
    arguments = {**script_util.model_and_diffusion_defaults(), **options}
    if half:
        arguments["channel_mult"] = "1,1"
    model, diffusion = script_util.create_model_and_diffusion(**arguments)
    if half:
        model = script_util.UNetModel(
            image_size=8,
            in_channels=3,
            model_channels=64,
            out_channels=3,
            num_res_blocks=1,
            attention_resolutions=(),
            channel_mult=(0.5, 1),
            num_head_channels=32,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )
    return model.eval(), diffusion


def main() -> None:
    """Write a file for each case into the folder of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, case) in enumerate(CASES.items()):
        options = {**SMALL, **case}
        arrays, shapes = computed(options, seed)
        notes = {
            "shapes": json.dumps(shapes),
            "options": json.dumps(options),
            "seed": str(seed),
        }
        save_file(arrays, folder / f"{name}.safetensors", metadata=notes)
        print(name, sum(map(np.prod, shapes.values())), "weights", flush=True)


def computed(
    options: dict[str, Any], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Return inputs and outputs of one case, and the shapes of its weights."""
    model, diffusion = networks(options)
    shapes = {key: list(array.shape) for key, array in model.state_dict().items()}
    drawn = weights(shapes, seed)
    state = {key: torch.from_numpy(array) for key, array in drawn.items()}
    model.load_state_dict(state)
    normal = np.random.RandomState(seed).standard_normal((2, 3, 8, 8))
    x = torch.from_numpy(normal.astype(np.float32))
    last = diffusion.num_timesteps - 1
    times = [0, 1, 37, last // 2, last - 1, last]
    label = {"y": torch.tensor([3, 999])} if options.get("class_cond") else {}
    # Rescales timesteps where the options say so.
    wrapped = diffusion._wrap_model(model)
    with torch.no_grad():
        outputs = [wrapped(x, torch.tensor([t, t]), **label) for t in times]
    tensors = {
        "x": x,
        "times": np.asarray(times),
        "outputs": torch.stack(outputs),
        "alpha": diffusion.sqrt_alphas_cumprod,
        "sigma": diffusion.sqrt_one_minus_alphas_cumprod,
        **label,
    }
    arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    for key in ("x", "outputs"):
        # Channels last, as networks take them here.
        arrays[key] = np.ascontiguousarray(np.moveaxis(arrays[key], -3, -1))
    for key in ("alpha", "sigma"):
        arrays[key] = arrays[key][times]
    return arrays, shapes


if __name__ == "__main__":
    main()
