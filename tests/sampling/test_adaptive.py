"""Adaptive step sizes in a run: acceptance on target at every level, failures, and the
first step size."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.results.status import Code
from messages import check_finding
from sampling_cases import SCHEDULE, run, single


@pytest.mark.parametrize(
    "warmup",
    [0, pytest.param(4, marks=pytest.mark.slow)],
    ids=["online", "warm-up, then frozen"],
)
def test_acceptance_is_on_target_at_every_level(product, warmup):
    for target in (0.574, 0.8):
        kernel = cp.MALA(cp.Adaptive(target_acceptance=target, warmup=warmup))
        result = run(product, chains=512, sampler=cp.AnnealedMCMC(kernel, 4))
        # The first levels start from `initial`. At the last ones the target keeps its
        # width while σ² falls by half a level: c must rise as much, and the acceptance
        # that makes it rise is up to 0.12 above the goal.
        assert np.abs(result.acceptance[:-2] - target).max() < 0.15
        assert np.abs(result.acceptance[14:-2].mean() - target) < 0.04
        steps = np.log(result.step_size)
        assert np.all(np.isfinite(steps))
        assert result.evaluations == SCHEDULE.num_levels * (1 + 4 + warmup)
    assert np.argmin(steps) < 14  # smaller where there is less noise


def test_failures_at_a_level_are_findings_and_leave_chains_finite(product):
    """Steps far too large at every level; a density that is NaN beyond a wall inside
    its bulk; a score that is never finite, which stops reverse diffusion at once."""

    def walled(x, level):
        return jnp.where(x[0] > 0.5, jnp.nan, -0.5 * jnp.sum(x**2))

    broken = cp.compile(single, cp.Energy(walled, SCHEDULE, event_shape=(1,)))
    score = cp.Diffusion(
        lambda x, t: x * jnp.nan,
        SCHEDULE,
        event_shape=(1,),
        parameterization="score",
        time="sigma",
    )
    never = cp.compile(single, score)
    first_order = cp.ReverseStep(order=1, control="none")
    too_large = cp.AnnealedMCMC(cp.MALA(50.0), 4)
    usual = cp.AnnealedMCMC(cp.MALA(0.3), 4)
    for density, sampler, code, fix in (
        (product, too_large, Code.ACCEPTANCE_COLLAPSED, "Adaptive"),
        (broken, usual, Code.NON_FINITE, "density.log_density"),
        (never, cp.Ancestral(), Code.NON_FINITE, ""),
        (never, cp.SMC(step=first_order), Code.WEIGHTS_COLLAPSED, ""),
    ):
        result = run(density, chains=512, sampler=sampler)
        assert (result.levels["non_finite"].sum() > 0) == (density is not product)
        assert fix in check_finding(result.status, code)
        assert np.all(np.isfinite(result["x"]))


def test_a_run_starts_with_the_step_for_its_numbers_and_factors():
    """Two blocks: 64 numbers under two factors, and a latent, which is in none."""

    @cp.program
    def program(f):
        cp.sample("x", f * f)
        cp.sample("z", dist.Normal(0.0, 1.0))

    f = cp.Analytic(dist.Normal(jnp.zeros(64), 1.0).to_event(1), SCHEDULE)
    density = cp.compile(program, f)
    kernel = cp.Gibbs({"x": cp.MALA(cp.Adaptive()), "z": cp.HMC(cp.Adaptive())})
    prepared = cp.AnnealedMCMC(kernel, 1).prepare(density)
    steps = [block.step_size.initial for block in prepared.moves.kernel.kernels]
    np.testing.assert_allclose(steps, [1.17**2 / (2 * 64 ** (1 / 3)), 0.5], rtol=1e-6)
