"""Cells of a table that are run one by one and kept, and intervals for the shares in
them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import CODE, STAMP
from scipy import stats


@dataclass(frozen=True)
class Cell:
    """One run, by its name.

    Attributes:
        part: its part of the table, such as ``"placed"``, ``"guided"`` or ``"mixed"``.
        settings: differences from other cells of the part, in the order of the table's
            columns.
        run: returns measured numbers, ready for JSON, and some of the images.
    """

    part: str
    settings: dict[str, Any]
    run: Callable[[], tuple[dict[str, Any], np.ndarray]]

    @property
    def name(self) -> str:
        settings = (f"{key}={value}" for key, value in self.settings.items())
        return " ".join([self.part, *settings])


class Kept:
    """Measured cells in a JSON file, and their images beside it in a folder."""

    def __init__(self, file: Path, folder: Path):
        self.file = file
        self.folder = folder

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Cells in the file now, by name: other processes may add to it."""
        if not self.file.exists():
            return {}
        return json.loads(self.file.read_text(encoding="utf-8"))["cells"]

    def __contains__(self, cell: Cell) -> bool:
        return cell.name in self.cells

    def put(self, cell: Cell, measured: dict[str, Any], images: np.ndarray) -> None:
        """Keep a cell; the file is whole after each."""
        found = {"part": cell.part, **cell.settings, **measured, STAMP: CODE.stamp()}
        cells = self.cells | {cell.name: found}
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.images_of(cell.name), np.asarray(images, np.float16))
        self.file.write_text(
            json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8"
        )

    def images_of(self, name: str) -> Path:
        """File of some images of a cell."""
        return self.folder / (re.sub(r"[^\w.-]", "_", name) + ".npy")


def share(successes: Any) -> dict[str, Any]:
    """A share with its exact (Clopper–Pearson) 95 % interval, from one truth value for
    each independent trial."""
    successes = np.asarray(successes, bool).ravel()
    interval = stats.binomtest(int(successes.sum()), len(successes)).proportion_ci()
    return {
        "share": float(successes.mean()),
        "interval": [float(interval.low), float(interval.high)],
    }


def as_text(found: dict[str, Any]) -> str:
    """A share as text."""
    low, high = found["interval"]
    return f"{found['share']:.3f} ({low:.2f}–{high:.2f})"
