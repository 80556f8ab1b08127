"""A result on disk that need not fit into memory: a zarr folder, read and written with
TensorStore."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jax.typing import DTypeLike

from composeprob.errors import InvalidValueError, LoadError
from composeprob.extras import needed
from composeprob.files import write_json
from composeprob.json_data import JSON, JSONObject

if TYPE_CHECKING:
    from tensorstore import TensorStore, WriteFutures


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Raise a `LoadError` with TensorStore's reason where it cannot read a folder."""
    try:
        yield
    except ValueError as error:
        raise LoadError(
            f"The draws in {path} cannot be read: {str(error).splitlines()[0]}",
            fix="the folder is damaged, or belongs to another program; start the run "
            "again.",
        ) from error


CODECS: list[JSON] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
"""The form of a block in its file: the numbers as they lie in memory, and a checksum,
by which a block that was changed is refused."""
CHECKSUM_BYTES = 4


class Stored:
    """An array on disk: indexing reads no more than the part that it returns,
    `numpy.asarray` reads all of it."""

    def __init__(self, array: TensorStore, path: Path):
        self._array = array
        self._path = path
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype.numpy_dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read the part that integers and slices select; an index of another kind, and
        all after it, are applied in memory."""
        given = index if isinstance(index, tuple) else (index,)
        read: list[slice] = []  # of the array on disk, forwards
        rest: list[int | slice] = []  # of the part that was read
        for entry, size in zip(given, self.shape, strict=False):
            if not isinstance(entry, (int, np.integer, slice)):
                break
            if not isinstance(entry, slice):
                place = range(size)[entry]
                read.append(slice(place, place + 1))
                rest.append(0)
                continue
            places = range(size)[entry]
            order = 1
            if places.step < 0:
                places = places[::-1]
                order = -1
            part_of_axis = slice(0, 0)
            if places:
                part_of_axis = slice(places[0], places[-1] + 1, places.step)
            read.append(part_of_axis)
            rest.append(slice(None, None, order))
        part = self._read(tuple(read))
        return part[(*rest, *given[len(read) :])]

    def __array__(
        self, dtype: DTypeLike | None = None, copy: bool | None = None
    ) -> np.ndarray:
        if copy is False:
            raise ValueError("A stored array is read from disk, which is a copy.")
        return np.asarray(self._read(()), dtype)

    def _read(self, part: tuple[slice, ...]) -> np.ndarray:
        array = self._array[part] if part else self._array
        with unreadable(self._path):
            return np.asarray(array.read().result())

    def __repr__(self) -> str:
        return f"Stored(shape={self.shape}, dtype={self.dtype})"


class Store:
    """The zarr (version 3) folder of one result.

    ``samples/NAME`` holds each site, (chain, draw, …), or (chain, …) for a run without
    draws; the arrays beside it and the group's attributes hold the rest of the result.
    Each block of an array is a file. One that is missing is refused, where a reader of
    zarr would take zeros for it.
    """

    format: ClassVar[JSONObject] = {"format": "composeprob.draws", "version": 2}

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.arrays: dict[str, TensorStore] = {}

    def create(
        self,
        names: Mapping[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]],
        draws: bool,
    ) -> None:
        """Make the folder, empty, in place of an earlier result, with room for sites of
        these shapes, dtypes and block shapes; by one process.

        The second axis may be that of draws.
        """
        if self.path.exists() and not self._is_replaceable():
            raise InvalidValueError(
                f"store={str(self.path)!r} exists and is not a stored result, so it is "
                "not overwritten.",
                fix="choose another folder; it need not exist.",
            )
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
            # First of all, so that an interrupted call leaves a folder that the next
            # one may replace.
            self.write_attributes({})
            write_json(
                self.path / "samples" / "zarr.json",
                {"zarr_format": 3, "node_type": "group", "attributes": {}},
            )
            for name, (shape, dtype, block) in names.items():
                axes = ["chain", "draw"] if draws else ["chain"]
                self._make(f"samples/{_quoted(name)}", shape, dtype, block, axes)
        except (OSError, ValueError) as error:
            raise InvalidValueError(
                f"Nothing can be written to store={str(self.path)!r}: "
                f"{str(error).splitlines()[0]}",
                fix="choose a folder that you may write to, on a disk with room.",
            ) from error

    def _is_replaceable(self) -> bool:
        """Return whether the folder holds an earlier result, or nothing."""
        if not self.path.is_dir():
            return False
        return self.is_store() or not any(self.path.iterdir())

    def open(self, names: Iterable[str]) -> None:
        """Open the arrays of these sites."""
        with unreadable(self.path):
            for name in names:
                self.arrays[name] = self._opened(f"samples/{_quoted(name)}")

    def grow(self, draws: int) -> None:
        """Make room for this number of draws."""
        # A run that continues for more draws finds an array of fewer.
        for name, array in self.arrays.items():
            if array.shape[1] < draws:
                size = [array.shape[0], draws, *array.shape[2:]]
                self.arrays[name] = array.resize(exclusive_max=size).result()

    def put(
        self, name: str, index: tuple[slice, ...], values: np.ndarray
    ) -> WriteFutures:
        """Begin to write; wait for it with ``.result()``."""
        return self.arrays[name][index].write(values)

    def stored(self, name: str, draws: int | None) -> Stored:
        """A site's array, with at most this number of draws."""
        array = self.arrays[name]
        if draws is not None:
            array = array[:, : min(draws, array.shape[1])]
        return Stored(array, self.path)

    def write_rest(
        self, arrays: Mapping[str, np.ndarray], attributes: JSONObject
    ) -> None:
        """Write all of a result beside its samples; by one process."""
        for name, values in arrays.items():
            array = self._make(name, values.shape, values.dtype, values.shape, [])
            array.write(values).result()
        # Numbers of another dtype and the same width would be read without an error.
        dtypes = {name: values.dtype.name for name, values in arrays.items()}
        for name, site in self.arrays.items():
            dtypes[f"samples/{_quoted(name)}"] = site.dtype.name
        self.write_attributes({**attributes, "dtypes": dtypes})

    def write_attributes(self, attributes: JSONObject) -> None:
        """Describe the contents of the folder."""
        about = {**self.format, **attributes}
        write_json(
            self.path / "zarr.json",
            {"zarr_format": 3, "node_type": "group", "attributes": about},
        )

    def attributes(self) -> JSONObject:
        """Read the attributes that `write_attributes` wrote.

        Raises:
            LoadError: the folder is not a result of this version.
        """
        try:
            text = (self.path / "zarr.json").read_text(encoding="utf-8")
            about = json.loads(text)["attributes"]
        # Attributes that are nested deeply enough exhaust Python's stack.
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise LoadError(
                f"{self.path} is not a stored result.", fix="check the path."
            ) from error
        if not isinstance(about, dict) or not self.format.items() <= about.items():
            raise LoadError(
                f"{self.path} is not a stored result of this version of composeprob.",
                fix="pass the folder that was given as store=.",
            )
        return about

    def is_store(self) -> bool:
        """Return whether a result of any state is there."""
        try:
            return bool(self.attributes())
        except LoadError:
            return False

    def written(self) -> dict[str, str]:
        """The dtypes of all arrays, by their names, as `write_rest` wrote them."""
        dtypes = self.attributes().get("dtypes")
        return dtypes if isinstance(dtypes, dict) else {}

    def rest(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Read the arrays that `write_rest` wrote."""
        arrays = {}
        with unreadable(self.path):
            for name in names:
                array = self._opened(name)
                self._check_blocks(name, array)
                arrays[name] = np.asarray(array.read().result())
        return arrays

    def whole(self, name: str, draws: int | None) -> Stored:
        """A site's array, as `stored`; refused where the file of a block is missing or
        of another size. None is read."""
        with unreadable(self.path):
            stored = self.stored(name, draws)
            self._check_blocks(f"samples/{_quoted(name)}", stored._array)
        return stored

    def _check_blocks(self, name: str, array: TensorStore) -> None:
        """Raise a ValueError unless each block of an array has its file."""
        metadata = array.spec().to_json()["metadata"]
        if metadata["codecs"] != CODECS:
            raise ValueError(f"{name!r} is stored in a form that no run writes")
        written = self.written().get(name)
        if array.dtype.name != written:
            raise ValueError(f"{name!r} is {array.dtype.name}, and was {written}")
        block = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        size = math.prod(block) * array.dtype.numpy_dtype.itemsize + CHECKSUM_BYTES
        number = [
            math.ceil(length / of_block)
            for length, of_block in zip(array.shape, block, strict=True)
        ]
        # A description may claim any number of blocks: they are counted one by one.
        for place in range(math.prod(number)):
            index = np.unravel_index(place, number)
            file = self.path / name / "/".join(["c", *map(str, index)])
            if not file.is_file():
                raise ValueError(f"{file.relative_to(self.path)} is missing")
            found = file.stat().st_size
            if found != size:
                raise ValueError(
                    f"{file.relative_to(self.path)} has {found} bytes of {size}"
                )

    def _opened(self, name: str) -> TensorStore:
        with needed("store", "A result on disk"):
            import tensorstore

        return tensorstore.open(self._spec(name), open=True).result()

    def _make(
        self,
        name: str,
        shape: Sequence[int],
        dtype: DTypeLike,
        block: Sequence[int],
        axes: list[str],
    ) -> TensorStore:
        """Make an array in blocks; ``axes`` are names of its first axes."""
        with needed("store", "A result on disk"):
            import tensorstore

        metadata = {
            "shape": list(shape),
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [max(b, 1) for b in block]},
            },
            "codecs": CODECS,
        }
        if axes:
            metadata["dimension_names"] = [*axes, *(None,) * (len(shape) - len(axes))]
        spec = {**self._spec(name), "metadata": metadata}
        return tensorstore.open(spec, create=True, delete_existing=True).result()

    def _spec(self, name: str) -> JSONObject:
        """TensorStore's address of an array; refuses a link that leads elsewhere."""
        # Names come from files that may be another's.
        folder = self.path / name
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise LoadError(
                f"{folder} is a link out of the folder of this result.",
                fix="copy the samples into it.",
            )
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            # Blocks of zeros are written like others, so a block without a file is lost
            # and not 0.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }


def _quoted(name: str) -> str:
    """A site's name as that of one folder."""
    for character, code in (("%", "%25"), ("/", "%2F"), ("\\", "%5C")):
        name = name.replace(character, code)
    if name.startswith("."):  # a hidden folder, or the one above
        return "%2E" + name[1:]
    return name
