"""Densities that are 0, or nearly so, on part of the space: the evidence, the samples,
and what the status says.

Each program's posterior is that of a normal or a mixture cut off somewhere, so evidence
and means are known.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy.special import log_ndtr
from scipy import stats

import composeprob as cp
from composeprob.results.status import Code
from composeprob.samplers.layout import Layout
from composeprob.samplers.run import Visits, begin
from composeprob.samplers.step import Backward, Step
from composeprob.samplers.weights import averaged
from composeprob.tuning import POTENTIAL_POINTS
from messages import check_finding
from sampling_cases import measured, modes, normal, run, single, slow, visited, weighed

FIRST_ORDER = cp.ReverseStep(order=1, control="none")

SCHEDULE = cp.Schedule.log_snr(40)
UNIT = normal(schedule=SCHEDULE)
PLANE = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), SCHEDULE)
BOX = 2 * np.log(stats.norm.cdf(1) - 0.5)
"""log of the mass of the unit square."""
SECOND_ORDER = cp.ReverseStep(control="none")


def allowed(inside):
    return jnp.where(inside, 0.0, -jnp.inf)


@cp.program
def walled(f, energy, edge):
    x = cp.sample("x", f)
    cp.factor("wall", allowed(x > edge))
    cp.sample("y", f * energy)


def in_box(x):
    return allowed(jnp.all((x > 0) & (x < 1)))


@pytest.mark.parametrize(
    ("spread", "alike"), [(1.0, True), (20.0, False), (np.inf, False)]
)
def test_weights_of_averaged_potentials_are_unbiased_over_which_point_a_step_came_from(
    spread, alike
):
    """One of M points is x, in proportion to P: the mean of P(x)/P̄ over all orders of
    the same points is 1."""
    points = np.linspace(0.0, 1.0, POTENTIAL_POINTS)

    def potential(x):
        left = spread * jnp.sin(7 * x[0]) ** 2
        if np.isinf(spread):
            left = 0.0
        return jnp.where(x[0] < 0.4, left, -spread * x[0])

    def ratio(i, j):
        others = np.delete(points, i)
        others[[0, j]] = others[[j, 0]]
        rise, same = averaged(
            potential,
            jnp.array([points[i]]),
            jnp.asarray(others)[:, None],
            jnp.zeros(1),
        )
        assert bool(same) is alike
        return np.exp(-float(rise))

    values = [float(potential(jnp.array([x]))) for x in points]
    allowed_points = np.flatnonzero(np.isfinite(values))
    ratios = [ratio(i, j) for i in allowed_points for j in range(POTENTIAL_POINTS - 1)]
    total = POTENTIAL_POINTS * (POTENTIAL_POINTS - 1)
    np.testing.assert_allclose(np.sum(ratios) / total, 1.0, rtol=1e-4)


def walls(edge=0.0):
    def log_wall(y, level):
        return allowed(y > 0)

    energy = cp.Energy(log_wall, SCHEDULE, event_shape=(), top_power=0.0)
    return cp.compile(walled, UNIT, energy, jnp.asarray(edge))


def smc(density, truth, check_levels=False):
    """A run whose log-evidence is that of the truth."""
    result = run(density, chains=1000, sampler=cp.SMC(check_levels=check_levels))
    assert abs(result.log_evidence - truth) < 0.5
    return result


def test_hard_walls_lose_nothing():
    """A statement's wall and an energy's: without the mean over M points the
    log-evidence is off by −10."""
    result = smc(walls(), np.log(0.5**2), check_levels=True)
    for name in "xy":
        assert np.all(result[name] > 0)
        assert abs(result[name].mean() - np.sqrt(2 / np.pi)) < 0.12
    assert not result.status.has(Code.NON_FINITE)  # a zero is not a failure
    assert not result.status.has(Code.ZERO_DENSITY)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [40, 160])
def test_the_loss_at_walls_does_not_grow_with_the_levels(levels):
    schedule = cp.Schedule.log_snr(levels)
    prior = cp.Analytic(dist.Normal(jnp.zeros(2), 1.0).to_event(1), schedule)
    density = cp.compile(weighed, prior, in_box)
    log_evidences = []
    for seed in range(6):
        result = run(density, seed, chains=4000, sampler=cp.SMC())
        log_evidences.append(result.log_evidence)
    assert abs(np.mean(log_evidences) - BOX) < 0.15


def test_a_box_is_found_from_the_noisiest_level():
    """At the first levels no chain is in it: its wall stands only from where some
    are."""
    result = smc(cp.compile(weighed, PLANE, in_box), BOX)
    assert np.all((result["x"] > 0) & (result["x"] < 1))
    assert np.abs(result["x"].mean(0) - stats.truncnorm(0, 1).mean()).max() < 0.06


def test_an_observation_sharper_than_its_function_is_flat():
    density = cp.compile(measured, UNIT, lambda x: dist.Normal(x**2, 0.1), 2.0)
    # The density of x²; the noise of y is narrow beside it.
    result = smc(density, stats.chi2(1).logpdf(2.0))
    assert abs((result["x"] ** 2).mean() - 2.0) < 0.05
    assert 0.3 < (result["x"] > 0).mean() < 0.7


def test_a_rare_event_at_the_tweedie_mean():
    means = np.array([-6.0, 4.0])
    sds = np.array([0.7, 1.5])
    weights = np.array([0.7, 0.3])
    truth = np.log(weights @ stats.norm.sf((8.0 - means) / np.hypot(sds, 0.1)))

    def event(x):
        return log_ndtr((x - 8.0) / 0.1)

    prior = cp.Analytic(modes(weights, means, sds), SCHEDULE)
    smc(cp.compile(weighed, prior, event, "denoised"), truth)


def independent(density, step=SECOND_ORDER):
    sampler = cp.AnnealedMCMC(cp.HMC(), 3, reverse_step=step)
    return run(density, chains=100, sampler=sampler)


@pytest.mark.parametrize(
    "step", [slow(FIRST_ORDER), SECOND_ORDER], ids=["first order", "second order"]
)
def test_independent_chains_come_in_and_stay_in(step):
    result = independent(walls(), step)
    assert np.all(result["x"] > 0)
    assert np.all(result["y"] > 0)
    assert not result.status.has(Code.ZERO_DENSITY)
    assert not result.status.has(Code.NON_FINITE)


def test_chains_that_never_come_in_are_named():
    result = independent(walls(edge=1000.0))
    outside = np.mean(result["x"] <= 1000)
    assert outside > 0.5
    assert f"{outside:.2%}" in check_finding(result.status, Code.ZERO_DENSITY)


def test_chains_that_stay_where_there_is_no_density_are_named():
    result = independent(cp.compile(weighed, UNIT, jnp.log))  # none where x < 0
    assert 0 < np.mean(result["x"] < 0) < 1
    assert result.status.has(Code.ZERO_DENSITY)
    assert np.isnan(result.mean(lambda s: s["x"]).error)


def test_a_network_is_not_a_user_defined_potential(monkeypatch):
    """A program without user functions of x, or with networks only, pays for no further
    points."""

    def never(*_, **__):
        raise AssertionError("evaluated")

    classifier = cp.Classifier(
        lambda x, t: jnp.stack([x, -x]), SCHEDULE, event_shape=()
    )

    guided = cp.compile(single, cp.condition(UNIT, classifier, 1))
    alone = cp.compile(single, UNIT)
    top = SCHEDULE.num_levels - 1

    def traced(density):
        """Log-weights after one level of SMC, traced: tracing evaluates whatever a run
        does."""
        sampler = cp.SMC().prepare(density)

        def log_weights(run):
            run = sampler.start(run, density, top)
            return sampler.advance(run, density, 2).log_weights

        run = begin(jax.random.key(0), 4, Visits.every(top, SCHEDULE.num_levels))
        return eqx.filter_eval_shape(log_weights, run)

    for method, owner in (
        ("user_potential", type(alone.evaluator)),
        ("of_step", Backward),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, never)
            assert [traced(density).shape for density in (guided, alone)] == [(4,)] * 2
            with pytest.raises(AssertionError, match="evaluated"):
                traced(walls())


@cp.program
def walled_product(f, g, edge):
    x = cp.sample("x", f**2 * g**2)
    cp.factor("wall", allowed(x > edge))


def test_the_backward_kernel_has_the_control_in_it():
    """Points that noise would lead back to without the drift −u lose 0.9 of the
    log-evidence here, 0.2 if both factors have power 1; with one step of Heun's method
    for all of the way 0.3."""
    schedule = cp.Schedule.log_snr(40)
    unit, wide = normal(0.0, 1.0, schedule), normal(1.0, 1.5, schedule)
    density = cp.compile(walled_product, unit, wide, jnp.asarray(0.2))
    result = run(density, chains=4000, sampler=cp.SMC(check_levels=False))
    x = np.linspace(0.2, 12.0, 10_001)
    density_of_x = (stats.norm.pdf(x) * stats.norm.pdf(x, 1.0, 1.5)) ** 2
    truth = np.log(np.trapezoid(density_of_x, x))
    assert abs(result.log_evidence - truth) < 0.24
    assert 0.05 < result.log_evidence_error < 0.08  # three of which are the bound


def test_a_sharp_observation_throws_no_chain_far_off():
    """One reverse step of an independent chain, which the observation's gradient would
    take from −2 to 19."""

    def law(x):
        return dist.Normal(x, 1e-3)

    density = cp.compile(measured, UNIT, law, jnp.float32(1.0), "tempered")
    layout = Layout.of_density(density)
    start = SCHEDULE.at(10)
    end = SCHEDULE.at(9)
    v = jnp.array([-2.0]) / start.alpha
    evaluation = jax.jit(lambda v: layout.evaluate(density, v, 10))(v)
    step = Step.ddpm(start.variance, end.variance)
    thrown, _, _ = step.predict(
        v, evaluation.terms.drift, evaluation.score, jnp.ones(1), None
    )
    sampler = cp.AnnealedMCMC(cp.ULA(1e-12), 1, reverse_step=FIRST_ORDER)
    sampler = sampler.prepare(density)
    after = visited(sampler, density, v[None], 9)
    assert float(end.alpha * thrown[0]) > 15
    moved = float(end.alpha * after.chains.position[0, 0])
    assert abs(moved + 2) < 4 * float(start.sigma)  # σ = 0.05
    assert int(after.records.non_finite[9]) == 0
    assert np.isfinite(after.path_weights[0])  # not so of a step that is not made
