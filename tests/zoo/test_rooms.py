"""Walks through rooms keep clear of walls, and plans are judged by what lies between their points too."""

import jax
import numpy as np
import pytest

from composeprob.models.worlds import rooms

DOORS = np.linspace(-0.6, 0.6, rooms.ROOMS - 1)
WALL = rooms.WALLS[3]


def test_walks_touch_no_wall_and_keep_their_pace():
    keys = jax.random.split(jax.random.key(0), 400)
    x = np.asarray(jax.jit(jax.vmap(rooms.walk, (0, None)))(keys, DOORS))
    steps = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    assert not rooms.touches(x, DOORS).any()
    assert steps.max() < rooms.LONGEST
    assert 3 * steps.sum(1).max() < rooms.ROOMS  # none is longer than a third of the row
    assert (np.diff(x[..., 0], axis=1) > -5 * rooms.JITTER).all()  # to the right
    assert np.ptp(x[..., 0]) > 0.8 * rooms.ROOMS  # and anywhere


def straight(first, last, points=20):
    """A plan of even steps."""
    return np.linspace(first, last, points)


@pytest.mark.parametrize(
    ("first", "last", "touched"),
    [
        ((WALL - 0.3, DOORS[3]), (WALL + 0.3, DOORS[3]), False),  # through the door
        ((WALL - 0.3, DOORS[3] + 0.3), (WALL + 0.3, DOORS[3] + 0.3), True),
        ((WALL - 0.3, DOORS[3] - 0.3), (WALL + 0.3, DOORS[3] - 0.3), True),
        ((WALL - 0.4, 0.9), (WALL - 0.4, 1.1), True),  # out at the top
        ((-4.3, 0.0), (-4.6, 0.0), True),
        ((4.3, 0.0), (4.6, 0.0), True),
    ],
)
def test_touching_is_seen_between_points(first, last, touched):
    for points in (2, 20):  # with two, neither lies in a wall between rooms
        assert rooms.touches(straight(first, last, points), DOORS) == touched


def test_plans_succeed_by_ends_steps_and_walls():
    first, last = np.array([WALL - 0.5, DOORS[3]]), np.array([WALL + 0.5, DOORS[3]])
    plan = straight(first, last)
    assert rooms.succeeds(plan, DOORS, first, last)
    assert not rooms.succeeds(plan, DOORS, first + np.array([0.0, 0.11]), last)
    assert not rooms.succeeds(plan, DOORS, first, last - np.array([0.11, 0.0]))
    assert not rooms.succeeds(straight(first, last, 5), DOORS, first, last)  # steps of 0.25
    assert not rooms.succeeds(plan, np.full_like(DOORS, rooms.HIGHEST), first, last)
    both = np.stack([plan, plan + np.array([0.0, 0.5])])
    np.testing.assert_array_equal(rooms.succeeds(both, DOORS, first, last), [True, False])
