"""Every sampler on Gaussian targets whose law at level 0 is known, and what SMC
estimates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.kernels import KernelState
from composeprob.samplers.layout import Layout
from composeprob.samplers.run import Visits, begin
from composeprob.samplers.step import Step
from composeprob.samplers.weights import first_weight
from sampling_cases import SCHEDULE, N, Never, both, normal, run, single, slow, visited
from zscores import assert_agrees, z_scores

MEANS = np.array([[0.5, -0.3], [0.2, 0.4]])
COVARIANCES = np.array([[[0.5, 0.3], [0.3, 0.4]], [[0.6, -0.2], [-0.2, 0.3]]])


def product_law():
    """Mean and covariance of the normalised product of the factors at level 0, and the
    log of its normaliser."""
    alpha, sigma = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
    means, covariances = alpha * MEANS, alpha**2 * COVARIANCES + sigma**2 * np.eye(2)
    precisions = np.linalg.inv(covariances)
    covariance = np.linalg.inv(precisions.sum(0))
    log_z = stats.multivariate_normal(means[0], covariances.sum(0)).logpdf(means[1])
    return covariance @ np.einsum("kij,kj->i", precisions, means), covariance, log_z


@pytest.fixture(scope="module")
def density():
    laws = map(dist.MultivariateNormal, jnp.asarray(MEANS), jnp.asarray(COVARIANCES))
    return cp.compile(both, *(cp.Analytic(law, SCHEDULE) for law in laws))


def statistics(x, mean):
    """Means and second moments about the exact mean, one column a chain."""
    d = x - mean
    return {
        "0": x[:, 0],
        "1": x[:, 1],
        "00": d[:, 0] ** 2,
        "11": d[:, 1] ** 2,
        "01": d[:, 0] * d[:, 1],
    }


def expectations(mean, covariance):
    values = [*mean, covariance[0, 0], covariance[1, 1], covariance[0, 1]]
    return dict(zip(("0", "1", "00", "11", "01"), map(float, values), strict=True))


@pytest.mark.parametrize(
    "sampler",
    [
        slow(cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 12)),
        cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), num_leapfrog=3), 6, reverse_step=True),
    ],
    ids=["MALA", "HMC with a reverse step"],
)
def test_adjusted_chains_have_the_law_of_level_0(density, sampler):
    result = run(density, chains=2 * N, sampler=sampler)
    mean, covariance, _ = product_law()
    assert_agrees(
        z_scores(
            statistics(np.asarray(result["x"], float), mean),
            expectations(mean, covariance),
        )
    )
    assert result.status.ok


RUNS = 40
SMC = {
    "feynman_kac": cp.SMC(cp.MALA(cp.Adaptive()), 2, check_levels=False),
    "density": cp.SMC(cp.MALA(cp.Adaptive()), 2, weights="density"),
}


@pytest.mark.parametrize("weights", SMC)
def test_smc_has_the_law_of_level_0_and_its_evidence(density, weights):
    """Chains that interact are no independent draws: the standard error is that of
    whole runs."""
    mean, covariance, log_z = product_law()
    runs = [run(density, seed, 512, sampler=SMC[weights]) for seed in range(RUNS)]
    each = [statistics(result["x"], mean) for result in runs]
    averages = {
        name: np.array([values[name].mean() for values in each]) for name in each[0]
    }
    averages["Z"] = np.exp([result.log_evidence - log_z for result in runs])
    assert averages["Z"].std() < 0.2
    assert_agrees(z_scores(averages, expectations(mean, covariance) | {"Z": 1.0}))


@pytest.mark.slow
def test_where_levels_say_nothing_but_are_far_apart_smc_starts_below_them():
    density = cp.compile(
        both, *(normal(0.0, s, cp.Schedule.cosine(50)) for s in (1.0, 0.5))
    )
    first = SMC["feynman_kac"].first_level(density)
    assert 40 <= first < 49
    result = run(density, chains=256, sampler=SMC["feynman_kac"])
    assert np.isnan(result.levels["ess"][first + 1 :]).all()
    assert np.isfinite(result.levels["ess"][: first + 1]).all()
    assert result.status.ok


def first_weights(density, chains=20_000):
    """Positions of the first draws, and their weights."""
    sampler, level, layout = (
        cp.SMC(cp.MALA()).prepare(density),
        density.num_levels - 1,
        Layout.of_density(density),
    )

    @jax.jit
    def drawn():
        begun = sampler.start(
            begin(jax.random.key(0), chains, Visits.every(level, density.num_levels)),
            density,
            level,
        )
        weigh = lambda v: first_weight(
            layout, density, v, layout.evaluate(density, v, level), level
        )
        return sampler.positions(begun, density), jax.vmap(weigh)(begun.chains.position)

    position, weights = drawn()
    return position, np.asarray(jax.nn.softmax(weights), np.float64)


@pytest.mark.slow
def test_an_energy_that_promises_a_power_counts_once_at_the_top():
    """N(0, 1) times the same again: of second moment ½, whether drawn or weighted."""
    again = cp.Energy(lambda x, level: -0.5 * jnp.sum(x**2), SCHEDULE, event_shape=(1,))
    position, weights = first_weights(cp.compile(both, normal([0.0]), again))
    assert abs(weights @ np.asarray(position["x"][:, 0]) ** 2 - 0.5) < 0.02


@cp.program
def looked_at(f):
    x = cp.sample("x", f)
    one = dist.Normal(
        x[..., None], 0.5
    )  # a mixture of one: no location that its coordinate could be measured from
    cp.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.ones(1)), one))


@pytest.mark.slow
def test_a_prior_that_looks_at_a_noised_site_is_drawn_and_weighted_where_it_looks():
    density = cp.compile(looked_at, normal())
    position, weights = first_weights(density, 2000)
    top = density.schedule.at(density.num_levels - 1)
    apart = np.asarray(position["z"] - position["x"] / top.alpha)
    assert abs(apart.std() - 0.5) < 0.05
    np.testing.assert_allclose(weights, weights.mean(), rtol=1e-3)

    level, layout = 3, Layout.of_density(density)
    sampler = cp.SMC(step=cp.ReverseStep(order=1), resample=Never())
    schedule, at = density.schedule, {"x": jnp.asarray(0.3), "z": jnp.asarray(2.5)}
    v = layout.vector(at, schedule.at(level + 1).alpha)
    visit = visited(sampler, density, v[None], level)
    after = layout.position(visit.chains.position[0], schedule.at(level).alpha)

    def prior(position, k):
        return dist.Normal(position["x"] / schedule.alpha[k], 0.5).log_prob(
            position["z"]
        )

    # One factor has the rate 0, so that the prior is all there is to weigh, and that
    # the step was twisted towards it.
    expected = prior(after, level) - prior(at, level + 1)
    found = layout.evaluate(density, v, level + 1)
    step, drift = (
        Step.ddpm(*(schedule.at(k).variance for k in (level + 1, level))),
        found.terms.drift,
    )
    way, shift = (
        (visit.chains.position[0, :1], v[:1], drift),
        step.shift(drift, found.score[:1], 0.5),
    )
    twisted = step.log_density(*way) - step.log_density(*way, shift)
    assert abs(float(expected)) > 0.01
    assert abs(float(twisted)) > 0.01
    np.testing.assert_allclose(visit.log_weights[0], expected + twisted, rtol=1e-3)


class Remembers(KernelState):
    seen: jax.Array


class Remembering(cp.ULA):
    """A kernel that caches something beside the evaluation: the log-density at the
    current level."""

    def init(self, key, position, target):
        evaluation = target(position)
        return Remembers(position, evaluation, evaluation.log_density)

    def relevel(self, state, target):
        evaluation = target(state.position)
        return Remembers(state.position, evaluation, evaluation.log_density)

    def finish(self, trajectory, evaluation):
        start = trajectory.start
        plain = KernelState(start.position, start.evaluation)
        state, info = super().finish(
            dataclasses.replace(trajectory, start=plain), evaluation
        )
        return Remembers(state.position, state.evaluation, start.seen), info


@pytest.mark.parametrize("weights", SMC)
def test_smc_refreshes_whatever_a_kernel_caches(weights):
    """What it knew when its transition began, which moved it by next to nothing."""
    density = cp.compile(single, normal([0.0], 0.1))
    sampler = cp.SMC(Remembering(1e-16), weights=weights, resample=Never()).prepare(
        density
    )
    after, layout = (
        visited(sampler, density, jnp.ones((1, 1)), 19).chains,
        sampler.moves.layout,
    )
    position = layout.position(after.position[0], density.schedule.at(19).alpha)
    expected, stale = (
        float(density.log_density(position, level)) for level in (19, 20)
    )
    np.testing.assert_allclose(after.inner[0].seen[0], expected, rtol=1e-5)
    assert abs(stale - expected) > 0.01
