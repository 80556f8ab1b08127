"""Step sizes: what may be given, what is refused, and how adaptation behaves."""

import types

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.errors import CapabilityError, ComposeProbError, ConditionError
from composeprob.kernels import HMC, MALA, UHMC, ULA, Adaptive, BlackJAX, mean_acceptance
from composeprob.kernels.step_size import resolve
from kernel_chains import start, transitions
from refusals import refused
from sampling_cases import slow
from targets import evaluate

NO_ACCEPTANCE = r"unadjusted, so there is no acceptance to adapt to.*\n.*MALA or HMC"
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
    np.testing.assert_allclose(resolve(kernel.step_size, SCHEDULE, kernel), expected, rtol=1e-6)


def resolving(step_size):
    kernel = MALA(step_size)
    return lambda: resolve(kernel.step_size, SCHEDULE, kernel)


HAMILTONIAN = {"num_integration_steps": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (resolving([0.1, 0.2]), r"MALA has 2 step sizes, but the schedule has 4 levels"),
        (resolving(lambda s: s.sigma[:2]), r"rule of MALA returned shape \(2,\) for a schedule of 4 levels"),
        (resolving(lambda s: 0.1), r"rule of MALA returned shape \(\) for a schedule of 4 levels"),
        (resolving(lambda s: s.sigma - 0.1), r"rule of MALA is 0"),
        (resolving(lambda s: "large"), r"rule of MALA returned cannot be 'large'"),
        (lambda: ULA(Adaptive()), NO_ACCEPTANCE),
        (lambda: UHMC(Adaptive()), NO_ACCEPTANCE),
        (lambda: MALA(-0.1), r"MALA\(step_size=\) is -0.1"),
        (lambda: ULA(0.0), r"ULA\(step_size=\) is 0"),
        (lambda: ULA(float("nan")), r"is nan"),
        (lambda: HMC([0.1, float("inf")]), r"HMC\(step_size=\) is inf"),
        (lambda: HMC(np.ones((2, 2))), r"shape \(2, 2\)"),
        (lambda: HMC("big"), r"a step size cannot be 'big', of type str"),
        (lambda: HMC(True), r"a step size cannot be True"),
        (lambda: HMC(None), r"a step size cannot be None"),
        (lambda: HMC(Adaptive), r"a step size cannot be <class"),
        (lambda: HMC(0.1, num_leapfrog=0), r"HMC\(num_leapfrog=\) must be at least 1; got 0"),
        (lambda: UHMC(0.1, num_leapfrog=2.5), r"UHMC\(num_leapfrog=\) must be a whole number; got 2.5"),
        (lambda: HMC(0.1, damping=1.0), r"HMC\(damping=\) is 1"),
        (lambda: UHMC(0.1, damping=-0.1), r"UHMC\(damping=\) is -0.1"),
        (lambda: HMC(0.1, damping=float("nan")), r"HMC\(damping=\) is nan"),
        (lambda: HMC(0.1, jitter=1.0), r"HMC\(jitter=\) is 1"),
        (lambda: HMC(0.1, damping="half"), r"damping cannot be 'half'"),
        (lambda: Adaptive(target_acceptance=1.0), r"target_acceptance=\) is 1"),
        (lambda: Adaptive(initial=0.0), r"initial=\) is 0"),
        (lambda: Adaptive(gain=-1), r"gain=\) is -1"),
        (lambda: Adaptive(warmup=-1), r"warmup=\) must be at least 0; got -1"),
        (lambda: Adaptive(warmup=1.5), r"warmup=\) must be a whole number; got 1.5"),
        (lambda: Adaptive(initial=[1.0, 2.0]), r"initial=\) has shape \(2,\)"),
        (lambda: BlackJAX(blackjax.hmc, -1.0, **HAMILTONIAN), r"BlackJAX\(step_size=\) is -1"),
        (lambda: BlackJAX(blackjax.hmc, 0.1, evaluations=0, **HAMILTONIAN), r"evaluations=\) must be at least 1"),
    ],
)
def test_constructors_refuse(make, message):
    with pytest.raises(ComposeProbError, match=message) as caught:
        make()
    assert caught.value.fix


def stepping(kernel):
    """One transition from the origin of N(0, I/2)."""
    target = evaluate(lambda x: -jnp.sum(x**2))
    state = kernel.init(jax.random.key(0), jnp.zeros(2), target)
    return kernel.step(jax.random.key(0), state, target, jnp.asarray(0.1))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: BlackJAX(blackjax.hmc, 0.1), ConditionError, "hmc of BlackJAX needs num_integration_steps"),
        (lambda: BlackJAX(blackjax.nuts, 0.1, steps=3), ConditionError, "nuts of BlackJAX has no parameter 'steps'"),
        (lambda: BlackJAX(blackjax.slice_sampling, 0.1), ConditionError, "takes no step_size"),
        (lambda: stepping(BlackJAX(blackjax.mclmc, Adaptive(), L=1.0)), CapabilityError, "reports no acceptance"),
        (lambda: stepping(BlackJAX(blackjax.orbital_hmc, 0.1, period=3)), CapabilityError, "not one position"),
    ],
)
def test_what_blackjax_cannot_do_here_is_refused(make, kind, message):
    refused(make, kind, message)


def test_mean_acceptance_does_not_depend_on_the_order_of_chains():
    acceptance = jax.random.uniform(jax.random.key(0), (10_007,))
    mean = mean_acceptance(acceptance)
    assert float(mean) == pytest.approx(float(acceptance.mean()), abs=1e-4)
    for seed in range(5):
        assert mean == mean_acceptance(jax.random.permutation(jax.random.key(seed), acceptance))
    assert float(mean_acceptance(jnp.ones(2_000_000))) == 1.0


@pytest.mark.parametrize(
    ("kernel", "size", "power"),
    [(MALA(), 64, 3.0), (HMC(), 1024, 1.0), slow(MALA(), 1024, 1.0), slow(HMC(), 64, 3.0)],
)
def test_the_first_step_suits_a_normal_law_of_any_size_and_power(kernel, size, power):
    target = evaluate(lambda x: -0.5 * power * jnp.sum(x**2))
    adaptive = Adaptive().starting(kernel, size, power)
    states = start(kernel, target, jax.random.key(0), jax.random.normal(jax.random.key(1), (200, size)) / power**0.5)
    _, info = transitions(kernel, target, jax.random.key(2), states, jnp.exp(adaptive.log_scale), 4)
    assert info.acceptance.mean() == pytest.approx(float(adaptive.target(kernel)), abs=0.12)


def test_targets_and_a_first_step_that_is_given_stays_and_one_of_few_numbers_is_a_half():
    assert float(Adaptive().target(MALA())) == pytest.approx(0.574)
    assert float(Adaptive().target(HMC())) == pytest.approx(0.75)
    assert float(Adaptive(target_acceptance=0.6).target(HMC())) == pytest.approx(0.6)
    assert Adaptive(initial=2.0).starting(MALA(), 64, 3.0).initial == 2
    assert Adaptive().starting(MALA(), 2, 2.0).initial == Adaptive().starting(HMC(), 2, 1.0).initial
    assert jnp.exp(Adaptive().log_scale) == 0.5
    cubed = types.SimpleNamespace(scale_exponent=3)  # a kernel of somebody's own
    assert Adaptive().starting(cubed, 64, 3.0).initial == 0.5
