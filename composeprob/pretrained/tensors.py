"""Arrays of safetensors files, in place of a skeleton's parameters; checked before any is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from composeprob.errors import LoadError
from composeprob.pretrained.layers import Parameter

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""By the names in safetensors files."""
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
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
            count = int(np.prod(self.shape))
            return np.fromfile(self.file, self.dtype, count, offset=self.start).reshape(self.shape)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


def header(file: Path) -> dict[str, Stored]:
    """The arrays of a safetensors file by name, none of them read.

    Raises:
        LoadError: the file is missing, no safetensors file, or shorter than its header states.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 2 <= length <= min(size - 8, 100_000_000):  # the most that the format allows
                raise ValueError(f"its header of {length} bytes does not fit into its {size}")
            entries = json.loads(stream.read(length))
        found = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name!r} has the dtype {entry['dtype']}")
            (start, end), dtype = entry["data_offsets"], np.dtype(DTYPES[entry["dtype"]])
            shape = tuple(entry["shape"])
            if not 0 <= start <= end <= size - 8 - length or end - start != int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} lies at bytes {start} to {end} of {size - 8 - length}")
            found[name] = Stored(file, dtype, shape, 8 + length + start)
    except FileNotFoundError as error:
        raise LoadError(f"There is no {file}.", fix="fetch the whole folder; its index names this file.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LoadError(
            f"{file} is no whole safetensors file: {error}.", fix="fetch it again: it is damaged or cut short."
        ) from error
    return found


def weights(folder: Path) -> dict[str, Stored]:
    """The arrays of a network's folder by name: of one file, or of all that an index names.

    Raises:
        LoadError: no safetensors file, only pickles, or files that an index names are missing.
    """
    for variant in ("", ".fp32", ".fp16", ".bf16", ".non_ema"):  # the last: before averaging
        for name in ("diffusion_pytorch_model", "model", "pytorch_model"):
            index = folder / f"{name}.safetensors.index{variant}.json"
            if index.exists():
                return _sharded(index)
            file = folder / f"{name}{variant}.safetensors"
            if file.exists():
                return header(file)
    others = sorted(file for file in folder.glob("*.safetensors"))
    if len(others) == 1:
        return header(others[0])
    refuse_pickles(folder)
    raise LoadError(
        f"There are no weights in {folder}"
        + (f", or too many: {', '.join(file.name for file in others)}." if others else "."),
        fix="it needs diffusion_pytorch_model.safetensors, or model.safetensors for a text encoder.",
    )


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder whose weights are pickles.

    Raises:
        LoadError: with the command that converts them.
    """
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES) if folder.is_dir() else []
    if folder.suffix in PICKLES:
        pickles = [folder]
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
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{index} is no index of weights: {type(error).__name__}: {error}.", fix="fetch it again: it is damaged."
        ) from error
    found: dict[str, Stored] = {}
    for file in files:
        found |= {name: stored for name, stored in header(index.parent / file).items() if name in places}
    missing = sorted(set(places) - set(found))
    if missing:
        raise LoadError(
            f"{index} names {first_three(missing)}, which its files do not have.", fix="fetch the whole folder again."
        )
    return found


def write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, one array after the other: none has to fit into memory beside the others."""
    codes = {np.dtype(kind): code for code, kind in DTYPES.items()}
    entries, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": codes[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # arrays begin at multiples of 8 bytes, as the format asks
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for array in arrays.values():
            np.ascontiguousarray(array).tofile(stream)


def fill(
    skeleton: Skeleton,
    stored: Mapping[str, Stored],
    where: str,
    dtype: DTypeLike | None = None,
    *,
    rename: Callable[[str], str] = lambda name: name,
    ignored: Iterable[str] = (),
) -> Skeleton:
    """The skeleton with the arrays of a file in the place of its parameters.

    Args:
        skeleton: a network whose arrays are `Parameter`s.
        stored: arrays by their names in the file.
        where: the file or folder, for errors.
        dtype: of the filled network; left out, float32.
        rename: makes the name in the network of the name in a file.
        ignored: names in the network's words of what files may have beside.

    Raises:
        LoadError: as of `check`, before anything is read.
    """
    found = check(skeleton, stored, where, rename=rename, ignored=ignored)
    kind = jnp.float32 if dtype is None else dtype
    arrays = [
        jnp.asarray(np.asarray(found[name].read()).transpose(parameter.axes).astype(kind))
        for name, parameter in named(skeleton)
    ]
    return jax.tree.unflatten(jax.tree.structure(skeleton), arrays)


def check(
    skeleton: PyTree[Parameter],
    stored: Mapping[str, Stored],
    where: str,
    *,
    rename: Callable[[str], str] = lambda name: name,
    ignored: Iterable[str] = (),
) -> dict[str, Stored]:
    """The arrays of a file by the network's names, as for `fill`, none of them read.

    Raises:
        LoadError: an array that is missing, unknown or of another shape.
    """
    found = {rename(name): array for name, array in stored.items()}
    wanted = dict(named(skeleton))
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted) - set(ignored))
    if missing or unknown:
        differences = [f"it lacks {first_three(missing)}"] * bool(missing) + [
            f"it has {first_three(unknown)} beside"
        ] * bool(unknown)
        raise LoadError(
            f"The weights in {where} are not those of the network of its config.json: {'; '.join(differences)}.",
            fix="take both files from one source; a file of LoRA or ControlNet weights is no network by itself.",
        )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.stored:
            raise LoadError(
                f"Tensor {name!r} in {where} has shape {list(found[name].shape)}; by config.json it should be "
                f"{list(parameter.stored)}.",
                fix="take config.json and the weights from one source.",
            )
    return found


def abstract(skeleton: Skeleton, dtype: DTypeLike = jnp.float32) -> Skeleton:
    """The skeleton with shapes for arrays, as `jax.eval_shape` gives them: it can be compiled, and takes no memory."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), skeleton)


def named(skeleton: PyTree[Parameter]) -> list[tuple[str, Parameter]]:
    """The parameters of a skeleton by their names in files, such as ``down_blocks.0.resnets.1.conv1.weight``."""
    leaves = jax.tree_util.tree_leaves_with_path(skeleton)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def first_three(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def current(name: str) -> str:
    """The name that an array has today: attention blocks had others in old files."""
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    parts = name.split(".")
    if len(parts) > 2 and "attentions" in parts and parts[-2] in today:
        parts[-2] = today[parts[-2]]
    return ".".join(parts).replace(".downsamplers.0.Conv2d_0.", ".downsamplers.0.conv.")
