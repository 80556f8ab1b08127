"""Kernels leave the target invariant, and their chains move; unadjusted kernels have
the bias that they should."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composeprob.kernels import (
    HMC,
    MALA,
    UHMC,
    ULA,
    BlackJAX,
    KernelState,
    LineIntegral,
)
from composeprob.kernels.langevin import log_proposal_ratio
from kernel_chains import from_exact_draws
from sampling_cases import slow
from targets import evaluate, gaussian, nested, two_modes
from zscores import assert_agrees, assert_disagrees, z_scores

LAWS = {
    "1d": two_modes(1),
    "2d": two_modes(2),
    "10d": two_modes(10),
    "nested": nested(),
}

# Steps at which a few proposals in ten are rejected: a kernel that accepts everything
# would hide a wrong ratio.
STEPS = {
    "MALA": {"1d": 0.35, "2d": 0.25, "10d": 0.12, "nested": 0.14},
    "HMC": {"1d": 0.7, "2d": 0.65, "10d": 0.5, "nested": 0.5},
}


def assert_invariant(kernel, law, moved=0.4, highest=0.95, **options):
    run = from_exact_draws(kernel, LAWS[law], **options)
    assert_agrees(run.scores)
    assert run.moved > moved
    assert 0.3 < run.acceptance < highest


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", STEPS)
def test_target_stays_invariant(name, law):
    """On every law; test_mutants.py has quick tests in two dimensions, and the
    mutants."""
    kernel = MALA if name == "MALA" else HMC
    assert_invariant(kernel(STEPS[name][law]), law)


@pytest.mark.parametrize("law", ["2d", slow("nested")])
def test_blackjax_leaves_the_target_invariant(law):
    kernel = BlackJAX(blackjax.hmc, 0.6, num_integration_steps=3)
    assert_invariant(kernel, law, highest=0.99, num_transitions=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        BlackJAX(blackjax.nuts, 0.5, max_num_doublings=4),
        BlackJAX(blackjax.mala, 0.2),
        BlackJAX(blackjax.barker, 0.5),
        BlackJAX(blackjax.ghmc, 0.4, momentum_inverse_scale=1.0, alpha=0.7, delta=0.3),
    ],
    ids=repr,
)
def test_other_blackjax_algorithms_leave_the_target_invariant(kernel):
    run = from_exact_draws(kernel, LAWS["2d"], num_chains=5_000, num_transitions=50)
    assert_agrees(run.scores)
    assert run.moved > 0.1


FINE = (
    slow(MALA(0.25, log_ratio=LineIntegral(9, "simpson"))),
    HMC(0.65, log_ratio=LineIntegral(17, "simpson")),
)


@pytest.mark.parametrize("kernel", FINE, ids=repr)
def test_a_fine_line_integral_leaves_the_target_invariant(kernel):
    assert_invariant(kernel, "2d", num_transitions=60)


def test_a_coarse_line_integral_does_not():
    kernel = HMC(0.65, log_ratio=LineIntegral(2))
    assert_disagrees(from_exact_draws(kernel, LAWS["2d"], num_transitions=60).scores)


S2 = 0.7  # variance of the Gaussian that unadjusted kernels are given


@pytest.mark.parametrize(
    ("kernel", "variance"),
    [
        (ULA(0.05), S2 / (1 - 0.05 / (2 * S2))),
        (ULA(0.4), S2 / (1 - 0.4 / (2 * S2))),
        # On N(0, s²) the leapfrog map conserves v²/2 + (1 − h²/4s²)·x²/2s² exactly, for
        # every number of steps.
        (UHMC(0.6, num_leapfrog=1, damping=0.9), S2 / (1 - 0.6**2 / (4 * S2))),
        slow(UHMC(0.6, num_leapfrog=3, damping=0.0), S2 / (1 - 0.6**2 / (4 * S2))),
    ],
)
def test_unadjusted_kernels_have_their_known_variance(kernel, variance):
    target = gaussian(3, S2)
    run = from_exact_draws(
        kernel, target, started_from=gaussian(3, variance), num_transitions=60
    )
    assert_agrees(run.scores)
    assert run.acceptance == 1.0
    # Its variance is not the target's.
    assert_disagrees(z_scores(run.values, target.expected))


def test_ratio_of_malas_proposals_is_accurate_in_float32_for_small_steps():
    target = evaluate(lambda x: -0.5 * jnp.sum(x**2))
    h = jnp.float32(1e-6)
    x = jax.random.normal(jax.random.key(0), (10_000,))
    noise = jax.random.normal(jax.random.key(1), x.shape)
    current = ULA(1e-6).init(jax.random.key(0), x, target)
    y = ULA(1e-6).propose(noise, current, h)
    proposed = KernelState(y, target(y))
    # The squares of q(x|x') and q(x'|x), written out for s = −x, in double precision.
    squares = np.sum(np.float64(y) ** 2) - np.sum(np.float64(x) ** 2)
    exact = 0.5 * squares - 0.25e-6 * squares
    np.testing.assert_allclose(
        log_proposal_ratio(current, proposed, h), exact, atol=1e-4
    )
