"""`from_diffusers`: a folder of diffusers', on this machine or on a hub, as a factor
that can also encode, decode and read prompts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from composeprob.arguments import check_path
from composeprob.errors import CapabilityError, InvalidValueError, LoadError, ShapeError
from composeprob.factors.diffusion import Diffusion, Encoder
from composeprob.factors.factor import Traits
from composeprob.factors.values import as_condition, check_choice
from composeprob.json_data import JSONObject
from composeprob.pretrained import schedulers, tensors
from composeprob.pretrained.autoencoder import autoencoder_kl, autoencoder_tiny
from composeprob.pretrained.config import check_beside, read_json, unsupported
from composeprob.pretrained.text_encoders import Prompts, TextEncoder, Tokenizer, clip
from composeprob.pretrained.transformer import dit, sd3
from composeprob.pretrained.unet import GUIDED, guided, unet_2d, unet_condition
from composeprob.schedule import Schedule, check_schedule, log_snr_of


class Components:
    """What lies beside a network in its folder, equal to no other's: an autoencoder,
    which models of pixels have not, and up to two text encoders."""

    def __init__(
        self,
        name: str,
        autoencoder: tensors.Loaded | None,
        text_encoders: tuple[TextEncoder, ...],
    ):
        self.name, self.autoencoder, self.text_encoders = (
            name,
            autoencoder,
            text_encoders,
        )

    def __repr__(self) -> str:
        return f"Components({self.name})"

    def pictures(self, latents: object) -> np.ndarray:
        """Images of latents (…, height, width, channels), their values from 0 to 1."""
        return pixels(self.coded("decode", latents))

    def coded(self, way: str, given: object) -> Array:
        """Images of latents (``"decode"``), or latents of images (``"encode"``), (…,
        height, width, channels)."""
        coder, x = self.autoencoder, jnp.asarray(given, jnp.result_type(float))
        assert coder is not None
        what, channels, multiple = "Latents", coder.form.latents, 1
        if way == "encode":
            what, channels, multiple = "Images", coder.form.channels, coder.form.shrinks
        if (
            x.ndim < 3
            or x.shape[-1] != channels
            or any(side % multiple or not side for side in x.shape[-3:-1])
        ):
            sides = f", sides multiples of {multiple}" if multiple > 1 else ""
            raise ShapeError(
                f"{what} of this model have shape (…, height, width, {channels}){sides}; got {x.shape}.",
                fix="channels come last; crop or scale the sides."
                if multiple > 1
                else "channels come last.",
            )
        stack = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        found = coder.mapped(way, stack)
        return found.reshape(*x.shape[:-3], *found.shape[1:])


def pixels(images: object) -> np.ndarray:
    """Images (…, height, width, channels) with values from −1 to 1, brought to 0 to 1:
    all models of pixels agree."""
    return np.clip(np.asarray(images, np.float32) / 2 + 0.5, 0.0, 1.0)


class Adapted(eqx.Module):
    """A network whose output has the variance beside, or that takes another time than
    the factor's."""

    network: Callable[..., Array]
    known: (
        Array | None
    )  # evaluated by log-SNR: that of its training's levels, from the noisiest to the cleanest
    channels: int = eqx.field(static=True)  # of events: the first of the output's
    pooled: int | None = eqx.field(
        static=True
    )  # width of the vector in the prompt's last row
    flow: float | None = eqx.field(
        static=True
    )  # times of flow matching: this number times σ/(σ + α)

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> Array:
        if self.pooled is not None:
            prompt = conditions["prompt"]
            conditions = {
                **conditions,
                "prompt": prompt[:-1],
                "pooled": prompt[-1, : self.pooled],
            }
        if self.known is not None:
            levels = jnp.arange(self.known.shape[0], dtype=jnp.float32)[::-1]
            t = jnp.interp(t, self.known, levels)
        if self.flow is not None:
            t = self.flow * t / (1 + t)
        return self.network(x, t, **conditions)[..., : self.channels]


class Preconditioned(eqx.Module):
    """x̂_0 = c_skip·x + c_out·F(c_in·x, ¼·log σ), for a network F of unit inputs and
    outputs.

    c_skip = s²/(σ² + s²), c_in = 1/√(σ² + s²), c_out = ±σ·s/√(σ² + s²), with s the
    data's standard deviation, `scale`, and − where F gives a velocity (Karras et al.
    2022, table 1).
    """

    network: Callable[..., Array]
    scale: float = eqx.field(static=True)
    sign: float = eqx.field(static=True)

    def __call__(self, x: Array, sigma: Array, /, **conditions: Array) -> Array:
        total = sigma**2 + self.scale**2
        inner = self.network(x / jnp.sqrt(total), 0.25 * jnp.log(sigma), **conditions)
        return (
            self.scale**2 / total * x
            + self.sign * sigma * self.scale / jnp.sqrt(total) * inner
        )


class Pretrained(Diffusion):
    """A `Pretrained` is a diffusion model from a folder of someone else's; made by
    `from_diffusers`.

    Its parts are the autoencoder and text encoders beside the network, which no density
    is made of: they are no leaves.
    """

    parts: Components = eqx.field(static=True)
    declared: ClassVar[bool] = True

    def __init__(
        self, network: Callable[..., Array], parts: Components, **options: Any
    ):
        self.parts = parts
        super().__init__(network, **options)

    @property
    def traits(self) -> Traits:
        pictures = pixels if self.parts.autoencoder is None else self.parts.pictures
        return dataclasses.replace(super().traits, pictures=pictures)

    @property
    def shown_conditions(self) -> dict[str, str]:
        prompts = {
            name: encoder
            for name, encoder in self.encoders
            if isinstance(encoder, Prompts)
        }
        texts = {
            name: prompts[name].text_of(self.fixed[name])
            for name in self.fixed
            if name in prompts
        }
        return super().shown_conditions | {
            name: repr(text) for name, text in texts.items() if text is not None
        }

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder: ``model.text_encoder(token_ids)`` gives hidden states
        (length, width).

        Raises:
            CapabilityError: the model has none.
        """
        return self._encoder(
            0, "text encoder", "use a text-to-image folder, with text_encoder/ in it."
        )

    @property
    def text_encoder_2(self) -> TextEncoder:
        """The second text encoder of two.

        Raises:
            CapabilityError: the model has no second one.
        """
        return self._encoder(
            1, "second text encoder", "use model.text_encoder, or another folder."
        )

    def _encoder(self, index: int, what: str, fix: str) -> TextEncoder:
        if len(self.parts.text_encoders) <= index:
            raise CapabilityError(f"The model '{self.label}' has no {what}.", fix=fix)
        return self.parts.text_encoders[index]

    def decode(self, latents: ArrayLike) -> Array:
        """Makes images of latents.

        Args:
            latents: (…, height, width, channels), such as ``result["x"]``.

        Returns:
            Images (…, height, width, channels), their values from about −1 to 1;
                `Result.images` has them from 0 to 1.

        Raises:
            CapabilityError: the model is one of pixels.
            ShapeError: no latents of this model.
        """
        return self._coded("decode", latents)

    def encode(self, images: ArrayLike) -> Array:
        """Makes latents of images: the mean of the encoder's distribution, scaled as
        the network was trained.

        Args:
            images: (…, height, width, channels), their values from −1 to 1.

        Returns:
            Latents (…, height, width, channels).

        Raises:
            CapabilityError: the model is one of pixels.
            ShapeError: no images of this model, or sides that the encoder cannot halve
                as often as it does.
        """
        return self._coded("encode", images)

    def _coded(self, way: str, given: ArrayLike) -> Array:
        if self.parts.autoencoder is None:
            raise CapabilityError(
                f"The model '{self.label}' has no autoencoder: its events {self.event_shape} are images themselves.",
                fix="use the events as they are; their values go from −1 to 1.",
            )
        return self.parts.coded(way, given)


class Folder(NamedTuple):
    """A model's folder, and the classes of a pipeline's components by their folders;
    none where it is one network's."""

    path: Path
    components: dict[str, str]


def find(path: str | os.PathLike[str]) -> Folder:
    """Finds a model's folder by its path, or by ``owner/name`` on a hub."""
    place = check_path(path, "A model's folder", "models/sd").expanduser()
    if place.is_file():
        tensors.refuse_pickles(place)
        fix = f"pass the folder: {place.parent}."
        raise LoadError(
            f"{place} is a file; a model is a folder with model_index.json or config.json in it.",
            fix=fix,
        )
    if not place.is_dir():
        place = _from_hub(str(path))
    if (index := place / "model_index.json").exists():
        # Components that are there are pairs (library, class).
        pairs = {
            name: entry
            for name, entry in read_json(index).items()
            if isinstance(entry, list)
        }
        components = {
            name: pair[1]
            for name, pair in pairs.items()
            if [type(text) for text in pair] == [str, str]
        }
        check_beside(components, index, "component")
        return Folder(place, components)
    if (place / "config.json").exists():
        return Folder(place, {})
    tensors.refuse_pickles(place)
    fix = "give a folder as diffusers' save_pretrained writes it; its from_single_file reads single files."
    raise LoadError(
        f"There is neither model_index.json nor config.json in {place}.", fix=fix
    )


def _from_hub(name: str) -> Path:
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~", "/")):
        raise LoadError(
            f"There is no folder {name}.",
            fix="check the path, or give owner/name of a model on the hub.",
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise LoadError(
            f"There is no folder {name}, and to look on the hub the package huggingface_hub is missing.",
            fix="pip install 'composeprob[hub]', or check the path.",
        ) from error
    try:
        wanted = [
            f"{folder}*.{kind}"
            for folder in ("", "*/")
            for kind in ("json", "safetensors", "txt")
        ]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (
        Exception
    ) as error:  # of many kinds: of the network, of the hub, of the cache
        raise LoadError(
            f"There is no folder {name}, and the hub gives no model of that name: {str(error).splitlines()[0]}",
            fix="check the name; without a network, download it before or set HF_HUB_OFFLINE=1 to use the cache only.",
        ) from error


Made = TypeVar("Made")
Build = Callable[[JSONObject, tensors.Arrays, str], Made]
"""Makes a network of its options and arrays; the last argument is the file of the
options, for errors."""
NETWORKS: dict[str, Build[tensors.Network]] = {
    "UNet2DModel": unet_2d,
    "UNet2DConditionModel": unet_condition,
    "DiTTransformer2DModel": dit,
    "SD3Transformer2DModel": sd3,
    GUIDED: guided,
}
AUTOENCODERS: dict[str, Build[tensors.Loaded]] = {
    "AutoencoderKL": autoencoder_kl,
    "AutoencoderTiny": autoencoder_tiny,
}
ENCODERS: dict[str, Build[tensors.Loaded]] = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip,
}


def from_diffusers(
    path_or_repo_id: str | os.PathLike[str],
    component: str | None = None,
    dtype: DTypeLike | None = None,
    schedule: Schedule | None = None,
    remat: bool = False,
) -> Pretrained:
    """Loads a model that diffusers saved, as a factor over images or latents (height,
    width, channels).

    The network is evaluated in JAX; torch is not needed. Its levels are those that its
    scheduler trained it on, often 1,000: at level k its score is −ε̂/σ_k with ε̂ the
    original's output at timestep k. On any other schedule it is evaluated where the
    log-SNR is the same, at a real-valued timestep between two trained ones
    (``time="real_level"``): its sinusoidal embedding is smooth, and neighbouring
    timesteps differ little. Networks of flow matching and those given σ are evaluated
    at the noise itself. A last level without any signal is given as much as single
    precision distinguishes from none. Clipping and thresholding that samplers of a
    scheduler add are left out: they are no part of the model.

    Known are `UNet2DModel`, `UNet2DConditionModel` (Stable Diffusion 1, 2, XL),
    `DiTTransformer2DModel`, `SD3Transformer2DModel`, with `AutoencoderKL`,
    `AutoencoderTiny` and CLIP's text encoders; and what
    tools/convert_guided_diffusion.py made of guided-diffusion's weights. Sizes and
    depths are those of the weights, with which config.json must agree. A learned
    variance is not used.

    Args:
        path_or_repo_id: a folder with model_index.json (a pipeline) or config.json (one
            network), or ``owner/name`` on the hub, which the package `huggingface_hub`
            fetches into its cache (extra ``hub``).
        component: which folder of a pipeline is the network; left out, ``unet`` or
            ``transformer``.
        dtype: of the weights and of what is computed with them: ``"float32"``,
            ``"bfloat16"`` or ``"float16"``; left out, float32. Events, scores and norms
            stay in float32.
        schedule: the levels that the factor offers; left out, those of the training.
            Where the folder has no scheduler, they must be those of the training, level
            k being timestep k.
        remat: as of `Diffusion`: gradients through the network, of denoised
            observations, take less memory.

    Returns:
        A `Diffusion`, which has a score and no energy. Its conditions: ``prompt`` (a
        text, token ids, or hidden states (length, width), with the pooled vector as a
        last row where the network takes one), ``label``, ``size`` (of Stable Diffusion
        XL, six numbers). Without a prompt it takes the empty one; where a transformer
        knows "no label", that. It can ``decode(latents)``, ``encode(images)`` and has
        its ``text_encoder``.

    Raises:
        LoadError: no folder, a file that is missing, damaged, pickled or outside of the
            folder, a class or option that is not supported, or weights that are not
            those of the network; all of it before a weight is read.
        InvalidValueError, WrongTypeError: an unknown dtype or component, or what is no
            schedule.

    Example:
        >>> import composeprob as cp
        >>> model = cp.from_diffusers("tests/pretrained/data/sd")  # any folder; or owner/name on the hub
        >>> model.event_shape, model.schedule.num_levels
        ((8, 8, 4), 1000)
        >>> model.given(prompt="a cat") * model.given(prompt="a dog") / model
        sd(prompt='a cat') * sd(prompt='a dog') / sd
    """
    if schedule is not None:
        check_schedule(schedule, "for example cp.Schedule.log_snr(60).")
    kind, place = _dtype(dtype), find(path_or_repo_id)
    where = place.path / _component(place, component)
    network = _skeleton(where, NETWORKS)
    learned = _trained(place, schedule)
    shape = _event_shape(network, str(where / "config.json"))
    # Everything that can be refused is examined before the first weight is read.
    coder, encoders, tokenizers = _beside(place)
    module, coder, encoders = tensors.fill((network.module, coder, encoders), kind)
    parts = Components(
        place.path.name, coder, tuple(map(TextEncoder, encoders, tokenizers))
    )
    adapted, options = _adapted(module, network, learned, schedule)
    options |= _conditions(network, parts, shape)
    return Pretrained(
        adapted, parts, event_shape=shape, label=parts.name, remat=remat, **options
    )


def _dtype(dtype: DTypeLike | None) -> DTypeLike:
    try:
        name = (
            dtype
            if isinstance(dtype, str)
            else jnp.dtype("float32" if dtype is None else dtype).name
        )
    except TypeError:
        name = repr(dtype)
    check_choice("dtype", name, ("float32", "bfloat16", "float16"))
    return jnp.dtype(name)


def _component(place: Folder, component: str | None) -> str:
    """The folder of the component that is the network; "" where it is the only one."""
    if not place.components:
        if component is not None:
            fix = "leave component out."
            raise InvalidValueError(
                f"component={component!r} is given, but {place.path} holds one network.",
                fix=fix,
            )
        return ""
    networks = [name for name, kind in place.components.items() if kind in NETWORKS]
    wanted = ["unet", "transformer", *networks] if component is None else [component]
    if found := [name for name in wanted if name in place.components]:
        return found[0]
    has = ", ".join(f"{name} ({kind})" for name, kind in place.components.items())
    missing = f"component {component!r}" if component else "network of diffusion"
    fix = (
        f"use component={networks[0]!r}."
        if networks
        else f"known are {', '.join(NETWORKS)}."
    )
    raise InvalidValueError(f"{place.path} has no {missing}; it has: {has}.", fix=fix)


def _skeleton(
    where: Path, known: Mapping[str, Build[Made]], kind: str | None = None
) -> Made:
    """A network of a folder, its arrays not read yet; ``kind`` is its class where
    config.json does not give it."""
    file = where / "config.json"
    config = read_json(file)
    name = config.get("_class_name", kind)
    if not isinstance(name, str) or name not in known:
        unsupported(str(file), "_class_name", name, tuple(known))
    config = config if kind is None else {"architectures": [kind], **config}
    return known[name](
        config, tensors.Arrays(tensors.weights(where), str(where)), str(file)
    )


def _trained(place: Folder, schedule: Schedule | None) -> schedulers.Trained:
    file = place.path / "scheduler" / "scheduler_config.json"
    if not place.components and not file.exists():
        file = place.path / "scheduler_config.json"
    if file.exists():
        return schedulers.trained(read_json(file), str(file))
    if schedule is None:
        raise LoadError(
            f"{place.path} has no scheduler, so nothing states which levels its network was trained on.",
            fix="give the folder of the whole pipeline, or schedule=cp.Schedule.linear(1000), with the levels of its "
            "training.",
        )
    return schedulers.Trained(schedule, "epsilon")


def _event_shape(network: tensors.Network, where: str) -> tuple[int, int, int]:
    size = network.sample_size
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(
        isinstance(n, int) and n > 0 and n % network.multiple == 0 for n in sides
    ):
        fix = f'write the height and width there, multiples of {network.multiple}: "sample_size": [64, 64].'
        raise LoadError(
            f"{where} has sample_size={size!r}, which gives no shape of events.",
            fix=fix,
        )
    if network.outputs not in (network.channels, 2 * network.channels):
        raise LoadError(
            f"The network of {where} takes {network.channels} channels and gives {network.outputs}: what it gives is "
            "no score of what it takes.",
            fix="load a model of whole images: networks that fill in or enlarge an image take it as further channels.",
        )
    return sides[0], sides[1], network.channels


def _beside(
    place: Folder,
) -> tuple[tensors.Loaded | None, list[tensors.Loaded], list[Tokenizer | None]]:
    """The autoencoder and the text encoders of a pipeline, their arrays not read yet,
    and the tokenizers."""
    name = next((name for name in ("vae", "vqvae") if name in place.components), None)
    coder = None if name is None else _skeleton(place.path / name, AUTOENCODERS)
    encoders, tokenizers = list[tensors.Loaded](), list[Tokenizer | None]()
    # A prompt is encoded by all text encoders, and T5, the third of three, is not among
    # those that are known.
    for suffix in ("", "_2") if "text_encoder_3" not in place.components else ():
        kind = place.components.get(f"text_encoder{suffix}")
        if kind in ENCODERS:
            encoders.append(
                _skeleton(place.path / f"text_encoder{suffix}", ENCODERS, kind)
            )
            files = place.path / f"tokenizer{suffix}"
            tokenizers.append(
                Tokenizer(files, encoders[-1].form.length) if files.is_dir() else None
            )
    return coder, encoders, tokenizers


def _adapted(
    module: Callable[..., Array],
    network: tensors.Network,
    learned: schedulers.Trained,
    schedule: Schedule | None,
) -> tuple[Callable[..., Array], dict[str, Any]]:
    """The network as the factor calls it, with the factor's levels, time and
    parameterization."""
    native, time, known = learned.schedule, learned.time or network.time, None
    options = {
        "schedule": native,
        "parameterization": learned.parameterization,
        "time": time,
    }
    if learned.preconditioning is not None:
        module = Preconditioned(module, *learned.preconditioning)
    if schedule is not None and not schedule.same_levels(native):
        options["schedule"] = schedule
        if time == "real_level":
            log_snr = log_snr_of(native.alpha, native.sigma)
            known, options["time"] = jnp.asarray(log_snr[::-1], jnp.float32), "log_snr"
            options["log_snr_range"] = (float(log_snr[-1]), float(log_snr[0]))
    flow = 1000.0 if learned.parameterization == "flow" else None
    if (
        known is not None
        or flow is not None
        or network.pooled is not None
        or network.outputs != network.channels
    ):
        module = Adapted(module, known, network.channels, network.pooled, flow)
    return module, options


def _conditions(
    network: tensors.Network, parts: Components, shape: tuple[int, ...]
) -> dict[str, Mapping[str, object]]:
    """The factor's conditions, the value of each that means "none", and what encodes
    them."""
    values: dict[str, ArrayLike | None] = {}
    encoders: dict[str, Encoder] = {}
    if "prompt" in network.conditions:
        prompts = Prompts(
            parts.text_encoders, network.conditions["prompt"][-1], network.pooled
        )
        readable = bool(parts.text_encoders) and all(
            e.tokenizer is not None for e in parts.text_encoders
        )
        values["prompt"], encoders["prompt"] = (
            prompts("") if readable else None,
            prompts,
        )
    if "size" in network.conditions:
        scale = 1 if parts.autoencoder is None else parts.autoencoder.form.shrinks
        height, width = (side * scale for side in shape[:2])
        values["size"] = np.asarray([height, width, 0, 0, height, width], np.float32)
    if "label" in network.conditions:
        values["label"] = network.null_label
        if network.classes is not None:
            encoders["label"] = partial(
                _label, network.classes + (network.null_label is not None)
            )
    return {"conditions": values, "encoders": encoders}


def _label(count: int, label: ArrayLike) -> np.ndarray:
    """A label as it is, refused where the table of labels has no such row: gathering
    would take the last."""
    array = np.asarray(as_condition("label", label))
    whole = np.issubdtype(array.dtype, np.integer) and array.ndim == 0
    if not whole or not 0 <= array.item() < count:
        raise InvalidValueError(
            f"A label of this model is a whole number from 0 to {count - 1}; got {label!r}.",
            fix="pass the class's index.",
        )
    return array
