"""Shares of an OR under an AND: a 3 with 0.2 or an 8 with 0.8, and thinly written. How
many are a 3?

"Thinly written" is a measurement, y = mean(x) + N(0, s²), whose likelihood G(x) favours
one class: the share of class k is wₖ·Zₖ / Σⱼ wⱼ·Zⱼ with Zₖ = E G(x) over the images of
class k alone. That is known without composing anything: draw each class by itself, by
reverse diffusion, and average. The judge's errors are part of what is known: it is the
share that the judge finds among images of that law,

    Σₖ wₖ·E[G(x)·1(judged 3)] / Σₖ wₖ·E[G(x)·1(judged 3 or 8)].
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import stats

import composeprob as cp
from composeprob.models.worlds import digits as world
from composeprob.plotting import new_figure, style

from .cells import Cell, share

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

CLASSES = (3, 8)
WEIGHTS = (0.2, 0.8)
INK = {"thin": (-0.5, 0.02)}
"""The measured mean of the pixels and its error; a 3 has −0.41 ± 0.06, an 8 −0.37 ±
0.07."""
ALONE = "each class alone"
NAMES = {"SMC": "cp.infer's choice (SMC)"}
"""Names of samplers in the picture, where they are not those of the table."""
RUNS, CHAINS = 16, 256
"""Runs of every sampler, each of so many chains: as few as `cp.infer` resamples by
itself."""
DRAWS, BATCH = 16_000, 2_000
"""Images of each class alone."""
SHOWN = 16


@dataclasses.dataclass(frozen=True)
class AtTheMean(cp.Policy):
    """The likelihood at the Tweedie mean, in full at every level: diffusion posterior
    sampling (Chung et al. 2023)."""

    def seen(self, x: Any, mean: Any, noise: Any) -> Any:
        return mean


@cp.program
def measured_ink(either: Any, ink: float, error: float, anneal: Any) -> Any:
    x = cp.sample("x", either)
    cp.observe("ink", dist.Normal(jnp.mean(x), error), ink, anneal=anneal)
    return x


def langevin(schedule: Any) -> Any:
    return 0.1 * schedule.sigma**2


SAMPLERS: dict[str, tuple[Any, Any]] = {
    "reverse, likelihood at the mean": (cp.Ancestral(), AtTheMean()),
    "reverse, the same widened": (cp.Ancestral(), "denoised"),
    "reverse, tempered": (cp.Ancestral(), "tempered"),
    "ULA": (cp.AnnealedMCMC(cp.ULA(langevin), 2, reverse_step=FIRST_ORDER), "tempered"),
    "MALA": (
        cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=FIRST_ORDER),
        "tempered",
    ),
    "SMC": (None, "tempered"),
}
"""Samplers, and what the measurement sees of a noised image; None leaves the choice to
`cp.infer`."""


def cells() -> Iterator[Cell]:
    """Cells of each ink: the share known from each class alone, then the samplers."""
    for ink in INK:
        yield Cell(
            "shares", {"ink": ink, "sampler": ALONE}, functools.partial(known, ink)
        )
        for name in SAMPLERS:
            yield Cell(
                "shares",
                {"ink": ink, "sampler": name},
                functools.partial(measure, ink, name),
            )


def known(ink: str) -> tuple[dict[str, Any], np.ndarray]:
    """The share that the judge finds under the law itself, from images of each class
    alone."""
    start = time.monotonic()
    by_class = []
    shown = []
    for label in CLASSES:
        images = alone(label)
        likelihood = np.exp(log_likelihood(images, *INK[ink]))
        judged = world.judge(images)
        by_class.append(
            likelihood[:, None]
            * np.stack([judged == CLASSES[0], np.isin(judged, CLASSES)], 1)
        )
        likely = np.random.default_rng(label).choice(
            len(images), SHOWN // 2, p=likelihood / likelihood.sum()
        )
        shown.append(images[likely])
    first, error = ratio(by_class)
    low = first - 1.96 * error
    high = first + 1.96 * error
    measured = {
        "images": DRAWS,
        "first": {"share": first, "interval": [low, high]},
        "evaluations": 59,
    }
    return measured | {"seconds": round(time.monotonic() - start, 1)}, np.concatenate(
        shown
    )


def alone(label: int) -> np.ndarray:
    """Images of one class by reverse diffusion of its own score, which nothing was
    added to."""
    density = cp.compile(_one, cp.load("digits", label=label))
    keys = jax.random.split(jax.random.key(100 + label), DRAWS // BATCH)
    runs = (
        cp.infer(density, key, num_chains=BATCH, sampler=cp.Ancestral(), progress=False)
        for key in keys
    )
    return np.concatenate([np.asarray(run["x"]) for run in runs])


@cp.program
def _one(factor: Any) -> Any:
    return cp.sample("x", factor)


def log_likelihood(images: np.ndarray, ink: float, error: float) -> np.ndarray:
    """log G of images (n, 8, 8, 1) at level 0, without its constant. What is measured
    is x₀/α₀."""
    alpha = float(cp.load("digits").schedule.alpha[0])
    return -0.5 * ((images.mean((1, 2, 3)) / alpha - ink) / error) ** 2


def ratio(by_class: list[np.ndarray], weights: Any = WEIGHTS) -> tuple[float, float]:
    """Σ wₖ·E a / Σ wₖ·E b and its standard error, from independent pairs (a, b) of each
    class, arrays (n, 2)."""
    above, below = sum(
        w * pairs.mean(0) for w, pairs in zip(weights, by_class, strict=True)
    )
    value = above / below
    left = ((pairs[:, 0] - value * pairs[:, 1]) for pairs in by_class)
    variance = sum(
        w**2 * rest.var() / len(rest) for w, rest in zip(weights, left, strict=True)
    )
    return float(value), float(np.sqrt(variance) / below)


def measure(ink: str, sampler: str) -> tuple[dict[str, Any], np.ndarray]:
    """The share of threes among the images of a sampler."""
    how, anneal = SAMPLERS[sampler]
    parts = [cp.load("digits", label=label) for label in CLASSES]
    density = cp.compile(
        measured_ink, cp.mixture(parts, weights=list(WEIGHTS)), *INK[ink], anneal
    )
    start = time.monotonic()
    by_run = []
    images = []
    found = set()
    for seed in range(RUNS):
        run = cp.infer(
            density,
            jax.random.key(seed),
            num_chains=CHAINS,
            sampler=how,
            progress=False,
        )
        drawn = np.asarray(run.unweighted()["x"])
        judged = world.judge(drawn)
        by_run.append(judged[np.isin(judged, CLASSES)] == CLASSES[0])
        images.append(drawn)
        found |= {str(code) for code, _ in run.status.findings}
    every = np.concatenate(images)
    measured = {
        "images": len(every),
        "first": between([part.mean() for part in by_run])
        if how is None
        else share(np.concatenate(by_run)),
        "neither": 1 - sum(map(len, by_run)) / len(every),
        "mean_ink": float(every.mean()),
        "evaluations": run.evaluations,
        "findings": sorted(found),
        "seconds": round(time.monotonic() - start, 1),
    }
    return measured, every[:: len(every) // SHOWN][:SHOWN]


def between(shares: list[Any]) -> dict[str, Any]:
    """The mean share of independent runs and its 95 % interval by Student's t: chains
    of one run descend from common ancestors, so that they are no independent trials."""
    mean = np.mean(shares)
    error = stats.sem(shares)
    away = float(stats.t.ppf(0.975, len(shares) - 1) * error)
    return {
        "share": float(mean),
        "interval": [max(0.0, float(mean) - away), min(1.0, float(mean) + away)],
    }


def checks(found: list[dict[str, Any]]) -> dict[str, bool]:
    """The chosen sampler agrees with what is known, and the intervals of reverse
    diffusion overlap with neither."""
    out = {}
    for ink in INK:
        at = {
            c["sampler"]: c["first"]["interval"]
            for c in found
            if c["part"] == "shares" and c["ink"] == ink
        }
        if ALONE in at and "SMC" in at:
            text = (
                f"3 or 8, {ink}: what cp.infer chooses agrees with what is known of "
                "the share"
            )
            out[text] = overlap(at["SMC"], at[ALONE])
            for name in at:
                if name.startswith("reverse"):
                    apart = not overlap(at[name], at[ALONE]) and not overlap(
                        at[name], at["SMC"]
                    )
                    out[
                        f"3 or 8, {ink}: {name}: apart from both, so the summed "
                        "scores are measurably wrong"
                    ] = apart
    return out


def picture(found: list[dict[str, Any]], file: Path) -> None:
    """Every sampler's share with its interval, beside the band of what is known."""
    shown = {
        ink: [c for c in found if c["part"] == "shares" and c["ink"] == ink]
        for ink in INK
    }
    shown = {
        ink: cells
        for ink, cells in shown.items()
        if len(cells) > 1 and cells[0]["sampler"] == ALONE
    }
    if not shown:
        return
    with style():
        figure = new_figure(7, 2.6 * len(shown))
        for ax, (ink, (band, *others)) in zip(
            figure.subplots(len(shown), squeeze=False)[:, 0], shown.items(), strict=True
        ):
            names = [NAMES.get(c["sampler"], c["sampler"]) for c in others]
            ax.axvspan(
                *band["first"]["interval"],
                color="0.8",
                lw=0,
                label="known, from each class alone",
            )
            ax.axvline(
                WEIGHTS[0],
                color="0.5",
                ls=":",
                lw=1,
                label=f"the mixture's weight, {WEIGHTS[0]:g}",
            )
            for row, cell in enumerate(others):
                color = "tab:red" if cell["sampler"] == "SMC" else "tab:blue"
                first = cell["first"]
                ax.plot(first["interval"], [row, row], color=color, lw=2)
                ax.plot(first["share"], row, "o", color=color)
            ax.set_yticks(range(len(names)), names)
            ax.invert_yaxis()
            ax.set_xlabel(
                f"share of 3 among {ink} images of a 3 or an 8 (95 % intervals)"
            )
            ax.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                ncols=2,
                frameon=False,
                fontsize=8,
            )
    figure.savefig(file, dpi=110)


def overlap(one: Any, other: Any) -> bool:
    """Return whether two intervals have a point in common."""
    return max(one[0], other[0]) <= min(one[1], other[1])
