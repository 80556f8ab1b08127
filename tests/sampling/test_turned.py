"""The reverse step turned round: for Gaussians, whose weights the control makes even, it is Bayes' rule for the step.

F_k is N(m, (c + s)/P) in y = x/α there, and so are chains after a step, since none weighs more than another.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.samplers.control import fixed_gain
from composeprob.samplers.fit import Fit
from composeprob.samplers.fitted import Flow
from composeprob.samplers.turned import Turned, scale

SCHEDULE = cp.Schedule.log_snr(40)
LEVELS = (jnp.asarray(20), jnp.asarray(19))


@cp.program
def powered(f, power):
    cp.sample("x", f**power)


def product(power, dims=2):
    factor = cp.Analytic(dist.Normal(jnp.zeros(dims), 1.0).to_event(1), SCHEDULE)
    return cp.compile(powered, factor, power)


def ideal(density, level, power, covariance, mean):
    """The fit whose control, with the fixed one, is (P − 1)/2·(c + s)⁻¹·(y − m), for both halves."""
    noise = density.schedule.at(level)
    s = scale(density, level)[1]
    whole = 0.5 * (power - 1) * np.linalg.inv(covariance + s * np.eye(len(mean)))
    gain = whole - noise.alpha**2 * float(fixed_gain(power, noise)) * np.eye(len(mean))
    centre = jnp.zeros(len(mean))
    both = lambda a: jnp.asarray(np.stack([a, a]), jnp.float32)
    return Fit(centre, None, both(gain), both(-whole @ mean))


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0, 20.0])
def test_of_powers_of_the_unit_normal(power):
    density = product(power)
    law = Turned.between(density, *LEVELS, None, True)
    s1, s0 = (float(scale(density, level)[1]) for level in LEVELS)
    ratio = (1 + s0) / (1 + s1)
    np.testing.assert_allclose(law.decay, ratio ** ((power - 1) / 2), rtol=0.02 if power > 10 else 1e-4)
    np.testing.assert_allclose(law.root**2, (1 + s1) / power * (1 - ratio**power), rtol=5e-3 if power > 10 else 1e-4)


@pytest.mark.parametrize(("power", "width"), [(3.0, 1.0), (3.0, 0.05), (0.5, 3.0)])
def test_it_is_bayes_rule_for_the_step(power, width):
    """Cov(y_k, y_k') = V_k·K of the step, and R·V_k' of the step turned round; and V_k = R·V_k'·Rᵀ + C."""
    density = product(power)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    variances = width**2 * np.array([1.0, 0.3])
    covariance, mean = turn * variances @ turn.T, np.array([0.7, -0.2])
    fits = [ideal(density, level, power, covariance, mean) for level in LEVELS]
    law = Turned.between(density, *LEVELS, fits, True)
    s1, s0 = (float(scale(density, level)[1]) for level in LEVELS)
    above, below = ((variances + s) / power for s in (s1, s0))
    slopes = [-0.5 * (power + 1) / (variances + s) for s in (s1, s0)]
    flow = Flow.between(*(jnp.asarray(slope) for slope in slopes), s1, s0, jnp.full(2, power))
    np.testing.assert_allclose(flow.decay**2 * above + flow.noise**2, below, rtol=1e-4)
    for half in (0, 1):
        decay, root = (np.asarray(leaf[half]) for leaf in (law.decay, law.root))
        np.testing.assert_allclose(turn.T @ decay @ turn, np.diag(above * flow.decay / below), atol=2e-3)
        found = turn.T @ (decay @ (turn * below @ turn.T) @ decay.T + root @ root.T) @ turn
        np.testing.assert_allclose(found, np.diag(above), rtol=2e-3, atol=2e-3 * above.min())
        np.testing.assert_allclose(decay @ mean + np.asarray(law.shift[half]), mean, atol=2e-3)


def test_without_a_control_it_is_the_noise_that_enters():
    density = product(3.0)
    law = Turned.between(density, *LEVELS, None, False)
    position, noise = {"x": jnp.array([0.3, -1.0])}, {"x": jnp.array([1.0, -2.0])}
    alphas = [density.schedule.at(level).alpha for level in LEVELS]
    wanted = alphas[0] / alphas[1] * position["x"] + jnp.sqrt(density.schedule.added(*LEVELS)) * noise["x"]
    for half in (0, 1):
        np.testing.assert_allclose(
            law.leads(position, noise, jnp.asarray(half), density, LEVELS)["x"], wanted, rtol=1e-5
        )


def test_a_law_that_is_not_finite_gives_way_to_the_noise_that_enters():
    density = product(3.0)
    fit = Fit(jnp.zeros(2), None, jnp.full((2, 2, 2), jnp.nan), jnp.zeros((2, 2)))
    law = Turned.between(density, *LEVELS, (fit, fit), True)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.all(jnp.isfinite(leaf))), law))
    np.testing.assert_allclose(law.decay, np.stack([np.eye(2)] * 2))
