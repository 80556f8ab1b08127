"""The evidence that Feynman–Kac weights add up to, with every expectation integrated on a grid instead of drawn.

d log ∫F_τ/dτ is the expectation of g²·r under F_τ. Weights are an affine function of the rates, so that their
expectation is the weight of the expected rates; summed over the levels it is log ∫F_0 − log ∫F_{K−1}, but for the error
of the trapezoid rule, which falls to a quarter on twice the levels. That of a wrong term or another rule does not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.samplers.weights import feynman_kac_weight
from sampling_cases import normal

FINE = cp.Schedule.log_snr(33, min=-5.0, max=5.0)
EVERY_SECOND = cp.Schedule.from_arrays(FINE.alpha[::2], FINE.sigma[::2])
GRID = np.linspace(-8.0, 8.0, 801)


@cp.program
def multiplied(f, g):
    cp.sample("x", f * g)


@cp.program
def measured(f, g):
    """A product and a measurement that is annealed exactly: its rate has a term of both together."""
    x = cp.sample("x", f * g)
    cp.observe("y", dist.Normal(x, 0.4), 0.9, anneal="exact")


def on_the_grid(program):
    """log ∫ of F·E at every level, and the evaluation whose rate and excess are their means under F·E."""
    f, g = normal(-0.6, 0.8, FINE), normal(0.7, 0.5, FINE)
    density = cp.compile(program, f, g)
    levels, points = jnp.arange(FINE.num_levels), {"x": jnp.asarray(GRID)}
    per_level = lambda k: jax.vmap(lambda x: density.evaluator(x, k))(points)
    found = jax.jit(jax.vmap(per_level))(levels).parts
    log_density = np.asarray(found.log_marginal + found.log_exact, np.float64)
    total = np.log(np.exp(log_density).sum(1) * (GRID[1] - GRID[0]))
    weights = jnp.asarray(np.exp(log_density - total[:, None]) * (GRID[1] - GRID[0]))
    mean = lambda values: jnp.sum(weights * values, 1)
    return total, dataclasses.replace(found, rate=mean(found.rate), excess=mean(found.excess))


def gained(means, schedule, step):
    """Σ of the expected weights over every ``step``-th level."""
    rates = [dataclasses.replace(means, rate=means.rate[k], excess=means.excess[k]) for k in range(0, 33, step)]
    pairs = enumerate(zip(rates[1:], rates[:-1], strict=True), start=1)
    return sum(float(feynman_kac_weight(before, after, schedule, jnp.int32(k))) for k, (before, after) in pairs)


@pytest.mark.parametrize("program", [multiplied, measured], ids=["product", "product, measured"])
def test_weights_add_up_to_the_evidence_by_a_rule_of_second_order(program):
    total, means = on_the_grid(program)
    fine, coarse = (gained(means, s, n) - (total[0] - total[-1]) for s, n in ((FINE, 1), (EVERY_SECOND, 2)))
    assert abs(fine) < 5e-4
    assert 3.2 < coarse / fine < 4.8
