"""Instances of the tall-data benchmark: their exact draws, and times of the papers'
schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tall import exact, instances


@pytest.mark.parametrize("toy", ["gaussian", "mixture"])
def test_exact_draws_have_the_score_of_the_product(toy):
    """E[score] = 0 and E[(θ − E θ)·score] = −1 in every entry."""
    n, count = 3, 4000
    instance = instances.TOYS[toy](3, n, 0.0, 0)
    draws = exact.exact_draws(instance, np.random.default_rng(0), count)

    def log_density(theta):
        each = [
            instances.log_posterior(
                instance,
                theta,
                (jnp.asarray(w), jnp.asarray(m)),
                jnp.array(1.0),
                jnp.array(0.0),
            )
            for w, m in zip(instance.log_weights, instance.means, strict=True)
        ]
        prior = -0.5 * jnp.sum(
            (theta - instance.prior_mean) ** 2 / instance.prior_variance
        )
        return sum(each) + (1 - n) * prior

    with jax.enable_x64(True):
        score = np.asarray(jax.jit(jax.vmap(jax.grad(log_density)))(jnp.asarray(draws)))
    for moment in (score, 1 + (draws - draws.mean(0)) * score):
        assert np.all(np.abs(moment.mean(0)) < 4.5 * moment.std(0) / np.sqrt(count))


def test_writing_out_and_gibbs_sampling_agree():
    instance = instances.mixture(3, 6, 0.0, 0)
    rng = np.random.default_rng(1)
    one, other, third = (
        make(instance, rng, 1000)
        for make in (exact._enumerated, exact._enumerated, exact._gibbs)
    )
    assert exact.max_sliced(one, third, 300) < 2 * exact.max_sliced(one, other, 300)


def test_the_time_of_a_log_snr():
    log_snr = jnp.array([-10.0, -1.0, 4.0])
    np.testing.assert_allclose(
        instances.signal(instances.time_of(log_snr)), jax.nn.sigmoid(log_snr), rtol=1e-4
    )
