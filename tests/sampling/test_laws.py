"""Every sampler on Gaussian targets whose law at level 0 is known, and what SMC estimates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.kernels import KernelState
from composeprob.samplers.layout import Layout
from composeprob.samplers.run import Visits, begin
from composeprob.samplers.step import Step
from composeprob.samplers.weights import first_weight
from sampling_cases import SCHEDULE, N, Never, both, learned, normal, run, single, visited
from zscores import LIMIT, assert_agrees, worst, z_scores

MEANS = np.array([[0.5, -0.3], [0.2, 0.4]])
COVARIANCES = np.array([[[0.5, 0.3], [0.3, 0.4]], [[0.6, -0.2], [-0.2, 0.3]]])


def noised(level, schedule=SCHEDULE):
    """The two factors' means and covariances at a level."""
    alpha, sigma = float(schedule.alpha[level]), float(schedule.sigma[level])
    return alpha * MEANS, alpha**2 * COVARIANCES + sigma**2 * np.eye(2)


def product_law(level=0):
    """Mean and covariance of the normalised product of the noised factors."""
    means, covariances = noised(level)
    precisions = np.linalg.inv(covariances)
    covariance = np.linalg.inv(precisions.sum(0))
    return covariance @ np.einsum("kij,kj->i", precisions, means), covariance


@pytest.fixture(scope="module")
def density():
    laws = map(dist.MultivariateNormal, jnp.asarray(MEANS), jnp.asarray(COVARIANCES))
    return cp.compile(both, *(cp.Analytic(law, SCHEDULE) for law in laws))


def statistics(x, mean):
    """Means and second moments about the exact mean, one column a chain."""
    d = x - mean
    return {"0": x[:, 0], "1": x[:, 1], "00": d[:, 0] ** 2, "11": d[:, 1] ** 2, "01": d[:, 0] * d[:, 1]}


def expectations(mean, covariance):
    values = [*mean, covariance[0, 0], covariance[1, 1], covariance[0, 1]]
    return dict(zip(("0", "1", "00", "11", "01"), map(float, values), strict=True))


CHAINS = {
    "MALA": cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 12),
    "HMC with a reverse step": cp.AnnealedMCMC(cp.HMC(cp.Adaptive(), num_leapfrog=3), 6, reverse_step=True),
}


@pytest.mark.parametrize("sampler", CHAINS.values(), ids=CHAINS)
def test_adjusted_chains_have_the_law_of_level_0(density, sampler):
    result = run(density, chains=2 * N, sampler=sampler)
    mean, covariance = product_law()
    assert_agrees(z_scores(statistics(np.asarray(result["x"], float), mean), expectations(mean, covariance)))
    assert result.status.ok


RUNS = 40
SMC = {
    "feynman_kac": cp.SMC(cp.MALA(cp.Adaptive()), 2, check_levels=False),
    "density": cp.SMC(cp.MALA(cp.Adaptive()), 2, weights="density"),
}


@pytest.mark.parametrize("weights", SMC)
def test_smc_has_the_law_of_level_0(density, weights):
    """Chains that interact are no independent draws: the standard error is that of whole runs."""
    mean, covariance = product_law()
    runs = [statistics(run(density, seed, 512, sampler=SMC[weights])["x"], mean) for seed in range(RUNS)]
    averages = {name: np.array([values[name].mean() for values in runs]) for name in runs[0]}
    assert_agrees(z_scores(averages, expectations(mean, covariance)))


def test_ancestral_is_wrong_for_a_product(density):
    """The negative control: adding scores is not sampling the product (FIELD: Du et al. 2023)."""
    mean, covariance = product_law()
    x = np.asarray(run(density, chains=2 * N, sampler=cp.Ancestral())["x"], float)
    assert worst(z_scores(statistics(x, mean), expectations(mean, covariance))) > 2 * LIMIT


def log_evidence(dimension, alpha, sigma):
    """log ∫ N(x; α·a, α²A + σ²)·N(x; α·b, α²B + σ²) dx per entry, times the number of entries."""
    variance = alpha**2 * (1.0 + 0.5**2) + 2 * sigma**2
    return dimension * (-0.5 * (alpha * 0.8) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance))


def evidence(dimension, schedule, sampler, runs):
    """log of the mean of the evidence estimates over runs, less the exact value, and its standard error."""
    factors = [normal(np.full(dimension, m), s, schedule) for m, s in ((0.0, 1.0), (0.8, 0.5))]
    density = cp.compile(both, *factors)
    logs = np.array([run(density, seed, 1024, sampler=sampler).log_evidence for seed in range(runs)])
    exact = log_evidence(dimension, float(schedule.alpha[0]), float(schedule.sigma[0]))
    ratios = np.exp(logs - exact)
    return np.log(ratios.mean()), ratios.std(ddof=1) / np.sqrt(runs) / ratios.mean()


@pytest.mark.parametrize("dimension", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_density_weights_give_the_evidence(dimension):
    """Σ-estimates of Z are unbiased: their mean agrees within its standard error."""
    error, sd = evidence(dimension, SCHEDULE, SMC["density"], RUNS)
    assert sd < 0.03
    assert abs(error) < LIMIT * sd + 1e-3  # adaptive steps cost a bias of order 1/N


@pytest.mark.slow
def test_feynman_kac_evidence_converges_with_the_number_of_levels():
    errors = []
    for levels in (32, 128):
        # Without control, which leaves the most to converge.
        sampler = cp.SMC(cp.MALA(cp.Adaptive()), step=cp.ReverseStep(control="none"))
        error, sd = evidence(2, cp.Schedule.log_snr(levels), sampler, 20)
        assert sd < 0.08
        errors.append(abs(error))
    # The error of second order: 0.8 nats at steps of 0.65 in log-SNR, a sixteenth of that at a quarter of them.
    assert errors[1] < 0.1 * errors[0]
    assert errors[1] < 0.08


@pytest.mark.slow
def test_smc_without_a_kernel_is_weighted_reverse_diffusion():
    """What weights alone do, from scores alone."""

    def network(mean, sd):
        def score(x, log_snr):
            alpha_squared = jax.nn.sigmoid(log_snr)
            return (jnp.sqrt(alpha_squared) * mean - x) / (alpha_squared * sd**2 + jax.nn.sigmoid(-log_snr))

        return learned(score, "score", cp.Schedule.log_snr(128), (1,))

    compiled = cp.compile(both, network(0.0, 1.0), network(0.8, 0.5))
    assert "energy" not in compiled.capabilities
    result = run(compiled, chains=4 * N, sampler=cp.SMC())
    assert np.isnan(result.acceptance).all()
    assert abs(result["x"].mean() - 0.64) < 0.04  # precisions 1 and 4
    assert abs(result["x"].var() - 0.2) < 0.04


@pytest.mark.slow
def test_where_levels_say_nothing_but_are_far_apart_smc_starts_below_them():
    density = cp.compile(both, *(normal(0.0, s, cp.Schedule.cosine(50)) for s in (1.0, 0.5)))
    first = SMC["feynman_kac"].first_level(density)
    assert 40 <= first < 49
    result = run(density, chains=256, sampler=SMC["feynman_kac"])
    assert np.isnan(result.levels["ess"][first + 1 :]).all()
    assert np.isfinite(result.levels["ess"][: first + 1]).all()
    assert result.status.ok


def first_weights(density, chains=20_000):
    """Positions of the first draws, and their weights."""
    sampler, level, layout = cp.SMC(cp.MALA()).prepare(density), density.num_levels - 1, Layout.of_density(density)

    @jax.jit
    def drawn():
        begun = sampler.start(begin(jax.random.key(0), chains, Visits.every(level, density.num_levels)), density, level)
        weigh = lambda v: first_weight(layout, density, v, layout.evaluate(density, v, level), level)
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
    one = dist.Normal(x[..., None], 0.5)  # a mixture of one: no location that its coordinate could be measured from
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
        return dist.Normal(position["x"] / schedule.alpha[k], 0.5).log_prob(position["z"])

    # One factor has the rate 0, so that the prior is all there is to weigh, and that the step was twisted towards it.
    expected = prior(after, level) - prior(at, level + 1)
    found = layout.evaluate(density, v, level + 1)
    step, drift = Step.ddpm(*(schedule.at(k).variance for k in (level + 1, level))), found.parts.drift
    way, shift = (visit.chains.position[0, :1], v[:1], drift), step.shift(drift, found.score[:1], 0.5)
    twisted = step.log_density(*way) - step.log_density(*way, shift)
    assert abs(float(expected)) > 0.01
    assert abs(float(twisted)) > 0.01
    np.testing.assert_allclose(visit.log_weights[0], expected + twisted, rtol=1e-3)


class Remembers(KernelState):
    seen: jax.Array


class Remembering(cp.ULA):
    """A kernel that caches something beside the evaluation: the log-density at the current level."""

    def init(self, key, position, target):
        evaluation = target(position)
        return Remembers(position, evaluation, evaluation.log_density)

    def relevel(self, state, target):
        evaluation = target(state.position)
        return Remembers(state.position, evaluation, evaluation.log_density)

    def finish(self, trajectory, evaluation):
        start = trajectory.start
        plain = KernelState(start.position, start.evaluation)
        state, info = super().finish(dataclasses.replace(trajectory, start=plain), evaluation)
        return Remembers(state.position, state.evaluation, start.seen), info


@pytest.mark.parametrize("weights", SMC)
def test_smc_refreshes_whatever_a_kernel_caches(weights):
    """What it knew when its transition began, which moved it by next to nothing."""
    density = cp.compile(single, normal([0.0], 0.1))
    sampler = cp.SMC(Remembering(1e-16), weights=weights, resample=Never()).prepare(density)
    after, layout = visited(sampler, density, jnp.ones((1, 1)), 19).chains, sampler.moves.layout
    position = layout.position(after.position[0], density.schedule.at(19).alpha)
    expected, stale = (float(density.log_density(position, level)) for level in (19, 20))
    np.testing.assert_allclose(after.inner[0].seen[0], expected, rtol=1e-5)
    assert abs(stale - expected) > 0.01


def mixture_score(x, t):
    """∇ log of the noised `PARTED`, as a function of the log-SNR t: α² = sigmoid(t), σ² = sigmoid(−t)."""
    means = jnp.sqrt(jax.nn.sigmoid(t)) * PARTED.component_distribution.loc
    variance = 0.3**2 * jax.nn.sigmoid(t) + jax.nn.sigmoid(-t)
    log_parts = jnp.log(PARTED.mixing_distribution.probs) - 0.5 * jnp.sum((x - means) ** 2, axis=1) / variance
    return jax.nn.softmax(log_parts) @ (means - x) / variance


PARTED = dist.MixtureSameFamily(
    dist.Categorical(jnp.array([0.3, 0.7])),
    dist.MultivariateNormal(jnp.array([[-1.0, 0.0], [1.0, 0.0]]), 0.3**2 * jnp.eye(2)),
)


@pytest.mark.slow
def test_hmc_on_scores_agrees_with_hmc_on_energies():
    """Under the same noise, in the modes' shares."""
    schedule = cp.Schedule.log_snr(24)
    energy = cp.compile(single, cp.Analytic(PARTED, schedule))
    scores = cp.compile(single, learned(mixture_score, "score", schedule))

    def shares(density, log_ratio):
        sampler = cp.AnnealedMCMC(cp.HMC(log_ratio=log_ratio), 2, reverse_step=True)
        result = run(density, 5, N, sampler=sampler)
        assert result.status.ok
        left = np.mean(result["x"][:, 0] < 0)
        return [left, 1 - left]

    found, exact = shares(scores, cp.LineIntegral(5, "simpson")), shares(energy, "exact")
    assert cp.metrics.total_variation(found, exact) < 0.02
