"""Standard errors: from the genealogy of chains, against the spread over keys, and
withheld where they would mislead."""

import dataclasses
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.findings import Code
from composeprob.results.checks.ancestors_collapsed import AncestorsCollapsed
from composeprob.results.checks.limits import (
    DRIFT,
    LEVELS_TOO_FEW,
    MASS_MISSING,
    MEMORY,
)
from composeprob.results.estimates import Estimate, Genealogy, effective_chains_bound
from composeprob.results.repetition import Repetition
from composeprob.runtime.outcome import _missing, discretisation_error
from messages import check_finding, check_wording
from refusals import refused
from sampling_cases import (
    SCHEDULE,
    both,
    measured,
    modes,
    normal,
    run,
    single,
    squared,
    unit_energy,
)

KEYS = 20


@pytest.mark.parametrize("copies", [1, 20])
def test_independent_chains_have_the_textbook_error_and_copies_count_as_one(copies):
    """The error of ten values, each of twenty copies, is that of ten."""
    values = np.random.default_rng(0).normal(size=(200 // copies, 3))
    ancestors = np.repeat(np.arange(len(values)), copies)
    genealogy = Genealogy.from_ancestors(np.ones(200), ancestors)
    variance = genealogy.variance(np.repeat(values, copies, 0))
    np.testing.assert_allclose(variance, values.var(0) / len(values))
    assert genealogy.effective == pytest.approx(len(values))


def test_stated_errors_are_the_spread_over_keys():
    """A narrow factor under a wide one, far from its middle: under a step of first
    order weights differ, and chains are copied. 20 keys tell a standard deviation to 16
    %; the copies, taken for independent chains, promise half of it."""
    fine = cp.Schedule.log_snr(60)
    density = cp.compile(
        both, normal([0.0, 0.0], 1.0, fine), normal([1.0, 0.0], 0.4, fine)
    )
    sampler = cp.SMC(cp.MALA(0.05), step=cp.ReverseStep(order=1))
    results = [run(density, seed, chains=1024, sampler=sampler) for seed in range(KEYS)]
    means = [result.mean(lambda s: s["x"]) for result in results]
    spread = np.std([mean.value for mean in means], axis=0, ddof=1)
    stated = np.sqrt(np.mean([mean.error**2 for mean in means], axis=0))
    assert np.all(spread < 1.5 * stated)
    assert np.all(stated < 1.7 * spread)
    evidence = np.array([result.log_evidence for result in results])
    errors = np.array([float(result.log_evidence_error) for result in results])
    assert evidence.std(ddof=1) < 1.3 * np.sqrt(np.mean(errors**2))
    of_distance = dist.Normal(0.0, (1 + 0.4**2) ** 0.5)
    exact = of_distance.log_prob(1.0) + of_distance.log_prob(0.0)
    off = np.abs(evidence - float(exact)) / errors
    assert np.mean(off > 3) <= 0.05
    assert all(result.effective_chains < 1024 for result in results)
    some = results[0]
    assert np.nanmin(some.ancestors) == len(np.unique(some._genealogy.index)) < 1024
    summary = str(some.summary())
    assert re.search(rf"chains +1,024.*{some.effective_chains:,.0f}", summary)
    assert "±" in summary


@pytest.fixture(scope="module")
def independent():
    """A run of 64 independent chains of 30 numbers."""
    density = cp.compile(single, normal(jnp.zeros(30)))
    return run(density, sampler=cp.AnnealedMCMC(cp.MALA(0.1), 1))


def test_independent_chains_and_the_functions_and_estimates_of_a_mean(independent):
    result = independent
    assert result.effective_chains == pytest.approx(64)
    assert np.isnan(result.ancestors).all()
    x = result["x"]
    whole = result.mean(lambda s: s["x"])
    np.testing.assert_allclose(whole.value, x.mean(0), rtol=1e-5)
    assert whole.error.shape == (30,)
    share = result.mean(lambda s: s["x"][0] > 0)
    assert share.value == pytest.approx(np.mean(x[:, 0] > 0))

    def by_python(s):  # not even NumPy: `if`
        return 1.0 if s["x"][0] > 0 else 0.0

    def of_all_chains(s):
        return s["x"][:, 0]

    assert result.mean(by_python).value == share.value
    errors = cp.errors
    refused(lambda: result.mean("x"), errors.WrongTypeError)
    refused(lambda: result.mean(of_all_chains), errors.InvalidValueError)
    assert str(Estimate(0.31234, 0.0141)) == "0.312 ± 0.014"
    check_wording(str(Estimate(0.3, np.nan)))


def test_copies_of_few_are_reported_and_their_errors_withheld():
    """A factor so narrow, on so few levels, that one chain becomes all of them; SMC is
    the user's choice, and stays."""
    coarse = cp.Schedule.log_snr(5)
    f = normal(jnp.zeros(8), 1.0, coarse)
    g = normal(2 * jnp.ones(8), 0.1, coarse)
    sampler = cp.SMC(cp.MALA(0.1), check_levels=False)
    result = run(cp.compile(both, f, g), chains=32, sampler=sampler)
    assert result.status.has("ancestors_collapsed")
    assert result.about.sampler.startswith("SMC")
    assert np.isnan(result.mean(lambda s: s["x"]).error).all()
    assert np.isnan(result.log_evidence_error)
    row = str(result.summary()).splitlines()[1]
    assert "–" in row
    distinct = len(np.unique(result._genealogy.index))
    message = check_finding(result.status, "ancestors_collapsed")
    assert re.search(rf" {distinct} .*ancestors", message)


EQUAL = np.full(64, 1 / 64)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_few_ancestors_are_worth_more_only_if_descendants_have_forgotten_them(kept):
    """Sixty-four chains of five ancestors, at the values of these or independent of
    them, in 40 entries or in one."""
    rng = np.random.default_rng(0)
    index = np.arange(64) % 5
    genealogy = Genealogy(EQUAL, index)
    inherited = rng.normal(size=(5, 40))[index]
    x = kept * inherited + np.sqrt(1 - kept) * rng.normal(size=(64, 40))
    assert genealogy.effective == pytest.approx(5, abs=0.05)
    worth = effective_chains_bound(genealogy, [x])
    assert worth == genealogy.effective if kept else 20 < worth < 64
    assert effective_chains_bound(genealogy, [x, x[:, :1]]) <= worth
    independent = Genealogy(EQUAL, np.arange(64))
    assert effective_chains_bound(independent, [x]) == pytest.approx(64)


def test_few_ancestors_that_agree_on_an_event_do_not_make_its_error_small(independent):
    """A single copy of one of five first chains is elsewhere, in 30 entries that chains
    keep."""
    index = np.arange(64) % 5
    x = np.where(np.arange(64)[:, None] == 0, 9.0, independent["x"][:5][index])
    genealogy = Genealogy(EQUAL, index)
    few = dataclasses.replace(independent, samples={"x": x}, _genealogy=genealogy)
    rare = few.probability(lambda s: s["x"][0] > 8)
    assert rare.value == pytest.approx(1 / 64)
    assert 0.1 < rare.error < 0.25
    assert few.mean(lambda s: s["x"][0] > 8).error > np.sqrt(1 / 64 * 63 / 64 / 5)


def test_findings_fire_and_not_without_reason():
    for findings, expected, number in (
        (AncestorsCollapsed().findings(3.0, 5, 1000), Code.ANCESTORS_COLLAPSED, "3.0"),
        (DRIFT.findings(0.4), Code.UNSETTLED, "0.4"),
        (LEVELS_TOO_FEW.findings(4.0), Code.LEVELS_TOO_FEW, "4"),
        (MASS_MISSING.findings(2.5), Code.LEVELS_TOO_FEW, "12 times"),
        (MASS_MISSING.findings(20.0), Code.LEVELS_TOO_FEW, "e^20 times"),
        (MEMORY.findings(0.3), Code.UNSETTLED, "0.3"),
    ):
        ((code, text),) = findings
        assert code is expected
        assert number in text
        check_wording(text)
    for arguments in ((200.0, 300, 1000), (8.0, 8, 8), (4.5, 9, 64)):
        assert AncestorsCollapsed().findings(*arguments) == []
    assert AncestorsCollapsed().findings(3.5, 9, 64)
    assert DRIFT.findings(0.0) == []
    assert LEVELS_TOO_FEW.findings(0.3) == []
    assert LEVELS_TOO_FEW.findings(np.nan) == []
    assert MASS_MISSING.findings(0.0) == MASS_MISSING.findings(1.9) == []


def test_means_have_no_errors_where_most_of_the_probability_is_missing():
    assert not LEVELS_TOO_FEW.withholds
    assert MASS_MISSING.withholds


def ended_with(renewed=np.nan, importance=(np.nan, np.nan), normalised=True):
    """A run that ended with log Z = 0, after global moves if any."""
    run = SimpleNamespace(
        evidence_variance=0.04, renewed=renewed, importance_evidence=importance
    )
    top = SimpleNamespace(normalised=normalised)
    state = SimpleNamespace(density=SimpleNamespace(top=top))
    return SimpleNamespace(run=run, state=state)


@pytest.mark.parametrize(
    ("coarse", "missing"),
    [(3.0, 3.0), (3.5, 3.5), (-9.0, 0.0), (0.1, 0.0)],
)
def test_what_the_run_over_every_other_level_found_more_is_missing(coarse, missing):
    ended = ended_with()
    found = _missing(ended, 0.0, Repetition(coarse, 0.05, None))
    assert found == pytest.approx(max(missing - 0.6, 0.0))
    assert _missing(ended, 0.0, None) == 0.0


def test_what_global_moves_have_found_is_not_missing():
    """Their importance samples say so, if they renewed nearly all chains."""
    coarse = Repetition(3.0, 0.05, None)
    mended = ended_with(renewed=0.95, importance=(2.9, 0.01))
    assert _missing(mended, 0.0, coarse) == 0.0
    found_less = ended_with(renewed=0.95, importance=(-1.0, 0.01))
    for ended in (
        found_less,
        ended_with(renewed=0.5, importance=(2.9, 0.01)),
        ended_with(renewed=0.95, importance=(2.9, 0.01), normalised=False),
        ended_with(renewed=0.95),
    ):
        assert _missing(ended, 0.0, coarse) == pytest.approx(2.4)


def test_a_discretisation_error_counts_whole_where_it_is_not_noise():
    exact = 1e-8
    noisy = 0.02**2
    error = discretisation_error((-1.2507, exact), (-1.2390, exact), 2)
    np.testing.assert_allclose(error, 0.0117, rtol=0.01)
    error = discretisation_error((-1.2507, noisy), (-1.2390, noisy), 2)
    np.testing.assert_allclose(error, 0.0117 / 3, rtol=0.01)


def test_the_error_of_averaged_potentials_shows_in_the_error_of_the_evidence():
    """Steps of first order, whose reversal departs from the exact kernel most: log ∫
    f(x)·N(1.3; x², ½²) dx = −1.2801 by quadrature. Over every other level the evidence
    is off by nearly as much: their difference tells little."""
    two = modes([0.3, 0.7], [-1.5, 1.2], [0.4, 0.6])
    prior = cp.Analytic(two, cp.Schedule.log_snr(20))
    density = cp.compile(measured, prior, lambda x: dist.Normal(x**2, 0.5), 1.3)
    sampler = cp.SMC(step=cp.ReverseStep(order=1))
    result = run(density, seed=2, chains=1024, sampler=sampler)
    assert 0.1 < abs(result.log_evidence + 1.2801) < 3 * result.log_evidence_error


def test_too_few_levels_show_in_the_error_of_the_evidence():
    """f² in two dimensions on 32 levels, where the trapezoid rule is off by half a nat:
    stated, and more than noise. Its exponent is 2 at every level: an exponent that
    grows, as chains carry log f, would leave an error of a hundredth."""
    unit = cp.Diffusion(
        unit_energy, SCHEDULE, event_shape=(2,), parameterization="energy", time="sigma"
    )
    density = cp.compile(squared, unit).untracked()
    kernel = cp.MALA(cp.Adaptive())
    step = cp.ReverseStep(control="none")  # the control would leave no error at all
    sampler = cp.SMC(kernel, step=step)
    result = run(density, chains=1024, sampler=sampler)
    without_check = cp.SMC(kernel, step=step, check_levels=False)
    unchecked = run(density, chains=1024, sampler=without_check)
    off = abs(result.log_evidence + np.log(4 * np.pi))
    assert 0.2 < off < 3 * result.log_evidence_error
    assert unchecked.log_evidence == result.log_evidence
    assert unchecked.log_evidence_error < 0.5 * result.log_evidence_error
