"""A calibration as a file: the tables of a calibrated factor, by name, in safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from composeprob.errors import LoadError
from composeprob.factors.base import LeafFactor
from composeprob.factors.calibrated import CENTRES, ERROR, KNOTS, LOG_NORMALISER, OFFSET, PREFIX, Calibrated

NEEDED = {KNOTS, OFFSET, LOG_NORMALISER, ERROR}


def save_calibration(factor: Calibrated, path: str | Path) -> None:
    """Write what `calibrate` found of a single factor: log-SNR, constants, log-normalisers and their errors."""
    tables = {name.removeprefix(PREFIX): np.ascontiguousarray(table) for name, table in factor.tables.items()}
    Path(path).write_bytes(save(tables))


def load_calibration(factor: LeafFactor, path: str | Path) -> Calibrated:
    """``factor`` with the calibration that `save_calibration` wrote.

    Raises:
        LoadError: the file is missing or damaged, or is the calibration of other events.
    """
    fix = "calibrate the model again, or restore the file."
    try:
        tables = {PREFIX + name: table for name, table in load(Path(path).read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise LoadError(f"The calibration {path} cannot be read: {error}", fix=fix) from error
    shapes = {name: table.shape for name, table in tables.items()}
    levels = shapes.get(KNOTS, (0,))
    modes = shapes[CENTRES][:1] if CENTRES in shapes else (1,)
    fits = (
        set(shapes) - {CENTRES} == NEEDED
        and shapes[OFFSET] == levels + modes
        and shapes[LOG_NORMALISER] == shapes[ERROR] == levels
        and shapes.get(CENTRES, modes + factor.event_shape) == modes + factor.event_shape
    )
    if not fits:
        raise LoadError(f"The calibration {path} does not fit factor '{factor.label}'.", fix=fix)
    return Calibrated(factor, tables)
