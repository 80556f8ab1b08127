"""The command `convert`: a state dict of guided-diffusion's becomes a folder that `from_diffusers` loads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from composeprob.cli.shell import app, clean_errors


class NoiseSchedule(StrEnum):
    """The schedules of guided-diffusion."""

    linear = "linear"
    cosine = "cosine"


@app.command()
@clean_errors
def convert(
    weights: Annotated[Path, typer.Argument(help="A safetensors file of the state dict of a UNetModel.")],
    out: Annotated[Path, typer.Argument(help="The folder to write into.")],
    image_size: Annotated[int, typer.Option(help="Height and width of its images.")],
    num_heads: Annotated[int | None, typer.Option(min=1, help="Heads of attention.", show_default=False)] = None,
    num_head_channels: Annotated[
        int | None, typer.Option(min=1, help="Channels of each head, instead of --num-heads.", show_default=False)
    ] = None,
    num_heads_upsample: Annotated[
        int | None, typer.Option(min=1, help="Heads on the way up, where it has others.", show_default=False)
    ] = None,
    use_new_attention_order: Annotated[
        bool, typer.Option("--use-new-attention-order", help="It was trained with this option.")
    ] = False,
    noise_schedule: Annotated[NoiseSchedule, typer.Option(help="The levels of its training.")] = NoiseSchedule.linear,
    diffusion_steps: Annotated[int, typer.Option(min=2, help="How many there are.")] = 1000,
    predict_xstart: Annotated[
        bool, typer.Option("--predict-xstart", help="It was trained with this option: it gives x̂₀ and not ε̂.")
    ] = False,
    rescale_timesteps: Annotated[
        bool, typer.Option("--rescale-timesteps", help="It was trained with this option.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what is in the folder.")] = False,
) -> None:
    """Convert the weights of guided-diffusion (ADM) or improved-diffusion into a folder for cp.from_diffusers.

    The options have the names, the meaning and the defaults of guided-diffusion's own flags; channels, blocks, labels
    and a learned variance are read from the weights. The number of heads must be given, as no weight contains it; a
    wrong number, or order, gives no error and another network.

    Its own files are pickles, which are not read: given one, the error names what makes safetensors of it.

    [b]Examples[/b]

        composeprob convert adm64.safetensors models/adm64 --image-size 64 --num-head-channels 64
        --use-new-attention-order --noise-schedule cosine

        composeprob convert lsun_bedroom.safetensors models/bedroom --image-size 256 --num-head-channels 64
    """
    from composeprob.pretrained.convert import Supplied
    from composeprob.pretrained.convert import convert as write

    supplied = Supplied(
        image_size, num_heads, num_head_channels, num_heads_upsample, use_new_attention_order, noise_schedule.value,
        diffusion_steps, predict_xstart, rescale_timesteps,
    )  # fmt: skip
    config = write(weights, out, supplied, replace=replace)
    labels = f", {config['num_classes']} labels" if config["num_classes"] else ""
    variance = ", a learned variance, which is not used" if config["out_channels"] != config["in_channels"] else ""
    order = "new" if use_new_attention_order else "old"
    print(f"a UNet of {config['block_channels']} channels, attention in the {order} order{labels}{variance}")
    print(f"levels: {noise_schedule.value}, {diffusion_steps:,} steps; output: {'x̂₀' if predict_xstart else 'ε̂'}")
    print(f'wrote {out}; cp.from_diffusers("{out}") loads it')
