"""Runs that choose their levels, or go to those that they are given."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.errors import AlignmentError, CapabilityError, InvalidValueError
from composeprob.records import Records
from composeprob.samplers.run import Pace, Visits
from composeprob.samplers.spread import host
from refusals import refused
from sampling_cases import (
    SCHEDULE,
    both,
    modes,
    normal,
    run,
    single,
    stop_after,
    weighed,
)
from targets import product_of_normals
from zscores import LIMIT

CHAINS = 512
NARROW, SHARES = 0.1, (0.25, 0.75)
MEANS = np.array([-1.0, 1.0])


@pytest.fixture(scope="module")
def density():
    """Two narrow modes times a Gaussian: exact shares and evidence by completing
    squares."""
    return cp.compile(
        both, cp.Analytic(modes(SHARES, MEANS, NARROW), SCHEDULE), normal(0.5, 1.0)
    )


def exact():
    """log Z and the share of the right mode."""
    *_, log_z = product_of_normals(1.0, 0.0, [MEANS, [0.5, 0.5]], [[NARROW], [1.0]])
    parts = np.array(SHARES) * np.exp(log_z)
    return np.log(parts.sum()), parts[1] / parts.sum()


def adaptive(density, **options):
    """A run that chooses its levels."""
    defaults = {
        "chains": CHAINS,
        "sampler": cp.SMC(cp.MALA(cp.Adaptive())),
        "levels": "adaptive",
    }
    return run(density, **(defaults | options))


def test_a_run_that_chooses_its_levels_is_right_and_reports_the_levels_that_it_visited(
    density,
):
    log_evidence, share = exact()
    chosen = adaptive(density)
    assert chosen.status.ok
    estimate = chosen.mean(lambda s: s["x"] > 0)
    assert abs(estimate.value - share) < LIMIT * estimate.error
    assert abs(chosen.log_evidence - log_evidence) < LIMIT * chosen.log_evidence_error
    log_snr = chosen.levels["log_snr"]
    all_levels = np.asarray(density.schedule.log_snr)
    assert len(log_snr) < 45  # of the 1,024 steps that it may make
    np.testing.assert_allclose(log_snr[[0, -1]], all_levels[[0, -1]], atol=1e-4)
    steps = -np.diff(log_snr)
    assert np.all(steps > 0)
    assert steps.max() < tuning.PACE.longest + 1e-3
    assert np.all(np.isfinite(chosen.acceptance))
    assert chosen.evaluations == 3 * len(log_snr) - 1
    assert f"{len(log_snr)}, log-SNR" in str(chosen.summary())


@pytest.mark.usefixtures("every_level")
def test_the_same_key_gives_the_same_levels_and_an_interruption_changes_nothing(
    density, tmp_path, monkeypatch
):
    whole = adaptive(density)
    with monkeypatch.context() as patch:
        stop_after(patch, 301)
        part = adaptive(density, checkpoint_dir=tmp_path)
    assert part.status.has("interrupted")
    # The levels that it would have visited are not known: all are listed.
    assert len(part.levels["log_snr"]) > 1000
    resumed = adaptive(density, checkpoint_dir=cp.Checkpoint(tmp_path, resume=True))
    np.testing.assert_array_equal(resumed["x"], whole["x"])
    np.testing.assert_array_equal(resumed.levels["log_snr"], whole.levels["log_snr"])
    assert resumed.log_evidence == whole.log_evidence


def test_levels_that_are_given_are_those_of_a_program_compiled_on_them(density):
    wanted = np.linspace(-6.0, 8.0, 12)
    sampler = cp.SMC(cp.MALA(0.05), check_levels=False)
    given = run(density, levels=wanted, sampler=sampler)
    np.testing.assert_allclose(given.levels["log_snr"], wanted[::-1], atol=1e-4)
    schedule = cp.Schedule.log_snr(12, min=-6.0, max=8.0)
    compiled = run(density.on(schedule), sampler=sampler)
    np.testing.assert_array_equal(given["x"], compiled["x"])


def test_a_network_that_knows_its_own_levels_only_is_run_on_some_of_them():
    """The score of N(0, 1) for variance-preserving levels, trained on 400 of them."""
    own = cp.Schedule.linear(400)
    sigma = jnp.asarray(own.sigma, jnp.float32)
    f = cp.Diffusion(
        lambda x, t: sigma[t] * x, own, event_shape=(2,), parameterization="epsilon"
    )
    density = cp.compile(single, f)
    result = adaptive(density, chains=256, sampler=cp.SMC())
    known = np.asarray(own.log_snr, np.float32)
    assert 5 < len(result.levels["log_snr"]) < 60
    assert np.all(
        np.isin(result.levels["log_snr"], np.asarray(density.schedule.log_snr))
    )
    assert result.levels["log_snr"][0] == known[0] or np.isclose(
        result.levels["log_snr"][0], known[0], atol=1e-3
    )
    assert abs(np.var(result["x"]) - 1.0) < 0.25
    refused(
        lambda: run(density, levels=[-3.0, 0.1, 4.0]),
        AlignmentError,
    )


def test_refusals(density):
    for levels in ("fast", (1.0, np.inf), (), ((1.0, 2.0),), (1.0, 1.0)):
        refused(lambda: run(density, levels=levels), InvalidValueError)
    independent = cp.AnnealedMCMC(cp.MALA(0.1), 1)
    refused(
        lambda: adaptive(density, sampler=independent),
        CapabilityError,
    )
    copy = eqx.tree_at(lambda d: d.schedule.sigma, density, density.schedule.sigma)
    refused(
        lambda: adaptive(copy),
        CapabilityError,
    )


def pace_after(level, above, variance, error, pace=None):
    schedule = cp.Schedule.log_snr(1001, min=-10.0, max=10.0)  # steps of 0.02
    records = jax.tree.map(jnp.asarray, Records.empty(1001))
    records = records.at(jnp.int32(level), weight_variance=variance, step_error=error)
    pace = Pace.default(1000) if pace is None else pace
    below = pace.after(schedule, records, jnp.int32(level), jnp.int32(above))
    return float(schedule.log_snr[int(below)] - schedule.log_snr[level]), int(below)


@pytest.mark.parametrize(
    ("variance", "error", "ratio"),
    [
        (0.04, 0.04, 1.0),
        (0.16, 0.0, 0.5),  # weights vary as the square of the step
        (0.0, 0.64, 0.5),  # the error's square as its fourth power
        (0.16, 0.64, 0.5),
        (0.0, 0.0, tuning.PACE.faster),
        (np.inf, 0.0, tuning.PACE.slower),
        (np.nan, 0.0, tuning.PACE.slower),
    ],
)
def test_a_step_is_as_long_as_the_last_one_says(variance, error, ratio):
    step, _ = pace_after(500, 520, variance, error)
    assert step == pytest.approx(0.4 * ratio, abs=0.021)
    assert step <= 0.4 * ratio + 1e-3


def test_the_first_step_the_longest_and_the_last_and_more_chains_make_shorter_ones():
    """The error of a step grows as its square, and must shrink as 1/√N: 16 times the
    chains, half the step."""
    assert pace_after(1000, 1000, 0.0, 0.0)[0] == pytest.approx(
        tuning.PACE.first, abs=0.021
    )
    assert pace_after(500, 545, 0.0, 0.0)[0] == pytest.approx(
        tuning.PACE.longest, abs=0.021
    )
    assert pace_after(500, 501, 1e6, 1e6)[1] == 499  # one level at least
    assert pace_after(10, 60, 0.0, 0.0)[1] == 0
    assert pace_after(0, 1, 0.0, 0.0)[1] == 0
    few, many = (
        pace_after(500, 520, 0.04, 0.04, Pace.default(n))[0] for n in (1000, 16_000)
    )
    assert few == pytest.approx(0.4, abs=0.021)
    assert many == pytest.approx(0.2, abs=0.021)
    assert pace_after(500, 545, 0.0, 0.0, Pace.default(16_000))[0] == pytest.approx(
        tuning.PACE.longest / 2, abs=0.021
    )
    assert pace_after(500, 520, 0.04, 0.04, Pace.default(10))[0] == few


def test_every_other_level_of_a_way_has_its_ends():
    def made(levels):
        visits = Visits.given(levels, 9)
        return dataclasses.replace(visits, made=jnp.int32(len(levels)))

    for levels, some in {
        (8, 5, 3, 0): (8, 3, 0),
        (8, 5, 0): (8, 0),
        (4, 0): (4, 0),
        (0,): (0,),
    }.items():
        coarser = made(levels).coarser()
        assert tuple(np.asarray(coarser.order)[: len(some)]) == some
        assert int(coarser.made) == 0


def test_every_other_level_of_a_chosen_way_is_visited_by_the_code_that_chose_it():
    """Another structure or type would compile the loop of the run a second time, and a
    pace would leave the way."""
    density = cp.compile(single, normal(schedule=cp.Schedule.log_snr(10)))
    chosen = Visits.given([9], 10, Pace.default(8))
    order = jnp.asarray([9, 7, 4, 1, 0, *chosen.order[5:]])
    coarser = dataclasses.replace(chosen, order=order, made=jnp.int32(5)).coarser()
    shapes = (jax.tree.map(jax.typeof, visits) for visits in (chosen, coarser))
    assert next(shapes) == next(shapes)
    while not coarser.arrived:
        coarser = coarser.onwards(density.schedule, Records.empty(10))
    assert coarser.visited().tolist() == [9, 4, 0]


@pytest.mark.parametrize(
    "place",
    [jax.jit(lambda visits: visits.arrived), lambda visits: host(visits).arrived],
)
def test_visits_have_arrived_where_level_0_was_visited_in_compiled_code_and_on_the_host(
    place,
):
    def arrived(order, made):
        return bool(place(Visits(order, jnp.int32(made), None)))

    order = Visits.given((4, 2, 0), 6).order
    assert [arrived(order, made) for made in range(4)] == [False, False, False, True]
    one_level = jnp.zeros(1, jnp.int32)
    assert [arrived(one_level, made) for made in range(2)] == [False, True]


@pytest.mark.parametrize(("width", "steady"), [(0.3, True), (0.01, False)])
def test_steps_that_are_too_long_for_a_sharp_event_are_named(width, steady):
    """P(x ≥ 4) of a normal law: softened over .01 the weights rise and fall within
    single steps, though the effective sample size stays above its floor."""

    def log_weight(x):
        return jax.scipy.special.log_ndtr((x - 4.0) / width)

    prior = normal(schedule=cp.Schedule.log_snr(40, max=8.0))
    target = cp.compile(weighed, prior, log_weight, "denoised")
    result = run(target, chains=CHAINS, sampler=cp.SMC())
    assert np.nanmin(result.levels["ess"]) > 0.05
    assert result.status.has("weights_collapsed") != steady
