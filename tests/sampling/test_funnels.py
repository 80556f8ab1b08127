"""Funnels, whose necks chains enter by steps that suit the place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.samplers.choose import choose, independent
from composeprob.samplers.finishers import Trail
from composeprob.samplers.funnels import FunnelMoves, significant_change
from sampling_cases import learned, normal, run, single, unit_energy, weighed

SD = 3.0
CHAINS = 300
SCHEDULE = cp.Schedule.log_snr(40)


def log_weight(x):
    """x₀ ~ N(0, 3²) and xᵢ ~ N(0, exp x₀), beside independent N(0, 3²)."""
    members = dist.Normal(0.0, jnp.exp(x[0] / 2)).log_prob(x[1:]).sum()
    return members - dist.Normal(0.0, SD).log_prob(x[1:]).sum()


@pytest.fixture(scope="module")
def funnel():
    factor = normal(np.zeros(8), SD, SCHEDULE)
    return cp.compile(weighed, factor, log_weight)


def in_neck(result):
    """Return the z-score of the share of chains with x₀ < −3, by binomial errors."""
    share = np.mean(result["x"][:, 0] < -SD)
    exact = 0.15866
    return (share - exact) / np.sqrt(exact * (1 - exact) / CHAINS)


def begins(scores):
    return FunnelMoves().begins(lambda: scores)


def funnel_scores(rng, sd, size):
    """Return scores of exact draws of x₀ ~ N(0, sd²) and one x₁ ~ N(0, exp x₀)."""
    x0 = sd * rng.standard_normal(size)
    z = rng.standard_normal(size)
    return np.stack([-x0 / sd**2 + 0.5 * (z**2 - 1), -z * np.exp(-x0 / 2)], axis=1)


@pytest.mark.parametrize("size", [64, 2000])
def test_heavy_tails_of_scores_show_a_funnel(size):
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert begins(funnel_scores(rng, 3.0, size))
        assert not begins(rng.standard_normal((size, 4)))
        # Two modes, one of a tenth of the width of the other.
        assert not begins(rng.standard_normal((size, 1)) / rng.choice([0.1, 1], size))
        t = rng.standard_t(2, (size, 2))
        assert not begins(-3 * t / (2 + t**2))
    assert not begins(np.full((size, 2), np.nan))
    assert not begins(np.zeros((size, 0)))


def test_the_population_that_creeps_is_seen_and_the_one_at_rest_is_not():
    rng = np.random.default_rng(1)
    own = np.arange(1000)
    old = rng.standard_normal((1000, 3))
    rest = 0.9 * old + np.sqrt(1 - 0.81) * rng.standard_normal((1000, 3))
    assert significant_change(old, rest, own) == 0.0
    crept = rest + np.array([0.0, 0.08, 0.0])  # a change of two and a half errors
    assert significant_change(old, crept, own) == pytest.approx(0.08, abs=0.03)
    wider = rest * np.array([1.0, 1.0, 1.15])
    assert significant_change(old, wider, own) > 0.15
    # Chains of one family creep together by chance.
    family = own // 250
    together = rest + 0.2 * np.array([[1.0], [-0.5], [0.8], [-0.3]])[family]
    assert significant_change(old, together, family) == 0.0
    assert significant_change(old, together, own) > 0.0


def test_rounds_go_on_while_their_latter_half_creeps(funnel):
    """A change that one round does not show is seen over two."""
    rng = np.random.default_rng(3)
    start = rng.standard_normal((4000, 1))
    trail = Trail(start, np.arange(4000))
    for number in range(4):
        trail.add(start + 0.02 * number + 0.5 * rng.standard_normal((4000, 1)))
    one_round = significant_change(trail.before, trail.after, trail.ancestors)
    assert one_round == 0.0
    assert FunnelMoves().drift(trail, funnel, supported=True) > 0.0


def test_the_share_that_had_no_chain_is_told_in_nats():
    """Chains arrive under N(0, 1) without its lower fifth, and end under N(0, 1)."""
    rng = np.random.default_rng(2)
    end = rng.standard_normal((4000, 2))
    start = rng.standard_normal((4000, 2))
    trail = Trail(start, np.arange(4000))
    trail.add(end)
    assert FunnelMoves().entered(trail) == 0.0
    cut = rng.standard_normal(8000)
    start[:, 1] = cut[cut > -0.8416][:4000]
    assert FunnelMoves().entered(trail) == pytest.approx(-np.log(0.8), abs=0.05)


def test_a_trail_keeps_the_population_of_half_the_rounds():
    trail = Trail(np.zeros((1, 1)), np.arange(1))
    halves = []
    for number in range(1, 13):
        trail.add(np.full((1, 1), number))
        halves.append(int(trail.halfway[0, 0]))
    assert halves == [0, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 4]
    assert trail.before == 11
    assert trail.after == 12


def moved(density, *finishers):
    """Run the sampler of these tests, with these finishers."""
    step = cp.ReverseStep(order=1)
    kernel = cp.MALA(cp.Adaptive())
    sampler = cp.SMC(kernel, check_levels=False, step=step, then=finishers)
    return run(density, chains=CHAINS, sampler=sampler)


def test_chains_enter_the_neck_of_a_funnel(funnel, monkeypatch):
    without = moved(funnel)
    result = moved(funnel, FunnelMoves())
    assert in_neck(without) < -4
    assert abs(in_neck(result)) < 4
    assert result.status.ok
    # The weights of the levels had none of the neck, which the error of the evidence
    # tells.
    assert abs(result.log_evidence) < 4 * result.log_evidence_error
    assert abs(without.log_evidence) > 4 * without.log_evidence_error
    rounds = (result.evaluations - without.evaluations) / 480
    assert rounds in range(4, 13)
    # Where scores show no funnel nothing is moved.
    monkeypatch.setattr(FunnelMoves, "begins", lambda self, scores: False)
    assert moved(funnel, FunnelMoves()).evaluations == without.evaluations


def test_a_default_run_asks_for_funnels(funnel):
    sampler, _ = choose(funnel, CHAINS)
    assert isinstance(sampler.finishers[-1], FunnelMoves)


@cp.program
def funnel_of_latents():
    x = cp.sample("x", dist.Normal(np.zeros(3), SD).to_event(1))
    cp.factor("w", log_weight(x))


@cp.program
def hierarchy():
    tau = cp.sample("tau", dist.LogNormal(0.0, SD))
    cp.sample("theta", dist.Normal(0.0, tau).expand([3]).to_event(1))


def test_latents_alone_have_such_moves_where_no_coordinates_reach_them():
    assert FunnelMoves.suits(cp.compile(funnel_of_latents))
    assert not FunnelMoves.suits(cp.compile(hierarchy))


PRIOR = dist.MixtureSameFamily(
    dist.Categorical(jnp.array([0.3, 0.7])),
    dist.Normal(jnp.array([-1.0, 0.8]), jnp.array([0.3, 0.5])),
)
SUBJECTS = np.array([-1.3, -0.6, 0.2, 0.9, 1.4, 0.5])


def score_of_prior(x, log_snr):
    """The score of `PRIOR` at a level."""
    alpha2 = jax.nn.sigmoid(log_snr)
    variance = alpha2 * PRIOR.component_distribution.scale**2 + 1 - alpha2
    away = x - jnp.sqrt(alpha2) * PRIOR.component_distribution.loc
    logs = jnp.log(PRIOR.mixing_distribution.probs) - 0.5 * jnp.log(variance)
    shares = jax.nn.softmax(logs - 0.5 * away**2 / variance)
    return -jnp.sum(shares * away / variance, keepdims=True)


@cp.program
def common_noise(prior, y):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(SUBJECTS)):
        x = cp.sample("x", prior)
        cp.observe("y", dist.Normal(x[..., 0], sigma), y)


def test_latents_under_scores_have_such_moves():
    """Subjects have to be where their data are if the noise of these is small, and
    log σ is no less likely to be far below 0 than under its prior."""
    prior = learned(score_of_prior, "score", SCHEDULE, shape=(1,))
    density = cp.compile(common_noise, prior, jnp.float32(SUBJECTS))
    sampler, _ = independent(density, "because")
    assert sampler.finishers == (cp.WarmUp(), FunnelMoves())

    log_sigma = np.linspace(-14, 2.5, 3301)
    spread = np.hypot(PRIOR.component_distribution.scale, np.exp(log_sigma)[:, None])
    of_y = dist.Normal(PRIOR.component_distribution.loc, spread[:, None])
    by_part = of_y.log_prob(SUBJECTS[:, None]) + np.log([0.3, 0.7])
    of_data = np.logaddexp(by_part[..., 0], by_part[..., 1]).sum(1)
    log_density = log_sigma - 0.5 * np.exp(2 * log_sigma) + of_data
    shares = np.exp(log_density - log_density.max())
    exact = shares @ log_sigma / shares.sum()

    def off(finishers):
        kept = cp.AnnealedMCMC(sampler.kernel, 3, sampler.step, then=finishers)
        result = run(density, chains=CHAINS, sampler=kept)
        mean = result.mean(lambda sites: jnp.log(sites["sigma"]))
        return (mean.value - exact) / mean.error

    assert abs(off(sampler.finishers)) < 4
    assert off((cp.WarmUp(),)) > 4


@cp.program
def group_of_subjects(prior):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("subjects", len(SUBJECTS)):
        u = cp.sample("u", dist.Normal(0.0, tau).expand([1]).to_event(1))
        cp.factor("x", prior, at=u)


def test_subjects_whose_prior_has_latents_for_its_scale_move_with_these_instead():
    prior = learned(score_of_prior, "score", SCHEDULE, shape=(1,))
    sampler, _ = independent(cp.compile(group_of_subjects, prior), "because")
    assert sampler.finishers == (cp.WarmUp(),)


def test_only_densities_that_can_be_asked_for_it_have_such_moves(funnel):
    assert FunnelMoves.suits(funnel)
    by_scores = cp.compile(single, learned(lambda x, t: -x, "score", SCHEDULE))
    assert not FunnelMoves.suits(by_scores)
    # Those of a learned energy are moves until Stein's identity holds.
    energy = cp.compile(single, learned(unit_energy, "energy", SCHEDULE, time="sigma"))
    sampler, _ = choose(energy, CHAINS)
    assert not any(isinstance(last, FunnelMoves) for last in sampler.finishers)
