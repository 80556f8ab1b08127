"""The leapfrog map is reversible, preserves volume, and errs in energy by O(h²); the ratio of MALA's proposals, written
without cancellation, is the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from composeprob import pytree
from composeprob.kernels import UHMC, ULA, HamiltonianState, KernelState
from composeprob.kernels.langevin import log_proposal_ratio
from kernel_chains import driven
from targets import evaluate, two_modes

TARGET = evaluate(two_modes(2).log_density)


@jax.jit
def flow(position, momentum, step_size, num_steps):
    """UHMC that draws its whole momentum anew, where the draw is ``momentum``."""
    state = HamiltonianState(position, TARGET(position), jnp.zeros_like(momentum))
    end, _ = driven(UHMC(0.1, damping=0.0), momentum, state, TARGET, step_size, num_steps)
    return end.position, end.momentum


@jax.jit
def jacobian(position, momentum, step_size):
    both = lambda z: jnp.concatenate(flow(z[:2], z[2:], step_size, 5))
    return jax.jacfwd(both)(jnp.concatenate([position, momentum]))


points = st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=2).map(lambda v: np.array(v, np.float64))
steps = st.floats(0.01, 0.3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(points, points, steps, st.integers(1, 20))
def test_reversible(x, v, h, num_steps):
    with jax.enable_x64(True):
        end, momentum = flow(x, v, h, num_steps)
        back, flipped = flow(end, -momentum, h, num_steps)
        again, _ = flow(end, momentum, -h, num_steps)
    np.testing.assert_allclose(back, x, atol=1e-8)
    np.testing.assert_allclose(-flipped, v, atol=1e-8)
    np.testing.assert_allclose(again, x, atol=1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(points, points, steps)
def test_preserves_volume(x, v, h):
    with jax.enable_x64(True):
        matrix = jacobian(x, v, h)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, rtol=1e-8)


def test_energy_error_is_of_second_order():
    with jax.enable_x64(True):
        key = jax.random.key(0)
        x, v = two_modes(2).draw(key, 200).astype(float), jax.random.normal(jax.random.key(1), (200, 2))
        energy = jax.jit(jax.vmap(lambda x, v: -TARGET(x).log_density + 0.5 * pytree.squared_norm(v)))
        errors = []
        for refine in (1, 2, 4, 8):
            end = jax.vmap(flow, (0, 0, None, None))(x, v, 0.2 / refine, 5 * refine)
            errors.append(float(jnp.sqrt(jnp.mean((energy(*end) - energy(x, v)) ** 2))))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders[1:] - 2) < 0.1), orders


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
