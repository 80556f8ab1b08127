"""Part (c): do scenes satisfy a formula of captions? AND, OR, and one caption AND NOT
another.

Each formula is made from a true scene, so that it can be satisfied: AND and OR take two
of its objects, described by colour, shape and place; NOT takes one of them, and a
colour or a shape that the scene lacks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import composeprob as cp
from composeprob.models.worlds import captions, detector, shapes

from .cells import Cell, share
from .drawn import draw
from .placed import samplers

MODEL = "shapes-caption"
FORMULAS = ("AND", "OR", "NOT")
NAMES = ("reverse", "MALA", "HMC")
FORMULAS_KEY = 7
STRENGTH = 6.0
"""The power of what a caption says; its number b is a log-ratio of a few nats."""
SHOWN = 8
WORLD = 20_000
"""True scenes by which the chance of a formula is counted."""


@cp.program
def scene(scenes: Any, formula: str, first: Any, second: Any, strength: float) -> Any:
    one, other = scenes.given(caption=first), scenes.given(caption=second)
    said = {
        "AND": lambda: (one / scenes) ** strength * (other / scenes) ** strength,
        "OR": lambda: (
            (cp.mixture([one, other], log_weights=[0.0, 0.0]) / scenes) ** strength
        ),
        "NOT": lambda: (one / scenes) ** strength / (other / scenes) ** strength,
    }
    return cp.sample("x", scenes * said[formula]())


def holds(formula: str, first: str, second: str, found: Any) -> np.ndarray:
    """Return whether the objects found in n images satisfy a formula, shape (n,)."""
    one, other = captions.true_of(first, found), captions.true_of(second, found)
    return {"AND": one & other, "OR": one | other, "NOT": one & ~other}[formula]


def cells(scenes: int) -> Iterator[Cell]:
    """All cells."""
    if MODEL not in cp.zoo():
        return
    for formula in FORMULAS:
        for name in NAMES:
            settings = {"formula": formula, "sampler": name, "w": STRENGTH}
            yield Cell(
                "captions",
                settings,
                functools.partial(measure, formula, name, scenes, STRENGTH),
            )


def measure(
    formula: str, sampler: str, scenes: int, strength: float
) -> tuple[dict[str, Any], np.ndarray]:
    """One cell: as many scenes, each of a formula of its own, the same formulas for
    every sampler."""
    model = cp.load(MODEL)
    pairs = formulas(formula, scenes)
    world = _world()
    densities = (cp.compile(scene, model, formula, *pair, strength) for pair in pairs)
    drawn = draw(densities, samplers("energy")[sampler])
    found = detector.detect(drawn.images)
    true = [holds(formula, *pair, found)[i] for i, pair in enumerate(pairs)]
    measured = {
        "scenes": scenes,
        "satisfied": share(true),
        "chance": float(
            np.mean([holds(formula, *pair, world).mean() for pair in pairs])
        ),
        "seconds_a_scene": round(drawn.seconds, 2),
    }
    return measured, drawn.images[:SHOWN]


def formulas(formula: str, number: int) -> list[tuple[str, str]]:
    """Pairs of captions, from true scenes of two to five objects."""
    true = jax.device_get(shapes.draw(jax.random.key(FORMULAS_KEY), number, fewest=2))
    rng = np.random.default_rng(FORMULAS_KEY)
    return [
        _pair(formula, type(true)(*(field[i] for field in true)), rng)
        for i in range(number)
    ]


def _pair(formula: str, one: Any, rng: np.random.Generator) -> tuple[str, str]:
    first = described(one, 0, rng)
    if formula != "NOT":
        return first, described(one, 1, rng)
    lacking = [
        f"a {c} object"
        for i, c in enumerate(shapes.COLOURS)
        if i not in one.colours[: one.count]
    ]
    lacking += [
        f"a {s}"
        for i, s in enumerate(shapes.SHAPES)
        if i not in one.shapes[: one.count]
    ]
    return first, str(rng.choice(lacking))


def described(one: Any, which: int, rng: np.random.Generator) -> str:
    """Colour, shape and a place of an object of a scene."""
    holding = [bool(place) for place in captions.places(one.centres[which])]
    place = rng.choice(
        [name for name, true in zip(captions.PLACES, holding, strict=True) if true]
    )
    return (
        f"a {shapes.COLOURS[one.colours[which]]} {shapes.SHAPES[one.shapes[which]]} "
        f"{place}"
    )


@functools.cache
def _world() -> Any:
    return jax.device_get(
        jax.jit(lambda key: shapes.draw(key, WORLD))(jax.random.key(FORMULAS_KEY + 1))
    )
