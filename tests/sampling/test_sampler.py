"""Descriptions of samplers, which checkpoints keep, and the names of 0.1.0."""

import equinox as eqx
import jax.numpy as jnp

import composeprob as cp
from composeprob.samplers.choose import independent
from sampling_cases import normal, single


class Later(cp.Resample):
    """A rule of resampling that is not the default one."""


def test_a_subclass_of_a_resampler_is_described_as_itself():
    """As a bare threshold it would pass for `Resample`, and a checkpoint of one would
    be continued by the other."""
    assert "resample=Later(0.8)" in cp.SMC(resample=Later(0.8)).describe()
    assert "resample=0.8)" in cp.SMC(resample=cp.Resample(0.8)).describe()
    assert (
        cp.SMC(resample=0.8).describe() == cp.SMC(resample=cp.Resample(0.8)).describe()
    )


def test_a_reverse_step_is_by_default_that_of_default_runs():
    chains = cp.AnnealedMCMC(cp.MALA(), reverse_step=True)
    assert chains.step.order == 2
    assert "reverse step of second order between levels" in chains.describe()
    default, _ = independent(cp.compile(single, normal(jnp.zeros(2))), "few chains")
    assert eqx.tree_equal(chains.step, default.step)
    assert cp.AnnealedMCMC(cp.MALA()).step is None
