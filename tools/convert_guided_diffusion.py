"""A state dict of guided-diffusion's UNetModel (ADM, improved-diffusion) as a folder
that `cp.from_diffusers` loads.

    python tools/convert_guided_diffusion.py adm64.safetensors models/adm64 --image-size
        64 --num-head-channels 64 \\ --use-new-attention-order --noise-schedule cosine
    python tools/convert_guided_diffusion.py lsun_bedroom.safetensors models/bedroom
        --image-size 256 \\ --num-head-channels 64

The options have the names, the meaning and the defaults of guided-diffusion's own
flags; channels, blocks, labels and a learned variance are read from the weights. The
number of heads must be given, as no weight contains it; a wrong number, or order, gives
no error and another network. Its own files are pickles, which are not read: given one,
the error names what makes safetensors of it.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from composeprob.errors import ComposeProbError, InvalidValueError, LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained import schedulers, tensors
from composeprob.pretrained.tensors import Arrays, Network, Stored
from composeprob.pretrained.unet import GUIDED, guided


@dataclass(frozen=True)
class Supplied:
    """Options that cannot be read off the weights, by the names of guided-diffusion's
    own options.

    Attributes:
        image_size: height and width of the images.
        num_heads, num_heads_upsample: heads of attention, and of that on the way up
            where it has others.
        num_head_channels: channels of each head, instead of their number.
        use_new_attention_order: whether queries, keys and values are split before the
            heads are.
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


def convert(
    weights: Path, out: Path, supplied: Supplied, *, replace: bool = False
) -> Network:
    """Writes a folder with config.json, the weights and scheduler_config.json; returns
    the network, without its arrays.

    Args:
        weights: a safetensors file.
        out: the folder.
        supplied: what the weights do not contain.
        replace: whether files that are there are replaced.

    Raises:
        LoadError: no such file, a pickle, or no state dict of such a network; before
            anything is written.
        InvalidValueError: the folder has files, or a value that fits no such network.
    """
    if weights.suffix in tensors.PICKLES:
        tensors.refuse_pickles(weights)
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValueError(
            f"{out} is there already.",
            fix="write into another folder, or replace what is there with --replace.",
        )
    stored, where = tensors.header(weights), str(weights)
    steps = supplied.diffusion_steps
    heads = ("num_heads", "num_head_channels", "num_heads_upsample")
    config: JSONObject = {
        "_class_name": GUIDED,
        "image_size": supplied.image_size,
        **{name: getattr(supplied, name) for name in heads},
        "time_scale": 1000 / steps if supplied.rescale_timesteps and steps > 0 else 1.0,
    }
    names = ("noise_schedule", "diffusion_steps", "predict_xstart")
    scheduler = {
        "_class_name": schedulers.Family.GUIDED.value[0],
        **{name: getattr(supplied, name) for name in names},
    }
    schedulers.trained(scheduler, "the command")  # refused before anything is written
    arrays = dict(
        _renamed(stored, blocks_per_resolution(stored, where), supplied, where)
    )
    shapes = {
        name: Stored(weights, array.dtype, array.shape, 0)
        for name, array in arrays.items()
    }
    network = guided(config, Arrays(shapes, where), where)
    if supplied.image_size < 1 or supplied.image_size % network.multiple:
        raise InvalidValueError(
            f"image_size={supplied.image_size} cannot be halved as often as this network does: it is no multiple of "
            f"{network.multiple}.",
            fix="give the size of the images that it was trained on.",
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    write(out / "diffusion_pytorch_model.safetensors", arrays)
    return network


def blocks_per_resolution(stored: Mapping[str, Stored], where: str) -> int:
    """How many residual blocks the way down has at each resolution; the way up has one
    more.

    Raises:
        LoadError: weights of another network.
    """
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"):
        if name not in stored:
            raise _foreign(
                f"{where} has no {name}, as a UNetModel of guided-diffusion has."
            )
    inputs, outputs = (
        stored["input_blocks.0.0.weight"].shape[1],
        stored["out.2.weight"].shape[0],
    )
    if outputs not in (inputs, 2 * inputs) or inputs == 6:
        raise LoadError(
            f"The network in {where} takes {inputs} channels and gives {outputs}: it enlarges a smaller image, or is "
            "no diffusion model.",
            fix="convert a model of whole images: what enlarges images has no score of what it takes.",
        )
    count = 1 + max(
        (int(i) for i in _indices(stored, r"output_blocks\.(\d+)\.0\.in_layers")),
        default=-1,
    )
    grown = {
        int(j)
        for j in _indices(
            stored, r"output_blocks\.(\d+)\.(?:[12]\.in_layers|[12]\.conv)\."
        )
    }
    period = min(grown, default=count - 1) + 1
    if (
        period < 2
        or count % period
        or grown != set(range(period - 1, count - 1, period))
    ):
        raise _foreign(
            f"The output_blocks of {where} are not those of a UNetModel of guided-diffusion."
        )
    return period - 1


def _heads(width: int, number: int | None, channels: int | None, where: str) -> int:
    """The number of heads of an attention of ``width`` channels: ``number``, or heads
    of ``channels`` each.

    Raises:
        LoadError: neither is given, or the heads cannot have equally many channels.
    """
    found = number if channels is None else width // channels
    if not found or width % found or (channels is not None and width % channels):
        option = (
            f"num_heads={number}"
            if channels is None
            else f"num_head_channels={channels}"
        )
        raise LoadError(
            f"{where} has attention over {width} channels, which {option} cannot split.",
            fix="give the number of heads, or the channels of each, that the model was trained with; weights do not "
            "contain it.",
        )
    return found


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
    stored: Mapping[str, Stored], layers: int, supplied: Supplied, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every array by its name here, queries, keys and values apart."""
    for name, entry in stored.items():
        layer, _, kind = name.rpartition(".")
        here, inner = _place(layer, layers)
        array = entry.read()
        if inner == "qkv":
            width = entry.shape[0] // 3
            up = name.startswith("output_blocks")
            number = (supplied.num_heads_upsample if up else None) or supplied.num_heads
            count = _heads(width, number, supplied.num_head_channels, where)
            for part, array_of in zip(
                "qkv",
                _split(array, count, supplied.use_new_attention_order),
                strict=True,
            ):
                yield f"{here}.to_{part}.{kind}", array_of
        elif inner == "proj_out":
            yield f"{here}.to_out.0.{kind}", array.reshape(array.shape[:2])
        elif here is None:
            raise _foreign(
                f"{where} has {name}, which a UNetModel of guided-diffusion has not."
            )
        else:
            yield f"{here}.{kind}", array


def _split(array: np.ndarray, heads: int, new_order: bool) -> list[np.ndarray]:
    """Queries, keys and values of one projection (3·c, …): in the new order they are
    its thirds, in the old one the thirds of each head."""
    wide = (
        array.reshape(array.shape[:2]) if array.ndim > 1 else array
    )  # a convolution of one pixel
    width, rest = wide.shape[0] // 3, wide.shape[1:]
    thirds = (
        wide.reshape(3, width, *rest)
        if new_order
        else wide.reshape(heads, 3, width // heads, *rest)
    )
    return [
        (thirds[i] if new_order else thirds[:, i]).reshape(width, *rest)
        for i in range(3)
    ]


def _place(layer: str, layers: int) -> tuple[str | None, str]:
    """Where a layer of the original lies here, and its name within attention; None for
    one that is not known."""
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
    found = re.fullmatch(
        r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)|(middle_block)\.()(\d)\.(.+)",
        layer,
    )
    if found is None:
        return None, ""
    side, number, position, inner = (
        group for group in found.groups() if group is not None
    )
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
        return {
            "norm": (f"{place}.group_norm", ""),
            "qkv": (place, inner),
            "proj_out": (place, inner),
        }.get(inner, (None, ""))
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


def write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, one array after the other: none has to fit into memory
    beside the others."""
    codes = {np.dtype(kind): code for code, kind in tensors.DTYPES.items()}
    entries, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {
            "dtype": codes[array.dtype],
            "shape": array.shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (
        -len(header) % 8
    )  # arrays begin at multiples of 8 bytes, as the format asks
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for array in arrays.values():
            np.ascontiguousarray(array).tofile(stream)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, converts, and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "weights", type=Path, help="a safetensors file of the state dict of a UNetModel"
    )
    parser.add_argument("out", type=Path, help="the folder to write into")
    for field in fields(Supplied):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(
                flag, action="store_true", help="it was trained with this option"
            )
        elif isinstance(default, str):
            parser.add_argument(flag, choices=("linear", "cosine"), default=default)
        else:
            parser.add_argument(
                flag, type=int, required=field.name == "image_size", default=default
            )
    parser.add_argument(
        "--replace", action="store_true", help="replace what is in the folder"
    )
    given = vars(parser.parse_args(arguments))
    weights, out, replace = (given.pop(name) for name in ("weights", "out", "replace"))
    supplied = Supplied(**given)
    try:
        network = convert(weights, out, supplied, replace=replace)
    except ComposeProbError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    labels = f", {network.classes} labels" if network.classes else ""
    variance = (
        ", a learned variance, which is not used"
        if network.outputs != network.channels
        else ""
    )
    order = "new" if supplied.use_new_attention_order else "old"
    print(
        f"a UNet whose images halve {network.multiple.bit_length() - 1} times, attention in the {order} order",
        end="",
    )
    print(f"{labels}{variance}")
    print(
        f"levels: {supplied.noise_schedule}, {supplied.diffusion_steps:,} steps; output: ",
        end="",
    )
    print("x̂₀" if supplied.predict_xstart else "ε̂")
    print(f'wrote {out}; cp.from_diffusers("{out}") loads it')
    return 0


if __name__ == "__main__":
    sys.exit(main())
