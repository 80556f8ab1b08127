"""The proposal's ratio, written without cancellation, is the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np

from composeprob.kernels import ULA, KernelState
from composeprob.kernels.langevin import log_proposal_ratio
from targets import evaluate, two_modes


def test_ratio_is_that_of_the_two_gaussian_densities():
    target = evaluate(two_modes(3).log_density)
    with jax.enable_x64(True):

        @jax.jit
        def ratios(x, h):
            current = ULA(0.3).init(jax.random.key(0), x, target)
            y = ULA(0.3).propose(jax.random.normal(jax.random.key(1), x.shape), current, h)
            proposed = KernelState(y, target(y))

            def log_q(to, origin):
                center = origin.position + h * origin.evaluation.score
                return jnp.sum(jax.scipy.stats.norm.logpdf(to.position, center, jnp.sqrt(2 * h)))

            return log_proposal_ratio(current, proposed, h), log_q(current, proposed) - log_q(proposed, current)

        found, expected = ratios(jnp.array([0.3, -0.2, 1.0]), jnp.asarray(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_ratio_is_accurate_in_float32_for_small_steps():
    target = evaluate(lambda x: -0.5 * jnp.sum(x**2))
    x = jax.random.normal(jax.random.key(0), (10_000,))
    current = ULA(1e-6).init(jax.random.key(0), x, target)
    y = ULA(1e-6).propose(jax.random.normal(jax.random.key(1), x.shape), current, jnp.float32(1e-6))
    proposed = KernelState(y, target(y))
    exact = 0.5 * (np.sum(np.float64(proposed.position) ** 2) - np.sum(np.float64(x) ** 2))
    exact += 0.25e-6 * (np.sum(np.float64(x) ** 2) - np.sum(np.float64(proposed.position) ** 2))
    np.testing.assert_allclose(log_proposal_ratio(current, proposed, jnp.float32(1e-6)), exact, atol=1e-4)
