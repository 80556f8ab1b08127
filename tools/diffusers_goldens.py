"""Make test data: folders of small random models, and outputs of the originals.

The models are those of diffusers and transformers.

Run it in an environment of its own, with torch (CPU), diffusers and transformers:

    python tools/diffusers_goldens.py tests/pretrained/data        # the committed data
    python tools/diffusers_goldens.py FOLDER --only sd --size 64

The second makes a folder to run examples/text_to_image.py on. Weights are drawn afresh
and rounded to half precision, in which they are stored, before the originals compute
anything: layers that start at zero would hide errors.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from small_models import (
    GROUPS,
    last,
    of_autoencoder,
    outputs,
    pipeline,
    randomised,
    rename_attention,
    save_half,
    text_encoder,
    tokenizer_files,
    unet_2d,
    unet_condition,
    vae,
    write,
)

TIMES = (0, 1, 37, 500, 998, 999)


def images(
    folder: Path,
    network: Any,
    scheduler: Any,
    times: Any = TIMES,
    old: bool = False,
    **conditions: Any,
) -> None:
    """Write a folder of a model of images."""
    network = save_half(network, folder / "unet")
    if old:
        rename_attention(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        folder,
        "DDPMPipeline",
        unet=("diffusers", type(network).__name__),
        scheduler=("diffusers", type(scheduler).__name__),
    )
    size = network.config.sample_size
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    x = torch.randn(2, network.config.in_channels, *sides)
    arrays = outputs(network, x, times, **conditions)
    if hasattr(scheduler, "alphas_cumprod"):
        arrays["alphas_cumprod"] = scheduler.alphas_cumprod.numpy()
    for name, value in conditions.items():
        arrays[name] = value.numpy()
    write(folder, arrays)


def ddpm(folder: Path) -> None:
    """Write a model with the options and names of attention of the first DDPMs."""
    network = unet_2d(
        flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6
    )
    images(folder, network, diffusers.DDPMScheduler(), old=True)


def labels(folder: Path) -> None:
    """Write a model of oblong images with classes and a learned variance.

    Norms are scaled and shifted, and residual blocks change the resolution.
    """
    network = unet_2d(
        sample_size=(8, 12),
        out_channels=6,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
        act_fn="gelu",
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=4,
        mid_block_scale_factor=2**0.5,
        center_input_sample=True,
        down_block_types=(
            "ResnetDownsampleBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(8, 8, 8),
        attn_norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample"
    )
    scheduler.register_to_config(variance_type="learned_range")
    images(folder, network, scheduler, class_labels=torch.tensor([0, 4]))


def edm(folder: Path) -> None:
    """Write a model with Karras's preconditioning, a network of ¼·log σ."""
    scheduler = diffusers.EDMEulerScheduler(
        sigma_data=0.7, sigma_min=0.01, sigma_max=20.0
    )
    network = unet_2d(mid_block_type=None, block_out_channels=(8, 8))
    scheduler.save_pretrained(folder / "scheduler")
    network = save_half(network, folder / "unet")
    pipeline(
        folder,
        "DDPMPipeline",
        unet=("diffusers", "UNet2DModel"),
        scheduler=("diffusers", "EDMEulerScheduler"),
    )
    sigmas = [0.01, 0.3, 1.0, 20.0]
    x = torch.randn(2, 3, 8, 8)
    clean = []
    with torch.no_grad():
        for sigma in sigmas:
            noisy = x * sigma
            inputs = scheduler.precondition_inputs(noisy, sigma)
            time = scheduler.precondition_noise(sigma)[0]
            out = network(inputs, time).sample
            clean.append(last(scheduler.precondition_outputs(noisy, out, sigma)))
    arrays = {"x": last(x), "sigmas": np.float32(sigmas), "clean": np.stack(clean)}
    write(folder, arrays)


def fourier(folder: Path) -> None:
    """Write a variance-exploding score, a network of Fourier features of σ."""
    network = unet_2d(
        time_embedding_type="fourier", add_attention=False, block_out_channels=(8, 8)
    )
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=200, sigma_max=50.0)
    images(folder, network, scheduler, [0.01, 0.5, 50.0])


PROMPTS = ("", "a cat on the left", "The  DOG's 2 cats, naïve – 日本", "the " * 30)


def sd(folder: Path, size: int = 8) -> None:
    """Write a model like Stable Diffusion 2.

    It has velocity, linear projections, and levels that end without signal.
    """
    tokenizer, vocabulary = tokenizer_files(folder / "tokenizer")
    encoder = text_encoder(12, vocabulary, hidden_act="gelu")
    network = unet_condition(
        size, use_linear_projection=True, attention_head_dim=[2, 4]
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    autoencoder = vae()
    encoder = save_half(encoder, folder / "text_encoder")
    network = save_half(network, folder / "unet")
    autoencoder = save_half(autoencoder, folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        folder,
        "StableDiffusionPipeline",
        unet=("diffusers", "UNet2DConditionModel"),
        vae=("diffusers", "AutoencoderKL"),
        text_encoder=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        scheduler=("diffusers", "DDIMScheduler"),
        safety_checker=(None, None),
        feature_extractor=(None, None),
    )
    ids = tokens(tokenizer)
    with torch.no_grad():
        hidden = encoder(ids).last_hidden_state
    x = torch.randn(2, 4, size, size)
    arrays = outputs(network, x, TIMES, encoder_hidden_states=hidden[1:3])
    arrays |= {
        "ids": ids.numpy(),
        "hidden": hidden.numpy(),
        "alphas_cumprod": scheduler.alphas_cumprod.numpy(),
    }
    write(folder, arrays | of_autoencoder(autoencoder))


def tokens(tokenizer: Any) -> torch.Tensor:
    """Return the tokens of the prompts, (prompts, 16)."""
    return tokenizer(
        list(PROMPTS),
        padding="max_length",
        max_length=16,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def sd1(folder: Path) -> None:
    """Write a model like Stable Diffusion 1.

    It has projections by convolutions, predicts the noise, has sizes that do not halve,
    and weights in two files.
    """
    network = unet_condition(
        sample_size=7,
        block_out_channels=(8, 8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        transformer_layers_per_block=(1, 2, 1),
        num_class_embeds=3,
    )
    network = save_half(network, folder / "unet", None, max_shard_size="60KB")
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
    )
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        folder,
        "StableDiffusionPipeline",
        unet=("diffusers", "UNet2DConditionModel"),
        scheduler=("diffusers", "PNDMScheduler"),
    )
    x = torch.randn(2, 4, 7, 7)
    hidden = torch.randn(2, 5, 12)
    label = torch.tensor([2, 0])
    conditions = {"encoder_hidden_states": hidden, "class_labels": label}
    arrays = outputs(network, x, TIMES, **conditions)
    arrays |= {
        "hidden": hidden.numpy(),
        "class_labels": label.numpy(),
        "alphas_cumprod": scheduler.alphas_cumprod.numpy(),
    }
    write(folder, arrays)


def sdxl(folder: Path) -> None:
    """Write a model like Stable Diffusion XL.

    It has two text encoders, a pooled prompt and sizes, and blocks of several layers.
    """
    _, vocabulary = tokenizer_files(folder / "tokenizer")
    tokenizer_files(folder / "tokenizer_2")
    config = folder / "tokenizer_2/tokenizer_config.json"
    notes = json.loads(config.read_text()) | {"pad_token": "!"}
    config.write_text(json.dumps(notes, indent=2) + "\n")
    one = text_encoder(8, vocabulary)
    two = text_encoder(16, vocabulary, projection=10, hidden_act="gelu")
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{s}")
        for s in ("", "_2")
    ]
    network = unet_condition(
        cross_attention_dim=24,
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[2, 4],
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    one = save_half(one, folder / "text_encoder")
    two = save_half(two, folder / "text_encoder_2")
    network = save_half(network, folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        folder,
        "StableDiffusionXLPipeline",
        unet=("diffusers", "UNet2DConditionModel"),
        text_encoder=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        text_encoder_2=("transformers", "CLIPTextModelWithProjection"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        scheduler=("diffusers", "EulerDiscreteScheduler"),
    )
    ids = [tokens(tokenizer) for tokenizer in tokenizers]
    with torch.no_grad():
        states = [
            encoder(tokens_of_one, output_hidden_states=True)
            for encoder, tokens_of_one in zip((one, two), ids, strict=True)
        ]
    hidden = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    pooled = states[1].text_embeds
    sizes = torch.tensor([[8.0, 8, 0, 0, 8, 8], [64.0, 48, 3, 5, 32, 32]])
    x = torch.randn(2, 4, 8, 8)
    added = {"text_embeds": pooled[1:3], "time_ids": sizes}
    conditions = {"encoder_hidden_states": hidden[1:3], "added_cond_kwargs": added}
    arrays = outputs(network, x, TIMES, **conditions)
    arrays |= {
        "ids": ids[0].numpy(),
        "ids_2": ids[1].numpy(),
        "hidden": hidden.numpy(),
        "pooled": pooled.numpy(),
        "sizes": sizes.numpy(),
        "alphas_cumprod": scheduler.alphas_cumprod.numpy(),
    }
    write(folder, arrays)


def dit(folder: Path) -> None:
    """Write a DiT with a learned variance, and the tiny autoencoder."""
    network = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=6,
            norm_num_groups=GROUPS,
        )
    )
    autoencoder = randomised(
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
            scaling_factor=1.5,
        )
    )
    scheduler = diffusers.DDIMScheduler()
    network = save_half(network, folder / "transformer", None)
    autoencoder = save_half(autoencoder, folder / "vae", None)
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        folder,
        "DiTPipeline",
        transformer=("diffusers", "DiTTransformer2DModel"),
        vae=("diffusers", "AutoencoderTiny"),
        scheduler=("diffusers", "DDIMScheduler"),
    )
    x = torch.randn(2, 4, 8, 8)
    label = torch.tensor([6, 3])
    arrays = outputs(network, x, TIMES, class_labels=label)
    arrays |= {
        "class_labels": label.numpy(),
        "alphas_cumprod": scheduler.alphas_cumprod.numpy(),
    }
    write(folder, arrays | of_autoencoder(autoencoder))


def sd3(folder: Path) -> None:
    """Write a model like Stable Diffusion 3.5.

    It has flow matching, joint attention with normed queries, and a second attention in
    one layer.
    """
    network = randomised(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            in_channels=4,
            out_channels=4,
            pos_embed_max_size=6,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = save_half(network, folder / "transformer", None)
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        folder,
        "StableDiffusion3Pipeline",
        transformer=("diffusers", "SD3Transformer2DModel"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
    )
    times = [float(scheduler.timesteps[999 - k]) for k in TIMES]
    x = torch.randn(2, 4, 8, 8)
    hidden = torch.randn(2, 5, 12)
    pooled = torch.randn(2, 10)
    conditions = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    arrays = outputs(network, x, np.float32(times), **conditions)
    arrays |= {
        "hidden": hidden.numpy(),
        "pooled": pooled.numpy(),
        "sigmas": scheduler.sigmas.numpy()[::-1],
    }
    write(folder, arrays)


CASES: dict[str, Callable[..., None]] = {
    "ddpm": ddpm,
    "labels": labels,
    "edm": edm,
    "fourier": fourier,
    "sd": sd,
    "sd1": sd1,
    "sdxl": sdxl,
    "dit": dit,
    "sd3": sd3,
}
"""Cases by the names of their folders."""


def main() -> None:
    """Write the folders of the cases into that of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--size", type=int, help="of the latents of sd")
    arguments = parser.parse_args()
    for number, (name, make) in enumerate(CASES.items()):
        if arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(number)
        folder = arguments.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        options = {}
        if name == "sd" and arguments.size:
            options["size"] = arguments.size
        make(folder, **options)
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(name, size // 1000, "kB", flush=True)


if __name__ == "__main__":
    main()
