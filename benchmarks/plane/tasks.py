"""Compositions of models in the plane: products, a mixture and a negation."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np

import composeprob as cp
from composeprob import model_zoo
from composeprob.language.decorator import Program
from plane.truth import CLEAN, Truth, truth_of

WEIGHTS = (0.3, 0.7)
"""Shares of the left and the right bar in the mixture."""


@cp.program
def product(ring: Any, bar: Any) -> Any:
    return cp.sample("x", ring * bar)


@cp.program
def mixture(left: Any, right: Any) -> Any:
    return cp.sample("x", cp.mixture([left, right], weights=WEIGHTS))


@cp.program
def negation(box: Any, inner: Any) -> Any:
    return cp.sample("x", box**1.3 / inner**0.3)


ANGLE = np.arange(8) * np.pi / 4
RING = 0.5 * np.stack([np.cos(ANGLE), np.sin(ANGLE)], -1)
NINE = np.stack(np.meshgrid([-0.5, 0.0, 0.5], [-0.5, 0.0, 0.5]), -1).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class Task:
    """One composition.

    Attributes:
        name, title: for files and tables.
        program: takes the models in order.
        models: names in the zoo; their score-only versions have "-score" added.
        half_width: the exact law lies in the square of this half-width.
        centres: centres of the modes.
        finest: log-SNR of level 0 of the levels that are even in log-SNR.
        retrainings: how often the models were trained.
    """

    name: str
    title: str
    program: Program
    models: tuple[str, ...]
    half_width: float
    centres: np.ndarray
    finest: float = 9.5
    retrainings: int = 1
    kinds: tuple[str, ...] = ("energy", "score")

    def factors(self, kind: str, retraining: int = 0) -> list[Any]:
        """Factors to compose: ``"exact"``, or models of ``"energy"`` or ``"score"``."""
        if kind == "exact":
            return [
                cp.Analytic(model_zoo.reference(name), CLEAN, label=f"exact {name}")
                for name in self.models
            ]
        suffix = "-score" if kind == "score" else ""
        options = {"retraining": retraining} if retraining else {}
        return [cp.load(name + suffix, **options) for name in self.models]

    def compile(self, kind: str, schedule: cp.Schedule, retraining: int = 0) -> Any:
        """The task's annealed density."""
        return cp.compile(
            self.program, *self.factors(kind, retraining), schedule=schedule
        )


@cache
def truth(task_name: str) -> Truth:
    """The exact law of a task."""
    task = TASKS[task_name]
    return truth_of(task.compile("exact", CLEAN), task.half_width, task.centres)


TASKS = {
    task.name: task
    for task in (
        Task(
            "sharp-product",
            "Product: narrow ring (sd 0.03) × bar with a floor",
            product,
            ("ring2d-sharp", "softbar2d"),
            1.1,
            RING,
            finest=11.0,
            retrainings=5,
        ),
        Task(
            "product",
            "Product: ring (sd 0.075) × bar",
            product,
            ("ring2d", "bar2d"),
            1.1,
            RING,
        ),
        Task(
            "mixture",
            "Mixture: 0.3 left bar + 0.7 right bar",
            mixture,
            ("bar2d-left", "bar2d-right"),
            1.1,
            np.array([[-0.5, 0.0], [0.5, 0.0]]),
            kinds=("energy",),
        ),
        Task(
            "negation",
            "Negation: box^1.3 / inner box^0.3",
            negation,
            ("box2d", "softbox2d"),
            0.8,
            NINE,
        ),
    )
}
