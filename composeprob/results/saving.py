"""Files of results: safetensors to write and read, and the folder where a run has stored its draws."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from composeprob.arguments import check_path
from composeprob.errors import LoadError
from composeprob.json_data import JSONObject
from composeprob.results.result import ARRAYS, FACTS, PER_LEVEL, Result
from composeprob.results.status import Code, Status
from composeprob.results.store import Store
from composeprob.results.summary import COLUMNS

FORMAT = {"format": "composeprob.results.result", "version": "4"}


def save(result: Result, path: str | os.PathLike) -> Path:
    """See `Result.save`."""
    from safetensors.numpy import save as as_bytes

    path = _with_suffix(path)
    arrays, facts = result.parts()
    arrays = {f"samples/{name}": np.asarray(value) for name, value in result.samples.items()} | arrays
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a reader never sees half a file
    # safetensors writes the buffer as it lies in memory; 0-d arrays keep their shape.
    whole = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    metadata = FORMAT | {"facts": json.dumps(facts)}
    partial.write_bytes(as_bytes(whole, metadata=metadata))  # save_file would leave a file for its owner's eyes only
    partial.replace(path)
    return path


def load(path: str | os.PathLike) -> Result:
    """See `Result.load`."""
    from safetensors import SafetensorError, safe_open

    if check_path(path, "The path of a result", "run.safetensors").is_dir():
        return _opened(Store(Path(path)))
    path = _with_suffix(path)
    if not path.is_file():
        raise LoadError(f"There is no saved result at {path}.", fix="check the path; result.save returns it.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"{path} cannot be read as safetensors: {error}", fix="save the result again; the file is damaged."
        ) from error
    if {name: metadata.get(name) for name in FORMAT} != FORMAT:
        found = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise LoadError(
            f"{path} is not a saved result of this version of composeprob ({found}; expected {FORMAT['format']!r}, "
            f"version {FORMAT['version']!r}).",
            fix="pass a file written by result.save; weights of a model are read by cp.load.",
        )
    facts: JSONObject = json.loads(metadata["facts"])
    samples = {name: arrays[f"samples/{name}"] for name in facts["sites"]}
    return _assembled(samples, arrays, facts)


def _opened(store: Store) -> Result:
    about = store.attributes()
    if "facts" not in about:
        raise LoadError(
            f"The run whose draws are in {store.path} has not ended.",
            fix="wait for it, or run it again; with checkpoint_dir= it goes on where it was.",
        )
    facts = about["facts"]
    store.open(facts["sites"])
    samples: dict[str, Any] = {name: store.stored(name, facts["draws"]) for name in facts["sites"]}
    return _assembled(samples, store.rest(about["arrays"]), facts)


def _assembled(samples: dict[str, np.ndarray], arrays: Mapping[str, np.ndarray], facts: JSONObject) -> Result:
    status = Status(tuple((Code(code), message) for code, message in facts.pop("status")))
    del facts["sites"]
    facts["dims"] = {name: tuple(dims) for name, dims in facts.get("dims", {}).items()}
    facts["blocks"] = tuple(facts.get("blocks", ()))
    facts |= {name: arrays[name] for name in ARRAYS}
    return Result(samples=samples, status=status, **facts)


def _with_suffix(path: str | os.PathLike) -> Path:
    path = check_path(path, "The path of a result", "run.safetensors")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def numbers(result: Result) -> JSONObject:
    """See `Result.numbers`."""

    def plain(values: ArrayLike | None) -> Any:
        values = np.asarray(values, float)
        if values.ndim == 0:
            return float(values) if np.isfinite(values) else None
        return [plain(row) for row in values]

    facts = {name: getattr(result, name) for name in FACTS}
    facts["log_evidence_error"] = None if result.log_evidence is None else plain(result.log_evidence_error)
    return {
        **facts,
        "num_chains": result.num_chains,
        "effective_chains": plain(result.effective_chains),
        "pareto_k": plain(result.pareto_k),
        "status": result.status.code.value,
        "message": result.status.message,
        "summary": {label: dict(zip(COLUMNS, plain(row), strict=True)) for label, row in result.summary().rows.items()},
        "levels": {name: plain(getattr(result, name)) for name in PER_LEVEL},
    }
