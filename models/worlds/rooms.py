"""Walks through a row of rooms, each joined to the next by one door.

Rooms are 1 wide and HEIGHT high. Someone goes from the left end to the right, through
each door near its middle and past one random place in each room, along a line with
rounded corners, at a random speed that varies slowly. A walk is a short section of this
path, whose points are at equal times.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

POINTS = 24
"""Number of points of a walk that is learned."""
ROOMS = 9
HEIGHT = 2.0
"""Number and height of rooms. They are 1 wide; the row is centred on the origin."""
THICK = 0.2
DOOR = 0.5
"""Thickness of a wall between rooms, and width of its door."""
HIGHEST = 0.65
"""The height of a door's middle is uniform between minus and plus this."""
SLOWEST = 0.06
FASTEST = 0.11
VARIES = 0.15
"""A walker's mean speed is uniform between the first two; the third is the relative
amplitude of its variation."""
LONGEST = FASTEST * (1 + VARIES) + 0.02
"""Bound of the length of a step."""
JITTER = 0.004
"""Standard deviation of each position about the line, in each coordinate."""
ENDS = 0.8
"""Greatest distance from the line of a walk's nominal start or end.

A walk that would begin before the line, or end after it, begins or ends with it.
"""
SWAY = 0.1
"""Greatest distance of a path from the middle of a door."""
ROUND = 0.12
"""Length of line, to either side, over which it is averaged: this rounds corners."""

REACH = 0.1
"""Greatest distance of the end of a plan from a goal that it has reached."""

WALLS = np.arange(1, ROOMS) - ROOMS / 2
"""x of the walls with doors."""


def doors(key: Array) -> Array:
    """Draw the height of the middle of each door, shape (ROOMS − 1,)."""
    return jax.random.uniform(key, WALLS.shape, minval=-HIGHEST, maxval=HIGHEST)


def walk(key: Array, doors: Array, points: int = POINTS) -> Array:
    """Draw one walk (points, 2) through rooms with these doors."""
    keys = jax.random.split(key, 5)
    line = _line(keys[0], doors)
    lengths = jnp.linalg.norm(jnp.diff(line, axis=0), axis=1)
    along = jnp.concatenate([jnp.zeros(1), jnp.cumsum(lengths)])
    speed = jax.random.uniform(keys[1], minval=SLOWEST, maxval=FASTEST)
    phase, period = jax.random.uniform(
        keys[2],
        (2,),
        minval=jnp.array([0.0, 12.0]),
        maxval=jnp.array([2 * jnp.pi, 40.0]),
    )
    swing = jnp.sin(phase + 2 * jnp.pi * jnp.arange(points - 1) / period)
    walked = jnp.concatenate([jnp.zeros(1), jnp.cumsum(speed * (1 + VARIES * swing))])
    longest = along[-1] - walked[-1]
    begin = jax.random.uniform(keys[3], minval=-ENDS, maxval=longest + ENDS)
    at = walked + jnp.clip(begin, 0.0, longest)
    near = at[:, None] + jnp.linspace(-ROUND, ROUND, 7)
    rounded = [jnp.interp(near, along, line[:, axis]).mean(1) for axis in (0, 1)]
    x = jnp.stack(rounded, axis=-1)
    return x + JITTER * jax.random.normal(keys[4], x.shape)


def _line(key: Array, doors: Array) -> Array:
    """Draw the corners of the line from the left end to the right, (3·ROOMS − 2, 2)."""
    places_key, sway_key = jax.random.split(key)
    unit = jax.random.uniform(places_key, (ROOMS, 2), minval=-1.0)
    places = unit * jnp.array([0.2, 0.4 * HEIGHT])
    places = places.at[:, 0].add(np.arange(ROOMS) + 0.5 - ROOMS / 2)
    unit = jax.random.uniform(sway_key, (ROOMS - 1, 2), minval=-1.0)
    sway = doors[:, None] + SWAY * unit
    # Before and behind each wall, at the height of its door.
    x = jnp.asarray(WALLS)[:, None] + jnp.array([-0.25, 0.25])
    beside = jnp.stack([x, sway], axis=-1)
    stops = jnp.concatenate([places[:-1, None], beside], axis=1).reshape(-1, 2)
    return jnp.concatenate([stops, places[-1:]])


def rectangles(doors: np.ndarray) -> np.ndarray:
    """Return the walls as rectangles (left, right, below, above), (2·ROOMS + 2, 4)."""
    half = THICK / 2
    top = HEIGHT / 2
    end = ROOMS / 2
    far = end + 1
    sides = [
        (-far, far, -top - 1, -top),
        (-far, far, top, top + 1),
        (-far, -end, -far, far),
        (end, far, -far, far),
    ]
    below = []
    above = []
    for x, y in zip(WALLS, doors, strict=True):
        below.append((x - half, x + half, -top, y - DOOR / 2))
        above.append((x - half, x + half, y + DOOR / 2, top))
    return np.array([*sides, *below, *above], np.float32)


def touches(x: np.ndarray, doors: np.ndarray, finer: int = 20) -> np.ndarray:
    """Return whether walks (…, points, 2) touch a wall between their points, shape (…).

    ``finer`` places are checked on the straight line between each two points.
    """
    share = np.linspace(0, 1, finer, endpoint=False)[:, None]
    between = x[..., :-1, None, :] * (1 - share) + x[..., 1:, None, :] * share
    before_last = between.reshape(*x.shape[:-2], -1, 2)
    places = np.concatenate([before_last, x[..., -1:, :]], axis=-2)[..., None, :]
    left, right, below, above = rectangles(doors).T
    inside = (
        (places[..., 0] > left)
        & (places[..., 0] < right)
        & (places[..., 1] > below)
        & (places[..., 1] < above)
    )
    return inside.any((-2, -1))


def places(key: Array) -> tuple[Array, Array]:
    """Draw a place (2,) in the first room and one in the last, ends of a walk."""
    unit = jax.random.uniform(key, (2, 2), minval=-1.0)
    drawn = unit * jnp.array([0.2, 0.4 * HEIGHT])
    to_the_end = jnp.array([ROOMS / 2 - 0.5, 0.0])
    return drawn[0] - to_the_end, drawn[1] + to_the_end


def succeeds(
    x: np.ndarray, doors: np.ndarray, start: np.ndarray, goal: np.ndarray
) -> np.ndarray:
    """Return whether plans (…, points, 2) lead from start to goal, shape (…).

    Such a plan comes within REACH of both, has no step longer than LONGEST, and touches
    no wall.
    """
    ends = np.stack([x[..., 0, :] - start, x[..., -1, :] - goal])
    near = (np.linalg.norm(ends, axis=-1) < REACH).all(0)
    steps = np.linalg.norm(np.diff(x, axis=-2), axis=-1).max(-1)
    return near & (steps <= LONGEST) & ~touches(x, doors)
