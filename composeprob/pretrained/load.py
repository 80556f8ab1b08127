"""`from_diffusers`: a folder of diffusers, on this machine or on a hub, as a factor
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
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from composeprob.arguments import as_condition, check_choice, check_path
from composeprob.core import Diffusion, Encoder, Schedule, Traits
from composeprob.errors import CapabilityError, InvalidValueError, LoadError, ShapeError
from composeprob.json_data import JSONObject
from composeprob.pretrained import schedulers, tensors
from composeprob.pretrained.autoencoder import autoencoder_kl, autoencoder_tiny
from composeprob.pretrained.config import check_beside, read_json, unsupported
from composeprob.pretrained.text_encoders import Prompts, TextEncoder, Tokenizer, clip
from composeprob.pretrained.transformer import dit, sd3
from composeprob.pretrained.unet import GUIDED, guided, unet_2d, unet_condition
from composeprob.schedule import check_schedule, log_snr_of


class Components:
    """The models beside a network in its folder: an autoencoder, which models of pixels
    lack, and up to two text encoders.

    Equal by identity, as what is compiled holds them.
    """

    def __init__(
        self,
        name: str,
        autoencoder: tensors.Loaded | None,
        text_encoders: tuple[TextEncoder, ...],
    ):
        self.name = name
        self.autoencoder = autoencoder
        self.text_encoders = text_encoders

    def __repr__(self) -> str:
        return f"Components({self.name})"

    def pictures(self, latents: object) -> Float[np.ndarray, "*batch h w channels"]:
        """Images of latents, their values from 0 to 1."""
        return pixels(self.decode(latents))

    def decode(self, latents: object) -> Float[Array, "*batch h w channels"]:
        """Images of latents (…, height, width, channels)."""
        assert self.autoencoder is not None
        x = jnp.asarray(latents, jnp.result_type(float))
        channels = self.autoencoder.form.latents
        if not _has_shape(x, channels, 1):
            raise ShapeError(
                "Latents of this model have shape (…, height, width, "
                f"{channels}); got {x.shape}.",
                fix="channels come last.",
            )
        return self._mapped("decode", x)

    def encode(self, images: object) -> Float[Array, "*batch h w channels"]:
        """Latents of images (…, height, width, channels)."""
        assert self.autoencoder is not None
        _check_values(images)
        x = jnp.asarray(images, jnp.result_type(float))
        channels = self.autoencoder.form.channels
        multiple = self.autoencoder.form.shrinks
        if not _has_shape(x, channels, multiple):
            sides = ""
            fix = "channels come last."
            if multiple > 1:
                sides = f", sides multiples of {multiple}"
                fix = "channels come last; crop or scale the sides."
            raise ShapeError(
                "Images of this model have shape (…, height, width, "
                f"{channels}){sides}; got {x.shape}.",
                fix=fix,
            )
        return self._mapped("encode", x)

    def _mapped(self, method: str, x: Array) -> Array:
        """Apply the autoencoder to each image, over any number of leading axes."""
        assert self.autoencoder is not None
        stack = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        outputs = self.autoencoder.mapped(method, stack)
        return outputs.reshape(*x.shape[:-3], *outputs.shape[1:])


def _check_values(images: object) -> None:
    """Refuse images of bytes, and those whose concrete values go beyond −1 to 1."""
    if isinstance(images, jax.core.Tracer):
        return
    values = np.asarray(images)
    whole = np.issubdtype(values.dtype, np.integer)
    # An image that was interpolated may go a little beyond.
    if not whole and not np.any(np.abs(values) > 1.01):
        return
    ends = ""
    if values.size:
        ends = f" from {values.min():.4g} to {values.max():.4g}"
    raise InvalidValueError(
        f"The images have {values.dtype} values{ends}; those of this model go from −1 "
        "to 1.",
        fix="pass images / 127.5 - 1 of bytes, 2 * images - 1 of values from 0 to 1.",
    )


def _has_shape(x: Array, channels: int, multiple: int) -> bool:
    """Return whether x is images with this number of channels, whose sides are non-zero
    multiples of a number."""
    if x.ndim < 3 or x.shape[-1] != channels:
        return False
    return all(side > 0 and side % multiple == 0 for side in x.shape[-3:-1])


def pixels(images: object) -> Float[np.ndarray, "*batch h w channels"]:
    """Images with values from −1 to 1, as all models of pixels have them, brought to 0
    to 1."""
    return np.clip(np.asarray(images, np.float32) / 2 + 0.5, 0.0, 1.0)


class Adapted(eqx.Module):
    """A network whose output also has the variance, or that takes another time than
    the factor's.

    Attributes:
        network: the network.
        log_snr: log-SNR of the levels of its training, from the noisiest to the
            cleanest, for a factor that is evaluated by log-SNR; None for others.
        channels: channels of events, the first of the output's.
        pooled: width of the vector in the prompt's last row; None without one.
        flow: factor of σ/(σ + α) in the times of flow matching; None for others.
    """

    network: Callable[..., Array]
    log_snr: Float[Array, " levels"] | None
    channels: int = eqx.field(static=True)
    pooled: int | None = eqx.field(static=True)
    flow: float | None = eqx.field(static=True)

    def __call__(self, x: Array, t: Array, /, **conditions: Array) -> Array:
        if self.pooled is not None:
            prompt = conditions["prompt"]
            conditions = {
                **conditions,
                "prompt": prompt[:-1],
                "pooled": prompt[-1, : self.pooled],
            }
        if self.log_snr is not None:
            levels = jnp.arange(self.log_snr.shape[0], dtype=jnp.float32)[::-1]
            t = jnp.interp(t, self.log_snr, levels)
        if self.flow is not None:
            # The factor's time is σ/α.
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
        skip = self.scale**2 / total
        out = self.sign * sigma * self.scale / jnp.sqrt(total)
        return skip * x + out * inner


class Pretrained(Diffusion):
    """A `Pretrained` is a diffusion model from other people's folder; made by
    `from_diffusers`.

    Its components are the autoencoder and the text encoders beside the network. No
    density is made of them: they are not leaves.
    """

    components: Components = eqx.field(static=True)
    declared: ClassVar[bool] = True

    def __init__(
        self, network: Callable[..., Array], components: Components, **options: Any
    ):
        self.components = components
        super().__init__(network, **options)

    @property
    def traits(self) -> Traits:
        pictures: Callable[[object], np.ndarray] = pixels
        if self.components.autoencoder is not None:
            pictures = self.components.pictures
        return dataclasses.replace(super().traits, pictures=pictures)

    @property
    def shown_conditions(self) -> dict[str, str]:
        # A prompt is shown as its text, not as an array.
        shown = super().shown_conditions
        for name, encoder in self.encoders:
            if isinstance(encoder, Prompts) and name in self.fixed:
                text = encoder.text_of(self.fixed[name])
                if text is not None:
                    shown = {**shown, name: repr(text)}
        return shown

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

    def _encoder(self, index: int, noun: str, fix: str) -> TextEncoder:
        if len(self.components.text_encoders) <= index:
            raise CapabilityError(f"The model '{self.label}' has no {noun}.", fix=fix)
        return self.components.text_encoders[index]

    def decode(self, latents: ArrayLike) -> Float[Array, "*batch h w channels"]:
        """Make images of latents.

        Args:
            latents: (…, height, width, channels), such as ``result["x"]``.

        Returns:
            Images (…, height, width, channels), their values from about −1 to 1;
                `Result.images` has them from 0 to 1.

        Raises:
            CapabilityError: the model is one of pixels.
            ShapeError: the array's shape is not that of latents of this model.
        """
        return self._with_autoencoder().decode(latents)

    def encode(self, images: ArrayLike) -> Float[Array, "*batch h w channels"]:
        """Make latents of images: the mean of the encoder's distribution, scaled as in
        the network's training.

        Args:
            images: (…, height, width, channels), their values from −1 to 1.

        Returns:
            Latents (…, height, width, channels).

        Raises:
            CapabilityError: the model is one of pixels.
            InvalidValueError: bytes, or other values beyond −1 to 1.
            ShapeError: the array's shape is not that of images of this model, or the
                encoder cannot halve its sides as often as it does.
        """
        return self._with_autoencoder().encode(images)

    def _with_autoencoder(self) -> Components:
        if self.components.autoencoder is None:
            raise CapabilityError(
                f"The model '{self.label}' has no autoencoder: its events "
                f"{self.event_shape} are images themselves.",
                fix="use the events as they are; their values go from −1 to 1.",
            )
        return self.components


class Folder(NamedTuple):
    """A model's folder, and the class of each component of a pipeline by its name.

    A folder of one network has no components.
    """

    path: Path
    classes: dict[str, str]


def find(path: str | os.PathLike[str]) -> Folder:
    """Find a model's folder by its path, or by ``owner/name`` on a hub."""
    place = check_path(path, "A model's folder", "models/sd").expanduser()
    if place.is_file():
        tensors.refuse_pickles(place)
        raise LoadError(
            f"{place} is a file; a model is a folder with model_index.json or "
            "config.json in it.",
            fix=f"pass the folder: {place.parent}.",
        )
    # A folder on this machine goes before one of the same name on the hub.
    if not place.is_dir():
        place = _from_hub(str(path))
    index = place / "model_index.json"
    if index.exists():
        classes = _classes(index)
        check_beside(classes, index, "component")
        return Folder(place, classes)
    if (place / "config.json").exists():
        return Folder(place, {})
    tensors.refuse_pickles(place)
    raise LoadError(
        f"There is neither model_index.json nor config.json in {place}.",
        fix="give a folder as diffusers' save_pretrained writes it; its "
        "from_single_file reads single files.",
    )


def _classes(index: Path) -> dict[str, str]:
    """Classes of a pipeline's components by their names."""
    classes = {}
    for name, entry in read_json(index).items():
        # A component is a pair (library, class); one that was left out has None twice.
        is_list = isinstance(entry, list)
        if is_list and [type(text) for text in entry] == [str, str]:
            classes[name] = entry[1]
    return classes


_DOWNLOADED = [
    f"{folder}*.{ending}"
    for folder in ("", "*/")
    for ending in ("json", "safetensors", "txt")
]
"""Files of a model on a hub that are downloaded; pickles are not among them."""


def _from_hub(name: str) -> Path:
    """Download a model's folder from the hub, or take it from the hub's cache."""
    words = name.split("/")
    if len(words) != 2 or not all(words) or name.startswith((".", "~", "/")):
        raise LoadError(
            f"There is no folder {name}.",
            fix="check the path, or give owner/name of a model on the hub.",
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise LoadError(
            f"There is no folder {name}, and the package huggingface_hub, which looks "
            "for models on the hub, is not installed.",
            fix="check the path; or pip install huggingface-hub, in a clone of "
            "composeprob pip install '.[hub]'.",
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED)
    # Of many kinds: of the network, of the hub, of the cache.
    except Exception as error:
        raise LoadError(
            f"There is no folder {name}, and the hub gives no model of that name: "
            f"{str(error).splitlines()[0]}",
            fix="check the name; without a network, download it before or set "
            "HF_HUB_OFFLINE=1 to use the cache only.",
        ) from error
    return Path(folder)


Made = TypeVar("Made")
Build = Callable[[JSONObject, tensors.Arrays, str], Made]
"""A function that makes a network of its options and arrays. Its last argument is the
file of the options, for errors."""
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
    """Load a model that diffusers saved, as a factor over images or latents (height,
    width, channels).

    The network is evaluated in JAX; torch is not needed. Its levels are those that its
    scheduler trained it on, often 1,000: at level k its score is −ε̂/σ_k with ε̂ the
    original's output at timestep k. On another schedule it is evaluated at the same
    log-SNR, at a real-valued timestep between two trained ones
    (``time="real_level"``): its sinusoidal embedding is smooth, and neighbouring
    timesteps differ little. Networks of flow matching and those that take σ are
    evaluated at the noise itself. A last level without any signal gets the least signal
    that single precision distinguishes from none. Clipping and thresholding, which
    samplers of a scheduler add, are left out: they are not part of the model.

    Supported are `UNet2DModel`, `UNet2DConditionModel` (Stable Diffusion 1, 2, XL),
    `DiTTransformer2DModel`, `SD3Transformer2DModel`, with `AutoencoderKL`,
    `AutoencoderTiny` and CLIP's text encoders; and folders that
    tools/convert_guided_diffusion.py made of guided-diffusion's weights. Sizes and
    depths are those of the weights, with which config.json must agree. A learned
    variance is not used.

    Args:
        path_or_repo_id: a folder with model_index.json (a pipeline) or config.json (one
            network), or ``owner/name`` on the hub, which the package `huggingface_hub`
            fetches into its cache (extra ``hub``).
        component: the folder of a pipeline that holds the network; left out, ``unet``
            or ``transformer``.
        dtype: precision of the weights and of the computation with them:
            ``"float32"``, ``"bfloat16"`` or ``"float16"``; left out, float32. Events,
            scores and norms stay in float32.
        schedule: the levels that the factor offers; left out, those of the training.
            Where the folder has no scheduler, they must be those of the training, level
            k being timestep k.
        remat: as of `Diffusion`: gradients through the network, of denoised
            observations, take less memory.

    Returns:
        A `Diffusion`, which has a score and no energy. Its conditions: ``prompt`` (a
        text, token ids, or hidden states (length, width), with the pooled vector as a
        last row where the network takes one), ``label``, ``size`` (of Stable Diffusion
        XL, six numbers). Without a prompt it takes the empty one, without a label "no
        label" where a transformer has that. It can ``decode(latents)``,
        ``encode(images)`` and has its ``text_encoder``.

    Raises:
        LoadError: no folder, a file that is missing, damaged, pickled or outside of the
            folder, a class or option that is not supported, or weights that are not
            those of the network; all of it before a weight is read.
        InvalidValueError: an unknown dtype or component.
        WrongTypeError: schedule is not a schedule.

    Example:
        >>> import composeprob as cp
        >>> # Any folder, or owner/name on the hub.
        >>> model = cp.from_diffusers("tests/pretrained/data/sd")
        >>> model.event_shape, model.schedule.num_levels
        ((8, 8, 4), 1000)
        >>> model.given(prompt="a cat") * model.given(prompt="a dog") / model
        sd(prompt='a cat') * sd(prompt='a dog') / sd
    """
    if schedule is not None:
        check_schedule(schedule, "for example cp.Schedule.log_snr(60).")
    precision = _dtype(dtype)
    folder = find(path_or_repo_id)
    where = folder.path / _component(folder, component)
    network = _skeleton(where, NETWORKS)
    training = _training(folder, schedule)
    shape = _event_shape(network, str(where / "config.json"))
    # All components are checked before the first weight is read.
    coder = _autoencoder(folder)
    encoders, tokenizers = _text_encoders(folder)
    module, coder, encoders = tensors.fill((network.module, coder, encoders), precision)
    text_encoders = tuple(map(TextEncoder, encoders, tokenizers))
    components = Components(folder.path.name, coder, text_encoders)
    adapted, options = _adapted(module, network, training, schedule)
    options |= _conditions(network, components, shape)
    return Pretrained(
        adapted,
        components,
        event_shape=shape,
        label=components.name,
        remat=remat,
        **options,
    )


def _dtype(dtype: DTypeLike | None) -> DTypeLike:
    """Return a dtype of weights; refuse those that are not supported."""
    if dtype is None:
        dtype = "float32"
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    check_choice("dtype", name, ("float32", "bfloat16", "float16"))
    return jnp.dtype(name)


def _component(folder: Folder, component: str | None) -> str:
    """Name of the component that is the network; "" in the folder of one network."""
    if not folder.classes:
        if component is not None:
            raise InvalidValueError(
                f"component={component!r} is given, but {folder.path} holds one "
                "network.",
                fix="leave component out.",
            )
        return ""
    networks = [name for name, kind in folder.classes.items() if kind in NETWORKS]
    candidates = ["unet", "transformer", *networks]
    missing = "network of diffusion"
    if component is not None:
        candidates = [component]
        missing = f"component {component!r}"
    for name in candidates:
        if name in folder.classes:
            return name
    available = ", ".join(f"{name} ({kind})" for name, kind in folder.classes.items())
    fix = f"supported are {', '.join(NETWORKS)}."
    if networks:
        fix = f"use component={networks[0]!r}."
    raise InvalidValueError(
        f"{folder.path} has no {missing}; it has: {available}.", fix=fix
    )


def _skeleton(
    where: Path, supported: Mapping[str, Build[Made]], kind: str | None = None
) -> Made:
    """A network of a folder, its arrays not read yet; ``kind`` is its class where
    config.json does not give it."""
    file = where / "config.json"
    config = read_json(file)
    name = config.get("_class_name", kind)
    if not isinstance(name, str) or name not in supported:
        unsupported(str(file), "_class_name", name, tuple(supported))
    if kind is not None:
        config = {"architectures": [kind], **config}
    arrays = tensors.Arrays(tensors.weights(where), str(where))
    return supported[name](config, arrays, str(file))


def _training(folder: Folder, schedule: Schedule | None) -> schedulers.Trained:
    """Levels and parameterization of the network's training, by its scheduler."""
    # One network's folder may have the file itself.
    file = folder.path / "scheduler" / "scheduler_config.json"
    if not folder.classes and not file.exists():
        file = folder.path / "scheduler_config.json"
    if file.exists():
        return schedulers.trained(read_json(file), str(file))
    if schedule is None:
        raise LoadError(
            f"{folder.path} has no scheduler, so nothing states the levels that its "
            "network was trained on.",
            fix="give the folder of the whole pipeline, or "
            "schedule=cp.Schedule.linear(1000), with the levels of its training.",
        )
    return schedulers.Trained(schedule, "epsilon")


def _event_shape(network: tensors.Network, where: str) -> tuple[int, int, int]:
    """Height, width and channels of events; refuses networks whose output is not a
    score of their input."""
    size = network.sample_size
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    usable = [isinstance(n, int) and n > 0 and n % network.multiple == 0 for n in sides]
    if len(sides) != 2 or not all(usable):
        raise LoadError(
            f"{where} has sample_size={size!r}, which gives no shape of events.",
            fix="write the height and width there, multiples of "
            f'{network.multiple}: "sample_size": [64, 64].',
        )
    # Twice the channels where the network has learned a variance too.
    if network.outputs not in (network.channels, 2 * network.channels):
        raise LoadError(
            f"The network of {where} takes {network.channels} channels and gives "
            f"{network.outputs}: its output is not a score of its input.",
            fix="load a model of whole images: networks that fill in or enlarge an "
            "image take it as further channels.",
        )
    return sides[0], sides[1], network.channels


def _autoencoder(folder: Folder) -> tensors.Loaded | None:
    """The autoencoder of a pipeline, its arrays not read yet; None for pixels."""
    for name in ("vae", "vqvae"):
        if name in folder.classes:
            return _skeleton(folder.path / name, AUTOENCODERS)
    return None


def _text_encoders(
    folder: Folder,
) -> tuple[list[tensors.Loaded], list[Tokenizer | None]]:
    """Text encoders of a pipeline, their arrays not read yet, and their tokenizers."""
    encoders: list[tensors.Loaded] = []
    tokenizers: list[Tokenizer | None] = []
    # A prompt needs all text encoders, and T5, the third of three, is not supported.
    if "text_encoder_3" in folder.classes:
        return encoders, tokenizers
    for suffix in ("", "_2"):
        kind = folder.classes.get(f"text_encoder{suffix}")
        if kind not in ENCODERS:
            continue
        encoder = _skeleton(folder.path / f"text_encoder{suffix}", ENCODERS, kind)
        encoders.append(encoder)
        files = folder.path / f"tokenizer{suffix}"
        tokenizer = None
        if files.is_dir():
            tokenizer = Tokenizer(files, encoder.form.length)
        tokenizers.append(tokenizer)
    return encoders, tokenizers


def _adapted(
    module: Callable[..., Array],
    network: tensors.Network,
    training: schedulers.Trained,
    schedule: Schedule | None,
) -> tuple[Callable[..., Array], dict[str, Any]]:
    """The network as the factor calls it, with the factor's levels, time and
    parameterization."""
    native = training.schedule
    time = training.time or network.time
    options: dict[str, Any] = {
        "schedule": native,
        "parameterization": training.parameterization,
        "time": time,
    }
    if training.preconditioning is not None:
        module = Preconditioned(module, *training.preconditioning)
    log_snr = None
    if schedule is not None and not schedule.same_levels(native):
        options["schedule"] = schedule
        if time == "real_level":
            # Only here: networks that take σ can be evaluated at any noise.
            # On other levels the network takes a timestep between those of its
            # training, interpolated in log-SNR.
            native_log_snr = log_snr_of(native.alpha, native.sigma)
            log_snr = jnp.asarray(native_log_snr[::-1], jnp.float32)
            options["time"] = "log_snr"
            lowest = float(native_log_snr[-1])
            highest = float(native_log_snr[0])
            options["log_snr_range"] = (lowest, highest)
    flow = 1000.0 if training.parameterization == "flow" else None
    pooled = network.pooled
    other_time = log_snr is not None or flow is not None
    if other_time or pooled is not None or network.outputs != network.channels:
        module = Adapted(module, log_snr, network.channels, pooled, flow)
    return module, options


def _conditions(
    network: tensors.Network, components: Components, shape: tuple[int, ...]
) -> dict[str, Mapping[str, object]]:
    """The factor's conditions, each with its value for "none", and their encoders."""
    values: dict[str, ArrayLike | None] = {}
    encoders: dict[str, Encoder] = {}
    if "prompt" in network.conditions:
        width = network.conditions["prompt"][-1]
        text_encoders = components.text_encoders
        prompts = Prompts(text_encoders, width, network.pooled)
        tokenizers = [encoder.tokenizer for encoder in text_encoders]
        values["prompt"] = None
        # Without a prompt the network gets the empty one, as in its training.
        if tokenizers and None not in tokenizers:
            values["prompt"] = prompts("")
        encoders["prompt"] = prompts
    if "size" in network.conditions:
        scale = 1
        if components.autoencoder is not None:
            scale = components.autoencoder.form.shrinks
        height, width = shape[0] * scale, shape[1] * scale
        # Size before scaling, top and left of the crop, and target size: an image that
        # was neither scaled nor cropped.
        values["size"] = np.asarray([height, width, 0, 0, height, width], np.float32)
    if "label" in network.conditions:
        values["label"] = network.null_label
        if network.classes is not None:
            rows = network.classes + (network.null_label is not None)
            encoders["label"] = partial(_label, rows)
    return {"conditions": values, "encoders": encoders}


def _label(count: int, label: ArrayLike) -> Int[np.ndarray, ""]:
    """Return a label; refuse one without a row in the table of ``count`` labels.

    JAX would take the last row for it.
    """
    array = np.asarray(as_condition("label", label))
    whole = np.issubdtype(array.dtype, np.integer) and array.ndim == 0
    if not whole or not 0 <= array.item() < count:
        raise InvalidValueError(
            f"A label of this model is a whole number from 0 to {count - 1}; "
            f"got {label!r}.",
            fix="pass the class's index.",
        )
    return array
