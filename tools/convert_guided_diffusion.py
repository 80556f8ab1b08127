"""Convert a state dict of guided-diffusion's UNetModel (ADM, improved-diffusion).

The result is a folder that `cp.from_diffusers` loads.

    python tools/convert_guided_diffusion.py adm64.safetensors models/adm64 \\
        --image-size 64 --num-head-channels 64 \\
        --use-new-attention-order --noise-schedule cosine
    python tools/convert_guided_diffusion.py lsun_bedroom.safetensors models/bedroom \\
        --image-size 256 --num-head-channels 64

The options have the names, the meaning and the defaults of guided-diffusion's own
flags; channels, blocks, labels and a learned variance are read from the weights. The
number of heads must be given, as no weight contains it; a wrong number, or order, gives
no error and another network. Its own files are pickles, which are not read: given one,
the error names a tool that converts it to safetensors.
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
from typing import NamedTuple

import numpy as np

from composeprob.errors import ComposeProbError, InvalidValueError, LoadError
from composeprob.json_data import JSONObject
from composeprob.pretrained import schedulers, tensors
from composeprob.pretrained.tensors import Arrays, Network, Stored
from composeprob.pretrained.unet import GUIDED, guided


@dataclass(frozen=True)
class Supplied:
    """Options that the weights do not contain, by guided-diffusion's own names.

    Attributes:
        image_size: height and width of the images.
        num_heads, num_heads_upsample: number of heads of attention, and of those on the
            way up if it differs.
        num_head_channels: channels of each head, instead of their number.
        use_new_attention_order: split queries, keys and values before the heads.
        noise_schedule: ``"linear"`` or ``"cosine"``.
        diffusion_steps: timesteps of the training.
        predict_xstart: the output is x̂₀, not ε̂.
        rescale_timesteps: the network takes timesteps on a scale of 1,000.
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
    """Write a folder with config.json, the weights and scheduler_config.json.

    Args:
        weights: a safetensors file.
        out: the folder.
        supplied: options that the weights do not contain.
        replace: replace files in the folder.

    Returns:
        The network, without its arrays.

    Raises:
        LoadError: no such file, a pickle, or the state dict of another network; raised
            before anything is written.
        InvalidValueError: the folder has files, or a value that fits no such network.
    """
    if weights.suffix in tensors.PICKLES:
        tensors.refuse_pickles(weights)
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValueError(
            f"{out} is there already.",
            fix="write into another folder, or replace what is there with --replace.",
        )
    stored = tensors.header(weights)
    where = str(weights)
    steps = supplied.diffusion_steps
    time_scale = 1.0
    if supplied.rescale_timesteps and steps > 0:
        time_scale = 1000 / steps
    config: JSONObject = {
        "_class_name": GUIDED,
        "image_size": supplied.image_size,
        "num_heads": supplied.num_heads,
        "num_head_channels": supplied.num_head_channels,
        "num_heads_upsample": supplied.num_heads_upsample,
        "time_scale": time_scale,
    }
    scheduler = {
        "_class_name": schedulers.Family.GUIDED.value[0],
        "noise_schedule": supplied.noise_schedule,
        "diffusion_steps": supplied.diffusion_steps,
        "predict_xstart": supplied.predict_xstart,
    }
    # Everything is refused before anything is written.
    schedulers.trained(scheduler, "the command")
    blocks = blocks_per_resolution(stored, where)
    arrays = dict(_renamed(stored, blocks, supplied, where))
    shapes = {
        name: Stored(name, array.dtype, array.shape) for name, array in arrays.items()
    }
    network = guided(config, Arrays(shapes, where), where)
    if supplied.image_size < 1 or supplied.image_size % network.multiple:
        raise InvalidValueError(
            f"image_size={supplied.image_size} cannot be halved as often as this "
            f"network does: it is not a multiple of {network.multiple}.",
            fix="give the size of the images that it was trained on.",
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    write(out / "diffusion_pytorch_model.safetensors", arrays)
    return network


def blocks_per_resolution(stored: Mapping[str, Stored], where: str) -> int:
    """Return the number of residual blocks of the way down at each resolution.

    The way up has one more.

    Raises:
        LoadError: weights of another network.
    """
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"):
        if name not in stored:
            raise _foreign(
                f"{where} has no {name}, as a UNetModel of guided-diffusion has."
            )
    inputs = stored["input_blocks.0.0.weight"].shape[1]
    outputs = stored["out.2.weight"].shape[0]
    if outputs not in (inputs, 2 * inputs) or inputs == 6:
        raise LoadError(
            f"The network in {where} takes {inputs} channels and gives {outputs}: it "
            "enlarges a smaller image, or is not a diffusion model.",
            fix="convert a model of whole images: one that enlarges images has no "
            "score of its inputs.",
        )
    residual = _indices(stored, r"output_blocks\.(\d+)\.0\.in_layers")
    count = 1 + max(residual, default=-1)
    # Blocks of the way up that end with a change of resolution.
    upsampling = _indices(
        stored, r"output_blocks\.(\d+)\.(?:[12]\.in_layers|[12]\.conv)\."
    )
    period = min(upsampling, default=count - 1) + 1
    regular = set(range(period - 1, count - 1, period))
    if period < 2 or count % period or upsampling != regular:
        raise _foreign(
            f"The output_blocks of {where} are not those of a UNetModel of "
            "guided-diffusion."
        )
    return period - 1


def _heads(width: int, number: int | None, channels: int | None, where: str) -> int:
    """Return the number of heads of an attention over ``width`` channels.

    It is ``number``, or that of heads of ``channels`` each.

    Raises:
        LoadError: neither is given, or the heads cannot have equally many channels.
    """
    if channels is None:
        heads = number
        option = f"num_heads={number}"
    else:
        heads = width // channels
        option = f"num_head_channels={channels}"
    if not heads or width % heads or (channels is not None and width % channels):
        raise LoadError(
            f"{where} has attention over {width} channels, which {option} cannot "
            "split.",
            fix="give the number of heads, or the channels of each, that the model was "
            "trained with; weights do not contain it.",
        )
    return heads


def _foreign(message: str) -> LoadError:
    """Return the error of weights that are not guided-diffusion's."""
    return LoadError(
        message,
        fix="save the state_dict of a UNetModel of guided-diffusion or "
        "improved-diffusion; a model in diffusers' form needs no conversion, and "
        "diffusers' from_single_file reads single files of Stable Diffusion.",
    )


def _indices(names: Mapping[str, Stored], pattern: str) -> set[int]:
    """Return the indices that a pattern captures at the beginning of names."""
    matches = [re.match(pattern, name) for name in names]
    return {int(match[1]) for match in matches if match is not None}


def _renamed(
    stored: Mapping[str, Stored], layers: int, supplied: Supplied, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array by its new name, with queries, keys and values split."""
    for name, entry in stored.items():
        layer, _, kind = name.rpartition(".")
        place, inner = _place(layer, layers)
        array = entry.read()
        if inner == "qkv":
            heads = _heads_of(name, entry, supplied, where)
            projections = _split(array, heads, supplied.use_new_attention_order)
            for letter, projection in zip("qkv", projections, strict=True):
                yield f"{place}.to_{letter}.{kind}", projection
        elif inner == "proj_out":
            yield f"{place}.to_out.0.{kind}", array.reshape(array.shape[:2])
        elif place is None:
            raise _foreign(
                f"{where} has {name}, which a UNetModel of guided-diffusion lacks."
            )
        else:
            yield f"{place}.{kind}", array


def _heads_of(name: str, entry: Stored, supplied: Supplied, where: str) -> int:
    """Return the number of heads of the projection in an array."""
    number = supplied.num_heads
    if name.startswith("output_blocks"):
        number = supplied.num_heads_upsample or number
    width = entry.shape[0] // 3
    return _heads(width, number, supplied.num_head_channels, where)


def _split(array: np.ndarray, heads: int, new_order: bool) -> list[np.ndarray]:
    """Return queries, keys and values of one projection (3·c, …).

    In the new order they are its thirds, in the old one the thirds of each head.
    """
    # A projection may be a convolution of one pixel.
    wide = array.reshape(array.shape[:2]) if array.ndim > 1 else array
    width = wide.shape[0] // 3
    rest = wide.shape[1:]
    if new_order:
        thirds = wide.reshape(3, width, *rest)
    else:
        by_head = wide.reshape(heads, 3, width // heads, *rest)
        thirds = np.moveaxis(by_head, 1, 0)
    return [third.reshape(width, *rest) for third in thirds]


OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
"""New names of layers outside of the blocks."""

ATTENTION = ("norm", "qkv", "proj_out")

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""New names of layers within residual blocks."""

UNKNOWN = (None, "")


class _Module(NamedTuple):
    """A module of a block: its stage, its index, and its kind."""

    stage: str
    index: int
    is_attention: bool
    changes_resolution: bool


def _place(layer: str, layers: int) -> tuple[str | None, str]:
    """Return the new name of a layer, and its old name within attention.

    None stands for an unknown layer.
    """
    if layer in OUTSIDE:
        return OUTSIDE[layer], ""
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", layer)
    middle = re.fullmatch(r"middle_block\.(\d)\.(.+)", layer)
    if match is not None:
        side, number, position, inner = match.groups()
        module = _module(side, int(number), int(position), inner, layers)
        change = "downsamplers.0" if side == "input" else "upsamplers.0"
    elif middle is not None:
        position, inner = middle.groups()
        # Residual block, attention, residual block.
        module = _Module("mid_block", int(position) // 2, position == "1", False)
        change = ""
    else:
        return UNKNOWN
    stage = module.stage
    if module.is_attention:
        place = f"{stage}.attentions.{module.index}"
        if inner == "norm":
            return f"{place}.group_norm", ""
        return (place, inner) if inner in ATTENTION else UNKNOWN
    if module.changes_resolution and inner in ("op", "conv"):
        return f"{stage}.{change}.conv", ""
    if inner not in RESIDUAL:
        return UNKNOWN
    block = f"resnets.{module.index}"
    if module.changes_resolution:
        block = change
    return f"{stage}.{block}.{RESIDUAL[inner]}", ""


def _module(side: str, number: int, position: int, inner: str, layers: int) -> _Module:
    """Return the module at a position of a block of the way down or up.

    A stage has as many blocks as ``layers``, and one more: on the way down it changes
    the resolution, on the way up the last one does at its end.
    """
    is_attention = inner.split(".")[0] in ATTENTION
    period = layers + 1
    if side == "input":
        # Block 0 is the first convolution.
        stage, index = divmod(number - 1, period)
        changes = index == layers
        return _Module(f"down_blocks.{stage}", index, is_attention, changes)
    stage, index = divmod(number, period)
    changes = position != 0 and not is_attention
    return _Module(f"up_blocks.{stage}", index, is_attention, changes)


def write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, one array after the other.

    Arrays are never in memory together, besides those of the caller.
    """
    codes = {np.dtype(kind): code for code, kind in tensors.DTYPES.items()}
    entries = {}
    end = 0
    for name, array in arrays.items():
        start = end
        end = start + array.nbytes
        entries[name] = {
            "dtype": codes[array.dtype],
            "shape": array.shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    # The format wants arrays to begin at multiples of 8 bytes.
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for array in arrays.values():
            np.ascontiguousarray(array).tofile(stream)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, convert, and return the exit code."""
    given = vars(_parser().parse_args(arguments))
    weights = given.pop("weights")
    out = given.pop("out")
    replace = given.pop("replace")
    supplied = Supplied(**given)
    try:
        network = convert(weights, out, supplied, replace=replace)
    except ComposeProbError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    halvings = network.multiple.bit_length() - 1
    order = "new" if supplied.use_new_attention_order else "old"
    text = f"a UNet whose images halve {halvings} times, attention in the {order} order"
    if network.classes:
        text += f", {network.classes} labels"
    if network.outputs != network.channels:
        text += ", a learned variance, which is not used"
    print(text)
    output = "x̂₀" if supplied.predict_xstart else "ε̂"
    print(
        f"levels: {supplied.noise_schedule}, {supplied.diffusion_steps:,} steps; "
        f"output: {output}"
    )
    print(f'wrote {out}; cp.from_diffusers("{out}") loads it')
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with an option for each of `Supplied`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "weights", type=Path, help="a safetensors file of the state dict of a UNetModel"
    )
    parser.add_argument("out", type=Path, help="the folder to write into")
    for field in fields(Supplied):
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default
        if isinstance(default, bool):
            parser.add_argument(
                flag, action="store_true", help="it was trained with this option"
            )
        elif isinstance(default, str):
            parser.add_argument(flag, choices=("linear", "cosine"), default=default)
        else:
            required = field.name == "image_size"
            parser.add_argument(flag, type=int, required=required, default=default)
    parser.add_argument(
        "--replace", action="store_true", help="replace what is in the folder"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
