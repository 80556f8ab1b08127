"""Picture of the home page and of README, idea-light.png and idea-dark.png.

    python docs/idea.py

It goes to docs/_static/. Above are the laws that two models of the zoo learned from.
Below are samples by their scores, added along the reverse diffusion, and samples of
their product by `cp.SMC`. The line holds 99 % of the
exact product; samples outside of it are marked and counted.
"""

from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

import composeprob as cp

HERE = Path(__file__).parent / "_static"
SCHEMES = {
    "light": {
        "ink": "#22313f",
        "shade": ["#2a6f9700", "#2a6f97ff"],
        "right": "#2a6f97",
        "wrong": "#c8402a",
    },
    "dark": {
        "ink": "#e8edf2",
        "shade": ["#7cc0ea00", "#7cc0eaff"],
        "right": "#7cc0ea",
        "wrong": "#ff8a70",
    },
}
TITLES = (
    "Model 1: a ring",
    "Model 2: a bar",
    "Their scores, added",
    "Their product, sampled",
)
EDGE, POINTS = 0.78, 700
SIDE = np.linspace(-EDGE, EDGE, 321)
MODES = 0.5 * np.stack(
    [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], -1
)


def ring(x):
    return np.exp(-((x[..., None, :] - MODES) ** 2).sum(-1) / (2 * 0.075**2)).sum(-1)


def bar(x):
    return (np.abs(x[..., 0]) < 0.2) * 1.0


@cp.program
def both(ring, bar):
    return cp.sample("x", ring * bar)


def samples():
    """Points of both samplers."""
    density = cp.compile(both, cp.load("ring2d"), cp.load("bar2d"))
    points = []
    for sampler in (cp.Ancestral(), cp.SMC(cp.MALA(cp.Adaptive()), steps_per_level=1)):
        result = cp.infer(density, jax.random.key(0), num_chains=2000, sampler=sampler)
        points.append(result.unweighted()["x"])
    return points


def draw(scheme, laws, lowest, points):
    """One picture; ``lowest`` is the product's density on the line."""
    plt.rcParams.update(
        {"font.size": 11, "text.color": scheme["ink"], "font.family": "sans-serif"}
    )
    figure, axes = plt.subplots(2, 2, figsize=(5.2, 5.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.05)
    for ax, title, weight in zip(
        axes.ravel(), TITLES, ("normal", "normal", "bold", "bold"), strict=True
    ):
        ax.set(
            xlim=(-EDGE, EDGE),
            ylim=(-EDGE, EDGE),
            xticks=[],
            yticks=[],
            aspect="equal",
            facecolor="none",
        )
        ax.spines[:].set(color=scheme["ink"], linewidth=0.8, alpha=0.5)
        ax.set_title(title, color=scheme["ink"], weight=weight)
    for ax, law in zip(axes[0], laws, strict=True):
        shade = LinearSegmentedColormap.from_list("shade", scheme["shade"])
        ax.imshow(
            0.8 * law / law.max(),
            origin="lower",
            extent=2 * (-EDGE, EDGE),
            cmap=shade,
            vmin=0,
            vmax=1,
        )
    for ax, x in zip(axes[1], points, strict=True):
        ax.contour(
            SIDE,
            SIDE,
            laws[0] * laws[1],
            levels=[lowest],
            colors=scheme["ink"],
            linewidths=0.9,
        )
        wrong = ring(x) * bar(x) < lowest
        for chosen, name, marker, size in (
            (~wrong, "right", ".", 9),
            (wrong, "wrong", "x", 15),
        ):
            ax.scatter(
                *x[:POINTS][chosen[:POINTS]].T,
                s=size,
                marker=marker,
                color=scheme[name],
                linewidths=0.9,
            )
        color = scheme["wrong" if wrong.mean() > 0.1 else "right"]
        ax.set_xlabel(
            f"{100 * wrong.mean():.0f} % outside of the product",
            color=color,
            fontsize=10.5,
        )
    figure.text(
        0.5, 0.78, "×", color=scheme["ink"], fontsize=22, ha="center", va="center"
    )
    return figure


if __name__ == "__main__":
    points = samples()
    grid = np.stack(np.meshgrid(SIDE, SIDE), -1)
    laws = [ring(grid), bar(grid)]
    heights = np.sort((laws[0] * laws[1]).ravel())
    lowest = heights[np.searchsorted(np.cumsum(heights), 0.01 * heights.sum())]
    for name, scheme in SCHEMES.items():
        draw(scheme, laws, lowest, points).savefig(
            HERE / f"idea-{name}.png", dpi=160, transparent=True
        )
