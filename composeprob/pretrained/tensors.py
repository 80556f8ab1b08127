"""Arrays of safetensors files by name, and the networks that are made of them; all
arrays are checked before any is read."""

from __future__ import annotations

import copy
import re
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
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

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
"""NumPy's dtypes by their names in safetensors files."""
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
RENAMED = (
    # Text encoders of the package transformers.
    (r"^text_model\.", ""),
    (r"\.self_attn\.([qkv])_proj\.", r".attn1.to_\1."),
    (r"\.self_attn\.out_proj\.", ".attn1.to_out.0."),
    (r"\.layer_norm1\.", ".norm1."),
    (r"\.layer_norm2\.", ".norm3."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
    # Diffusers' first releases.
    (
        r"(attentions\..*)\.(q)uery\."
        r"|(attentions\..*)\.(k)ey\."
        r"|(attentions\..*)\.(v)alue\.",
        r"\1\3\5.to_\2\4\6.",
    ),
    (r"(attentions\..*)\.proj_attn\.", r"\1.to_out.0."),
    (r"\.downsamplers\.0\.Conv2d_0\.", ".downsamplers.0.conv."),
)
"""Names of arrays in files of other packages or old releases, as patterns, and their
names here."""
IGNORED = ("embeddings.position_ids", "pos_embed.pos_embed")
"""Tables that old files have and networks compute."""
ShapeDtype = jax.ShapeDtypeStruct
Skeleton = TypeVar("Skeleton")


@dataclass(frozen=True)
class Stored:
    """One array of a file: its dtype and its shape, and the open file that it is in."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: safe_open | None = None

    def read(self) -> np.ndarray:
        """Return the array; the file's other arrays are not read."""
        assert self.file is not None
        return self.file.get_tensor(self.name)


def header(file: Path) -> dict[str, Stored]:
    """Return the arrays of a safetensors file by name, none of them read.

    The format's own library checks offsets, shapes and dtypes.
    """
    try:
        opened = safe_open(file, framework="numpy")
        stored = {name: _entry(opened, name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise LoadError(
            f"There is no {file}.",
            fix="fetch the whole folder; its index names this file.",
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(
            f"{file} is not a complete safetensors file: {error}.",
            fix="fetch it again: it is damaged or cut short.",
        ) from error
    return stored


def _entry(opened: safe_open, name: str) -> Stored:
    """Return an array of an open file."""
    entry = opened.get_slice(name)
    dtype = entry.get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {dtype}")
    return Stored(name, np.dtype(DTYPES[dtype]), tuple(entry.get_shape()), opened)


def weights(folder: Path) -> dict[str, Stored]:
    """Return the arrays of a network's folder by their names here: those of one file,
    or of all files that an index names."""
    place = _place(folder)
    stored = _sharded(place) if place.suffix == ".json" else header(place)
    renamed = {}
    for name, array in stored.items():
        for pattern, here in RENAMED:
            name = re.sub(pattern, here, name)
        renamed[name] = array
    if len(renamed) < len(stored):
        raise Arrays(stored, str(folder)).foreign(
            "it has some arrays twice, by an old and a new name"
        )
    return renamed


def _place(folder: Path) -> Path:
    """Return the file of a folder's weights, or the index of several files."""
    # Of `.non_ema`, the weights before averaging, only where there are no others.
    for variant in ("", ".fp32", ".fp16", ".bf16", ".non_ema"):
        for name in ("diffusion_pytorch_model", "model", "pytorch_model"):
            index = folder / f"{name}.safetensors.index{variant}.json"
            file = folder / f"{name}{variant}.safetensors"
            for place in (index, file):
                if place.exists():
                    return place
    # A file of any name is taken where it is the only one.
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    refuse_pickles(folder)
    problem = f"There are no weights in {folder}"
    if others:
        problem += f", or too many: {', '.join(file.name for file in others)}"
    raise LoadError(
        f"{problem}.",
        fix="it needs diffusion_pytorch_model.safetensors, or model.safetensors for a "
        "text encoder.",
    )


def refuse_pickles(folder: Path) -> None:
    """Refuse a pickle, or a folder that has one, with the command that converts it."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [file for file in (folder, *files) if file.suffix in PICKLES]
    if not pickles:
        return
    first = pickles[0]
    converted = first.with_suffix(".safetensors")
    raise LoadError(
        f"The weights {first} are a pickle, and reading one runs the code that its "
        "author put in.",
        fix="in an environment with torch, where you trust the file: "
        'python -c "import torch, safetensors.torch as s; '
        "s.save_file({k: v.contiguous() for k, v in "
        f"torch.load('{first}', weights_only=True).items()}}, '{converted}')\"; "
        "a whole folder, "
        "from_pretrained(…).save_pretrained(…, safe_serialization=True).",
    )


def _sharded(index: Path) -> dict[str, Stored]:
    """Return the arrays of all files that an index names."""
    try:
        file_of: Mapping[str, str] = read_json(index)["weight_map"]
        files = sorted(set(file_of.values()))
        check_beside(files, index, "file")
    except (KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{index} is not an index of weights: {type(error).__name__}: {error}.",
            fix="fetch it again: it is damaged.",
        ) from error
    stored = {}
    for file in files:
        for name, array in header(index.parent / file).items():
            if name in file_of:
                stored[name] = array
    missing = sorted(set(file_of) - set(stored))
    if missing:
        raise LoadError(
            f"{index} names {first_three(missing)}, which its files do not have.",
            fix="fetch the whole folder again.",
        )
    return stored


class Arrays:
    """Arrays of a network whose names have a common prefix, read or not yet; a layer
    takes its arrays, and its sizes from them.

    ``arrays / "conv_in"`` are those of a layer, ``arrays.items("down_blocks")`` those
    of every block.
    """

    def __init__(self, held: Mapping[str, Stored | Array], where: str = "the network"):
        self.where = where
        self.prefix = ""
        self._held = held
        self._prefixes = set()  # of the arrays' names, without the dots at their ends
        for name in held:
            for i, character in enumerate(name):
                if character == ".":
                    self._prefixes.add(name[:i])
        # Shared by all that `/` makes, so that `finish` knows the arrays of all layers.
        self._taken: set[str] = set()

    def __truediv__(self, name: str | int) -> Arrays:
        below = copy.copy(self)
        below.prefix = f"{self.prefix}{name}."
        return below

    def __contains__(self, name: str) -> bool:
        full = self.prefix + name
        return full in self._held or full in self._prefixes

    def items(self, name: str) -> list[Arrays]:
        """Arrays below ``name.0``, ``name.1`` and so on, up to the first number that is
        missing."""
        below = self / name
        items: list[Arrays] = []
        while str(len(items)) in below:
            items.append(below / len(items))
        return items

    def numbers(self) -> list[int]:
        """Numbers right below this name, at least one, in order; some may be left
        out."""
        numbers = set()
        for name in self._held:
            if name.startswith(self.prefix):
                word = name.removeprefix(self.prefix).partition(".")[0]
                if word.isdecimal():
                    numbers.add(int(word))
        if not numbers:
            raise self.foreign(f"it lacks {self.prefix}0")
        return sorted(numbers)

    def like(self, ending: str) -> tuple[int, ...]:
        """Shape of the first array of the network whose name ends so; () without
        one."""
        for name, array in self._held.items():
            if name.endswith(ending):
                return _shape_in_file(array)
        return ()

    def take(self, name: str, *shape: int | None) -> Array:
        """Return an array below this name, and check its shape in the file.

        ``shape`` is the one that the layer needs, None for an axis of any length.
        """
        full = self.prefix + name
        if full not in self._held:
            raise self.foreign(f"it lacks {full}")
        self._taken.add(full)
        # An empty axis fits no network, and would give empty outputs.
        in_file = _shape_in_file(self._held[full])
        if 0 in in_file or not _fits(in_file, shape):
            raise LoadError(
                f"Tensor {full!r} in {self.where} has shape {list(in_file)}; by "
                f"config.json and the layers around it, it should be {_shown(shape)}.",
                fix="take config.json and all of the weights from one source.",
            )
        return cast(Array, self._held[full])

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape in the file of an array with ``rank`` axes."""
        return _shape_in_file(self.take(name, *[None] * rank))

    def foreign(self, difference: str) -> LoadError:
        """Return the error for weights that are not those of the network."""
        return LoadError(
            f"The weights in {self.where} are not those of the network of its "
            f"config.json: {difference}.",
            fix="take both files from one source; a file of LoRA or ControlNet weights "
            "is not a network by itself.",
        )

    def trace(
        self, compute: Callable[..., Array], *inputs: ShapeDtype, **named: ShapeDtype
    ) -> tuple[int, ...]:
        """Return the shape of ``compute(arrays, *inputs, **named)``.

        Its layers thereby check all arrays that they take.
        """

        def traced(
            held: Mapping[str, Array],
            inputs: tuple[Array, ...],
            named: dict[str, Array],
        ) -> Array:
            arrays = Arrays(held, self.where)
            arrays._taken = self._taken
            return compute(arrays, *inputs, **named)

        held = abstract(dict(self._held), jnp.float32)
        try:
            return jax.eval_shape(traced, held, inputs, named).shape
        except ComposeProbError:
            raise
        # JAX's errors of sizes that no layer compares.
        except (TypeError, ValueError) as error:
            raise self.foreign(
                f"its layers do not fit together ({str(error).splitlines()[0]})"
            ) from error

    def finish(self, form: Hashable) -> Loaded:
        """Return the network of the arrays that layers took, not read yet; refuse
        arrays that no layer took, and dtypes other than floating-point numbers."""
        unknown = sorted(set(self._held) - self._taken - set(IGNORED))
        if unknown:
            raise self.foreign(f"it has {first_three(unknown)} beside")
        taken = {name: cast(Array, self._held[name]) for name in sorted(self._taken)}
        for name, array in taken.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise LoadError(
                    f"Tensor {name!r} in {self.where} holds {array.dtype.name}, and a "
                    "weight is a floating-point number.",
                    fix="save the weights in float32, bfloat16 or float16: quantized "
                    "ones are not read.",
                )
        return Loaded(taken, form)


class Loaded(eqx.Module):
    """A network: its arrays by their names here, and the form that computes with them.

    Forms are equal by their values. Kernels of convolutions are (height, width, in,
    out), all other arrays as in the files.
    """

    arrays: dict[str, Array]
    form: Any = eqx.field(static=True)

    def __call__(self, *inputs: Array, **named: Array) -> Array:
        return self.form(Arrays(self.arrays), *inputs, **named)

    @eqx.filter_jit
    def mapped(self, method: str, stack: Float[Array, "n ..."]) -> Any:
        """Apply another method of the form to every entry of a stack, a few at a
        time."""
        function = getattr(self.form, method)
        arrays = Arrays(self.arrays)
        return jax.lax.map(lambda entry: function(arrays, entry), stack, batch_size=4)


@dataclass(frozen=True)
class Network:
    """A network's skeleton, called as ``module(x, t, **conditions)`` on one event, and
    its properties for that.

    Attributes:
        module: the network; its arrays are not read yet.
        outputs: channels of the output; twice those of events where the variance is
            learned too.
        sample_size: height and width of events, or one number for both; None where the
            file has none.
        channels: channels of events.
        multiple: a divisor of height and width.
        time: as of `Diffusion`.
        conditions: their shapes; a 0 stands for any length.
        classes: number of labels; None where labels are not numbered.
        null_label: the label that means "no label"; None where there is none.
    """

    module: Loaded
    outputs: int
    sample_size: JSON
    channels: int
    multiple: int = 1
    time: str = "real_level"
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: int | None = None
    null_label: int | None = None

    @classmethod
    def traced(
        cls, form: Callable[..., Array], arrays: Arrays, **properties: Any
    ) -> Network:
        """Return the network of a form and its arrays, traced once; ``properties`` are
        its other attributes."""
        network = cls(Loaded({}, form), 0, **properties)
        # The smallest image that can be halved at every stage.
        side = max(network.multiple, 2 ** len(arrays.items("down_blocks")))
        image = ShapeDtype((side, side, network.channels), jnp.float32)
        of_time = jnp.int32 if network.time == "level" else jnp.float32
        conditions = {}
        for name, shape in network.conditions.items():
            # A label without a shape is a whole number.
            dtype = jnp.float32 if shape else jnp.int32
            conditions[name] = ShapeDtype(tuple(n or 1 for n in shape), dtype)
        *_, outputs = arrays.trace(form, image, ShapeDtype((), of_time), **conditions)
        return replace(network, module=arrays.finish(form), outputs=outputs)

    @property
    def pooled(self) -> int | None:
        """Width of the vector in the prompt's last row; None for a network without
        one."""
        if "pooled" not in self.conditions:
            return None
        return self.conditions["pooled"][0]


def _fits(found: tuple[int, ...], needed: tuple[int | None, ...]) -> bool:
    if len(found) != len(needed):
        return False
    return all(m is None or n == m for n, m in zip(found, needed, strict=True))


def _shown(needed: tuple[int | None, ...]) -> str:
    """A shape in a message, such as ``[8, any]``."""
    return f"[{', '.join(map(str, needed)).replace('None', 'any')}]"


def _shape_in_file(array: Stored | Array) -> tuple[int, ...]:
    if isinstance(array, Stored) or len(array.shape) != 4:
        return array.shape
    return tuple(array.shape[axis] for axis in (3, 2, 0, 1))


def _axes(stored: Stored) -> tuple[int, ...]:
    """The file's axes in the order of the array: kernels are stored (out, in, height,
    width)."""
    if len(stored.shape) == 4:
        return (2, 3, 1, 0)
    return tuple(range(len(stored.shape)))


def fill(skeleton: Skeleton, dtype: DTypeLike) -> Skeleton:
    """Return the network with its arrays, read from the files as ``dtype``."""

    def read(stored: Stored) -> Array:
        in_file = np.asarray(stored.read())
        return jnp.asarray(in_file.transpose(_axes(stored)).astype(dtype))

    return jax.tree.map(read, skeleton)


def abstract(skeleton: Skeleton, dtype: DTypeLike) -> Skeleton:
    """Return the network with shapes for arrays, as `jax.eval_shape` has them: it can
    be compiled, and takes no memory."""

    def shape_of(stored: Stored) -> ShapeDtype:
        return ShapeDtype(tuple(stored.shape[axis] for axis in _axes(stored)), dtype)

    return jax.tree.map(shape_of, skeleton)


def first_three(names: list[str]) -> str:
    """The first three names, and the number of further ones."""
    listed = ", ".join(names[:3])
    if len(names) <= 3:
        return listed
    return f"{listed} and {len(names) - 3} more"
