"""Whole figures of a result: what `Result.plot` draws, by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from composeprob import tuning
from composeprob.errors import InvalidValueError
from composeprob.results.plotting import (
    PALETTE,
    SIZES,
    TOWARDS,
    is_image,
    new_figure,
    plot_levels,
    plot_site,
    style,
    wrapped,
)

if TYPE_CHECKING:
    from composeprob.results.result import Result


def plot_result(result: Result, kind: str) -> Figure:
    """See `Result.plot`.

    Raises:
        InvalidValueError: no such kind, or nothing of this kind to draw.
    """
    if kind not in KINDS:
        raise InvalidValueError(f"There is no kind of picture {kind!r}.", fix=f"use one of: {', '.join(KINDS)}.")
    with style():
        figure = KINDS[kind](result)
        if result.density is not None:
            clean = result.density.graph.formula.replace("_k(", "(")  # the samples are those of level 0
            formula = wrapped(clean, int(14 * figure.get_figwidth()), SIZES.formula_lines)
            figure.suptitle(formula, x=0.01, ha="left", fontsize=9)
    return figure


def _grid(count: int, columns: int = 3) -> tuple[Figure, np.ndarray]:
    """A figure of so many panels, in rows."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(SIZES.panel * columns + 0.6, SIZES.panel * rows + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes


def _overview(result: Result) -> Figure:
    draws = result.unweighted(most=tuning.SUMMARY.most_numbers)
    has_levels = any(np.isfinite(values).any() for values in (result.acceptance, result.step_size, result.ess))
    figure, axes = _grid(len(draws) + has_levels)
    for ax, (name, values) in zip(axes, draws.items(), strict=False):
        plot_site(ax, name, values, result.density)
    if has_levels:
        plot_levels(axes[len(draws)], result)
    return figure


def _samples(result: Result) -> Figure:
    draws = result.unweighted(most=tuning.SUMMARY.most_numbers)
    figure, axes = _grid(len(draws))
    for ax, (name, values) in zip(axes, draws.items(), strict=False):
        plot_site(ax, name, values, result.density)
    return figure


def _pairs(result: Result) -> Figure:
    """Every number against every other, with its own histogram on the diagonal."""
    draws = result.unweighted(most=tuning.SUMMARY.most_numbers)
    draws = {name: x for name, x in draws.items() if not is_image(x.shape[1:])}
    labels = [name + ("" if not i else str(list(i))) for name, x in draws.items() for i in np.ndindex(x.shape[1:])]
    if not labels:
        raise InvalidValueError("There are no numbers to pair: every site is an image.", fix="leave kind= out.")
    numbers = np.concatenate([x.reshape(len(x), -1) for x in draws.values()], axis=1)[:, : SIZES.pairs]
    numbers = numbers[np.isfinite(numbers).all(1)]
    count = numbers.shape[1]
    figure = new_figure(1.9 * count + 0.8, 1.9 * count + 0.8)
    axes = figure.subplots(count, count, squeeze=False, sharex="col")
    for i in range(count):
        for j in range(count):
            _pair(axes[i, j], numbers, i, j)
        axes[i, 0].set_ylabel(wrapped(labels[i], 18) if i else "")
        axes[-1, i].set_xlabel(wrapped(labels[i], 18))
    if len(labels) > count:
        figure.supxlabel(f"the first {count} of {len(labels)} numbers", fontsize=8)
    return figure


def _pair(ax: Axes, numbers: np.ndarray, i: int, j: int) -> None:
    """Row i, column j of a figure of pairs."""
    if j > i:
        ax.set_axis_off()
    elif i == j:
        ax.hist(numbers[:, i], bins=40, color=PALETTE.second, alpha=0.75)
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
    else:
        ax.scatter(numbers[:, j], numbers[:, i], s=2.5, c=PALETTE.accent, alpha=0.4, linewidths=0, rasterized=True)
        if j:
            ax.set_yticklabels([])
        if min(np.ptp(numbers[:, i]), np.ptp(numbers[:, j])) > 0:
            correlation = np.corrcoef(numbers[:, i], numbers[:, j])[0, 1]
            ax.text(0.97, 0.97, f"r = {correlation:.2f}", transform=ax.transAxes, ha="right", va="top", fontsize=7)


def _levels(result: Result) -> Figure:
    """A panel for each diagnostic."""
    n = result.num_chains
    drawn: dict[str, tuple[np.ndarray | None, dict[str, object]]] = {
        "acceptance": (result.acceptance, {"ylim": (0, 1.02), "ylabel": "share of moves"}),
        "step size": (result.step_size, {"yscale": "log"}),
        "effective sample size": (result.ess, {"ylim": (0, 1.02), "ylabel": "share of chains"}),
        "first chains with descendants": (result.ancestors, {"ylim": (0, 1.02 * n), "ylabel": "chains"}),
        "swaps with the next level": (result.swaps, {"ylim": (0, 1.02), "ylabel": "share accepted"}),
    }
    known = {title: what for title, what in drawn.items() if np.isfinite(np.asarray(what[0], float)).any()}
    if not known:
        raise InvalidValueError("This run has no diagnostics by level.", fix="leave kind= out.")
    figure, axes = _grid(len(known), columns=2)
    for ax, (title, (values, limits)) in zip(axes, known.items(), strict=False):
        columns = np.asarray(values, float).reshape(len(result.log_snr), -1)
        for b, column in enumerate(columns.T):
            label = wrapped(result.blocks[b], 24) if len(result.blocks) == columns.shape[1] else None
            lines, dashes = PALETTE.lines, PALETTE.dashes
            look = {"color": lines[b % len(lines)], "linestyle": dashes[b % len(dashes)]}
            ax.plot(result.log_snr, column, label=label, **look)
        ax.set(title=title, xlabel=TOWARDS, **limits)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    return figure


KINDS: dict[str, Callable[[Result], Figure]] = {
    "overview": _overview,
    "samples": _samples,
    "pairs": _pairs,
    "levels": _levels,
}
