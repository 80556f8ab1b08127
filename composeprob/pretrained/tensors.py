"""Arrays of safetensors files by name, and the networks that are made of them; all are
checked before one is read."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from composeprob.errors import ComposeProbError, LoadError
from composeprob.json_data import JSON
from composeprob.pretrained.config import check_beside, read_json

DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "bfloat16",
    "I64": "i8",
    "I32": "i4",
    "U8": "u1",
    "BOOL": "?",
}
"""By the names in safetensors files."""
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
RENAMED = (
    (r"^text_model\.", ""),
    (r"\.self_attn\.([qkv])_proj\.", r".attn1.to_\1."),
    (r"\.self_attn\.out_proj\.", ".attn1.to_out.0."),
    (r"\.layer_norm1\.", ".norm1."),
    (r"\.layer_norm2\.", ".norm3."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
    (
        r"(attentions\..*)\.(q)uery\.|(attentions\..*)\.(k)ey\.|(attentions\..*)\.(v)alue\.",
        r"\1\3\5.to_\2\4\6.",
    ),
    (r"(attentions\..*)\.proj_attn\.", r"\1.to_out.0."),
    (r"\.downsamplers\.0\.Conv2d_0\.", ".downsamplers.0.conv."),
)
"""Names in files that arrays have elsewhere or had before, as patterns, and their names
here."""
IGNORED = ("embeddings.position_ids", "pos_embed.pos_embed")
"""Tables that old files have and networks make themselves."""
Shaped = jax.ShapeDtypeStruct
Skeleton = TypeVar("Skeleton")


@dataclass(frozen=True)
class Stored:
    """One array of a file: where it lies, its dtype and shape."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The array, mapped from the file: only what is used is read."""
        if not self.shape or 0 in self.shape:
            count = math.prod(self.shape)
            return np.fromfile(self.file, self.dtype, count, offset=self.start).reshape(
                self.shape
            )
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


def header(file: Path) -> dict[str, Stored]:
    """The arrays of a safetensors file by name, none of them read; offsets, shapes and
    dtypes are checked."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if (
                not 2 <= length <= min(size - 8, 100_000_000)
            ):  # the most that the format allows
                raise ValueError(
                    f"its header of {length} bytes does not fit into its {size}"
                )
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name!r} has the dtype {entry['dtype']}")
            (start, end), dtype = (
                entry["data_offsets"],
                np.dtype(DTYPES[entry["dtype"]]),
            )
            shape = tuple(entry["shape"])
            if any(type(n) is not int or n < 0 for n in (start, end, *shape)):
                raise ValueError(
                    f"tensor {name!r} has the shape {list(shape)} at bytes {start} to {end}"
                )
            if (
                not start <= end <= size - 8 - length
                or end - start != math.prod(shape) * dtype.itemsize
            ):
                raise ValueError(
                    f"tensor {name!r} lies at bytes {start} to {end} of {size - 8 - length}"
                )
            found[name] = Stored(file, dtype, shape, 8 + length + start)
    except FileNotFoundError as error:
        raise LoadError(
            f"There is no {file}.",
            fix="fetch the whole folder; its index names this file.",
        ) from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        struct.error,
        RecursionError,
    ) as error:
        fix = "fetch it again: it is damaged or cut short."
        raise LoadError(
            f"{file} is no whole safetensors file: {error}.", fix=fix
        ) from error
    return found


def weights(folder: Path) -> dict[str, Stored]:
    """The arrays of a network's folder by their names here: of one file, or of all that
    an index names."""
    place = _place(folder)
    found = _sharded(place) if place.suffix == ".json" else header(place)
    renamed = {}
    for name, stored in found.items():
        for pattern, here in RENAMED:
            name = re.sub(pattern, here, name)
        renamed[name] = stored
    if len(renamed) < len(found):
        raise Arrays(found, str(folder)).foreign(
            "it has some arrays twice, by an old and a new name"
        )
    return renamed


def _place(folder: Path) -> Path:
    """The file of a folder's weights, or the index of several."""
    for variant in (
        "",
        ".fp32",
        ".fp16",
        ".bf16",
        ".non_ema",
    ):  # the last: before averaging
        for name in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for file in (
                f"{name}.safetensors.index{variant}.json",
                f"{name}{variant}.safetensors",
            ):
                if (folder / file).exists():
                    return folder / file
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    refuse_pickles(folder)
    raise LoadError(
        f"There are no weights in {folder}"
        + (
            f", or too many: {', '.join(file.name for file in others)}."
            if others
            else "."
        ),
        fix="it needs diffusion_pytorch_model.safetensors, or model.safetensors for a text encoder.",
    )


def refuse_pickles(folder: Path) -> None:
    """Refuses a pickle, or a folder of some, with the command that converts them."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [file for file in (folder, *files) if file.suffix in PICKLES]
    if pickles:
        raise LoadError(
            f"The weights {pickles[0]} are a pickle, and reading one runs what its author put in.",
            fix="in an environment with torch, where you trust the file: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file({{k: v.contiguous() for k, v in torch.load('{pickles[0]}', weights_only=True).items()}}, "
            f"'{pickles[0].with_suffix('.safetensors')}')\"; a whole folder, from_pretrained(…).save_pretrained(…, "
            "safe_serialization=True).",
        )


def _sharded(index: Path) -> dict[str, Stored]:
    try:
        places: Mapping[str, str] = read_json(index)["weight_map"]
        files = sorted(set(places.values()))
        check_beside(files, index, "file")
    except (KeyError, TypeError, AttributeError) as error:
        fix = "fetch it again: it is damaged."
        raise LoadError(
            f"{index} is no index of weights: {type(error).__name__}: {error}.", fix=fix
        ) from error
    found = {
        name: at
        for file in files
        for name, at in header(index.parent / file).items()
        if name in places
    }
    if missing := sorted(set(places) - set(found)):
        fix = "fetch the whole folder again."
        raise LoadError(
            f"{index} names {first_three(missing)}, which its files do not have.",
            fix=fix,
        )
    return found


class Arrays:
    """The arrays of a network whose names begin alike, read or not yet; a layer takes
    its own, with them its sizes.

    ``arrays / "conv_in"`` are those of a layer, ``arrays.items("down_blocks")`` those
    of every block.
    """

    def __init__(self, held: Mapping[str, Stored | Array], where: str = "the network"):
        self.where, self.prefix, self._held = where, "", held
        self._beginnings = {
            name[:i] for name in held for i in range(len(name)) if name[i] == "."
        }
        self._taken: set[str] = set()

    def __truediv__(self, name: str | int) -> Arrays:
        found = copy.copy(self)
        found.prefix = f"{self.prefix}{name}."
        return found

    def __contains__(self, name: str) -> bool:
        full = self.prefix + name
        return full in self._held or full in self._beginnings

    def items(self, name: str) -> list[Arrays]:
        """The arrays below ``name.0``, ``name.1`` and so on, as far as there are
        any."""
        below = self / name
        return [
            below / i
            for i in itertools.takewhile(lambda i: str(i) in below, itertools.count())
        ]

    def numbers(self) -> list[int]:
        """The numbers right below this name, in order, of which some may be left out;
        at least one."""
        parts = {
            name[len(self.prefix) :].partition(".")[0]
            for name in self._held
            if name.startswith(self.prefix)
        }
        if not (found := sorted(int(part) for part in parts if part.isdecimal())):
            raise self.foreign(f"it lacks {self.prefix}0")
        return found

    def like(self, ending: str) -> tuple[int, ...]:
        """The shape of the first array whose name ends so; () without one."""
        return next(
            (
                _shape_in_file(array)
                for name, array in self._held.items()
                if name.endswith(ending)
            ),
            (),
        )

    def take(self, name: str, *shape: int | None) -> Array:
        """An array below this name, of which its layer states the shape in the file,
        None where it may be any."""
        full = self.prefix + name
        if full not in self._held:
            raise self.foreign(f"it lacks {full}")
        self._taken.add(full)
        found = _shape_in_file(self._held[full])
        fits = len(found) == len(shape) and all(
            n == m or m is None for n, m in zip(found, shape, strict=True)
        )
        if not fits or 0 in found:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise LoadError(
                f"Tensor {full!r} in {self.where} has shape {list(found)}; by config.json and the layers around it, it "
                f"should be [{wanted}].",
                fix="take config.json and all of the weights from one source.",
            )
        return cast(Array, self._held[full])

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape in the file of an array of so many axes."""
        return _shape_in_file(self.take(name, *[None] * rank))

    def foreign(self, difference: str) -> LoadError:
        """The error of weights that are not those of the network."""
        return LoadError(
            f"The weights in {self.where} are not those of the network of its config.json: {difference}.",
            fix="take both files from one source; a file of LoRA or ControlNet weights is no network by itself.",
        )

    def trace(
        self, compute: Callable[..., Array], *inputs: Shaped, **named: Shaped
    ) -> tuple[int, ...]:
        """The shape of ``compute(arrays, *inputs, **named)``, whose layers thereby
        check every array that they take."""

        def traced(
            held: Mapping[str, Array],
            inputs: tuple[Array, ...],
            named: dict[str, Array],
        ) -> Array:
            arrays = Arrays(held, self.where)
            arrays._taken = self._taken
            return compute(arrays, *inputs, **named)

        try:
            return jax.eval_shape(
                traced, abstract(dict(self._held), jnp.float32), inputs, named
            ).shape
        except ComposeProbError:
            raise
        except (TypeError, ValueError) as error:  # of JAX: sizes that no layer compares
            raise self.foreign(
                f"its layers do not fit together ({str(error).splitlines()[0]})"
            ) from error

    def finish(self, form: Hashable) -> Loaded:
        """The network of the arrays that layers took, not read yet; refuses others, and
        numbers without fractions."""
        if unknown := sorted(set(self._held) - self._taken - set(IGNORED)):
            raise self.foreign(f"it has {first_three(unknown)} beside")
        taken = {name: cast(Array, self._held[name]) for name in sorted(self._taken)}
        for name, array in taken.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise LoadError(
                    f"Tensor {name!r} in {self.where} holds {array.dtype.name}, and a weight is a floating-point "
                    "number.",
                    fix="save the weights in float32, bfloat16 or float16: quantized ones are not read.",
                )
        return Loaded(taken, form)


class Loaded(eqx.Module):
    """A network: its arrays by their names here, and the form, equal by its values,
    that computes with them. Kernels of convolutions are (height, width, in, out), all
    others as in the files."""

    arrays: dict[str, Array]
    form: Any = eqx.field(static=True)

    def __call__(self, *inputs: Array, **named: Array) -> Array:
        return self.form(Arrays(self.arrays), *inputs, **named)

    @eqx.filter_jit
    def mapped(self, method: str, stack: Array) -> Any:
        """Another method of the form, of every entry of a stack, a few at a time."""
        return jax.lax.map(
            lambda each: getattr(self.form, method)(Arrays(self.arrays), each),
            stack,
            batch_size=4,
        )


@dataclass(frozen=True)
class Network:
    """A network's skeleton, called as ``module(x, t, **conditions)`` on one event, and
    what must be known for that."""

    module: Loaded  # its arrays are not read yet
    # channels of the output; twice those of events where the variance is learned too
    outputs: int
    # height and width of events, or one number for both; None where the file has none
    sample_size: JSON
    channels: int  # of events
    multiple: int = 1  # height and width must be multiples of it
    time: str = "real_level"  # what it takes of the noise, as `Diffusion`'s
    conditions: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # their shapes
    classes: int | None = (
        None  # how many labels there are; None where labels are not numbered
    )
    null_label: int | None = (
        None  # the label that means "no label"; None where there is none
    )

    @classmethod
    def traced(
        cls, form: Callable[..., Array], arrays: Arrays, **facts: Any
    ) -> Network:
        """The network of a form and its arrays, traced once; ``facts`` are its other
        attributes."""
        network = cls(Loaded({}, form), 0, **facts)
        side = max(network.multiple, 2 ** len(arrays.items("down_blocks")))
        given = {  # a label is whole, and prompts have any length
            name: Shaped(
                tuple(n or 1 for n in shape), jnp.float32 if shape else jnp.int32
            )
            for name, shape in network.conditions.items()
        }
        t = Shaped((), jnp.int32 if network.time == "level" else jnp.float32)
        *_, outputs = arrays.trace(
            form, Shaped((side, side, network.channels), jnp.float32), t, **given
        )
        return replace(network, module=arrays.finish(form), outputs=outputs)

    @property
    def pooled(self) -> int | None:
        """The width of the vector that the prompt's last row holds; None without."""
        return self.conditions["pooled"][0] if "pooled" in self.conditions else None


def _shape_in_file(array: Stored | Array) -> tuple[int, ...]:
    if isinstance(array, Stored) or len(array.shape) != 4:
        return array.shape
    return tuple(array.shape[axis] for axis in (3, 2, 0, 1))


def _axes(stored: Stored) -> tuple[int, ...]:
    """The file's axes in the order of the array: kernels are stored (out, in, height,
    width)."""
    return (2, 3, 1, 0) if len(stored.shape) == 4 else tuple(range(len(stored.shape)))


def fill(skeleton: Skeleton, dtype: DTypeLike) -> Skeleton:
    """The network with its arrays, read from the files as ``dtype``."""
    return jax.tree.map(
        lambda s: jnp.asarray(np.asarray(s.read()).transpose(_axes(s)).astype(dtype)),
        skeleton,
    )


def abstract(skeleton: Skeleton, dtype: DTypeLike) -> Skeleton:
    """The network with shapes for arrays, as `jax.eval_shape` gives them: it can be
    compiled, and takes no memory."""
    return jax.tree.map(
        lambda s: Shaped(tuple(s.shape[axis] for axis in _axes(s)), dtype), skeleton
    )


def first_three(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
