"""CompLift's nine compositions in the plane, of exact noised factors or any others,
their targets, and their judges.

Setup and judges are those of Yu and Gao 2025 (arXiv 2505.13740, code
`rainorangelemon/complift-2d-and-clevr`): three products, three mixtures and three
negations of boxes, circles and Gaussians, of which one product and one negation are
empty. What divides is a box with a tenth of N(0, I) beside it: where both parts of a
quotient of boxes have nothing, the edges that they have by level 0's noise would be all
there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

import composeprob as cp
from composeprob.factors.factor import LeafFactor, Traits

Named = Callable[[str], cp.Factor]
"""Factors of the laws that are composed, by name."""
DEVIATION = 0.03
"""Standard deviation of each Gaussian."""
RADIUS = 0.1
WIDTH = 3 * DEVIATION
"""Distances within which a sample counts as right: from an intersection or a circle,
and from a Gaussian's centre along each axis."""
NEGATED = 0.5
"""Power of a divisor: the temperature of CompLift's authors."""
EIGHT = 0.5 * np.stack(
    [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1
)
SIX = [np.array([[x, 0.5], [x, 0.0], [x, -0.5]]) for x in (-0.25, 0.25)]
TWO = np.array([[0.0, 0.5], [0.0, -0.5]])
MEETING = np.array([[0.0, 0.5], [0.0, -0.5]]) * np.sqrt(3)
LEFT, RIGHT = ([-1.0, -1.0], [-0.5, 1.0]), ([0.5, -1.0], [1.0, 1.0])
WHOLE, INNER, STRIP, BAR = (
    ([-x, -y], [x, y]) for x, y in ((1.0, 1.0), (0.5, 0.5), (0.5, 2.0), (0.1, 1.0))
)
BOXES = {
    "left": LEFT,
    "right": RIGHT,
    "whole": WHOLE,
    "inner": INNER,
    "strip": STRIP,
    "bar": BAR,
}
GAUSSIANS = {"eight": EIGHT, "left three": SIX[0], "right three": SIX[1]}
CIRCLES = {"left circle": [-0.5, 0.0], "right circle": [0.5, 0.0]}
LAWS = (*BOXES, *GAUSSIANS, *CIRCLES)
"""Laws that are composed: uniform on boxes, equal shares of each Gaussian, uniform on
circles of radius 1."""


class Circle(LeafFactor):
    """The uniform law on a circle of radius 1, noised exactly: with m = α and r the
    distance from its centre α·c, f = exp(−(r − m)²/(2σ²))·e⁻ᶻI₀(z)/(2πσ²), z =
    r·m/σ²."""

    centre: Any
    schedule: cp.Schedule
    event_shape: tuple[int, ...] = eqx.field(static=True)
    fixed: Mapping[str, Array]
    label: str = eqx.field(static=True)

    def __init__(self, centre: Any, schedule: cp.Schedule, label: str):
        self.centre = jnp.asarray(centre)
        self.schedule = schedule
        self.event_shape = (2,)
        self.fixed = {}
        self.label = label

    @property
    def traits(self) -> Traits:
        return Traits(Traits.EXACT, "any")

    def evaluate(
        self, x: Array, noise: Any, conditions: Mapping[str, Array]
    ) -> tuple[Array | None, Array]:
        def log_density(x: Array) -> Array:
            r = jnp.sqrt(jnp.sum((x - noise.alpha * self.centre) ** 2) + 1e-12)
            scaled = jnp.log(jax.scipy.special.i0e(r * noise.alpha / noise.sigma**2))
            return (
                scaled
                - (r - noise.alpha) ** 2 / (2 * noise.sigma**2)
                - jnp.log(2 * jnp.pi * noise.sigma**2)
            )

        return jax.value_and_grad(log_density)(x)


def exact(schedule: cp.Schedule) -> Named:
    """Each law, noised exactly."""

    def factor(name: str) -> cp.Factor:
        if name in CIRCLES:
            return Circle(CIRCLES[name], schedule, name)
        if name in BOXES:
            low, high = (jnp.array(corner) for corner in BOXES[name])
            return cp.Analytic(
                dist.Uniform(low, high).to_event(1), schedule, label=name
            )
        centres = jnp.asarray(GAUSSIANS[name])
        shares = dist.Categorical(jnp.full(len(centres), 1 / len(centres)))
        parts = dist.Normal(centres, DEVIATION).to_event(1)
        return cp.Analytic(dist.MixtureSameFamily(shares, parts), schedule, label=name)

    return factor


def bounded(f: cp.Factor) -> cp.Factor:
    wide = cp.Analytic(
        dist.Normal(jnp.zeros(2), 1.0).to_event(1), f.schedule, label="floor"
    )
    return cp.mixture([f, wide], weights=[0.9, 0.1])


def inside(x: np.ndarray, corners: Any) -> np.ndarray:
    """Mask of the samples (n, 2) that lie in a box."""
    return np.asarray(((x >= corners[0]) & (x <= corners[1])).all(1))


def near(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Mask of the samples that lie in the square of three standard deviations around
    one of the centres."""
    return np.any([inside(x, (c - WIDTH, c + WIDTH)) for c in centres], axis=0)


def ring(rng: np.random.Generator, n: int, x: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle) + x, np.sin(angle)], 1)


def scattered(rng: np.random.Generator, n: int, centres: np.ndarray) -> np.ndarray:
    return np.asarray(
        centres[rng.integers(len(centres), size=n)]
        + DEVIATION * rng.normal(size=(n, 2))
    )


def uniform(rng: np.random.Generator, n: int, *boxes: Any) -> np.ndarray:
    """Draws of the uniform law on boxes of one size."""
    low, high = np.array(boxes)[rng.integers(len(boxes), size=n)].swapaxes(0, 1)
    return np.asarray(rng.uniform(low, high))


FRAME = (
    ([-1.0, -1.0], [-0.5, 0.5]),
    ([-0.5, -1.0], [1.0, -0.5]),
    ([-1.0, 0.5], [0.5, 1.0]),
    ([0.5, -0.5], [1.0, 1.0]),
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One composition.

    Attributes:
        says: for the table.
        factor: the composed factor, of those that a function gives by name.
        right: which samples (n, 2) lie where the target does; None where it is empty.
        draw: ``draw(rng, n)``, draws of the target; None where it is empty.
    """

    says: str
    factor: Callable[[Named], cp.Factor]
    right: Callable[[np.ndarray], np.ndarray] | None = None
    draw: Callable[[np.random.Generator, int], np.ndarray] | None = None

    @property
    def empty(self) -> bool:
        return self.draw is None


def on_circles(x: np.ndarray) -> np.ndarray:
    """Their judge leaves out the absolute value, and counts all that lies inside of a
    circle."""
    return np.any(
        [np.abs(np.hypot(x[:, 0] - c, x[:, 1]) - 1) <= RADIUS for c in (-0.5, 0.5)],
        axis=0,
    )


NINE = {
    "product a": Scenario(
        "ring of 8 Gaussians × bar",
        lambda f: f("eight") * f("bar"),
        lambda x: near(x, TWO),
        lambda rng, n: scattered(rng, n, TWO),
    ),
    "product b": Scenario(
        "circle × circle",
        lambda f: f("left circle") * f("right circle"),
        lambda x: np.linalg.norm(x[:, None] - MEETING, axis=-1).min(1) <= RADIUS,
        lambda rng, n: MEETING[rng.integers(2, size=n)],
    ),
    "product c": Scenario(
        "box × box, disjoint: empty", lambda f: f("left") * f("right")
    ),
    "summation a": Scenario(
        "3 Gaussians or 3 Gaussians",
        lambda f: cp.mixture([f("left three"), f("right three")]),
        lambda x: near(x, np.concatenate(SIX)),
        lambda rng, n: scattered(rng, n, np.concatenate(SIX)),
    ),
    "summation b": Scenario(
        "box or box",
        lambda f: cp.mixture([f("left"), f("right")]),
        lambda x: inside(x, LEFT) | inside(x, RIGHT),
        lambda rng, n: uniform(rng, n, LEFT, RIGHT),
    ),
    "summation c": Scenario(
        "circle or circle",
        lambda f: cp.mixture([f("left circle"), f("right circle")]),
        on_circles,
        lambda rng, n: np.concatenate(
            [ring(rng, n // 2, -0.5), ring(rng, n - n // 2, 0.5)]
        ),
    ),
    "negation a": Scenario(
        "box, not the box inside",
        lambda f: f("whole") / bounded(f("inner")) ** NEGATED,
        lambda x: np.any([inside(x, part) for part in FRAME], axis=0),
        lambda rng, n: uniform(rng, n, *FRAME),
    ),
    "negation b": Scenario(
        "box, not the strip",
        lambda f: f("whole") / bounded(f("strip")) ** NEGATED,
        lambda x: inside(x, LEFT) | inside(x, RIGHT),
        lambda rng, n: uniform(rng, n, LEFT, RIGHT),
    ),
    "negation c": Scenario(
        "box, not the box around it: empty",
        lambda f: f("inner") / bounded(f("whole")) ** NEGATED,
    ),
}


@cp.program
def single(f: Any) -> None:
    cp.sample("x", f)


def chamfer(x: np.ndarray, y: np.ndarray) -> float:
    """Mean distance to the nearest of the other samples, x to y and y to x, added."""
    from scipy.spatial import cKDTree

    return float(cKDTree(y).query(x)[0].mean() + cKDTree(x).query(y)[0].mean())
