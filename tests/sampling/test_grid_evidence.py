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
from composeprob.samplers.layout import Layout
from composeprob.samplers.weights import incremental_log_weight
from sampling_cases import both, normal

FINE = cp.Schedule.log_snr(33, min=-5.0, max=5.0)
GRID = np.linspace(-8.0, 8.0, 801)


@cp.program
def measured(f, g):
    """A product and a measurement that is annealed exactly: its rate has a term of both together."""
    x = cp.sample("x", f * g)
    cp.observe("y", dist.Normal(x, 0.4), 0.9, anneal="exact")


def on_the_grid(program):
    """log ∫ of F·E over x at every level, and its parts in y with the rate and excess that are their means under F·E,
    and neither potential nor prior."""
    f, g = normal(-0.6, 0.8, FINE), normal(0.7, 0.5, FINE)
    density = cp.compile(program, f, g)
    layout, points = Layout.of_density(density), jnp.asarray(GRID)
    per_level = lambda k: jax.vmap(lambda x: layout.evaluate(density, x[None] / FINE.at(k).alpha, k))(points)
    found = jax.jit(jax.vmap(per_level))(jnp.arange(FINE.num_levels)).parts
    log_density = np.asarray(found.log_marginal + found.log_exact, np.float64)
    total = np.log(np.exp(log_density).sum(1) * (GRID[1] - GRID[0]))
    weights = jnp.asarray(np.exp(log_density - total[:, None]) * (GRID[1] - GRID[0]))
    mean, zero = lambda values: jnp.sum(weights * values, 1), jnp.zeros(FINE.num_levels)
    means = {"rate": mean(found.rate), "excess": mean(found.excess), "log_potential": zero, "log_prior": zero}
    return total, dataclasses.replace(found, **means)


def gained(means, step):
    """Σ of the expected weights over every ``step``-th level."""
    names = ("rate", "excess", "log_potential", "log_prior")

    def at(k):
        return dataclasses.replace(means, **{name: getattr(means, name)[k] for name in names}), FINE.at(k)

    known = [at(k) for k in range(0, FINE.num_levels, step)]
    pairs = zip(known[1:], known[:-1], strict=True)
    return sum(float(incremental_log_weight(before, after, n, end)) for (before, n), (after, end) in pairs)


@pytest.mark.parametrize("program", [both, measured], ids=["product", "product, measured"])
def test_weights_add_up_to_the_evidence_by_a_rule_of_second_order(program):
    total, means = on_the_grid(program)
    fine, coarse = (gained(means, step) - (total[0] - total[-1]) for step in (1, 2))
    assert abs(fine) < 5e-4
    assert 3.2 < coarse / fine < 4.8
