"""Plans through nine rooms from a model of short walks.

It counts how many of 100 reach the goal without touching a wall.

    python -m benchmarks planning

The program is that of examples/planning.py: the model (`rooms` of the zoo) knows walks
of 24 points, none longer than a third of the row of rooms, and a plan of 216 points is
made of 13 windows. Each of 100 tasks has doors, a start in the first room and a goal in
the last of its own. A plan succeeds if it ends within 0.1 of start and goal, if none of
its steps is longer than the longest that a walk can make, and if it touches no wall at
any of 20 places between each two of its points. Exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import publish

import composeprob as cp
from composeprob.cli.programs import load_program
from composeprob.models.rooms.train import data
from composeprob.models.worlds import rooms

TASKS = 100
plan, example = load_program(
    str(Path(__file__).resolve().parents[1] / "examples" / "planning.py")
)
LEVELS = example.levels
"""log-SNR: most of them are where the plan takes shape."""
FINE = np.interp(
    np.linspace(0, len(LEVELS) - 1, 33 * len(LEVELS)), np.arange(len(LEVELS)), LEVELS
)
"""As many levels as the composed plan takes evaluations."""
WAYS = {
    "composed: 31 steps of UHMC a level": (example.sampler, LEVELS),
    "summed scores: reverse diffusion": (cp.Ancestral(), LEVELS),
    "summed scores: reverse diffusion, as many evaluations": (cp.Ancestral(), FINE),
}
COLUMNS = (
    "method",
    "tasks",
    "plans that succeed",
    "no wall touched",
    "steps of a walk",
    "evaluations",
    "seconds a plan",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of one planner."""

    method: str
    tasks: int
    succeed: float
    free: float
    steps: float
    evaluations: int
    seconds: float

    def as_text(self) -> list[str]:
        """The row's cells."""
        shares = [
            f"{self.free:.2f}",
            f"{self.steps:.2f}",
            f"{self.evaluations:,}",
            f"{self.seconds:.2f}",
        ]
        return [
            self.method,
            str(self.tasks),
            f"{round(self.succeed * self.tasks)} of {self.tasks}",
            *shares,
        ]


@cp.program
def stretch(walk, doors):
    """One walk of the model."""
    return cp.sample("x", walk.given(doors=doors))


def task(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Doors, start and goal."""
    doors_key, places_key = jax.random.split(jax.random.key(number))
    start, goal = rooms.places(places_key)
    return np.asarray(rooms.doors(doors_key)), np.asarray(start), np.asarray(goal)


def judged(
    method: str, plans: np.ndarray, tasks: list, evaluations: int, seconds: float
) -> Row:
    """A row from plans (tasks, points, 2); short walks have no goal, and are judged by
    where they end themselves."""
    good, free = [], []
    for x, (doors, start, goal) in zip(plans, tasks, strict=True):
        ends = (start, goal) if len(x) == example.LENGTH else (x[0], x[-1])
        good.append(rooms.succeeds(x, doors, *ends))
        free.append(not rooms.touches(x, doors))
    steps = np.linalg.norm(np.diff(plans, axis=1), axis=-1).max(-1) <= rooms.LONGEST
    row = Row(
        method,
        len(tasks),
        *(float(np.mean(each)) for each in (good, free, steps)),
        evaluations,
        seconds,
    )
    print("  ".join(row.as_text()), flush=True)
    return row


def drawn(
    method: str,
    tasks: list,
    walk: cp.Factor,
    sampler: cp.Sampler,
    levels: np.ndarray | None,
) -> Row:
    """One plan for each task; or one walk, where no levels are given. The first is made
    twice: once to compile."""
    plans, seconds = [], []
    for number, (doors, start, goal) in enumerate([tasks[0], *tasks]):
        density = (
            cp.compile(stretch, walk, doors)
            if levels is None
            else cp.compile(plan, walk, doors, start, goal)
        )
        began = time.monotonic()
        key = jax.random.key(number)
        result = cp.infer(
            density, key, num_chains=1, sampler=sampler, levels=levels, progress=False
        )
        seconds.append(time.monotonic() - began)
        plans.append(np.asarray(result["x"])[0])
    return judged(
        method,
        np.stack(plans[1:]),
        tasks,
        result.evaluations,
        float(np.median(seconds[1:])),
    )


def main() -> int:
    walk = example.walk
    tasks = [task(number) for number in range(TASKS)]
    keys = jax.random.split(jax.random.key(TASKS), TASKS)
    known = np.asarray(
        jax.vmap(rooms.walk)(keys, jnp.stack([doors for doors, *_ in tasks]))
    )
    rows = [
        judged("a walk of training (floor)", known, tasks, 0, 0.0),
        drawn("the model alone: reverse diffusion", tasks, walk, cp.Ancestral(), None),
        *(drawn(method, tasks, walk, *way) for method, way in WAYS.items()),
    ]
    composed, *summed = rows[2:]
    many = jax.vmap(data, (0, None))(jax.random.split(jax.random.key(0), 10), 1000)[0]
    longest = float(
        np.linalg.norm(np.diff(np.asarray(many), axis=2), axis=-1).sum(-1).max()
    )
    checks = {
        "composed: ≥ 95 of 100 plans succeed": composed.succeed >= 0.95,
        "summed scores: at most half as many": max(row.succeed for row in summed)
        <= 0.5 * composed.succeed,
        "the row of rooms is three times as long as any of 10,000 walks of training": 3
        * longest
        <= rooms.ROOMS,
    }
    notes = (
        "One plan a task. An evaluation of the program evaluates the network once "
        f"for each of its {example.WINDOWS} windows. Seconds leave out compilation. "
        "Walks of training and of the model alone have no goal: walls and steps "
        f"judge them. The longest of 10,000 walks of training is {longest:.2f} long, "
        f"the row of rooms {rooms.ROOMS}."
    )
    details = {
        "longest walk": longest,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    title = "Plans from short walks: how many reach the goal without touching a wall"
    return publish(
        "planning",
        title,
        list(COLUMNS),
        [row.as_text() for row in rows],
        checks,
        details,
        notes,
    )


if __name__ == "__main__":
    sys.exit(main())
