"""Errors split between sampler and model, by valid refinements of a run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.metrics import sources, tuning
from composeprob.metrics.sources import (
    compared,
    draws_moments,
    moments,
    named_draws,
    split,
)
from messages import check_wording
from sampling_cases import both, normal, run

ERROR = 0.01


def rows(**values):
    """Estimates of these means, with one standard error."""
    return {label: (value, ERROR) for label, value in values.items()}


def test_an_error_is_split_at_the_finest_run():
    """Off by 0.5: 0.1 of it goes with the sampler's refinement, 0.4 stays."""
    table, largest = split(rows(a=1.5, b=0.0), rows(a=1.4, b=0.0), rows(a=1.0, b=0.0))
    chance = np.sqrt(2 * np.log(2))
    assert largest["sampler"] == pytest.approx(0.1 / (ERROR * np.sqrt(2)) - chance)
    assert largest["model"] == pytest.approx(0.4 / (ERROR * np.sqrt(2)) - chance)
    _, of_a, _ = table.splitlines()
    assert re.split(r"\s{2,}", of_a)[-3:] == [
        "+0.5 (35.4 ±)",
        "+0.1 (7.1 ±)",
        "+0.4 (28.3 ±)",
    ]


@pytest.mark.parametrize(
    ("finest", "reference", "sampler", "model"),
    [(1.5, 1.5, False, False), (1.0, 1.0, True, False), (1.5, 1.0, False, True)],
)
def test_only_who_errs_is_named(finest, reference, sampler, model):
    _, largest = split(rows(a=1.5), rows(a=finest), rows(a=reference))
    assert (largest["sampler"] > tuning.REFINED_ERRORS) == sampler
    assert (largest["model"] > tuning.REFINED_ERRORS) == model


def test_errors_that_are_withheld_name_nobody():
    _, largest = compared({"a": (0.0, np.nan)}, {"other": {"a": (9.0, 0.1)}})
    assert largest == {"other": 0.0}


@pytest.fixture(scope="module")
def density():
    return cp.compile(both, normal(0.0, 0.7), normal(1.0, 0.7))


def test_moments_of_a_run_and_of_draws_are_of_the_same_numbers(density):
    result = run(density, chains=256)
    found = moments(result)
    assert set(found) == {"x", "x²", "log evidence"}
    x = np.asarray(result["x"], np.float64)
    assert found["x²"][0] == pytest.approx((x**2).mean(), rel=1e-5)
    reference = draws_moments(result, {"x": x})
    assert reference["x"] == pytest.approx((x.mean(), x.std(ddof=1) / 16), rel=1e-6)
    for draws, facts in (
        ({"y": x}, "'x'"),
        ({"x": np.zeros((10, 3))}, r"\(10, 3\)"),
    ):
        with pytest.raises(cp.errors.ShapeError, match=facts) as caught:
            draws_moments(result, draws)
        check_wording(str(caught.value))


def test_what_is_refined(density):
    """Half the step is a test of kernels without a Metropolis test only.

    Twice the levels lie between the first ones.
    """
    mala = cp.AnnealedMCMC(cp.MALA(0.1), 3)
    assert sources.shorter_steps(density, mala, None) is None
    assert sources.longer(density, mala).steps_per_level == 6
    assert sources.longer(density, cp.Ancestral()) is None
    ula = cp.AnnealedMCMC(cp.ULA(lambda s: 0.1 * s.sigma**2), 3)
    first = run(density, chains=16, sampler=ula)
    halved = sources.shorter_steps(density, ula, first)
    assert halved.steps_per_level == 6
    expected = 0.05 * np.asarray(density.schedule.sigma) ** 2
    assert np.allclose(halved.kernel.step_size, expected, rtol=1e-4)
    name, finer = sources.twice_the_levels(density)
    assert name == "2 × levels"
    coarse_log_snr = np.asarray(density.schedule.log_snr)
    fine_log_snr = np.asarray(finer.schedule.log_snr)
    assert np.allclose(fine_log_snr[::2], coarse_log_snr, atol=1e-4)
    assert len(fine_log_snr) == 2 * len(coarse_log_snr) - 1
    one_a_level = cp.AnnealedMCMC(cp.ULA(np.full(len(coarse_log_snr), 0.1)), 1)
    assert not sources.fits(finer, one_a_level)


def test_a_network_that_knows_only_its_levels_is_compared_with_half_of_them():
    def network(x, level):
        return x * jnp.asarray(schedule.sigma)[level]

    schedule = cp.Schedule.log_snr(11)
    f = cp.Diffusion(network, schedule, event_shape=(), parameterization="epsilon")
    density = cp.compile(both, f, normal(0.0, 1.0, schedule))
    name, coarser = sources.twice_the_levels(density)
    assert name == "½ × levels"
    assert coarser.num_levels == 6


def test_one_array_is_of_the_only_site():
    x = np.arange(6.0).reshape(3, 2)
    assert named_draws(x, ["x"])["x"] is x
    assert set(named_draws({"x": x, "y": x[:, 0]}, ["x", "y"])) == {"x", "y"}
    with pytest.raises(cp.errors.ShapeError, match="x, y") as caught:
        named_draws(x, ["x", "y"])
    check_wording(str(caught.value))


# ── all of it ─────────────────────────────────────────────────────────────────────────

SLOW = cp.AnnealedMCMC(cp.ULA(0.01), 1)
# The variance s² = 0.245 becomes s²/(1 − 0.1/s²).
COARSE = cp.AnnealedMCMC(cp.ULA(0.2), 8)


def draws(mean):
    """Draws of f · g, which is N(0.5, 0.7²/2), or of another mean."""
    normals = jax.random.normal(jax.random.key(5), (300, 2))
    return mean + 0.7 / np.sqrt(2) * np.asarray(normals)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "chains", "reference", "said", "unsaid"),
    [
        (
            None,
            300,
            None,
            ["Nothing was found", "2 × levels", "2 × transitions", "x[0]²"],
            ["½ step", "error:"],
        ),
        (SLOW, 3000, None, ["2 × transitions: a difference"], []),
        (COARSE, 3000, None, ["½ step, 2 × transitions: a difference"], []),
        (None, 300, 0.5, ["Nothing was found", "the model's"], ["error:"]),
        (None, 300, 0.8, ["The model's error"], ["The sampler's error"]),
        (SLOW, 3000, 0.5, ["The sampler's error"], []),
    ],
    ids=[
        "right",
        "too few",
        "too coarse",
        "right, with reference",
        "wrong model",
        "too few, with reference",
    ],
)
def test_the_error_is_found_with_whoever_makes_it(
    sampler, chains, reference, said, unsaid
):
    schedule = cp.Schedule.log_snr(24)
    if reference is not None:
        reference = draws(reference)
    factors = [normal(jnp.full(2, c), 0.7, schedule) for c in (0.0, 1.0)]
    found = cp.metrics.error_sources(
        cp.compile(both, *factors),
        jax.random.key(0),
        num_chains=chains,
        sampler=sampler,
        reference=reference,
    )
    assert bool(found.findings) == ("Nothing was found" not in said)
    for text in said:
        assert text in str(found)
    for text in unsaid:
        assert text not in str(found)
