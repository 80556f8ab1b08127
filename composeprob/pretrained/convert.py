"""A state dict of guided-diffusion's UNetModel as a folder that `from_diffusers` loads.

What the shapes of the weights contain is read from them: channels, blocks, where there is attention, labels. The
caller supplies the rest: the image's size, the heads and their order, the schedule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from composeprob.errors import InvalidValueError, LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained import adm, schedulers, tensors
from composeprob.pretrained.layers import Parameter
from composeprob.pretrained.tensors import Stored


@dataclass(frozen=True)
class Supplied:
    """Options that cannot be read off the weights, by the names of guided-diffusion's own options.

    Attributes:
        image_size: height and width of the images.
        num_heads, num_heads_upsample: heads of attention, and of that on the way up where it has others.
        num_head_channels: channels of each head, instead of their number.
        use_new_attention_order: whether queries, keys and values are split before the heads are.
        noise_schedule: ``"linear"`` or ``"cosine"``.
        diffusion_steps: timesteps of the training.
        predict_xstart: whether the output is x̂₀, and not ε̂.
        rescale_timesteps: whether the network takes timesteps as if there were 1,000.
    """

    image_size: int
    num_heads: int | None = None
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    use_new_attention_order: bool = False
    noise_schedule: str = "linear"
    diffusion_steps: int = 1000
    predict_xstart: bool = False
    rescale_timesteps: bool = False


def convert(weights: Path, out: Path, supplied: Supplied, *, replace: bool = False) -> JSONObject:
    """Writes a folder with config.json, the weights and scheduler_config.json; returns the network's configuration.

    Args:
        weights: a safetensors file.
        out: the folder.
        told: what the weights do not tell.
        replace: whether files that are there are replaced.

    Raises:
        LoadError: no such file, a pickle, or no state dict of such a network; before anything is written.
        InvalidValueError: the folder has files, or a value that fits no such network.
    """
    if weights.suffix in tensors.PICKLES:
        tensors.refuse_pickles(weights)
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValueError(
            f"{out} is there already.", fix="write into another folder, or replace what is there with --replace."
        )
    stored = tensors.header(weights)
    config = configuration(stored, supplied, str(weights))
    if supplied.image_size < 1 or supplied.image_size % 2 ** (len(config["block_channels"]) - 1):
        raise InvalidValueError(
            f"image_size={supplied.image_size} cannot be halved as often as this network does, "
            f"{len(config['block_channels']) - 1} times.",
            fix="give the size of the images that it was trained on.",
        )
    scheduler = {
        "_class_name": schedulers.Family.GUIDED.value[0],
        **{name: getattr(supplied, name) for name in ("noise_schedule", "diffusion_steps", "predict_xstart")},
    }
    schedulers.trained(scheduler, "the command")  # refused before anything is written
    arrays = dict(_renamed(stored, config, supplied, str(weights)))
    _check(adm.build(config, str(weights)).module, arrays, str(weights))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    tensors.write(out / "diffusion_pytorch_model.safetensors", arrays)
    return config


def configuration(stored: Mapping[str, Stored], supplied: Supplied, where: str) -> JSONObject:
    """The network's options, as `adm.build` takes them.

    Raises:
        LoadError: weights of another network.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in stored:
            raise _foreign(f"{where} has no {name}, as a UNetModel of guided-diffusion has.")
        return stored[name].shape

    inputs, outputs = shape("input_blocks.0.0.weight")[1], shape("out.2.weight")[0]
    if outputs not in (inputs, 2 * inputs) or inputs == 6:
        raise LoadError(
            f"The network in {where} takes {inputs} channels and gives {outputs}: it enlarges a smaller image, or is "
            "no diffusion model.",
            fix="convert a model of whole images: what enlarges images has no score of what it takes.",
        )
    count = 1 + max((int(i) for i in _indices(stored, r"output_blocks\.(\d+)\.0\.in_layers")), default=-1)
    grown = {int(j) for j in _indices(stored, r"output_blocks\.(\d+)\.(?:[12]\.in_layers|[12]\.conv)\.")}
    period = min(grown, default=count - 1) + 1  # blocks of one resolution on the way up, one more than on the way down
    if period < 2 or count % period or grown != set(range(period - 1, count - 1, period)):
        raise _foreign(f"The output_blocks of {where} are not those of a UNetModel of guided-diffusion.")
    first = [i * period for i in reversed(range(count // period))]  # of each resolution, the largest images first
    widths = [shape(f"output_blocks.{j}.0.out_layers.3.weight")[0] for j in first]
    channels = shape("time_embed.0.weight")[1]
    steps = 1000 / supplied.diffusion_steps if supplied.rescale_timesteps and supplied.diffusion_steps > 0 else 1.0
    return {
        "_class_name": adm.NAME,
        "image_size": supplied.image_size,
        "in_channels": inputs,
        "out_channels": outputs,
        "num_channels": channels,
        "block_channels": widths,
        "attention_blocks": [f"output_blocks.{j}.1.qkv.weight" in stored for j in first],
        "num_res_blocks": period - 1,
        "num_classes": shape("label_emb.weight")[0] if "label_emb.weight" in stored else None,
        "num_heads": supplied.num_heads,
        "num_head_channels": supplied.num_head_channels,
        "num_heads_upsample": supplied.num_heads_upsample,
        "use_scale_shift_norm": shape("middle_block.0.emb_layers.1.weight")[0] == 2 * widths[-1],
        "resblock_updown": any(_indices(stored, r"output_blocks\.(\d+)\.[12]\.in_layers\.")),
        "time_scale": steps,
    }


def _foreign(message: str) -> LoadError:
    """The error of weights that are not guided-diffusion's."""
    return LoadError(
        message,
        fix="save the state_dict of a UNetModel of guided-diffusion or improved-diffusion; a model in diffusers' form "
        "needs no conversion, and diffusers' from_single_file reads single files of Stable Diffusion.",
    )


def _indices(names: Mapping[str, Stored], pattern: str) -> Iterator[str]:
    return (found[1] for name in names if (found := re.match(pattern, name)))


def _renamed(
    stored: Mapping[str, Stored], config: JSONObject, supplied: Supplied, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every array by its name here, queries, keys and values apart."""
    for name, entry in stored.items():
        layer, _, kind = name.rpartition(".")
        here, inner = _place(layer, config["num_res_blocks"])
        array = entry.read()
        if inner == "qkv":
            width = entry.shape[0] // 3
            up = name.startswith("output_blocks")
            number = (supplied.num_heads_upsample if up else None) or supplied.num_heads
            count = adm.heads(width, number, supplied.num_head_channels, where)
            for part, array_of in zip("qkv", _split(array, count, supplied.use_new_attention_order), strict=True):
                yield f"{here}.to_{part}.{kind}", array_of
        elif inner == "proj_out":
            yield f"{here}.to_out.0.{kind}", array.reshape(array.shape[:2])
        elif here is None:
            raise _foreign(f"{where} has {name}, which a UNetModel of guided-diffusion has not.")
        else:
            yield f"{here}.{kind}", array


def _split(array: np.ndarray, heads: int, new_order: bool) -> list[np.ndarray]:
    """Queries, keys and values of one projection (3·c, …): in the new order they are its thirds, in the old one the
    thirds of each head."""
    wide = array.reshape(array.shape[:2]) if array.ndim > 1 else array  # a convolution of one pixel
    width, rest = wide.shape[0] // 3, wide.shape[1:]
    thirds = wide.reshape(3, width, *rest) if new_order else wide.reshape(heads, 3, width // heads, *rest)
    return [(thirds[i] if new_order else thirds[:, i]).reshape(width, *rest) for i in range(3)]


def _place(layer: str, layers: int) -> tuple[str | None, str]:
    """Where a layer of the original lies here, and its name within attention; None for one that is not known."""
    outside = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    if layer in outside:
        return outside[layer], ""
    found = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)|(middle_block)\.()(\d)\.(.+)", layer)
    if found is None:
        return None, ""
    side, number, position, inner = (group for group in found.groups() if group is not None)
    if side == "middle_block":
        stage, block, at = "mid_block", int(position) // 2, int(position) == 1
        last = False
    else:
        index, period = int(number) - (side == "input_blocks"), layers + 1
        stage = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{index // period}"
        block, at = index % period, inner.split(".")[0] in ("norm", "qkv", "proj_out")
        last = block == layers if side == "input_blocks" else position != "0" and not at
    if at:
        place = f"{stage}.attentions.{block}"
        return {"norm": (f"{place}.group_norm", ""), "qkv": (place, inner), "proj_out": (place, inner)}.get(
            inner, (None, "")
        )
    change = f"{stage}.{'downsamplers' if side == 'input_blocks' else 'upsamplers'}.0"
    if last and inner in ("op", "conv"):
        return f"{change}.conv", ""
    resnet = change if last else f"{stage}.resnets.{block}"
    names = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return (f"{resnet}.{names[inner]}" if inner in names else None), ""


def _check(skeleton: PyTree[Parameter], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuses arrays that are not those of the skeleton.

    Raises:
        LoadError: it names what is missing, too much, or of another shape.
    """
    wanted = {name: parameter.stored for name, parameter in tensors.named(skeleton)}
    found = {name: array.shape for name, array in arrays.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise _foreign(
            f"The weights in {where} are not those of one UNetModel: for {name} the file has {found.get(name)}, and "
            f"the other layers ask for {wanted.get(name)}" + (f"; {len(wrong) - 1} more." if len(wrong) > 1 else ".")
        )
