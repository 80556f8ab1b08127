"""Simulators draw from the density that they state.

Walks through rooms keep clear of walls, and plans are judged between their points too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from composeprob.models.worlds import drift_diffusion, rooms, slcp, two_moons


def test_slcp_is_four_points_of_a_gaussian():
    theta = jnp.array([0.5, -1.0, 1.2, -0.7, 0.9])
    a = theta[2] ** 2
    b = theta[3] ** 2
    r = jnp.tanh(theta[4])
    covariance = np.array([[a**2, r * a * b], [r * a * b, b**2]])
    x = np.linspace(-2.0, 2.0, 8)
    law = stats.multivariate_normal(theta[:2], covariance)
    exact = law.logpdf(x.reshape(4, 2)).sum()
    log_likelihood = jax.jit(slcp.log_likelihood)(theta, x)
    np.testing.assert_allclose(log_likelihood, exact, rtol=1e-5)
    thetas = jnp.tile(theta, (5000, 1))
    draws = jax.jit(slcp.simulate)(jax.random.key(0), thetas).reshape(-1, 2)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.06)
    np.testing.assert_allclose(draws.mean(0), theta[:2], atol=0.05)


def test_the_density_of_two_moons_is_normalised_and_holds_the_draws():
    theta = jnp.array([0.3, -0.6])
    draws = jax.jit(two_moons.simulate)(jax.random.key(1), jnp.tile(theta, (2000, 1)))
    side = np.linspace(0, 0.3, 400)
    corner = draws.mean(0) - 0.15
    axes = jnp.meshgrid(corner[0] + side, corner[1] + side)
    grid = jnp.stack(axes, -1).reshape(-1, 2)
    density = jax.jit(jax.vmap(lambda x: jnp.exp(two_moons.log_likelihood(theta, x))))
    values = density(grid)
    mass = values.sum() * (side[1] - side[0]) ** 2
    np.testing.assert_allclose(mass, 1.0, rtol=0.01)
    assert jnp.all(density(draws) > 0)
    mean = (grid * values[:, None]).sum(0) / values.sum()
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.01)


@pytest.mark.parametrize(("v", "a"), [(0.0, 1.4), (1.5, 1.4), (-6.0, 0.8)])
def test_first_passages_have_their_density_mean_and_choices(v, a):
    """The mean is a·tanh(va/2)/2v, and the share of upper choices 1/(1 + exp(−va))."""
    t0 = 0.25
    theta = jnp.array([v, np.log(a), np.log(t0)])
    grid = np.linspace(t0 + 1e-4, t0 + 8.0, 40001)

    @jax.jit
    def log_density(choice):
        def at(t):
            return drift_diffusion.log_likelihood(theta, t[None], choice[None])

        return jax.vmap(at)(jnp.asarray(grid))

    density = {}
    for choice in (0.0, 1.0):
        log_f = log_density(jnp.asarray(choice))
        density[choice] = np.exp(np.asarray(log_f, float))
    upper = 1 / (1 + np.exp(-v * a))
    np.testing.assert_allclose(np.trapezoid(density[1.0], grid), upper, atol=2e-6)
    np.testing.assert_allclose(np.trapezoid(density[0.0], grid), 1 - upper, atol=2e-6)
    mean = a * np.tanh(v * a / 2) / (2 * v) if v else a**2 / 4
    both = density[0.0] + density[1.0]
    np.testing.assert_allclose(np.trapezoid(both * grid, grid), t0 + mean, atol=2e-5)
    thetas = jnp.tile(theta, (200, 1))
    times, choices = jax.jit(drift_diffusion.trials)(jax.random.key(2), thetas)
    below = np.interp(times.ravel(), grid, np.cumsum(both) * (grid[1] - grid[0]))
    assert stats.kstest(below, "uniform").pvalue > 1e-4
    assert stats.binomtest(int(choices.sum()), choices.size, upper).pvalue > 1e-4
    assert np.all(np.diff(times, axis=1) >= 0)


def test_a_response_before_the_non_decision_time_has_no_density():
    theta = jnp.array([1.0, 0.3, np.log(0.3)])
    early = jnp.array([0.29, 0.6])
    log_f = drift_diffusion.log_likelihood(theta, early, jnp.ones(2))
    assert log_f == -jnp.inf
    possible = jnp.array([0.31, 0.6])
    gradient = jax.grad(drift_diffusion.log_likelihood)(theta, possible, jnp.ones(2))
    assert jnp.all(jnp.isfinite(gradient))


def test_summaries_do_not_depend_on_the_order_of_trials():
    theta = jnp.array([[1.0, 0.3, -1.2], [-0.5, 0.1, -1.0]])
    times, choices = drift_diffusion.trials(jax.random.key(3), theta)
    order = jax.random.permutation(jax.random.key(4), drift_diffusion.TRIALS)
    found = drift_diffusion.summaries(times[:, order], choices[:, order])
    assert found.shape == (2, drift_diffusion.SUMMARIES)
    in_order = drift_diffusion.simulate(jax.random.key(3), theta)
    np.testing.assert_allclose(found, in_order, rtol=1e-4, atol=1e-5)


DOORS = np.linspace(-0.6, 0.6, rooms.ROOMS - 1)
WALL = rooms.WALLS[3]


def test_walks_touch_no_wall_and_keep_their_pace():
    keys = jax.random.split(jax.random.key(0), 400)
    x = np.asarray(jax.jit(jax.vmap(rooms.walk, (0, None)))(keys, DOORS))
    steps = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    assert not rooms.touches(x, DOORS).any()
    assert steps.max() < rooms.LONGEST
    # None is longer than a third of the row.
    assert 3 * steps.sum(1).max() < rooms.ROOMS
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
    first = np.array([WALL - 0.5, DOORS[3]])
    last = np.array([WALL + 0.5, DOORS[3]])
    plan = straight(first, last)
    assert rooms.succeeds(plan, DOORS, first, last)
    assert not rooms.succeeds(plan, DOORS, first + np.array([0.0, 0.11]), last)
    assert not rooms.succeeds(plan, DOORS, first, last - np.array([0.11, 0.0]))
    long_steps = straight(first, last, 5)
    assert not rooms.succeeds(long_steps, DOORS, first, last)
    assert not rooms.succeeds(plan, np.full_like(DOORS, rooms.HIGHEST), first, last)
    both = np.stack([plan, plan + np.array([0.0, 0.5])])
    success = rooms.succeeds(both, DOORS, first, last)
    np.testing.assert_array_equal(success, [True, False])
