"""Bounds of log Z: a sandwich on Gaussians and mixtures with known Z.

It is narrower with more levels.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import composeprob as cp
from refusals import refused
from sampling_cases import both, learned, modes, normal, single
from targets import product_of_normals
from zscores import LIMIT

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

SAMPLER = cp.AnnealedMCMC(cp.MALA(lambda s: 0.3 * s.sigma**2), 2)
CENTRES = np.array([[-1.0, 0.0], [1.0, 0.5]])
SHARES = np.array([0.3, 0.7])


def gaussians(dimension: int, levels: int) -> tuple[Any, float, np.ndarray]:
    """A product of two Gaussians: the density, log Z and exact draws of level 0."""
    schedule = cp.Schedule.log_snr(levels, min=-6.0, max=7.0)
    means = np.stack([np.linspace(-0.5, 0.5, dimension), np.full(dimension, 0.2)])
    sds = np.array([0.6, 0.9])[:, None] * np.ones(dimension)
    factors = [normal(mean, sd, schedule) for mean, sd in zip(means, sds, strict=True)]
    centre, variance, log_z = product_of_normals(
        schedule.alpha[0], schedule.sigma[0], means, sds
    )
    noise = np.random.default_rng(0).normal(size=(400, dimension))
    draws = centre + np.sqrt(variance) * noise
    return cp.compile(both, *factors), float(log_z.sum()), draws


def mixture(levels: int) -> tuple[Any, float, np.ndarray]:
    """Two modes of width 0.3 times a Gaussian of width 0.8, like `gaussians`."""
    schedule = cp.Schedule.log_snr(levels, min=-6.0, max=7.0)
    both_modes = cp.Analytic(modes(SHARES, CENTRES, 0.3), schedule)
    wide = normal([0.0, 0.0], 0.8, schedule)
    means = np.stack([CENTRES, 0 * CENTRES])
    sds = np.reshape([0.3, 0.8], (2, 1, 1))
    centres, variance, log_z = product_of_normals(
        schedule.alpha[0], schedule.sigma[0], means, sds
    )
    masses = SHARES * np.exp(log_z.sum(1))
    rng = np.random.default_rng(1)
    mode = rng.choice(2, size=400, p=masses / masses.sum())
    draws = centres[mode] + np.sqrt(variance) * rng.normal(size=(400, 2))
    return cp.compile(both, both_modes, wide), float(np.log(masses.sum())), draws


CASES = {
    "2": lambda levels: gaussians(2, levels),
    "10": lambda levels: gaussians(10, levels),
    "mixture": mixture,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sandwich_closes_as_levels_are_added(case):
    widths = []
    for levels in (16, 64):
        density, log_z, draws = CASES[case](levels)
        bounds = cp.metrics.evidence_bounds(
            density, draws, jax.random.key(0), sampler=SAMPLER, num_chains=1
        )
        assert bounds.contains(log_z, errors=LIMIT)
        # With one chain each, the gap on either side is a divergence, and at few levels
        # significant.
        if levels == 16:
            assert bounds.lower + LIMIT * bounds.lower_error < log_z
            assert log_z < bounds.upper - LIMIT * bounds.upper_error
        widths.append(bounds.width)
    assert 0 < widths[1] < 0.5 * widths[0]


@pytest.mark.slow
def test_more_chains_close_in_and_the_forward_estimate_is_near():
    density, log_z, draws = gaussians(2, 32)
    bounds = partial(
        cp.metrics.evidence_bounds, density, draws, jax.random.key(0), sampler=SAMPLER
    )
    one = bounds(num_chains=1)
    many = bounds(num_chains=16)
    assert many.contains(log_z, errors=LIMIT)
    assert many.width < 0.5 * one.width
    assert abs(many.log_evidence - log_z) < max(LIMIT * many.log_evidence_error, 0.02)
    assert many.lower <= many.log_evidence
    assert len(many.lower_values) == len(many.upper_values) == len(draws)
    assert "≤ log Z ≤" in repr(many)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        # Steps and transitions with momenta: all terms of a path.
        cp.AnnealedMCMC(
            cp.HMC(lambda s: 0.7 * s.sigma, num_leapfrog=2), 1, reverse_step=FIRST_ORDER
        ),
        cp.AnnealedMCMC(cp.ULA(lambda s: 0.2 * s.sigma**2), 1),
        cp.Ancestral(),
        cp.SMC(
            cp.UHMC(lambda s: 0.5 * s.sigma),
            1,
            step=cp.ReverseStep(order=1, control="none"),
        ),
        cp.SMC(cp.MALA(lambda s: 0.5 * s.sigma**2), 1, weights="density"),
    ],
    ids=lambda sampler: sampler.describe()[:40],
)
def test_every_sampler_bounds_the_same_number(sampler):
    density, log_z, draws = mixture(32)
    bounds = cp.metrics.evidence_bounds(
        density, draws, jax.random.key(2), sampler=sampler, num_chains=4
    )
    assert bounds.contains(log_z, errors=LIMIT)
    assert bounds.width < 5.0


class Doubling(cp.MALA):
    """A mutant: reports the reversal of its moves twice as likely as they are."""

    def step(self, key: Any, state: Any, target: Any, step_size: Any) -> Any:
        state, info = super().step(key, state, target, step_size)
        return state, dataclasses.replace(info, log_reversal=2 * info.log_reversal)


def test_wrong_reversals_break_the_sandwich():
    density, log_z, draws = gaussians(2, 64)
    wrong = cp.AnnealedMCMC(Doubling(lambda s: 0.3 * s.sigma**2), 2)
    bounds = cp.metrics.evidence_bounds(
        density, draws, jax.random.key(0), sampler=wrong
    )
    assert not bounds.contains(log_z, LIMIT)


def test_needs_an_energy():
    schedule = cp.Schedule.log_snr(6)
    factor = learned(lambda x, t: -x + 0 * t, "score", schedule, (1,))
    density = cp.compile(single, factor)

    def call():
        sampler = cp.AnnealedMCMC(cp.ULA(0.1), 1)
        points = np.zeros((3, 1))
        key = jax.random.key(0)
        return cp.metrics.evidence_bounds(density, points, key, sampler=sampler)

    refused(call, cp.errors.CapabilityError)
