"""`density.check` and the findings of runs: factors that agree nowhere are named, those that agree are not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import chi2, norm

import composeprob as cp
from composeprob import tuning
from composeprob.density.overlap import agreement, bound
from sampling_cases import normal, single

COARSE = cp.Schedule.log_snr(24)


def box(low, high, label):
    return cp.Analytic(dist.Uniform(jnp.array(low), jnp.array(high)).to_event(1), COARSE, label=label)


LEFT, RIGHT, OVER = (
    box([-1.0, -1.0], [-0.5, 1.0], "left"),
    box([0.5, -1.0], [1.0, 1.0], "right"),
    box([-0.8, -1.0], [0.8, 1.0], "right"),
)
WHOLE, INNER = box([-1.0, -1.0], [1.0, 1.0], "whole"), box([-0.5, -0.5], [0.5, 0.5], "inner")


def test_the_bound_is_the_mean_of_the_largest_noises():
    rng = np.random.default_rng(0)
    for d in (1, 2, 64):
        noise = np.sort((rng.normal(size=(100_000, d)) ** 2).sum(1))
        largest = noise[-1000:]
        assert abs(bound(d, 0.01) - largest.mean()) < 4 * 2 * largest.std() / np.sqrt(len(largest))
        assert bound(d, 1e-6) > bound(d, 0.01) > chi2.isf(0.01, d)


def exceeds(t, outlier, share):
    """How often E[ε | x]² > t for x = x₀ + ε with x₀ = 0, or ±outlier with a share, in closed form."""
    x = np.linspace(-20, 20, 100_001)
    noises = np.stack([x, x - outlier, x + outlier])
    weights = np.array([[1 - share], [share / 2], [share / 2]]) * norm.pdf(noises)
    density = weights.sum(0)
    return (density * ((weights * noises).sum(0) ** 2 > t * density**2)).sum() * (x[1] - x[0])


def test_the_bound_holds_for_points_with_outliers_and_no_bound_is_much_smaller():
    t, q = bound(1, 0.01), chi2.isf(0.01, 1)
    cases = [(outlier, share) for outlier in (1.0, 2.0, 3.0, 4.0) for share in (0.0, 0.003, 0.01, 0.1)]
    assert max(exceeds(t, *case) for case in cases) < 0.01
    assert exceeds(0.95 * q, 1.0, 0.0) > 0.01  # one point: what is seen is the noise itself


def test_boxes_that_do_not_meet_are_named_with_the_level():
    density = cp.compile(single, LEFT * RIGHT)
    findings = density.check(jax.random.key(0))
    assert [(f.code, f.factor) for f in findings] == [("no_overlap", "left(x)"), ("no_overlap", "right(x)")]
    assert findings[0].share == 1.0
    assert f"at level {findings[0].level}" in findings[0].message
    sampler = cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 1)
    result = cp.infer(density, jax.random.key(0), num_chains=64, sampler=sampler, progress=False)
    assert result.status.has("no_overlap")
    assert "right(x)" in result.status.message
    meeting = cp.compile(single, LEFT * OVER)
    assert not meeting.check(jax.random.key(0))
    assert cp.infer(meeting, jax.random.key(0), num_chains=64, sampler=sampler, progress=False).status.ok


def test_a_negation_that_takes_everything_away():
    inner = {"x": jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (64, 2)), float)}
    key = jax.random.key(1)
    (finding,) = agreement(cp.compile(single, INNER / WHOLE**0.5), inner, key)
    assert finding.code == "no_overlap"
    assert "The negation leaves nothing" in finding.message
    around = {"x": inner["x"] + jnp.where(inner["x"] > 0, 0.5, -0.5)}
    floor = cp.mixture([INNER, normal([0.0, 0.0], schedule=COARSE)], weights=[0.9, 0.1])
    assert not agreement(cp.compile(single, WHOLE / floor**0.5), around, key)
    # Powers that sum to 1 or more are Bayes' rule or guidance: the denominator holds everything by design.
    assert not agreement(cp.compile(single, INNER**2 / WHOLE), inner, key)
    assert not agreement(cp.compile(single, INNER**3 / WHOLE), inner, key)


def wavy_box(real):
    """A box |x₁|, |x₂| < 1 as an energy that wavers by half a nat: everywhere as a law does, whose waves noise smooths
    away, or at level 0 alone, as a network errs."""

    def network(x, log_snr):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        inside = jnp.log(jax.scipy.special.ndtr((alpha - jnp.abs(x)) / sigma)).sum()
        size = jnp.exp(-0.5 * (20 * sigma / alpha) ** 2) if real else jax.nn.sigmoid(5 * (log_snr - 9.5))
        return -sigma * (inside + 0.5 * size * jnp.cos(20 * x / alpha).sum())

    return cp.Diffusion(network, COARSE, event_shape=(2,), parameterization="energy", time="log_snr", label="wavy")


@pytest.mark.parametrize("real", [False, True])
def test_waves_of_level_0_alone_are_a_networks_error(real):
    inner = {"x": jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (64, 2)), float)}
    density = cp.compile(single, INNER / wavy_box(real) ** 0.5)
    values = jax.jit(jax.vmap(lambda x: 0.5 * density.log_density({"x": x}, 0)))(inner["x"])
    assert values.std() > 0.1  # at level 0 it is not flat
    codes = [(f.code, f.factor) for f in agreement(density, inner, jax.random.key(1))]
    assert codes == ([] if real else [("no_overlap", "wavy(x)")])


def test_a_narrow_law_of_many_numbers_is_asked_where_it_is():
    """Unadjusted steps of σ² double the variance of a point's noised draws: with 1,024 numbers 2d is too far."""
    d = 1024
    point = cp.Diffusion(
        lambda x, sigma: x * jnp.sqrt(1 + sigma**2) / sigma,
        COARSE,
        event_shape=(d,),
        parameterization="epsilon",
        time="sigma",
        label="point",
    )

    @cp.program
    def measured(f):
        cp.observe("y", dist.Normal(cp.sample("x", f), 1.0).to_event(1), jnp.zeros(d))

    assert 2 * d > tuning.OVERLAP.slack * bound(d)
    assert cp.compile(measured, point).check(jax.random.key(0)) == ()


def test_the_floor_around_what_is_taken_away_is_not_its_inside():
    """Samples around a box, on its flat floor: as flat as inside, and where a negation wants them."""
    rng = np.random.default_rng(0)
    around = rng.uniform(-0.8, 0.8, (200, 2))
    around = {"x": jnp.asarray(around[(np.abs(around) > 0.52).any(1)][:64], float)}
    within = {"x": 0.5 * around["x"]}
    frame, floor = box([-0.8, -0.8], [0.8, 0.8], "frame"), box([-1.1, -1.1], [1.1, 1.1], "floor")
    density = cp.compile(single, frame / cp.mixture([INNER, floor], weights=[0.99, 0.01]) ** 0.5)
    assert not agreement(density, around, jax.random.key(0))
    (finding,) = agreement(density, within, jax.random.key(0))
    assert "The negation leaves nothing" in finding.message


def away(x, log_snr, c):
    """The score of N(c, 1), noised."""
    return -(x - jnp.sqrt(jax.nn.sigmoid(log_snr)) * c)


def learned(c):
    f = cp.Diffusion(
        away, COARSE, event_shape=(2,), parameterization="score", time="log_snr", conditions=("c",), label="net"
    )
    return f.given(c=c)


@pytest.mark.parametrize(("far", "found"), [(2.0, False), (7.0, False), (12.0, True), (40.0, True)])
def test_data_far_from_a_trained_prior(far, found):
    @cp.program
    def measured(f, y):
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x, 0.1), y)

    density = cp.compile(measured, learned(0.0), jnp.full(2, far))
    at = {"x": jnp.full((32, 2), 0.99 * far)}
    findings = agreement(density, at, jax.random.key(0))
    assert [f.code for f in findings] == (["out_of_training"] if found else [])
    assert not found or "asked where it was never trained" in findings[0].message
    exact = cp.compile(measured, normal([0.0, 0.0], schedule=COARSE), jnp.full(2, far))
    assert not agreement(exact, at, jax.random.key(0))  # a closed form is right everywhere


@pytest.mark.parametrize(("at", "found"), [(0.0, False), (1.5, False), (4.0, True)])
def test_a_trained_divisor_is_asked_where_its_draws_are(at, found):
    """The bound on scores sees nothing at 4 deviations, the distance to draws does. Closed forms divide anywhere."""
    x = at + np.random.default_rng(0).normal(size=(32, 2)) * 0.3
    wide = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), COARSE, label="wide")
    density = cp.compile(single, wide**2 / learned(0.0) ** 0.5)
    findings = agreement(density, {"x": jnp.asarray(x, float)}, jax.random.key(0))
    assert [(f.code, f.divides) for f in findings] == ([("out_of_training", True)] if found else [])
    exact = cp.compile(single, wide**2 / normal([0.0, 0.0], schedule=COARSE) ** 0.5)
    assert not agreement(exact, {"x": jnp.asarray(x, float)}, jax.random.key(0))


def test_a_rare_part_of_a_divisor_is_looked_for_before_it_is_missing(monkeypatch):
    """Samples on a floor that holds a twentieth of the divisor's draws."""

    def floored(x, log_snr):
        alpha, variance = jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr)
        bump = jnp.log(0.95) + jax.scipy.stats.norm.logpdf(x, 0.0, jnp.sqrt(0.01 * alpha**2 + variance)).sum()
        floor = jnp.log(0.05) + jax.scipy.stats.norm.logpdf(x, alpha * 2, jnp.sqrt(0.25 * alpha**2 + variance)).sum()
        return -jnp.sqrt(variance) * jnp.logaddexp(bump, floor)

    net = cp.Diffusion(floored, COARSE, event_shape=(2,), parameterization="energy", time="log_snr", label="floored")
    x = {"x": jnp.asarray(2 + 0.3 * np.random.default_rng(0).normal(size=(32, 2)), float)}
    density = cp.compile(single, WHOLE**2 / net**0.5)
    named = lambda: sum(any(f.divides for f in agreement(density, x, jax.random.key(k))) for k in range(8))
    assert named() == 0
    monkeypatch.setattr(tuning, "OVERLAP", tuning.OVERLAP._replace(rounds=1))
    assert named() > 0


def test_a_run_under_such_a_divisor_gives_no_errors():
    wide = cp.Analytic(dist.Normal(jnp.full(2, 5.0), 0.5).to_event(1), COARSE, label="wide")
    density = cp.compile(single, wide / learned(0.0) ** 0.1)
    result = cp.infer(
        density, jax.random.key(0), num_chains=64, sampler=cp.AnnealedMCMC(cp.ULA(0.1), 1), progress=False
    )
    assert result.status.has("out_of_training")
    assert result.status.has("network_doubted")
    assert np.isnan(result.mean(lambda s: s["x"][0]).error)


def test_conditions_in_a_plate_that_contradict_one_another():
    near, apart = (jnp.stack([jnp.zeros(2), jnp.full(2, c)]) for c in (1.0, 60.0))
    for values, count in ((near, 0), (apart, 1)):
        factor = cp.Diffusion(
            away, COARSE, event_shape=(2,), parameterization="score", time="log_snr", conditions=("c",), label="net"
        )
        density = cp.compile(single, cp.product(factor, over={"c": values}))
        at = {"x": jnp.broadcast_to(values.mean(0), (16, 2))}
        findings = agreement(density, at, jax.random.key(0))
        assert len(findings) == count
        assert all("its own 2 conditions" in f.message for f in findings)


def test_factors_of_one_name_are_two():
    one, two = (box([a, -1.0], [a + 0.5, 1.0], "box") for a in (-1.0, 0.5))
    (finding,) = agreement(cp.compile(single, one * two), {"x": jnp.zeros((16, 2))}, jax.random.key(0))
    assert finding.factor == "box(x)"


def test_one_factor_by_itself_is_not_asked():
    assert cp.compile(single, LEFT).check(jax.random.key(0)) == ()


def test_a_quotient_of_narrow_factors_excludes_nothing():
    """Samples 20 widths from both parts, which together are flat there; of one part alone they are far."""
    here, narrow, divided = (
        cp.Analytic(dist.Normal(jnp.array([mean]), sd).to_event(1), COARSE, label=label)
        for mean, sd, label in ((1.0, 0.1, "here"), (0.0, 0.05, "narrow"), (0.0, 0.0501, "divided"))
    )
    x = 1 + 0.1 * jax.random.normal(jax.random.key(0), (64, 1))
    assert not agreement(cp.compile(single, here * narrow / divided), {"x": x}, jax.random.key(1))
    named = agreement(cp.compile(single, here * narrow), {"x": x}, jax.random.key(1))
    assert [(f.code, f.factor) for f in named] == [("no_overlap", "narrow(x)")]
