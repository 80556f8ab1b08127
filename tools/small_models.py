"""Small networks of diffusers' and transformers' classes with random weights, and files
of them."""

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
    """Every weight drawn anew, such that no layer is silent and none blows up, and
    exact in half precision."""
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
    """Writes the model in half precision, under the names that diffusers gives such
    files; returns it as read again."""
    named = {} if variant is None else {"variant": variant}
    model.half().save_pretrained(folder, **named, **options)
    return type(model).from_pretrained(folder, **named).float().eval()


def last(x: torch.Tensor) -> np.ndarray:
    """Channels last, contiguous."""
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def outputs(
    network: Any, x: torch.Tensor, times: Any, **conditions: Any
) -> dict[str, np.ndarray]:
    """The network's output for the same events at every time."""
    found = []
    with torch.no_grad():
        for t in times:
            t = (
                torch.tensor([t]).expand(len(x))
                if "SD3" in type(network).__name__
                else torch.tensor(t)
            )
            if "DiT" in type(network).__name__:
                t = t.expand(len(x))
            if "SD3" in type(network).__name__:
                found.append(
                    last(network(hidden_states=x, timestep=t, **conditions).sample)
                )
            else:
                found.append(last(network(x, t, **conditions).sample))
    return {"x": last(x), "times": np.asarray(times), "outputs": np.stack(found)}


def write(folder: Path, arrays: dict[str, Any]) -> None:
    """What the originals compute, in the folder."""
    tensors = {
        k: torch.tensor(np.ascontiguousarray(v)).reshape(np.shape(v))
        for k, v in arrays.items()
    }
    save_file(tensors, folder / "golden.safetensors")


def pipeline(folder: Path, kind: str, **components: tuple[str, str]) -> None:
    """The index of a pipeline."""
    index = {
        "_class_name": kind,
        "_diffusers_version": diffusers.__version__,
        **{k: list(v) for k, v in components.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def unet_2d(**options: Any) -> diffusers.UNet2DModel:
    """A small network of images."""
    base = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": GROUPS, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": None,
    }  # fmt: skip
    return randomised(diffusers.UNet2DModel(**{**base, **options}))


def rename_attention(file: Path) -> None:
    """The names that attention had in the first releases."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, array in load_file(file).items():
        for new, before in old.items():
            name = (
                name.replace(f".{new}.", f".{before}.")
                if "attentions" in name
                else name
            )
        tensors[name] = array
    save_file(tensors, file, metadata={"format": "pt"})


def text_encoder(
    width: int, vocabulary: int, projection: int | None = None, **options: Any
) -> Any:
    """A small text encoder, with a projection where its width is given."""
    config = transformers.CLIPTextConfig(
        **{
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": projection or width,
            "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 1, **options,
        }
    )  # fmt: skip
    kind = (
        transformers.CLIPTextModel
        if projection is None
        else transformers.CLIPTextModelWithProjection
    )
    return randomised(kind(config))


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
    """CLIP's vocabulary of single bytes, and a few merges."""
    folder.mkdir(parents=True)
    signs = list(
        dict.fromkeys(
            chr(b) if chr(b).isprintable() and not chr(b).isspace() else chr(256 + b)
            for b in range(256)
        )
    )

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
    """A small autoencoder."""
    base = {
        "block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16,
    }  # fmt: skip
    return randomised(diffusers.AutoencoderKL(**{**base, **options}))


def of_autoencoder(
    network: Any, size: tuple[int, int] = (16, 20)
) -> dict[str, np.ndarray]:
    """An image and its latents, latents and their image, scaled as pipelines do."""
    image = torch.rand(2, 3, *size) * 2 - 1
    shift, scale = network.config.shift_factor or 0.0, network.config.scaling_factor
    with torch.no_grad():
        found = network.encode(image)
        mean = (
            found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents
        )
        latents = torch.randn_like(mean)
        decoded = network.decode(latents / scale + shift).sample
    return {
        "images": last(image), "encoded": last((mean - shift) * scale), "latents": last(latents),
        "decoded": last(decoded),
    }  # fmt: skip


def unet_condition(size: int = 8, **options: Any) -> Any:
    """A small network of latents that is told a prompt."""
    base = {
        "sample_size": size, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": GROUPS,
        "cross_attention_dim": 12, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return randomised(diffusers.UNet2DConditionModel(**{**base, **options}))
