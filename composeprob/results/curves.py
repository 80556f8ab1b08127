"""Diagnostics by level as small SVG drawings, whose colours are those of the page that they stand in."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from composeprob.results.result import Result


def curves(result: Result) -> dict[str, str]:
    """Returns ``{title: SVG}``, one for everything that the sampler has by level."""
    blocks = f" (a line each: {', '.join(result.blocks)})" if result.blocks else ""
    shares, n = (0.0, 1.0), result.num_chains
    drawn = {
        f"acceptance{blocks}": (result.acceptance, shares, False),
        f"step size{blocks}": (result.step_size, None, True),
        "effective sample size, share of chains": (result.ess, shares, False),
        "first chains that have descendants": (result.ancestors, (0.0, float(n)), False),
        "proposals that were not finite": (_where(result.non_finite), None, False),
    }
    known = {title: what for title, what in drawn.items() if np.isfinite(np.asarray(what[0], float)).any()}
    return {title: curve(result.log_snr, values, limits, log) for title, (values, limits, log) in known.items()}


def _where(counts: np.ndarray) -> np.ndarray:
    """Counts, as they are worth a drawing: only where there are any."""
    return np.where(np.nansum(counts) > 0, counts, np.nan)


def curve(x: np.ndarray, values: np.ndarray | None, limits: tuple[float, float] | None, log: bool) -> str:
    """Draws columns of numbers over x, (K,) or (K, B), noisy on the left.

    Args:
        x: log-SNR, (K,).
        values: what is drawn.
        limits: of the vertical axis; those of the values where left out.
        log: whether the axis is logarithmic.
    """
    columns = np.asarray(values, float).reshape(len(x), -1)
    columns = np.where(columns > 0, columns, np.nan) if log else columns
    finite = columns[np.isfinite(columns)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    scaled, low_, high_ = (np.log10(columns), math.log10(low), math.log10(high)) if log else (columns, low, high)
    if high_ <= low_:
        low_, high_ = low_ - 0.5, high_ + 0.5
    width, height, margin_left, margin_right, margin_top, margin_bottom = 320, 170, 58, 8, 10, 26
    span = float(np.ptp(x)) or 1.0
    across = margin_left + (np.asarray(x, float) - np.min(x)) / span * (width - margin_left - margin_right)
    down = margin_top + (high_ - scaled) / (high_ - low_) * (height - margin_top - margin_bottom)
    lines = []
    for column in down.T:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, column, strict=True) if math.isfinite(b))
        lines.append(f"<polyline points='{points}'/>")
    floor = height - margin_bottom
    texts = [
        (margin_left - 6, margin_top + 4, "end", f"{high:.3g}"),
        (margin_left - 6, floor + 4, "end", f"{low:.3g}"),
        (margin_left, height - 8, "start", f"log-SNR {np.min(x):.3g}"),
        (width - margin_right, height - 8, "end", f"{np.max(x):.3g}"),
    ]
    labels = "".join(f"<text x='{a}' y='{b}' text-anchor='{c}'>{escape(t)}</text>" for a, b, c, t in texts)
    axis = f"<path class='axis' d='M{margin_left} {margin_top}V{floor}H{width - margin_right}'/>"
    return f"<svg class='curve' viewBox='0 0 {width} {height}' role='img'>{axis}{''.join(lines)}{labels}</svg>"
