"""Part (d): canvases of 96×96 pixels under 16 windows, each with a caption of its own:
is it true, and are there seams?

Windows start at 0, 21, 43 and 64 along either axis, so that neighbours overlap by 10 or
11 pixels. `counted` tells how they make a canvas: "once" (`cp.tapestry`) or "as often
as seen" (their plain product).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

import composeprob as cp
from composeprob.models.worlds import captions, detector, shapes

from . import placed
from .captioned import MODEL, STRENGTH
from .cells import Cell, share
from .drawn import draw

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

CANVAS = (96, 96, 3)
STARTS = (0, 21, 43, 64)
OFFSETS = tuple((y, x) for y in STARTS for x in STARTS)
COUNTED = {"once": cp.tapestry, "as often as seen": cp.product}
BACKGROUND = 0.3
"""Below this in every channel a pixel is background."""


def langevin(schedule: Any) -> Any:
    """As for scenes, of which a canvas has nine times the entries."""
    return placed.langevin(schedule) / 9 ** (1 / 3)


def leapfrog(schedule: Any) -> Any:
    return placed.leapfrog(schedule) / 9 ** (1 / 4)


SAMPLERS = {
    "reverse": cp.Ancestral(),
    "MALA": cp.AnnealedMCMC(cp.MALA(langevin), 1, reverse_step=FIRST_ORDER),
    "HMC": cp.AnnealedMCMC(cp.HMC(leapfrog, 3), 1, reverse_step=FIRST_ORDER),
}


@cp.program
def canvas(scenes: Any, said: list[str], strength: float, combine: Any) -> Any:
    shown = [cp.guide(scenes, strength, caption=caption) for caption in said]
    windows = [
        cp.window(factor, CANVAS, offset)
        for factor, offset in zip(shown, OFFSETS, strict=True)
    ]
    return cp.sample("x", combine(*windows))


def cells(canvases: int) -> Iterator[Cell]:
    """All cells."""
    if MODEL not in cp.zoo():
        return
    for counted in COUNTED:
        for name in SAMPLERS:
            settings = {"counted": counted, "sampler": name, "w": STRENGTH}
            yield Cell(
                "tapestry",
                settings,
                functools.partial(measure, counted, name, canvases, STRENGTH),
            )


def measure(
    counted: str, sampler: str, canvases: int, strength: float
) -> tuple[dict[str, Any], np.ndarray]:
    """One cell: as many canvases, the same captions for every sampler."""
    model = cp.load(MODEL)
    rng = np.random.default_rng(9)
    said = [[_caption(rng) for _ in OFFSETS] for _ in range(canvases)]
    combine = COUNTED[counted]
    drawn = draw(
        (cp.compile(canvas, model, ours, strength, combine) for ours in said),
        SAMPLERS[sampler],
    )
    shown = np.stack(
        [image[y : y + 32, x : x + 32] for image in drawn.images for y, x in OFFSETS]
    )
    found = detector.detect(shown)
    asked = [caption for ours in said for caption in ours]
    true = [captions.true_of(caption, found)[i] for i, caption in enumerate(asked)]
    measured = {
        "canvases": canvases,
        "satisfied": share(true),
        "seam": seam(drawn.images),
        "acceptance": drawn.acceptance,
        "seconds_a_canvas": round(drawn.seconds, 1),
    }
    return measured, drawn.images[: placed.SHOWN]


def seam(images: np.ndarray) -> float:
    """Differences of neighbouring pixels of background across a window's border over
    those elsewhere.

    It is a ratio of root mean squares, 1 without seams.
    """
    across, elsewhere = [], []
    dark = (np.abs(images) < BACKGROUND).all(-1)
    borders = {s for start in STARTS for s in (start, start + 32)} - {0, CANVAS[0]}
    for axis in (1, 2):
        step = np.diff(images, axis=axis)
        both = np.minimum(
            *(np.take(dark, range(i, dark.shape[axis] - 1 + i), axis) for i in (0, 1))
        )
        for i in range(step.shape[axis]):
            squares = np.take(step, i, axis)[np.take(both, i, axis)] ** 2
            (across if i + 1 in borders else elsewhere).append(squares.ravel())
    return float(
        np.sqrt(np.concatenate(across).mean() / np.concatenate(elsewhere).mean())
    )


def _caption(rng: np.random.Generator) -> str:
    return f"a {rng.choice(shapes.COLOURS)} {rng.choice(shapes.SHAPES)} in the middle"
