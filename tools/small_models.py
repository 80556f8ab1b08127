"""Small networks of diffusers' and transformers' classes, with random weights.

Functions that write files of them are here too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

GROUPS = 4


def randomised(model: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """Return a model with all weights drawn afresh, exact in half precision.

    Their scales are such that no layer is silent and no output explodes.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embedding" not in name:
                p.copy_(torch.randn_like(p) * scale / max(p[0].numel(), 1) ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(0.3 * torch.randn_like(p))
            p.copy_(p.half().float())
    return model.eval()


def save_half(
    model: Any, folder: Path, variant: str | None = "fp16", **options: Any
) -> Any:
    """Write a model in half precision, by diffusers; return it as it is read again."""
    named = {} if variant is None else {"variant": variant}
    model.half().save_pretrained(folder, **named, **options)
    return type(model).from_pretrained(folder, **named).float().eval()


def last(x: torch.Tensor) -> np.ndarray:
    """Return images as a contiguous array, channels last."""
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def outputs(
    network: Any, x: torch.Tensor, times: Any, **conditions: Any
) -> dict[str, np.ndarray]:
    """Return the network's output for the same events at every time."""
    kind = type(network).__name__
    results = []
    with torch.no_grad():
        for t in times:
            if "SD3" in kind:
                time = torch.tensor([t]).expand(len(x))
                output = network(hidden_states=x, timestep=time, **conditions)
            elif "DiT" in kind:
                output = network(x, torch.tensor(t).expand(len(x)), **conditions)
            else:
                output = network(x, torch.tensor(t), **conditions)
            results.append(last(output.sample))
    return {"x": last(x), "times": np.asarray(times), "outputs": np.stack(results)}


def write(folder: Path, arrays: dict[str, Any]) -> None:
    """Write the arrays that the originals compute into a folder."""
    tensors = {}
    for name, array in arrays.items():
        # np.ascontiguousarray makes a scalar a vector.
        tensor = torch.tensor(np.ascontiguousarray(array))
        tensors[name] = tensor.reshape(np.shape(array))
    save_file(tensors, folder / "golden.safetensors")


def pipeline(folder: Path, kind: str, **components: tuple[str, str]) -> None:
    """Write the index of a pipeline."""
    index = {
        "_class_name": kind,
        "_diffusers_version": diffusers.__version__,
        **{k: list(v) for k, v in components.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def unet_2d(**options: Any) -> diffusers.UNet2DModel:
    """Return a small network of images."""
    base = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": GROUPS,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
    }
    return randomised(diffusers.UNet2DModel(**{**base, **options}))


def rename_attention(file: Path) -> None:
    """Rename the weights of attention in a file to those of the first releases."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, array in load_file(file).items():
        if "attentions" in name:
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = array
    save_file(tensors, file, metadata={"format": "pt"})


def text_encoder(
    width: int, vocabulary: int, projection: int | None = None, **options: Any
) -> Any:
    """Return a small text encoder, with a projection where its width is given."""
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": projection or width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }
    config = transformers.CLIPTextConfig(**{**settings, **options})
    if projection is None:
        return randomised(transformers.CLIPTextModel(config))
    return randomised(transformers.CLIPTextModelWithProjection(config))


MERGES = (
    "c a",
    "ca t</w>",
    "d o",
    "do g</w>",
    "t h",
    "th e</w>",
    "l e",
    "f t</w>",
    "le ft</w>",
    "o n</w>",
)


def tokenizer_files(folder: Path) -> Any:
    """Write a tokenizer of CLIP with a few merges; return it and its size."""
    folder.mkdir(parents=True)
    signs = list(bytes_to_unicode().values())
    words = [
        *signs,
        *[s + "</w>" for s in signs],
        *[m.replace(" ", "") for m in MERGES],
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=True))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    notes = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 16,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(notes, indent=2) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder), len(words)


def vae(**options: Any) -> Any:
    """Return a small autoencoder."""
    base = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return randomised(diffusers.AutoencoderKL(**{**base, **options}))


def of_autoencoder(
    network: Any, size: tuple[int, int] = (16, 20)
) -> dict[str, np.ndarray]:
    """Return an image and its latents, and latents and their image, as in pipelines."""
    image = torch.rand(2, 3, *size) * 2 - 1
    shift = network.config.shift_factor or 0.0
    scale = network.config.scaling_factor
    with torch.no_grad():
        code = network.encode(image)
        mean = code.latent_dist.mean if hasattr(code, "latent_dist") else code.latents
        latents = torch.randn_like(mean)
        decoded = network.decode(latents / scale + shift).sample
    return {
        "images": last(image),
        "encoded": last((mean - shift) * scale),
        "latents": last(latents),
        "decoded": last(decoded),
    }


def unet_condition(size: int = 8, **options: Any) -> Any:
    """Return a small network of latents, with a prompt as its condition."""
    base = {
        "sample_size": size,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": GROUPS,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return randomised(diffusers.UNet2DConditionModel(**{**base, **options}))
