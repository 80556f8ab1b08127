"""Walks through a row of rooms, each joined to the next by one door.

Rooms are 1 wide and HEIGHT high. Someone goes from the left end to the right, through
each door near its middle and past one random place in each room, along a line with
rounded corners, at a speed of his own that varies slowly. A walk is a short part of
that, whose points come at equal times.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

POINTS = 24
"""Of a walk that is learned."""
ROOMS, HEIGHT = 9, 2.0
"""Rooms are 1 wide; the row is centred on the origin."""
THICK, DOOR = 0.2, 0.5
"""Thickness of a wall between rooms, and width of its door."""
HIGHEST = 0.65
"""The height of a door's middle is uniform between minus and plus this."""
SLOWEST, FASTEST, VARIES = 0.06, 0.11, 0.15
"""A walker's speed is uniform between the first two; it swings by the third, relative
to that."""
LONGEST = FASTEST * (1 + VARIES) + 0.02
"""No step is as long as this."""
JITTER = 0.004
"""Standard deviation of each position about the line, in each coordinate."""
ENDS = 0.8
"""Walks that would begin so far before the line, or end so far after it, begin or end
with it."""
SWAY = 0.1
"""How far from the middle of a door a walker goes through it, at most."""
ROUND = 0.12
"""Corners are rounded by averaging the line over so much of its length to either
side."""

REACH = 0.1
"""A plan that ends this near to its goal has reached it."""

WALLS = np.arange(1, ROOMS) - ROOMS / 2
"""x of the walls with doors."""


def doors(key: Array) -> Array:
    """Draws the height of the middle of each door, shape (ROOMS − 1,)."""
    return jax.random.uniform(key, WALLS.shape, minval=-HIGHEST, maxval=HIGHEST)


def walk(key: Array, doors: Array, points: int = POINTS) -> Array:
    """Draws one walk (points, 2) through rooms with these doors."""
    keys = jax.random.split(key, 5)
    line = _line(keys[0], doors)
    along = jnp.concatenate(
        [jnp.zeros(1), jnp.cumsum(jnp.linalg.norm(jnp.diff(line, axis=0), axis=1))]
    )
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
    x = jnp.stack(
        [jnp.interp(near, along, line[:, axis]).mean(1) for axis in (0, 1)], axis=-1
    )
    return x + JITTER * jax.random.normal(keys[4], x.shape)


def _line(key: Array, doors: Array) -> Array:
    """The corners of the line from the left end to the right, shape (3·ROOMS − 2,
    2)."""
    places_key, sway_key = jax.random.split(key)
    places = jax.random.uniform(places_key, (ROOMS, 2), minval=-1.0) * jnp.array(
        [0.2, 0.4 * HEIGHT]
    )
    places = places.at[:, 0].add(np.arange(ROOMS) + 0.5 - ROOMS / 2)
    sway = doors[:, None] + SWAY * jax.random.uniform(
        sway_key, (ROOMS - 1, 2), minval=-1.0
    )
    beside = jnp.stack(
        [jnp.asarray(WALLS)[:, None] + jnp.array([-0.25, 0.25]), sway], axis=-1
    )
    stops = jnp.concatenate([places[:-1, None], beside], axis=1).reshape(-1, 2)
    return jnp.concatenate([stops, places[-1:]])


def rectangles(doors: np.ndarray) -> np.ndarray:
    """The walls as rectangles (left, right, below, above), shape (2·ROOMS + 2, 4)."""
    half, top, end = THICK / 2, HEIGHT / 2, ROOMS / 2
    far = end + 1
    sides = [
        (-far, far, -top - 1, -top),
        (-far, far, top, top + 1),
        (-far, -end, -far, far),
        (end, far, -far, far),
    ]
    below = [
        (x - half, x + half, -top, y - DOOR / 2)
        for x, y in zip(WALLS, doors, strict=True)
    ]
    above = [
        (x - half, x + half, y + DOOR / 2, top)
        for x, y in zip(WALLS, doors, strict=True)
    ]
    return np.array([*sides, *below, *above], np.float32)


def touches(x: np.ndarray, doors: np.ndarray, finer: int = 20) -> np.ndarray:
    """Whether walks (…, points, 2) touch a wall anywhere between their points, shape
    (…).

    Looks at ``finer`` places on the straight line between each two points.
    """
    share = np.linspace(0, 1, finer, endpoint=False)[:, None]
    between = x[..., :-1, None, :] * (1 - share) + x[..., 1:, None, :] * share
    places = np.concatenate(
        [between.reshape(*x.shape[:-2], -1, 2), x[..., -1:, :]], axis=-2
    )[..., None, :]
    left, right, below, above = rectangles(doors).T
    inside = (
        (places[..., 0] > left)
        & (places[..., 0] < right)
        & (places[..., 1] > below)
        & (places[..., 1] < above)
    )
    return inside.any((-2, -1))


def places(key: Array) -> tuple[Array, Array]:
    """Draws a place (2,) in the first room and one in the last, where walks start and
    end."""
    drawn = jax.random.uniform(key, (2, 2), minval=-1.0) * jnp.array(
        [0.2, 0.4 * HEIGHT]
    )
    return drawn[0] - jnp.array([ROOMS / 2 - 0.5, 0.0]), drawn[1] + jnp.array(
        [ROOMS / 2 - 0.5, 0.0]
    )


def succeeds(
    x: np.ndarray, doors: np.ndarray, start: np.ndarray, goal: np.ndarray
) -> np.ndarray:
    """Which plans (…, points, 2) lead from start to goal: within REACH of both, with no
    step longer than LONGEST, which no step of a walk is, and without touching a wall.
    Shape (…)."""
    ends = np.stack([x[..., 0, :] - start, x[..., -1, :] - goal])
    near = (np.linalg.norm(ends, axis=-1) < REACH).all(0)
    steps = np.linalg.norm(np.diff(x, axis=-2), axis=-1).max(-1)
    return near & (steps <= LONGEST) & ~touches(x, doors)
