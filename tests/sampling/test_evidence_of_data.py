"""SMC's evidence of data: likelihood ratios between levels are in the weights, under each policy.

One program holds a conjugate model for each policy, so its evidence is the product of theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.samplers.step import Step
from composeprob.samplers.weights import Weight
from sampling_cases import SCHEDULE, normal
from zscores import assert_agrees, assert_disagrees, z_scores

POLICIES, SD, Y, RUNS = ("exact", "tempered", "denoised"), 0.5, 1.2, 20


@cp.program
def data(f, y, latent):
    for policy in POLICIES:
        with numpyro.handlers.scope(prefix=policy, divider="_"), cp.annealed(policy):
            x = cp.sample("x", f)
            m = cp.sample("m", dist.Normal(0.5, 0.8)) if latent else 0.5
            cp.observe("y", dist.Normal(x + m, SD), y)


def evidence(latent, schedule, sd=SD):
    """Π N(y; 0.5, Var x/α + Var m + sd²)."""
    variance = 1 + float(schedule.sigma[0] / schedule.alpha[0]) ** 2 + latent * 0.8**2 + sd**2
    return (np.exp(-0.5 * (Y - 0.5) ** 2 / variance) / np.sqrt(2 * np.pi * variance)) ** len(POLICIES)


def estimates(sampler, latent, schedule):
    density = cp.compile(data, normal(schedule=schedule), jnp.array(Y), latent)
    runs = [
        cp.infer(density, jax.random.key(seed), num_chains=1024, sampler=sampler, progress=False)
        for seed in range(RUNS)
    ]
    return {"Z": np.exp([run.log_evidence for run in runs])}


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True], ids=["without latents", "with latents"])
@pytest.mark.parametrize(("weights", "levels"), [("density", 32), ("feynman_kac", 128)])
def test_the_evidence_is_that_of_the_data(weights, levels, latent):
    schedule = cp.Schedule.log_snr(levels)
    found = estimates(cp.SMC(cp.MALA(), 2, weights=weights), latent, schedule)
    assert_agrees(z_scores(found, {"Z": evidence(latent, schedule)}))
    assert_disagrees(z_scores(found, {"Z": evidence(latent, schedule, sd=2 * SD)}))


class Forgets(cp.SMC):
    """A type of its own, so that nothing compiled of `SMC` is taken for it."""


@pytest.mark.slow
def test_without_the_ratios_between_levels_the_evidence_is_wrong(monkeypatch):
    monkeypatch.setattr(Weight, "gained", lambda *_: jnp.zeros(()))
    found = estimates(Forgets(cp.MALA(), 1), False, SCHEDULE)
    assert_disagrees(z_scores(found, {"Z": evidence(False, SCHEDULE)}))


class Unmended(cp.SMC):
    """Another one."""


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_without_the_ratio_of_the_twist_the_evidence_is_wrong(monkeypatch, order):
    predict = Step.predict
    monkeypatch.setattr(Step, "predict", lambda *given: (*predict(*given)[:2], jnp.zeros(())))
    found = estimates(Unmended(cp.MALA(), 1, step=cp.ReverseStep(order=order)), False, SCHEDULE)
    assert_disagrees(z_scores(found, {"Z": evidence(False, SCHEDULE)}))
