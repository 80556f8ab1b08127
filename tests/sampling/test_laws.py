"""Every sampler on Gaussian targets whose law at level 0 is known, and the evidence
that SMC estimates."""

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
from composeprob.samplers.weights import first_evidence, first_weight
from sampling_cases import SCHEDULE, N, Never, both, normal, run, single, slow, visited
from zscores import assert_agrees, z_scores

MEANS = np.array([[0.5, -0.3], [0.2, 0.4]])
COVARIANCES = np.array([[[0.5, 0.3], [0.3, 0.4]], [[0.6, -0.2], [-0.2, 0.3]]])


def product_law():
    """Mean and covariance of the normalised product of the factors at level 0, and the
    log of its normaliser."""
    alpha, sigma = float(SCHEDULE.alpha[0]), float(SCHEDULE.sigma[0])
    means = alpha * MEANS
    covariances = alpha**2 * COVARIANCES + sigma**2 * np.eye(2)
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
    samples = statistics(np.asarray(result["x"], float), mean)
    assert_agrees(z_scores(samples, expectations(mean, covariance)))
    assert result.status.ok


RUNS = 40
SMC = {
    "feynman_kac": cp.SMC(cp.MALA(cp.Adaptive()), 2, check_levels=False),
    "density": cp.SMC(cp.MALA(cp.Adaptive()), 2, weights="density"),
}


@pytest.mark.parametrize("weights", SMC)
def test_smc_has_the_law_of_level_0_and_its_evidence(density, weights):
    """Chains that interact are not independent draws: the standard error is that of
    whole runs."""
    mean, covariance, log_z = product_law()
    runs = [run(density, seed, 512, sampler=SMC[weights]) for seed in range(RUNS)]
    of_runs = [statistics(result["x"], mean) for result in runs]
    averages = {}
    for name in of_runs[0]:
        averages[name] = np.array([values[name].mean() for values in of_runs])
    averages["Z"] = np.exp([result.log_evidence - log_z for result in runs])
    assert averages["Z"].std() < 0.2
    assert_agrees(z_scores(averages, expectations(mean, covariance) | {"Z": 1.0}))


@pytest.mark.slow
def test_where_levels_have_no_signal_but_are_far_apart_smc_starts_below_them():
    schedule = cp.Schedule.cosine(50)
    density = cp.compile(both, normal(0.0, 1.0, schedule), normal(0.0, 0.5, schedule))
    first = SMC["feynman_kac"].first_level(density)
    assert 40 <= first < 49
    result = run(density, chains=256, sampler=SMC["feynman_kac"])
    assert np.isnan(result.levels["ess"][first + 1 :]).all()
    assert np.isfinite(result.levels["ess"][: first + 1]).all()
    assert result.status.ok


def first_log_weights(density, chains):
    """Positions of the first draws, and their log-weights."""
    sampler = cp.SMC(cp.MALA()).prepare(density)
    level = density.num_levels - 1
    layout = Layout.of_density(density)

    def log_weight(v):
        evaluation = layout.evaluate(density, v, level)
        return first_weight(layout, density, v, evaluation, level)

    @jax.jit
    def drawn():
        visits = Visits.every(level, density.num_levels)
        run = begin(jax.random.key(0), chains, visits)
        run = sampler.start(run, density, level)
        log_weights = jax.vmap(log_weight)(run.chains.position)
        return sampler.positions(run, density), log_weights

    position, log_weights = drawn()
    return position, np.asarray(log_weights, np.float64)


def first_weights(density, chains=20_000):
    """Positions of the first draws, and their weights."""
    position, log_weights = first_log_weights(density, chains)
    return position, np.asarray(jax.nn.softmax(log_weights), np.float64)


def standard_score():
    """N(0, 1) at every level, by its score alone."""
    return cp.Diffusion(
        lambda x, level: -x, SCHEDULE, parameterization="score", event_shape=(1,)
    )


def standard_energy():
    """N(0, 1) at every level, by its log-density."""

    def energy(x, log_snr):
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        log_normaliser = 0.5 * jnp.log(2 * jnp.pi)
        return sigma * (0.5 * jnp.sum(x**2) + log_normaliser)

    return cp.Diffusion(
        energy,
        SCHEDULE,
        parameterization="energy",
        event_shape=(1,),
        time="log_snr",
        mode_depth=True,
    )


def promised():
    """N(0, 1) at every level, which promises to be that at the noisiest."""
    return cp.Energy(lambda x, level: -0.5 * jnp.sum(x**2), SCHEDULE, event_shape=(1,))


def mixed():
    """Twice N(0, 1), which has no rate, so that its values are evaluated."""
    both = [standard_energy(), standard_energy()]
    return cp.mixture(both, log_weights=[0.0, 0.0])


PAIRS_OF_NOISE = {
    "closed form, promised energy": lambda: (normal([0.0]), promised()),
    "score, promised energy": lambda: (standard_score(), promised()),
    "energy, mixture of energies": lambda: (standard_energy(), mixed()),
}


@pytest.mark.parametrize("pair", PAIRS_OF_NOISE)
def test_factors_with_a_power_at_the_top_count_once_there(pair):
    """N(0, 1) times the same again has second moment ½, whether drawn or weighted."""
    position, weights = first_weights(cp.compile(both, *PAIRS_OF_NOISE[pair]()))
    assert abs(weights @ np.asarray(position["x"][:, 0]) ** 2 - 0.5) < 0.02


def test_the_evidence_of_the_first_level_counts_a_mixture_of_energies_once():
    """2·N(x; 0, 1)² has the integral 1/√π."""
    density = cp.compile(both, standard_energy(), mixed())
    _, log_weights = first_log_weights(density, 100)
    start = first_evidence(density, density.num_levels - 1)
    log_evidence = start + np.log(np.mean(np.exp(log_weights)))
    assert abs(log_evidence + 0.5 * np.log(np.pi)) < 1e-3


@cp.program
def depends_on_noised(f):
    x = cp.sample("x", f)
    # A mixture of one component has no location that its coordinate could be measured
    # from.
    one = dist.Normal(x[..., None], 0.5)
    cp.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.ones(1)), one))


@pytest.mark.slow
def test_a_prior_that_depends_on_a_noised_site_is_drawn_and_weighted_there():
    density = cp.compile(depends_on_noised, normal())
    position, weights = first_weights(density, 2000)
    top = density.schedule.at(density.num_levels - 1)
    away = np.asarray(position["z"] - position["x"] / top.alpha)
    assert abs(away.std() - 0.5) < 0.05
    np.testing.assert_allclose(weights, weights.mean(), rtol=1e-3)

    level = 3
    layout = Layout.of_density(density)
    schedule = density.schedule
    sampler = cp.SMC(step=cp.ReverseStep(order=1), resample=Never())
    at = {"x": jnp.asarray(0.3), "z": jnp.asarray(2.5)}
    v = layout.vector(at, schedule.at(level + 1).alpha)
    visit = visited(sampler, density, v[None], level)
    after = layout.position(visit.chains.position[0], schedule.at(level).alpha)

    def log_prior(position, k):
        law = dist.Normal(position["x"] / schedule.alpha[k], 0.5)
        return law.log_prob(position["z"])

    # One factor has the rate 0, so that the increment has two terms: the prior's, and
    # the log-ratio of the step, which was twisted towards it.
    of_prior = log_prior(after, level) - log_prior(at, level + 1)
    evaluation = layout.evaluate(density, v, level + 1)
    drift = evaluation.terms.drift
    step = Step.ddpm(schedule.at(level + 1).variance, schedule.at(level).variance)
    shift = step.shift(drift, evaluation.score[:1], 0.5)
    made = visit.chains.position[0, :1], v[:1], drift
    of_twist = step.log_density(*made) - step.log_density(*made, shift)
    assert abs(float(of_prior)) > 0.01
    assert abs(float(of_twist)) > 0.01
    np.testing.assert_allclose(visit.log_weights[0], of_prior + of_twist, rtol=1e-3)


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
        without_cache = KernelState(start.position, start.evaluation)
        trajectory = dataclasses.replace(trajectory, start=without_cache)
        state, info = super().finish(trajectory, evaluation)
        return Remembers(state.position, state.evaluation, start.seen), info


@pytest.mark.parametrize("weights", SMC)
def test_smc_refreshes_whatever_a_kernel_caches(weights):
    """The cache when the transition began, which moved the chain by next to nothing."""
    density = cp.compile(single, normal([0.0], 0.1))
    sampler = cp.SMC(Remembering(1e-16), weights=weights, resample=Never())
    sampler = sampler.prepare(density)
    after = visited(sampler, density, jnp.ones((1, 1)), 19).chains
    layout = sampler.moves.layout
    position = layout.position(after.position[0], density.schedule.at(19).alpha)
    expected = float(density.log_density(position, 19))
    stale = float(density.log_density(position, 20))
    np.testing.assert_allclose(after.inner[0].seen[0], expected, rtol=1e-5)
    assert abs(stale - expected) > 0.01
