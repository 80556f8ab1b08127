"""Rewards: criteria on the host, against closed forms, and what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob import tuning
from composeprob.density.reward import SiteReward
from composeprob.errors import (
    CapabilityError,
    InvalidValueError,
    NetworkError,
    ProgramError,
    ShapeError,
    WrongTypeError,
)
from composeprob.runtime.population import GlobalMover, Population, next_increment
from composeprob.runtime.rewards import Criterion, Predicted
from composeprob.samplers.finishers import GaussianMixture
from messages import check_finding, check_wording
from refusals import refused, rows
from sampling_cases import modes, normal, run, single
from zscores import LIMIT, assert_agrees, assert_disagrees

LEVELS = cp.Schedule.log_snr(16, -8.0, 8.0)
NOISE = float(LEVELS.sigma[0] / LEVELS.alpha[0])


@cp.program
def rewarded(f, reward):
    cp.factor("score", reward, at=cp.sample("x", f))


def slope(x):
    """A linear reward, under which a Gaussian only moves."""
    return 1.5 * x


def standard(reward, **options):
    density = cp.compile(rewarded, normal(0.0, 1.0, LEVELS), reward)
    return run(density, chains=1000, **options)


def scores_of(result, mean, variance, log_evidence):
    """z-scores of the first two moments and the log-evidence."""
    x = result["x"] / float(LEVELS.alpha[0])
    n = result.effective_chains
    error = result.log_evidence_error
    return {
        "mean": (x.mean() - mean) / np.sqrt(variance / n),
        "variance": (x.var() - variance) / (variance * np.sqrt(2 / n)),
        "log Z": (result.log_evidence - log_evidence) / error,
    }


def test_a_linear_reward_moves_a_gaussian():
    result = standard(cp.Reward(slope))
    variance = 1 + NOISE**2
    tilt = 1.5 * float(LEVELS.alpha[0])
    assert_agrees(scores_of(result, tilt * variance, variance, tilt**2 * variance / 2))
    assert result.status.ok
    assert result.effective_chains > 800
    assert "score" in result.reason


def test_moves_that_do_not_ask_for_it_lead_back(monkeypatch):
    move = GlobalMover.move

    def unaware(self, log_gain):
        return move(self, lambda states: 0 * log_gain(states))

    monkeypatch.setattr(GlobalMover, "move", unaware)
    variance = 1 + NOISE**2
    tilt = 1.5 * float(LEVELS.alpha[0])
    result = standard(cp.Reward(slope))
    assert_disagrees(
        scores_of(result, tilt * variance, variance, tilt**2 * variance / 2)
    )


class Unweighted(GaussianMixture):
    """Mixtures whose density the accept test leaves out."""

    def log_prob(self, row):
        return jnp.zeros(())


def test_draws_from_mixtures_whose_density_is_left_out_are_found(monkeypatch):
    with_tails = GaussianMixture.with_tails

    def unweighted(self, width):
        return Unweighted(**vars(with_tails(self, width)))

    monkeypatch.setattr(GaussianMixture, "with_tails", unweighted)
    variance = 1 + NOISE**2
    tilt = 1.5 * float(LEVELS.alpha[0])
    result = standard(cp.Reward(slope))
    assert_disagrees(
        scores_of(result, tilt * variance, variance, tilt**2 * variance / 2)
    )


def test_chains_forget_by_several_draws_from_a_fit():
    """One draw repeats the errors of the chains that it was fitted to."""
    density = cp.compile(single, normal(0.0, 1.0, LEVELS))
    result = run(density, chains=200)
    population = Population.of_result(result, density, jax.random.key(3), None)
    mover = GlobalMover(population)
    renewed = []
    for _ in range(8):
        fitted = mover.fitted()
        mover.move_by_mixtures(fitted, lambda states: np.zeros(200))
        renewed.append(np.mean(mover.renewed))
    draws = tuning.REWARD.draws
    assert renewed[: draws - 1] == [0.0] * (draws - 1)
    assert renewed[-1] > 0.9


class Asked:
    """A rare event, P(x > 2) of N(0, 1), that counts what it is asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x))
        return np.where(x > 2.0, 0.0, -np.inf)


def test_a_rare_event_of_a_program():
    asked = Asked()
    result = standard(cp.Reward(asked, calls=40))
    sd = np.sqrt(1 + NOISE**2)
    cut = 2.0 / float(LEVELS.alpha[0]) / sd
    exact = np.log(stats.norm.sf(cut))
    assert (result["x"] > 2.0).all()
    assert abs(result.log_evidence - exact) < LIMIT * result.log_evidence_error
    assert result.log_evidence_error < 0.3
    mean = sd * stats.norm.pdf(cut) / stats.norm.sf(cut)
    found = result["x"].mean() / float(LEVELS.alpha[0])
    spread = result["x"].std() / np.sqrt(result.effective_chains)
    assert abs(found - mean) < LIMIT * spread
    # Draws from mixtures reach a tail in a few calls of all chains.
    calls = result.about.calls["score"]
    assert calls <= 20
    assert calls == -(-sum(asked.batches) // 1000)
    assert max(asked.batches) == 1000


def test_an_event_is_asked_for_once():
    asked = Asked()
    criterion = Criterion(SiteReward("s", "x", cp.Reward(asked, scale=2.0), "here"))
    events = np.array([1.0, 3.0, 1.0, 3.0])
    np.testing.assert_array_equal(criterion(events), [-np.inf, 0, -np.inf, 0])
    np.testing.assert_array_equal(criterion(events[1:]), [0, -np.inf, 0])
    assert asked.batches == [2]
    assert criterion.asked == 2


def test_several_rewards_and_a_scale():
    @cp.program
    def two(f):
        x = cp.sample("x", f)
        cp.factor("up", cp.Reward(slope, scale=2.0), at=x)
        cp.factor("down", cp.Reward(slope, scale=-1.0), at="x")

    density = cp.compile(two, normal(0.0, 1.0, LEVELS))
    check_wording(str(density))
    result = run(density, chains=1000)
    variance = 1 + NOISE**2
    tilt = 1.5 * float(LEVELS.alpha[0])
    assert_agrees(scores_of(result, tilt * variance, variance, tilt**2 * variance / 2))
    assert set(result.about.calls) == {"up", "down"}


@pytest.mark.slow
def test_data_and_latents_keep_their_posterior():
    """x and z are jointly Gaussian given y, and the reward tilts x."""

    @cp.program
    def observed(f, y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        x = cp.sample("x", f)
        cp.observe("y", dist.Normal(x + z, 1.0), y)
        cp.factor("score", cp.Reward(slope), at=x)

    density = cp.compile(observed, normal(0.0, 1.0, LEVELS), 1.0)
    sampler = cp.SMC(cp.MALA(), check_levels=False)
    result = run(density, chains=2000, sampler=sampler)
    alpha = float(LEVELS.alpha[0])
    prior = np.diag([1 + NOISE**2, 1.0])
    covariance = np.linalg.inv(np.linalg.inv(prior) + np.ones((2, 2)))
    mean = covariance @ np.ones(2) + 1.5 * alpha * covariance[:, 0]
    found = np.stack([result["x"] / alpha, result["z"]])
    errors = np.sqrt(np.diag(covariance) / result.effective_chains)
    assert np.all(abs(found.mean(1) - mean) < LIMIT * errors)
    assert result.status.ok


def test_calls_that_do_not_suffice_are_said():
    result = standard(cp.Reward(slope, scale=20.0, calls=4))
    check_finding(result.status, "weights_collapsed")
    assert np.isnan(result.log_evidence_error)
    assert result.about.calls["score"] <= 4


def test_a_reward_that_no_chain_has_is_said():
    result = standard(cp.Reward(lambda x: np.full(len(x), -np.inf)))
    check_finding(result.status, "zero_density")


def test_a_small_place_of_high_reward_that_moves_found_is_said():
    """P(3.2 < x < 3.8) is 0.0006, and under the reward 0.65: hardly any of the chains
    that get weights are there."""

    def place(x):
        return 8.0 * (np.abs(x - 3.5) < 0.3)

    density = cp.compile(rewarded, normal(0.0, 1.0, LEVELS), cp.Reward(place))
    result = run(density, chains=300)
    assert np.mean(place(result["x"]) > 0) < 0.3
    check_finding(result.status, "modes_unreached")
    assert np.isnan(result.log_evidence_error)


@pytest.mark.parametrize(("shift", "is_excess"), [(0.0, False), (3.0, True)])
def test_weights_predict_their_mean_after_a_stage(shift, is_excess):
    """exp(a·x) makes N(a, 1) of N(0, 1); a population farther on is in excess."""
    a = 0.7
    rng = np.random.default_rng(0)
    excesses = []
    for _ in range(50):
        predicted = Predicted.by_weights(np.zeros(300), a * rng.normal(size=300))
        after = a + shift + rng.normal(size=300)
        excesses.append(predicted.excess(a * after))
    assert predicted.log_mean == pytest.approx(1.5 * a**2, abs=0.3)
    found = np.mean(np.array(excesses) > 0)
    assert found == float(is_excess)


def test_the_calls_are_kept_in_a_file(tmp_path):
    result = standard(cp.Reward(slope, calls=4))
    result.save(tmp_path / "run.nc")
    again = cp.Result.load(tmp_path / "run.nc")
    assert again.about.calls == result.about.calls
    assert again.evaluations == result.evaluations


def test_the_prior_has_no_rewards():
    density = cp.compile(rewarded, normal(0.0, 1.0, LEVELS), cp.Reward(slope))
    assert density.described.rewards
    assert not cp.prior(density).described.rewards


def test_exponents_grow_as_far_as_half_of_the_possible_chains_count():
    logs = np.random.default_rng(0).standard_normal(20_000)
    # The relative effective size of log-normal weights is e^(−s²).
    step = next_increment(5 * logs, 1.0)
    np.testing.assert_allclose(step, np.sqrt(np.log(2)) / 5, rtol=0.03)
    assert next_increment(0.1 * logs, 1.0) == 1.0
    impossible = np.where(logs > 1, 0.0, -np.inf)
    assert next_increment(impossible, 1.0) == 1.0


def failing(x):
    if (x > 0.5).any():
        raise KeyError("no pose")
    return x


def stated(fn):
    density = cp.compile(rewarded, normal(0.0, 1.0, LEVELS), cp.Reward(fn))
    return lambda: run(density, chains=64)


def test_an_exception_of_the_function_is_shown_with_an_event():
    error = refused(stated(failing), ProgramError, facts="'score' at site 'x'")
    assert isinstance(error.__cause__, KeyError)


def in_program(body):
    def call():
        @cp.program
        def program(f):
            body(cp.sample("x", f))

        cp.compile(program, normal(0.0, 1.0, LEVELS))

    return call


REWARD = cp.Reward(slope)


def in_plate(x):
    with numpyro.plate("n", 3):
        cp.factor("score", REWARD, at=x)


def at_latent(x):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    cp.factor("score", REWARD, at=z)


def at_tokens():
    uniform = dist.Categorical(jnp.ones(3) / 3).expand([4]).to_event(1)
    cp.compile(rewarded, cp.Analytic(uniform), REWARD)


def scaled(x):
    with numpyro.handlers.scale(scale=2.0):
        cp.factor("score", REWARD, at=x)


def callback(x):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    cp.factor("score", jax.pure_callback(slope, shape, x))


def energy(x, level):
    return jax.pure_callback(slope, jax.ShapeDtypeStruct((), jnp.float32), x)


REFUSED = {
    InvalidValueError: {
        "NaN": stated(lambda x: np.where(x > 0, np.nan, 0.0)),
        "infinity": stated(lambda x: np.where(x > 0, np.inf, 0.0)),
        "a policy": in_program(lambda x: cp.factor("s", REWARD, "tempered", at=x)),
        "a scale that is NaN": lambda: cp.Reward(slope, scale=np.nan),
        "one call": lambda: cp.Reward(slope, calls=1),
    },
    WrongTypeError: {
        "no function": lambda: cp.Reward(3.0),
        "no site": in_program(lambda x: cp.factor("s", REWARD)),
    },
    ShapeError: {"a number for all": stated(lambda x: 1.0)},
    ProgramError: {
        "in a plate": in_program(in_plate),
        "at a latent": in_program(at_latent),
        "at tokens": at_tokens,
        "scaled": in_program(scaled),
        "an unknown site": in_program(lambda x: cp.factor("s", REWARD, at="y")),
        "a callback in a log-weight": in_program(callback),
    },
    NetworkError: {
        "a callback in an energy": lambda: cp.Energy(energy, LEVELS, event_shape=()),
    },
    CapabilityError: {
        "draws": lambda: standard(REWARD, draws=3),
    },
}


@pytest.mark.parametrize(("kind", "call"), rows(REFUSED))
def test_mistakes_are_refused(kind, call):
    refused(call, kind)


def test_a_callback_with_a_derivative_of_its_own_is_no_mistake():
    @jax.custom_jvp
    def host(x):
        return jax.pure_callback(
            slope,
            jax.ShapeDtypeStruct((), jnp.float32),
            x,
            vmap_method="expand_dims",
        )

    host.defjvp(lambda primals, tangents: (host(*primals), 1.5 * tangents[0]))
    f = cp.Energy(lambda x, level: host(x), LEVELS, event_shape=(), top_power=0.0)
    density = cp.compile(single, normal(0.0, 1.0, LEVELS) * f)
    score = density.score({"x": jnp.float32(0.0)}, 0)["x"]
    np.testing.assert_allclose(score, 1.5, rtol=1e-4)


@pytest.mark.slow
def test_shares_of_two_modes_by_a_default_call():
    """The judgement of a reward that is held back: both shares within .03 by
    quadrature, four keys, at most 120 calls a chain."""
    schedule = cp.Schedule.log_snr(60)

    def inside(x):
        return 3.0 * (np.abs(x - 4) < 0.3) + 1.0 * (x < 0)

    prior = cp.Analytic(modes([0.5, 0.5], [-4.0, 4.0], [0.5, 0.5]), schedule)
    density = cp.compile(rewarded, prior, cp.Reward(inside))
    sd = np.hypot(0.5, float(schedule.sigma[0] / schedule.alpha[0]))
    step = stats.norm.cdf(0.3 / sd) - stats.norm.cdf(-0.3 / sd)
    right = 0.5 * (step * np.exp(3) + 1 - step)
    total = right + 0.5 * np.e
    for seed in range(4):
        result = cp.infer(
            density, jax.random.key(seed), num_chains=1000, progress=False
        )
        x = result["x"]
        assert abs(np.mean(x > 0) - right / total) < 0.03
        in_step = np.mean(np.abs(x - 4) < 0.3)
        assert abs(in_step - 0.5 * step * np.exp(3) / total) < 0.03
        assert result.status.ok
        assert result.about.calls["score"] <= 120
        off = result.log_evidence - np.log(total)
        assert abs(off) < LIMIT * result.log_evidence_error


def test_log_weights_that_come_in_with_the_first_power_count_once():
    """The prior draws of N(0, 1) are weighted to N(½, 1), beside a factor far away."""
    n = 20_000
    x = np.random.default_rng(0).normal(size=n)
    words = jnp.zeros(2, jnp.uint32)
    population = Population(None, x, np.arange(n), None, words, np.zeros(n), None)
    powers = []

    def gain(x):
        return -0.5 * ((x - 2) / 0.3) ** 2

    def resampled(exponent, chosen):
        powers.append(exponent)
        return gain(population.points)

    population.bring_in(gain(x), resampled, 0.5 * x - 0.125)
    assert len(powers) > 1
    height = 0.3 * np.sqrt(2 * np.pi)
    exact = np.log(height * stats.norm.pdf(2, 0.5, np.sqrt(1.09)))
    error = np.sqrt(population.variance)
    assert error < 0.1
    assert abs(population.log_evidence - exact) < LIMIT * error
