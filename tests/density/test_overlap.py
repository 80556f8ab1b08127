"""`density.check` and the findings of runs: factors that agree nowhere are reported,
those that agree are not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import chi2, norm

import composeprob as cp
from composeprob import tuning
from composeprob.density.overlap import agreement, bound
from messages import check_wording
from sampling_cases import learned, measured, normal, run, single

COARSE = cp.Schedule.log_snr(24)


def box(low, high, label):
    return cp.Analytic(
        dist.Uniform(jnp.array(low), jnp.array(high)).to_event(1), COARSE, label=label
    )


LEFT = box([-1.0, -1.0], [-0.5, 1.0], "left")
RIGHT = box([0.5, -1.0], [1.0, 1.0], "right")
OVER = box([-0.8, -1.0], [0.8, 1.0], "right")  # meets `LEFT`
WHOLE = box([-1.0, -1.0], [1.0, 1.0], "whole")
INNER = box([-0.5, -0.5], [0.5, 0.5], "inner")
INSIDE = np.random.default_rng(0).uniform(-0.5, 0.5, (64, 2))


def law(mean, sd, label):
    return cp.Analytic(
        dist.Normal(jnp.asarray(mean, float), sd).to_event(1), COARSE, label=label
    )


def findings(f, x, seed=0, program=single, data=()):
    """Findings at points of a program under a factor."""
    density = cp.compile(program, f, *data)
    return agreement(density, {"x": jnp.asarray(x, float)}, jax.random.key(seed))


def codes(*args, **options):
    return [(finding.code, finding.factor) for finding in findings(*args, **options)]


def test_the_bound_is_the_mean_of_the_largest_noises():
    rng = np.random.default_rng(0)
    for d in (1, 2, 64):
        noise = np.sort((rng.normal(size=(100_000, d)) ** 2).sum(1))
        largest = noise[-1000:]
        error = 2 * largest.std() / np.sqrt(len(largest))
        assert abs(bound(d, 0.01) - largest.mean()) < 4 * error
        assert bound(d, 1e-6) > bound(d, 0.01) > chi2.isf(0.01, d)


def exceeds(t, outlier, share):
    """Probability of E[ε | x]² > t for x = x₀ + ε with x₀ = 0, or ±outlier with a
    share, by quadrature."""
    x = np.linspace(-20, 20, 100_001)
    noises = np.stack([x, x - outlier, x + outlier])
    weights = np.array([[1 - share], [share / 2], [share / 2]]) * norm.pdf(noises)
    density = weights.sum(0)
    is_beyond = (weights * noises).sum(0) ** 2 > t * density**2
    return (density * is_beyond).sum() * (x[1] - x[0])


def test_the_bound_holds_for_points_with_outliers_and_no_bound_is_much_smaller():
    t = bound(1, 0.01)
    q = chi2.isf(0.01, 1)
    cases = [
        (outlier, share)
        for outlier in (1.0, 2.0, 3.0, 4.0)
        for share in (0.0, 0.003, 0.01, 0.1)
    ]
    assert max(exceeds(t, *case) for case in cases) < 0.01
    # A single point: the predicted noise is the noise itself.
    assert exceeds(0.95 * q, 1.0, 0.0) > 0.01


def test_boxes_that_do_not_meet_are_named_with_the_level():
    density = cp.compile(single, LEFT * RIGHT)
    named = density.check(jax.random.key(0))
    assert [(f.code, f.factor) for f in named] == [
        ("no_overlap", "left(x)"),
        ("no_overlap", "right(x)"),
    ]
    assert named[0].share == 1.0
    assert f"level {named[0].level}" in named[0].message
    check_wording(named[0].message, estimated=True)
    sampler = cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 1)
    result = run(density, sampler=sampler)
    assert result.status.has("no_overlap")
    assert "right(x)" in result.status.message
    meeting = cp.compile(single, LEFT * OVER)
    assert not meeting.check(jax.random.key(0))
    assert run(meeting, sampler=sampler).status.ok
    # A factor by itself is not checked.
    assert cp.compile(single, LEFT).check(jax.random.key(0)) == ()


def test_a_negation_that_takes_everything_away():
    (finding,) = findings(INNER / WHOLE**0.5, INSIDE, 1)
    assert finding.code == "no_overlap"
    check_wording(finding.message, estimated=True)
    floor = cp.mixture([INNER, normal([0.0, 0.0], schedule=COARSE)], weights=[0.9, 0.1])
    assert not findings(WHOLE / floor**0.5, INSIDE + np.where(INSIDE > 0, 0.5, -0.5), 1)
    # Powers that sum to 1 or more are Bayes' rule or guidance: the denominator holds
    # everything by design.
    assert not findings(INNER**2 / WHOLE, INSIDE, 1)
    assert not findings(INNER**3 / WHOLE, INSIDE, 1)


def wavy_box(real):
    """A box |x₁|, |x₂| < 1 as an energy with waves of half a nat: those of a law, which
    noise smooths away, or those of a network's error, at level 0 alone."""

    def network(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        inside = jnp.log(jax.scipy.special.ndtr((alpha - jnp.abs(x)) / sigma)).sum()
        if real:
            size = jnp.exp(-0.5 * (20 * sigma / alpha) ** 2)
        else:
            size = jax.nn.sigmoid(5 * (log_snr - 9.5))
        return -sigma * (inside + 0.5 * size * jnp.cos(20 * x / alpha).sum())

    return learned(network, "energy", COARSE, label="wavy")


@pytest.mark.parametrize("real", [False, True])
def test_waves_of_level_0_alone_are_a_networks_error(real):
    factor = INNER / wavy_box(real) ** 0.5
    density = cp.compile(single, factor)
    log_density = jax.jit(jax.vmap(lambda x: 0.5 * density.log_density({"x": x}, 0)))
    values = log_density(jnp.asarray(INSIDE, float))
    assert values.std() > 0.1  # at level 0 it is not flat
    expected = [] if real else [("no_overlap", "wavy(x)")]
    assert codes(factor, INSIDE, 1) == expected


def test_a_narrow_law_of_many_entries_is_evaluated_where_it_is():
    """Unadjusted steps of σ² double the variance of a point's noised samples: with
    1,024 entries 2d is too far."""
    d = 1024

    def noise_of_point(x, sigma):
        return x * jnp.sqrt(1 + sigma**2) / sigma

    point = cp.Diffusion(
        noise_of_point,
        COARSE,
        event_shape=(d,),
        parameterization="epsilon",
        time="sigma",
        label="point",
    )
    density = cp.compile(
        measured, point, lambda x: dist.Normal(x, 1.0).to_event(1), jnp.zeros(d)
    )
    assert 2 * d > tuning.OVERLAP.slack * bound(d)
    assert density.check(jax.random.key(0)) == ()


def test_the_floor_around_a_negated_box_is_not_its_inside():
    """Samples around a box, on its flat floor: as flat as inside, and where a negation
    should put them."""
    around = np.random.default_rng(0).uniform(-0.8, 0.8, (200, 2))
    around = around[(np.abs(around) > 0.52).any(1)][:64]
    frame = box([-0.8, -0.8], [0.8, 0.8], "frame")
    floor = box([-1.1, -1.1], [1.1, 1.1], "floor")
    factor = frame / cp.mixture([INNER, floor], weights=[0.99, 0.01]) ** 0.5
    assert not findings(factor, around)
    (finding,) = findings(factor, 0.5 * around)
    check_wording(finding.message, estimated=True)


def away(x, log_snr, c):
    """The score of N(c, 1), noised."""
    return -(x - jnp.sqrt(jax.nn.sigmoid(log_snr)) * c)


CONDITIONED = learned(away, "score", COARSE, conditions=("c",), label="net")
LEARNED = CONDITIONED.given(c=0.0)
EXACT = normal([0.0, 0.0], schedule=COARSE)


@pytest.mark.parametrize(
    ("far", "trained"), [(2.0, True), (7.0, True), (12.0, False), (40.0, False)]
)
def test_data_far_from_a_trained_prior(far, trained):
    data = (lambda x: dist.Normal(x, 0.1), jnp.full(2, far))
    samples = np.full((32, 2), 0.99 * far)
    named = findings(LEARNED, samples, program=measured, data=data)
    expected = [] if trained else ["out_of_training"]
    assert [finding.code for finding in named] == expected
    for finding in named:
        check_wording(finding.message, estimated=True)
    # A closed form is right everywhere.
    assert not findings(EXACT, samples, program=measured, data=data)


@pytest.mark.parametrize(("at", "trained"), [(0.0, True), (1.5, True), (4.0, False)])
def test_a_trained_divisor_is_evaluated_where_its_samples_are(at, trained):
    """The bound on scores is not exceeded at 4 deviations, the distance to samples is.
    Closed forms divide anywhere."""
    x = at + np.random.default_rng(0).normal(size=(32, 2)) * 0.3
    wide = law([0.0, 0.0], 1.0, "wide")
    named = [
        (finding.code, finding.divides)
        for finding in findings(wide**2 / LEARNED**0.5, x)
    ]
    expected = [] if trained else [("out_of_training", True)]
    assert named == expected
    assert not findings(wide**2 / EXACT**0.5, x)


def test_a_rare_part_of_a_divisor_is_sampled_again_before_it_is_missing(monkeypatch):
    """Samples on a floor that holds a twentieth of the divisor's samples."""
    logpdf = jax.scipy.stats.norm.logpdf

    def floored(x, log_snr):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
        variance = jax.nn.sigmoid(-log_snr)
        bump_sd = jnp.sqrt(0.01 * alpha**2 + variance)
        bump = jnp.log(0.95) + logpdf(x, 0.0, bump_sd).sum()
        floor_sd = jnp.sqrt(0.25 * alpha**2 + variance)
        floor = jnp.log(0.05) + logpdf(x, alpha * 2, floor_sd).sum()
        return -jnp.sqrt(variance) * jnp.logaddexp(bump, floor)

    net = learned(floored, "energy", COARSE, label="floored")
    x = 2 + 0.3 * np.random.default_rng(0).normal(size=(32, 2))

    def num_reports():
        reported = 0
        for seed in range(8):
            named = findings(WHOLE**2 / net**0.5, x, seed)
            reported += any(finding.divides for finding in named)
        return reported

    assert num_reports() == 0
    monkeypatch.setattr(tuning, "OVERLAP", tuning.OVERLAP._replace(rounds=1))
    assert num_reports() > 0


def test_a_run_under_such_a_divisor_gives_no_errors():
    density = cp.compile(single, law([5.0, 5.0], 0.5, "wide") / LEARNED**0.1)
    result = run(density, sampler=cp.AnnealedMCMC(cp.ULA(0.1), 1))
    assert result.status.has("out_of_training")
    assert result.status.has("network_doubted")
    assert np.isnan(result.mean(lambda s: s["x"][0]).error)


def test_conditions_in_a_plate_that_contradict_one_another():
    for distance, number in ((1.0, 0), (60.0, 1)):
        values = np.stack([np.zeros(2), np.full(2, distance)])
        named = findings(
            cp.product(CONDITIONED, over={"c": values}),
            np.tile(values.mean(0), (16, 1)),
        )
        assert len(named) == number
        for finding in named:
            assert " 2 conditions" in finding.message
            check_wording(finding.message, estimated=True)


def test_factors_of_one_name_are_two():
    left, right = (box([a, -1.0], [a + 0.5, 1.0], "box") for a in (-1.0, 0.5))
    assert codes(left * right, np.zeros((16, 2))) == [("no_overlap", "box(x)")]


def test_a_quotient_of_narrow_factors_excludes_nothing():
    """Samples are 20 widths from both factors, whose quotient is flat there; they are
    far from one of them alone."""
    here = law([1.0], 0.1, "here")
    narrow = law([0.0], 0.05, "narrow")
    divided = law([0.0], 0.0501, "divided")
    x = 1 + 0.1 * jax.random.normal(jax.random.key(0), (64, 1))
    assert not findings(here * narrow / divided, x, 1)
    assert codes(here * narrow, x, 1) == [("no_overlap", "narrow(x)")]
