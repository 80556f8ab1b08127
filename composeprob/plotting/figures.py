"""The panels of a picture: samples over their density, image grids, histograms, and the
diagnostics by level."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from composeprob import tuning
from composeprob.core import log_densities
from composeprob.errors import InvalidValueError
from composeprob.events import as_images, entries, is_image, is_tokens
from composeprob.records import REPORTED, Quantity, by_block
from composeprob.results.geometry import rows

if TYPE_CHECKING:
    from composeprob.core import AnnealedDensity, Result


class Palette(NamedTuple):
    """Colours and dashes of pictures."""

    ink: str = "#22313f"
    accent: str = "#c8553d"
    second: str = "#2a6f97"
    faint: str = "#b8c4cf"
    # Told apart by the colour-blind too (Okabe and Ito 2008); lines that share a panel
    # differ in their dashes too.
    lines: tuple[str, ...] = (
        "#0072b2",
        "#d55e00",
        "#009e73",
        "#cc79a7",
        "#e69f00",
        "#56b4e9",
    )
    dashes: tuple[str, ...] = ("-", "--", ":", "-.")


class Sizes(NamedTuple):
    """Numbers and sizes of the things that a picture shows."""

    points: int = 3000
    images: int = 16
    histograms: int = 6
    # Points along a side of the grid on which a density is shaded. A network is
    # evaluated at each.
    cells: int = 80
    aside: float = 0.17  # of a panel's side: the height of the histograms beside it
    panel: float = 3.4  # inches
    # Of a saved picture, by default: on fine screens Matplotlib's 100 are blurred.
    pixels_an_inch: int = 160
    # Above a figure: the panels need the room, and ``print(density)`` shows all of it.
    formula_lines: int = 4
    pairs: int = 6  # rows of a figure of pairs


PALETTE = Palette()
SIZES = Sizes()
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": PALETTE.ink,
    "axes.labelcolor": PALETTE.ink,
    "axes.linewidth": 0.7,
    "xtick.color": PALETTE.ink,
    "ytick.color": PALETTE.ink,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
}
LOG_SNR = "log-SNR (noisy → clean)"
LOG_ODDS = "log-odds to be visible (hidden → visible)"


@contextmanager
def style() -> Iterator[None]:
    """Give figures the look of the library's own: ``with style(): …``.

    `matplotlib.pyplot.rc_context` would set all settings back at the end, also that a
    notebook shows figures, which pyplot sets with the first figure.
    """
    before = {name: plt.rcParams[name] for name in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)


LogDensity = Callable[[np.ndarray], ArrayLike]  # log-densities (M,) of points (M, 2)
Window = tuple[float, float, float, float]  # x_min, x_max, y_min, y_max


class Picture(Figure):
    """A `Picture` is a figure that a notebook shows once, and that is saved at high
    resolution.

    A notebook shows a cell's value, and at the cell's end every figure that pyplot
    holds: a Matplotlib figure that a cell makes and returns is shown twice, and one
    that is kept from pyplot is not shown after ``result.plot();``.
    """

    def savefig(
        self, fname: str | os.PathLike[str] | IO[bytes], **options: Any
    ) -> None:
        """Save as any figure does, at a higher resolution unless the call or
        Matplotlib's settings state one."""
        resolution = plt.rcParams["savefig.dpi"]
        if resolution == "figure":  # Matplotlib's default
            resolution = SIZES.pixels_an_inch
        super().savefig(fname, **{"dpi": resolution, **options})

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> dict[str, object]:
        """Close the figure when the notebook is about to show it, which its own
        formatters then do."""
        # pyplot forgets the figure, so that it is not shown again.
        if "inline" in plt.get_backend().lower():
            plt.close(self)
        return {}


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of this size in inches, which a notebook shows once, and a script
    by `matplotlib.pyplot.show`."""
    size = (width, height)
    return plt.figure(figsize=size, layout="constrained", FigureClass=Picture)


def plot_site(
    ax: Axes, name: str, values: np.ndarray, density: AnnealedDensity | None
) -> None:
    """Draw the panel of one site, by the shape of its event."""
    shape = values.shape[1:]
    if is_tokens(values, 1):
        plot_tokens(ax, values, name)
    elif shape == (2,):
        log_density = log_density_at(density, name, 0)
        plot_points(ax, values, name, log_density=log_density, aside=True)
        ax.set(xlabel=f"{name}[0]", ylabel=f"{name}[1]")
    elif is_image(shape):
        title = name
        if len(values) > SIZES.images:
            title = f"{name} (first {SIZES.images} samples)"
        plot_images(ax, values, title)
    else:
        plot_histograms(ax, values, name)


def plot_points(
    ax: Axes,
    points: np.ndarray,
    title: str = "",
    log_density: LogDensity | None = None,
    window: Window | None = None,
    aside: bool = False,
) -> None:
    """Draw points of the plane, (N, 2), over the density that they should follow.

    The window holds 99 % of them unless one is given. ``aside`` adds the marginals,
    above and to the right: of the points as histograms, of the density, as far as the
    window shows it, as lines.
    """
    points = np.asarray(points, float)
    points = points[np.isfinite(points).all(1)]
    if window is None:
        window = _window(points)
    relative = None if log_density is None else plot_density(ax, log_density, window)
    shown = points[:: max(1, len(points) // SIZES.points)]
    alpha = float(np.clip(600 / max(len(shown), 1), 0.35, 0.9))
    ax.scatter(
        shown[:, 0],
        shown[:, 1],
        s=3.5,
        c=PALETTE.accent,
        alpha=alpha,
        linewidths=0,
        rasterized=True,
    )
    ax.set(xlim=window[:2], ylim=window[2:], aspect="equal")
    height = 1.05 + SIZES.aside if aside else None  # above the marginals
    ax.set_title(wrapped(title), y=height)
    if aside and len(points):
        _plot_marginals(ax, points, relative, window)


def _plot_marginals(
    ax: Axes, points: np.ndarray, relative: np.ndarray | None, window: Window
) -> None:
    """Draw the marginals of points, and those of the density on a grid (y, x)."""
    above = ax.inset_axes((0, 1.02, 1, SIZES.aside))
    right = ax.inset_axes((1.02, 0, SIZES.aside, 1))
    bars = {"color": PALETTE.accent, "alpha": 0.55, "density": True}
    x_bins = np.linspace(*window[:2], 41)
    y_bins = np.linspace(*window[2:], 41)
    above.hist(points[:, 0], bins=x_bins, orientation="vertical", **bars)
    right.hist(points[:, 1], bins=y_bins, orientation="horizontal", **bars)
    if relative is not None:
        line = {"color": PALETTE.second, "linewidth": 1.1}
        above.plot(*_marginal(relative.sum(axis=0), window[:2]), **line)
        y, density = _marginal(relative.sum(axis=1), window[2:])
        right.plot(density, y, **line)
    above.set_axis_off()
    right.set_axis_off()
    above.set_xlim(window[:2])
    right.set_ylim(window[2:])


def _marginal(
    values: np.ndarray, ends: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """A grid between two ends, and values on it as a normalised density."""
    grid = np.linspace(*ends, len(values))
    return grid, values / (values.sum() * (grid[1] - grid[0]))


def plot_density(ax: Axes, log_density: LogDensity, window: Window) -> np.ndarray:
    """Shade a density over a window of the plane, relative to its highest value there,
    and return these values (y, x)."""
    x = np.linspace(*window[:2], SIZES.cells)
    y = np.linspace(*window[2:], SIZES.cells)
    grid = np.stack(np.meshgrid(x, y), -1)
    values = np.asarray(log_density(grid.reshape(-1, 2)), float).reshape(grid.shape[:2])
    values = np.where(np.isfinite(values), values, -np.inf)
    relative = np.exp(values - values.max())
    shade = LinearSegmentedColormap.from_list(
        "shade", ["#ffffff", "#d6e2ec", "#9dbbd3", "#5b8db3"]
    )
    ax.imshow(
        relative,
        cmap=shade,
        extent=window,
        origin="lower",
        vmin=0,
        vmax=1,
        interpolation="bilinear",
        zorder=0,
    )
    deviations = np.exp([-4.5, -2.0, -0.5])  # where a Gaussian has 3, 2 and 1 of them
    ax.contour(
        x,
        y,
        relative,
        levels=deviations,
        colors=PALETTE.ink,
        linewidths=0.45,
        alpha=0.55,
        zorder=1,
    )
    return relative


def plot_images(ax: Axes, images: np.ndarray, title: str = "") -> None:
    """Draw the first images as one mosaic; values in [0, 1] or [−1, 1] keep their
    meaning, others are stretched."""
    images = as_images(images[: SIZES.images])
    n, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    mosaic = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = row * (height + 1)
        left = column * (width + 1)
        mosaic[top : top + height, left : left + width] = image
    if channels == 1:
        mosaic = mosaic.squeeze(-1)
    ax.imshow(mosaic, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(title=wrapped(title))
    ax.set_axis_off()


def plot_histograms(ax: Axes, values: np.ndarray, title: str = "") -> None:
    """Draw the marginals of a site's numbers in one panel, of the first few if there
    are many."""
    shape = values.shape[1:]
    flat = np.asarray(values, float).reshape(len(values), -1)
    number = flat.shape[1]
    finite = flat[np.isfinite(flat)]
    low, high = (0.0, 1.0)
    if finite.size:
        low, high = np.quantile(finite, [0.001, 0.999])
    if not high > low:  # all values are equal
        high = low + 1
    bins = np.linspace(low, high, 41)
    for j, label in enumerate(entries("", shape)[: SIZES.histograms]):
        column = flat[np.isfinite(flat[:, j]), j]
        if not column.size:
            continue
        look: dict[str, Any] = {"color": PALETTE.second, "alpha": 0.75}
        if number > 1:
            look = {
                "color": PALETTE.lines[j],
                "linestyle": PALETTE.dashes[j % len(PALETTE.dashes)],
                "linewidth": 1.3,
                "histtype": "step",
                "label": label,
            }
        ax.hist(column, bins=bins, density=True, **look)
    if number > 1 and ax.patches:
        ax.legend(fontsize=8, loc="upper right")
    if number > SIZES.histograms:
        title += f" (first {SIZES.histograms} of {number})"
    ax.set(title=wrapped(title), xlabel="value", ylabel="density of samples")
    ax.spines[["top", "right"]].set_visible(False)


def plot_tokens(ax: Axes, values: np.ndarray, title: str = "") -> None:
    """Draw the share of every token at every position, (N, …)."""
    flat = values.reshape(len(values), -1)
    tokens = np.arange(max(flat.max(initial=0) + 1, 2))
    shares = (flat[:, :, None] == tokens).mean(axis=0)
    image = _plot_shares(ax, shares.T)
    ax.figure.colorbar(image, ax=ax, label="share of samples", shrink=0.8)
    ax.set(title=wrapped(title), xlabel="position", ylabel="token")


def _plot_shares(ax: Axes, shares: np.ndarray) -> AxesImage:
    """Draw a table of shares, (rows, columns), with ticks at whole numbers."""
    image = ax.imshow(
        shares,
        origin="lower",
        aspect="auto",
        cmap="Blues",
        vmin=0.0,
        vmax=shares.max(),
        interpolation="nearest",
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def diagnostics(result: Result) -> dict[str, Quantity]:
    """The quantities that the sampler has by level and that have a panel, those that
    count events last."""
    shown = {}
    for name, quantity in sorted(REPORTED.items(), key=lambda row: row[1].counts):
        if not quantity.drawn or not by_block(result.levels, name):
            continue
        # A panel of zeros would tell nothing.
        if not quantity.counts or result.levels[name].any():
            shown[name] = quantity
    return shown


def _set_limits(ax: Axes, most: float | str | None, num_chains: int) -> None:
    """Let an axis end a little above the most that its numbers can be."""
    if most == "chains":
        most = num_chains
    if most is not None:
        ax.set_ylim(0.0, 1.02 * float(most))


def _of_levels(result: Result) -> str:
    """Return the label of the axis along which levels lie."""
    return LOG_ODDS if result.about.by_reveals else LOG_SNR


def _plot_level_lines(
    ax: Axes, result: Result, name: str, colours: Sequence[str]
) -> None:
    """Draw a diagnostic over log-SNR, a line for each block."""
    log_snr = result.levels["log_snr"].to_numpy()
    for b, (label, column) in enumerate(by_block(result.levels, name).items()):
        look = {
            "color": colours[b % len(colours)],
            "linestyle": PALETTE.dashes[b % len(PALETTE.dashes)],
        }
        ax.plot(log_snr, column, label=wrapped(label, 24), linewidth=1.4, **look)


def _plot_run(ax: Axes, result: Result) -> None:
    """Draw acceptance and effective sample size (left axis) and step size (right axis,
    logarithmic) by log-SNR."""
    _plot_level_lines(ax, result, "ess", [PALETTE.faint])
    _plot_level_lines(ax, result, "acceptance", [PALETTE.accent])
    ax.set(ylim=(0, 1.02), xlabel=_of_levels(result), ylabel="share", title="run")
    ax.spines["top"].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    if (result.step_size > 0).any():
        right = ax.twinx()
        _plot_level_lines(right, result, "step_size", [PALETTE.second])
        right.set_yscale("log")
        right.set_ylabel("step size", color=PALETTE.second)
        right.spines["top"].set_visible(False)
        right_handles, right_labels = right.get_legend_handles_labels()
        handles += right_handles
        labels += [f"{label} (right)" for label in right_labels]
    if handles:
        ax.legend(handles, labels, fontsize=8, loc="lower left")


def wrapped(text: str, width: int = 44, most: int | None = None) -> str:
    """Break text into lines of at most ``width`` characters; of each given line at most
    ``most`` lines stay."""
    fill = functools.partial(
        textwrap.fill, width=width, max_lines=most, placeholder=" …"
    )
    return "\n".join(map(fill, text.splitlines()))


def _window(points: np.ndarray) -> Window:
    """Return a square around 99 % of the points."""
    if len(points) == 0:
        return (-1.0, 1.0, -1.0, 1.0)
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    center = (low + high) / 2
    half = 0.5 * float(np.max(high - low)) * 1.25 + 1e-6
    return (center[0] - half, center[0] + half, center[1] - half, center[1] + half)


def log_density_at(
    density: AnnealedDensity | None, name: str, level: int
) -> LogDensity | None:
    """Return the log-density at a level as a function of values (M, …) of the only
    site; None if the density has other sites, or only a score."""
    if density is None or "energy" not in density.capabilities:
        return None
    # A slice through other sites, or unconstrained coordinates, would not be the
    # samples' density.
    if set(density.sites) != {name} or density.sites[name].kind != "noised":
        return None

    def log_density(points: np.ndarray) -> ArrayLike:
        positions = {name: np.asarray(points, np.float32)}
        return log_densities(density, positions, level)

    return log_density


# ── whole figures, by kind ────────────────────────────────────────────────────────────
def plot_result(result: Result, kind: str) -> Figure:
    """Draw a figure of one kind; see `Result.plot`."""
    if kind not in KINDS:
        raise InvalidValueError(
            f"Unknown kind of picture {kind!r}.",
            fix=f"use one of: {', '.join(KINDS)}.",
        )
    with style():
        figure = KINDS[kind](result)
        if result.density is not None:
            # The samples are those of level 0.
            formula = result.density.graph.formula.replace("_k(", "(")
            width = int(14 * figure.get_figwidth())
            title = wrapped(formula, width, SIZES.formula_lines)
            figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def grid(count: int, columns: int = 3) -> tuple[Figure, np.ndarray]:
    """Make a figure of ``count`` panels, in rows."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(SIZES.panel * columns + 0.6, SIZES.panel * rows + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes


def _sites(result: Result, run: bool = True) -> Figure:
    """Draw a panel for each site, and one for the ``run`` if it has diagnostics."""
    names = ("acceptance", "step_size", "ess")
    run = run and any(by_block(result.levels, name) for name in names)
    draws = result.unweighted(most=tuning.SUMMARY.most_numbers)
    figure, axes = grid(len(draws) + run)
    for ax, (name, values) in zip(axes, draws.items(), strict=False):
        plot_site(ax, name, values, result.density)
    if run:
        _plot_run(axes[len(draws)], result)
    return figure


def _pairs(result: Result) -> Figure:
    """Draw every number against every other, with histograms on the diagonal."""
    draws = result.unweighted(most=tuning.SUMMARY.most_numbers)
    draws = {name: x for name, x in draws.items() if not is_image(x.shape[1:])}
    if not draws:
        raise InvalidValueError(
            "There are no numbers to pair: every site is an image.",
            fix="leave kind= out.",
        )
    numbers, sizes, labels = rows(draws)
    of_tokens = np.repeat([is_tokens(x, 1) for x in draws.values()], sizes)
    numbers = numbers[:, : SIZES.pairs]
    numbers = numbers[np.isfinite(numbers).all(1)]
    count = numbers.shape[1]
    figure = new_figure(1.9 * count + 0.8, 1.9 * count + 0.8)
    axes = figure.subplots(count, count, squeeze=False, sharex="col")
    for i in range(count):
        for j in range(count):
            joint = bool(of_tokens[i] and of_tokens[j])
            _pair(axes[i, j], numbers, i, j, joint)
        label = wrapped(labels[i], 18)
        axes[-1, i].set_xlabel(label)
        if i:  # the first row is a histogram
            axes[i, 0].set_ylabel(label)
    if len(labels) > count:
        figure.supxlabel(f"the first {count} of {len(labels)} numbers", fontsize=8)
    return figure


def _pair(ax: Axes, numbers: np.ndarray, i: int, j: int, joint: bool) -> None:
    """Draw row i, column j of a figure of pairs; ``joint`` for the shares of pairs of
    tokens."""
    if j > i:
        ax.set_axis_off()
    elif i == j:
        ax.hist(numbers[:, i], bins=40, color=PALETTE.second, alpha=0.75)
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
    else:
        if joint:
            _plot_joint_shares(ax, numbers[:, j], numbers[:, i])
        else:
            _plot_correlation(ax, numbers[:, j], numbers[:, i])
        if j:
            ax.set_yticklabels([])


def _plot_joint_shares(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the share of every pair of tokens at two positions."""
    shape = (int(y.max()) + 1, int(x.max()) + 1)
    shares = np.zeros(shape)
    np.add.at(shares, (y.astype(int), x.astype(int)), 1 / len(x))
    _plot_shares(ax, shares)


def _plot_correlation(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw two numbers of all samples, with their correlation if both vary."""
    ax.scatter(x, y, s=2.5, c=PALETTE.accent, alpha=0.4, linewidths=0, rasterized=True)
    if min(np.ptp(x), np.ptp(y)) > 0:
        ax.text(
            0.97,
            0.97,
            f"r = {np.corrcoef(y, x)[0, 1]:.2f}",
            transform=ax.transAxes,
            ha="right",
            va="top",
            fontsize=7,
        )


def plot_levels(result: Result) -> Figure:
    """Draw a panel for each diagnostic."""
    shown = diagnostics(result)
    if not shown:
        raise InvalidValueError(
            "This run has no diagnostics by level.", fix="leave kind= out."
        )
    figure, axes = grid(len(shown), columns=2)
    for ax, (name, quantity) in zip(axes, shown.items(), strict=False):
        _plot_level_lines(ax, result, name, PALETTE.lines)
        ax.set(
            title=quantity.long_name, xlabel=_of_levels(result), ylabel=quantity.units
        )
        _set_limits(ax, quantity.most, len(result.log_weights))
        if name == "step_size":
            ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
        if len(ax.lines) > 1:
            ax.legend(fontsize=8)
    return figure


KINDS: dict[str, Callable[[Result], Figure]] = {
    "overview": _sites,
    "samples": functools.partial(_sites, run=False),
    "pairs": _pairs,
    "levels": plot_levels,
}
