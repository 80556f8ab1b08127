"""Parts (b) and (e), digits: guidance by a classifier and without one, and the shares
of a mixture of two classes.

A support-vector machine judges, trained on images that neither the model nor its
classifier saw.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from scipy import linalg

import composeprob as cp
from composeprob.models.worlds import digits as world

from .cells import Cell, share

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

SHOWN = 8
SCALES = {"classifier": (1.0, 3.0, 8.0), "classifier-free": (1.0, 2.0, 4.0)}
PAIRS = ((3, 8), (4, 9), (0, 1))
SHARE = 0.2
SAMPLERS = {
    "reverse": cp.Ancestral(),
    "MALA": cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=FIRST_ORDER),
    "HMC": cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), 3), 1, reverse_step=FIRST_ORDER),
    "SMC": cp.SMC(cp.MALA(cp.Adaptive())),
}


@cp.program
def digit(factor: Any) -> Any:
    return cp.sample("x", factor)


def cells(chains: int) -> Iterator[Cell]:
    """Guidance of every class, then mixtures of two."""
    for kind, scales in SCALES.items():
        for scale in scales:
            for name in SAMPLERS:
                settings = {"by": kind, "scale": scale, "sampler": name}
                yield Cell(
                    "guided",
                    settings,
                    lambda k=kind, s=scale, n=name: guided(k, s, n, chains),
                )
    for pair in PAIRS:
        for name in SAMPLERS:
            settings = {"classes": f"{pair[0]} and {pair[1]}", "sampler": name}
            yield Cell(
                "mixed", settings, lambda p=pair, n=name: mixed(p, n, 10 * chains)
            )


def guided(
    kind: str, scale: float, sampler: str, chains: int
) -> tuple[dict[str, Any], np.ndarray]:
    """As many images of each class: the share that the judge recognises, and how far
    from real ones they are."""
    model, classifier = cp.load("digits"), cp.load("digits-classifier")
    images, seconds = [], 0.0
    for label in range(world.CLASSES):
        if kind == "classifier":
            factor = cp.condition(model, classifier, label, scale)
        else:
            factor = cp.guide(model, scale, label=label)
        drawn, took = sample(factor, sampler, label, chains)
        images.append(drawn)
        seconds += took
    labels = np.repeat(np.arange(world.CLASSES), chains)
    measured = {
        "images": len(labels),
        "recognised": share(world.judge(np.concatenate(images)) == labels),
        "distance": frechet(np.concatenate(images)),
        "seconds": round(seconds, 1),
    }
    return measured, np.stack([part[0] for part in images][:SHOWN])


def mixed(
    pair: tuple[int, int], sampler: str, chains: int
) -> tuple[dict[str, Any], np.ndarray]:
    """The share of the first class in a mixture that gives it `SHARE`."""
    parts = [cp.load("digits", label=label) for label in pair]
    drawn, seconds = sample(
        cp.mixture(parts, weights=[SHARE, 1 - SHARE]), sampler, 0, chains
    )
    judged = world.judge(drawn)
    either = np.isin(judged, pair)
    first = share(judged[either] == pair[0])
    measured = {
        "images": chains,
        "first": first,
        "neither": float(1 - either.mean()),
        "seconds": round(seconds, 1),
    }
    return measured, drawn[:SHOWN]


def sample(
    factor: Any, sampler: str, seed: int, chains: int
) -> tuple[np.ndarray, float]:
    """Images of a factor, and the seconds that they took."""
    start = time.monotonic()
    density = cp.compile(digit, factor)
    result = cp.infer(
        density,
        jax.random.key(seed),
        num_chains=chains,
        sampler=SAMPLERS[sampler],
        progress=False,
    )
    return result.unweighted()["x"], time.monotonic() - start


def real() -> tuple[np.ndarray, np.ndarray]:
    """The real images of the models and of the judge, in the units of samples."""
    learned, other = (
        (half.images / (world.COUNTS / 2) - 1)[..., None] for half in world.split()
    )
    return learned, other


def floor() -> float:
    """The distance of one half of the real images from the other."""
    return frechet(real()[1])


def frechet(images: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to the judge's ten decision values, of these
    images and the model's data."""
    ours = world.decisions(images)
    theirs = world.decisions(real()[0])
    a, b = np.cov(ours.T), np.cov(theirs.T)
    root = linalg.sqrtm(a @ b).real
    return float(
        ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    )
