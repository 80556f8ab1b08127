"""A film of a run: its chains on their way from noise to samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import animation

from composeprob.errors import InvalidValueError
from composeprob.results.figures import plot_frame
from composeprob.results.plotting import PANEL, Window, new_figure, style

if TYPE_CHECKING:
    from composeprob.results.result import Result

WRITERS = {".gif": "pillow", ".mp4": "ffmpeg"}
REST = 1.5
"""Seconds that the last picture stays."""
DOTS = 110
"""Per inch."""


def animate(result: Result, path: str | os.PathLike, site: str | None, seconds: float) -> Path:
    """See `Result.animate`."""
    path, descent = Path(path), result.descent
    if path.suffix not in WRITERS:
        raise InvalidValueError(f"A film is a .gif or an .mp4; got {path.name!r}.", fix="name it run.gif.")
    if not animation.writers.is_available(WRITERS[path.suffix]):
        raise InvalidValueError(
            "An .mp4 is written by the program ffmpeg, which is not installed here.",
            fix="install ffmpeg, or write a .gif.",
        )
    names = list(descent.samples) if site is None else [site]
    for name in names:
        result[name]  # refuses what is no site
    rate = max(1.0, len(descent) / seconds)
    windows = {name: _windows(descent.samples[name]) for name in names if descent.samples[name].shape[2:] == (2,)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure = new_figure(PANEL * len(names), PANEL)
        try:
            film = animation.writers[WRITERS[path.suffix]](fps=rate)
            with film.saving(figure, str(path), dpi=DOTS):
                for frame in range(len(descent)):
                    figure.clear()
                    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
                        plot_frame(ax, result, name, frame, windows[name][frame] if name in windows else None)
                    film.grab_frame()
                for _ in range(round(REST * rate)):
                    film.grab_frame()
        finally:
            plt.close(figure)
    return path


def _windows(points: np.ndarray) -> list[Window]:
    """A window for each frame of points (F, N, 2) around where they end; never wider than the one before."""
    last = points[-1][np.isfinite(points[-1]).all(1)]
    center = np.quantile(last, [0.005, 0.995], axis=0).mean(0) if len(last) else np.zeros(2)
    away = np.abs(points - center).max(-1)
    half = np.nanquantile(np.where(np.isfinite(away), away, np.nan), 0.99, axis=1) * 1.15 + 1e-6
    half = np.maximum.accumulate(half[::-1])[::-1]
    return [(center[0] - h, center[0] + h, center[1] - h, center[1] + h) for h in half]
