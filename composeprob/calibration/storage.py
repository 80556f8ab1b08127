"""Files of calibrations: the tables of a calibrated factor, by name, in safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from composeprob.errors import LoadError
from composeprob.factors.base import LeafFactor
from composeprob.factors.calibrated import TABLES, Calibrated


def save_calibration(factor: Calibrated, path: str | Path, *, weights: str | Path | None = None) -> None:
    """Writes what `calibrate` found of a single factor: log-SNR, log-normalisers and their errors.

    Args:
        factor: a calibrated leaf.
        path: where to write.
        weights: the file of the network's weights, by whose digest `load_calibration` knows it again.
    """
    about = None if weights is None else {"weights": _digest(weights)}
    tables = {name.removeprefix("calibration "): np.ascontiguousarray(table) for name, table in factor.tables.items()}
    Path(path).write_bytes(save(tables, about))


def load_calibration(factor: LeafFactor, path: str | Path, *, weights: str | Path | None = None) -> Calibrated:
    """Reads what `save_calibration` wrote; returns ``factor`` with it.

    Args:
        factor: the leaf that was calibrated.
        path: the file.
        weights: the file of its weights; refused where it is another than at calibration.

    Raises:
        LoadError: the file is missing or damaged, or is the calibration of other events or weights.
    """
    fix = f"calibrate it again: python tools/calibrate.py {factor.label}"
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            tables = {f"calibration {name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise LoadError(f"The calibration {path} cannot be read: {error}", fix=fix) from error
    shapes = {table.shape for table in tables.values()}
    if set(tables) != set(TABLES) or len(shapes) != 1 or len(shapes.pop()) != 1:
        raise LoadError(f"The calibration {path} does not fit factor '{factor.label}'.", fix=fix)
    if weights is not None and about.get("weights") != _digest(weights):
        raise LoadError(
            f"The calibration {path} was made for other weights than those in {Path(weights).name}.", fix=fix
        )
    return Calibrated(factor, tables)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
