"""Simulators: their draws have the density that they state."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from composeprob.models.worlds import slcp, two_moons


def test_slcp_is_four_points_of_a_gaussian():
    theta = jnp.array([0.5, -1.0, 1.2, -0.7, 0.9])
    a, b, r = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
    covariance = np.array([[a**2, r * a * b], [r * a * b, b**2]])
    x = np.linspace(-2.0, 2.0, 8)
    wanted = stats.multivariate_normal(theta[:2], covariance).logpdf(x.reshape(4, 2)).sum()
    np.testing.assert_allclose(jax.jit(slcp.log_likelihood)(theta, x), wanted, rtol=1e-5)
    draws = jax.jit(slcp.simulate)(jax.random.key(0), jnp.tile(theta, (5000, 1))).reshape(-1, 2)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.06)
    np.testing.assert_allclose(draws.mean(0), theta[:2], atol=0.05)


def test_the_density_of_two_moons_is_normalised_and_holds_the_draws():
    theta = jnp.array([0.3, -0.6])
    draws = jax.jit(two_moons.simulate)(jax.random.key(1), jnp.tile(theta, (2000, 1)))
    side = np.linspace(0, 0.3, 400)
    corner = draws.mean(0) - 0.15
    grid = jnp.stack(jnp.meshgrid(corner[0] + side, corner[1] + side), -1).reshape(-1, 2)
    density = jax.jit(jax.vmap(lambda x: jnp.exp(two_moons.log_likelihood(theta, x))))
    np.testing.assert_allclose(density(grid).sum() * (side[1] - side[0]) ** 2, 1.0, rtol=0.01)
    assert jnp.all(density(draws) > 0)
    np.testing.assert_allclose(draws.mean(0), (grid * density(grid)[:, None]).sum(0) / density(grid).sum(), atol=0.01)
