"""Step sizes: their forms, and adaptation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.kernels import HMC, MALA, Adaptive, mean_acceptance
from composeprob.kernels.step_size import resolve
from kernel_chains import start, transitions
from sampling_cases import slow
from targets import evaluate

SCHEDULE = types.SimpleNamespace(num_levels=4, sigma=jnp.array([0.1, 0.2, 0.4, 0.8]))


@pytest.mark.parametrize(
    ("step_size", "expected"),
    [
        (0.3, [0.3] * 4),
        (1, [1.0] * 4),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
        (lambda s: 0.5 * s.sigma**2, [0.005, 0.02, 0.08, 0.32]),
        (lambda s: [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]),
        (Adaptive(initial=2.0), [0.02, 0.08, 0.32, 1.28]),
        (HMC(Adaptive(initial=0.5)), [0.05, 0.1, 0.2, 0.4]),  # as a length
    ],
)
def test_resolve(step_size, expected):
    kernel = step_size if isinstance(step_size, HMC) else MALA(step_size)
    np.testing.assert_allclose(
        resolve(kernel.step_size, SCHEDULE, kernel), expected, rtol=1e-6
    )


def test_mean_acceptance_does_not_depend_on_the_order_of_chains():
    acceptance = jax.random.uniform(jax.random.key(0), (10_007,))
    mean = mean_acceptance(acceptance)
    assert float(mean) == pytest.approx(float(acceptance.mean()), abs=1e-4)
    for seed in range(5):
        assert mean == mean_acceptance(
            jax.random.permutation(jax.random.key(seed), acceptance)
        )
    assert float(mean_acceptance(jnp.ones(2_000_000))) == 1.0


@pytest.mark.parametrize(
    ("kernel", "size", "power"),
    [
        (MALA(), 64, 3.0),
        (HMC(), 1024, 1.0),
        slow(MALA(), 1024, 1.0),
        slow(HMC(), 64, 3.0),
    ],
)
def test_the_first_step_suits_a_normal_law_of_any_size_and_power(kernel, size, power):
    target = evaluate(lambda x: -0.5 * power * jnp.sum(x**2))
    adaptive = Adaptive().starting(kernel, size, power)
    exact = jax.random.normal(jax.random.key(1), (200, size)) / power**0.5
    states = start(kernel, target, jax.random.key(0), exact)
    _, info = transitions(
        kernel, target, jax.random.key(2), states, jnp.exp(adaptive.log_scale), 4
    )
    target_acceptance = float(adaptive.target(kernel))
    assert info.acceptance.mean() == pytest.approx(target_acceptance, abs=0.12)


def test_target_acceptances():
    assert float(Adaptive().target(MALA())) == pytest.approx(0.574)
    assert float(Adaptive().target(HMC())) == pytest.approx(0.75)
    assert float(Adaptive(target_acceptance=0.6).target(HMC())) == pytest.approx(0.6)


def test_a_first_step_that_is_given_stays_and_one_of_few_numbers_is_a_half():
    assert Adaptive(initial=2.0).starting(MALA(), 64, 3.0).initial == 2
    assert Adaptive().starting(MALA(), 2, 2.0).initial == 0.5
    assert Adaptive().starting(HMC(), 2, 1.0).initial == 0.5
    assert jnp.exp(Adaptive().log_scale) == 0.5
    cubed = types.SimpleNamespace(scale_exponent=3)  # a user's kernel
    assert Adaptive().starting(cubed, 64, 3.0).initial == 0.5
