"""Results that go on by the next state of a Markov chain: against Kalman's filter, with
and without log-densities, and what is refused."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import composeprob as cp
from composeprob.errors import (
    CapabilityError,
    DoublyIntractableError,
    InvalidValueError,
    ShapeError,
    WrongTypeError,
)
from composeprob.runtime import next_step
from composeprob.runtime.next_step import Steps
from composeprob.runtime.population import GlobalMover
from messages import check_wording
from refusals import refused
from sampling_cases import learned, run
from zscores import LIMIT, assert_agrees, assert_disagrees

LEVELS = cp.Schedule.log_snr(16, -8.0, 8.0)
ALPHA = float(LEVELS.alpha[0])
NOISE = float(LEVELS.sigma[0] / LEVELS.alpha[0])
KEPT, SD = 0.9, 0.5
"""What a step keeps of the state, and the standard deviation of what it adds."""

YS = (1.6, 2.9, 0.4, 1.1, -2.0)
PAST = {"past": "x"}


@cp.program
def first(y):
    x = cp.sample("x", cp.Analytic(dist.Normal(0.0, 1.0), LEVELS))
    cp.observe("y", dist.Normal(x, 1.0), y)


@cp.program
def step(y):
    past = cp.sample("past", dist.Normal(0.0, 1.0))
    x = cp.sample("x", cp.Analytic(dist.Normal(KEPT * past, SD), LEVELS))
    cp.observe("y", dist.Normal(x, 1.0), y)


@cp.program
def step_of(f, y):
    """A step by a conditional network."""
    past = cp.sample("past", dist.Normal(0.0, 1.0))
    x = cp.sample("x", f.given(past=past))
    cp.observe("y", dist.Normal(x, 1.0), y)


def network(x, log_snr, past):
    """The noise in x of the step's law."""
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
    away = x - alpha * KEPT * past
    return sigma * away / ((alpha * SD) ** 2 + sigma**2)


def transition():
    levels = cp.Schedule.log_snr(40, -8.0, 8.0)
    return learned(network, "epsilon", levels, shape=(), conditions=("past",))


class State(NamedTuple):
    """The exact law of a state given the data so far, and their log-evidence."""

    mean: float
    variance: float
    log_evidence: float


def kalman(ys) -> list[State]:
    """Return the law of each state, with the noise of level 0."""
    states = []
    mean = 0.0
    variance = 1 + NOISE**2
    log_evidence = 0.0
    for y in ys:
        if states:
            mean = KEPT * mean
            variance = KEPT**2 * variance + SD**2 + NOISE**2
        spread = np.sqrt(variance + 1)
        log_evidence += stats.norm.logpdf(y, mean, spread)
        gain = variance / (variance + 1)
        mean += gain * (y - mean)
        variance *= 1 - gain
        states.append(State(mean, variance, log_evidence))
    return states


def scores(result, exact: State) -> dict[str, float]:
    """z-scores of the mean, the variance and the log-evidence."""
    mean = result.mean(lambda sample: sample["x"] / ALPHA)
    square = result.mean(lambda sample: (sample["x"] / ALPHA - exact.mean) ** 2)
    error = result.log_evidence_error
    return {
        "mean": (mean.value - exact.mean) / mean.error,
        "variance": (square.value - exact.variance) / square.error,
        "log Z": (result.log_evidence - exact.log_evidence) / error,
    }


def start(seed=0, y=YS[0]):
    # Level weights are exact here, up to those of 1,000 chains.
    return run(cp.compile(first, y), seed, chains=1000)


@pytest.fixture(scope="module")
def begun():
    return start()


def test_a_chain_goes_on_state_by_state(begun):
    result = begun
    spent = begun.evaluations
    moved = 0
    for t, exact in list(enumerate(kalman(YS)))[1:]:
        before = result
        density = cp.compile(step, YS[t])
        result = result.extend(density, jax.random.key(t), given=PAST)
        assert_agrees(scores(result, exact))
        assert result.status.ok
        # Given sites are frozen: copies of what the chains had.
        earlier = np.float32(before["x"] / ALPHA)
        assert np.isclose(result["past"][:, None], earlier, rtol=1e-6).any(1).all()
        moved += "and 1 moves (" in result.reason
    assert set(result.samples) == {"past", "x"}
    assert f"extended by {len(YS) - 1} steps of x" in result.reason
    # A draw is one way down, and pilots and moves are a few more.
    assert moved
    assert result.evaluations - spent <= 4 * len(YS) * LEVELS.num_levels


def test_without_the_weights_of_the_steps_it_does_not_see_the_data(begun, monkeypatch):
    fallen = next_step._fallen

    def unweighted(*arguments: Any) -> Any:
        states, log_weights = fallen(*arguments)
        return states, jnp.zeros_like(log_weights)

    monkeypatch.setattr(next_step, "_fallen", unweighted)
    result = begun
    for t in (1, 2):
        density = cp.compile(step, YS[t])
        result = result.extend(density, jax.random.key(t), given=PAST)
    assert_disagrees(scores(result, kalman(YS)[2]))


def test_a_conditional_network_is_stepped_and_looks_back_a_few_steps(begun):
    """Reverse steps have the law of the factor, up to an error below the chains'."""
    f = transition()
    ys = (*YS, 0.3, 1.0)
    result = begun
    for t, exact in list(enumerate(kalman(ys)))[1:]:
        density = cp.compile(step_of, f, ys[t])
        result = result.extend(density, jax.random.key(t), given=PAST, keep=2)
        found = scores(result, exact)
        assert max(map(abs, found.values())) < LIMIT, (t, found)
    assert density.sites["past"].kind == "given"
    assert "energy" not in density.capabilities
    assert "past by an earlier result, then x given that" in str(density)
    assert "errors by ancestors 2 steps back" in result.reason
    assert result.effective_chains > 200


# ── data that are far away ────────────────────────────────────────────────────────────
FINE, FAR = 0.03, 2.0
"""The standard deviation of a datum, and the datum: a few in a hundred of the chains
that do not see it count."""


@cp.program
def far_step(f, y):
    past = cp.sample("past", dist.Normal(0.0, 1.0))
    x = cp.sample("x", f.given(past=past))
    cp.observe("y", dist.Normal(x, FINE), y, anneal="tempered")


def after_far_datum() -> State:
    """The exact law of the state after it."""
    now = kalman(YS[:1])[0]
    mean = KEPT * now.mean
    variance = KEPT**2 * now.variance + SD**2 + NOISE**2
    spread = np.sqrt(variance + FINE**2)
    log_evidence = now.log_evidence + stats.norm.logpdf(FAR, mean, spread)
    gain = variance / spread**2
    return State(mean + gain * (FAR - mean), variance * (1 - gain), log_evidence)


@pytest.fixture(scope="module")
def far():
    return cp.compile(far_step, transition(), FAR)


def test_a_far_datum_comes_into_a_step_by_powers(begun, far):
    """Proposals of scores alone do not see it."""
    result = begun.extend(far, jax.random.key(3), given=PAST)
    found = scores(result, after_far_datum())
    assert max(map(abs, found.values())) < LIMIT, found
    assert result.log_evidence_error < 0.3
    assert result.about.steps == 1
    assert 0 < result.about.global_acceptance < 1
    assert "accepted" in result.reason


def test_moves_that_see_all_of_a_far_datum_at_once_are_found(begun, far, monkeypatch):
    move = GlobalMover.move

    def unaware(self, log_gain):
        return move(self, lambda states: np.zeros(len(self.population)))

    monkeypatch.setattr(GlobalMover, "move", unaware)
    result = begun.extend(far, jax.random.key(3), given=PAST)
    assert_disagrees(scores(result, after_far_datum()))


def test_the_ancestors_of_the_first_run_count_until_there_are_steps_enough():
    """Its chains may be copies of one another, which no step has parted yet."""
    steps, ancestors = Steps().onwards(np.array([0, 0, 1]), keep=2)
    assert ancestors is None
    steps, ancestors = steps.onwards(np.array([2, 2, 0]), keep=2)
    assert ancestors.tolist() == [1, 1, 0]
    steps, ancestors = steps.onwards(np.array([1, 2, 0]), keep=2)
    assert ancestors.tolist() == [2, 0, 2]
    assert steps.number == 3
    assert steps.onwards(np.array([0, 1, 2]), keep=None)[1] is None


@cp.program
def step_of_noise(y):
    past = cp.sample("past", dist.Normal(0.0, 1.0))
    noise = cp.sample("noise", cp.Analytic(dist.Normal(0.0, 1.0), LEVELS))
    x = numpyro.deterministic("x", KEPT * past + SD * noise)
    cp.observe("y", dist.Normal(x, 1.0), y)


def test_a_state_may_be_a_deterministic_of_new_noise(begun):
    result = begun
    for t in (1, 2):
        density = cp.compile(step_of_noise, YS[t])
        result = result.extend(density, jax.random.key(20 + t), given=PAST)
    # As statements see it, so that it is given on without a factor α.
    mean = result.mean(lambda sample: sample["x"])
    exact = kalman(YS[:3])

    def away(state: State) -> dict[str, float]:
        gain = result.log_evidence - state.log_evidence
        return {
            "mean": (mean.value - state.mean) / mean.error,
            "log Z": gain / result.log_evidence_error,
        }

    assert_agrees(away(exact[-1]))
    assert_disagrees(away(exact[-2]))


def test_a_step_without_data_forecasts(begun):
    @cp.program
    def forecast():
        past = cp.sample("past", dist.Normal(0.0, 1.0))
        cp.sample("x", cp.Analytic(dist.Normal(KEPT * past, SD), LEVELS))

    key = jax.random.key(1)
    result = begun.extend(cp.compile(forecast), key, given=PAST)
    now = kalman(YS[:1])[0]
    variance = KEPT**2 * now.variance + SD**2 + NOISE**2
    exact = State(KEPT * now.mean, variance, now.log_evidence)
    assert_agrees(scores(result, exact))


def test_steps_that_cannot_be_made_are_refused(begun):
    density = cp.compile(step, YS[1])
    key = jax.random.key(0)

    def extended(result=begun, density=density, **options):
        return lambda: result.extend(density, key, **options)

    @cp.program
    def with_a_new_latent(y):
        past = cp.sample("past", dist.Normal(0.0, 1.0))
        sd = cp.sample("sd", dist.HalfNormal(1.0))
        x = cp.sample("x", cp.Analytic(dist.Normal(past, sd), LEVELS))
        cp.observe("y", dist.Normal(x, 1.0), y)

    @cp.program
    def of_two_numbers(y):
        past = cp.sample("past", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        x = cp.sample("x", cp.Analytic(dist.Normal(past.sum(), SD), LEVELS))
        cp.observe("y", dist.Normal(x, 1.0), y)

    @cp.program
    def of_nothing_new(y):
        past = cp.sample("past", dist.Normal(0.0, 1.0))
        cp.observe("y", dist.Normal(past, 1.0), y)

    new_latent = cp.compile(with_a_new_latent, 1.0)
    two = cp.compile(of_two_numbers, 1.0)
    nothing = cp.compile(of_nothing_new, 1.0)
    refused(extended(), InvalidValueError, fix="given={'past': 'x'}")
    refused(extended(keep=2), InvalidValueError, facts="keep=2")
    refused(extended(given={}), WrongTypeError)
    refused(extended(given={"before": "x"}), InvalidValueError, facts="before")
    refused(extended(given={"past": "z"}), InvalidValueError, facts="'z'")
    refused(extended(given=PAST, keep=0), InvalidValueError, facts="keep")
    refused(extended(density=two, given=PAST), ShapeError)
    refused(extended(density=new_latent, given=PAST), CapabilityError, facts="sd")
    refused(extended(density=nothing, given=PAST), InvalidValueError)
    on = begun.extend(density, key, given=PAST)
    refused(extended(result=on), InvalidValueError, fix="given=")


def test_a_saved_step_goes_on_in_the_same_words(begun, tmp_path):
    """Its reason states the last step only, and how many there were."""
    then = cp.compile(step, YS[1])
    now = cp.compile(step, YS[2])
    key = jax.random.key(1)
    result = begun.extend(then, key, given=PAST)
    result.save(tmp_path / "series")
    loaded = cp.Result.load(tmp_path / "series.safetensors")
    expected = result.extend(now, key, given=PAST)
    found = loaded.extend(now, key, given=PAST, before=then)
    assert found.reason == expected.reason
    assert found.reason.count("extended") == 1
    assert found.about.steps == expected.about.steps == 2
    assert str(found.status) == str(expected.status)


def test_a_network_of_a_latent_and_data_runs_only_as_a_step():
    density = cp.compile(step_of, transition(), YS[1])
    key = jax.random.key(0)
    error = refused(
        lambda: cp.infer(density, key, num_chains=10),
        DoublyIntractableError,
        fix="'past'",
    )
    assert "extend" in error.fix


def test_an_energy_without_its_constant_is_refused(begun):
    def energy(x, log_snr, past):
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))
        return sigma * 0.5 * (x - past) ** 2

    f = learned(energy, "energy", LEVELS, shape=(), conditions=("past",))
    density = cp.compile(step_of, f, YS[1])
    key = jax.random.key(0)
    refused(lambda: begun.extend(density, key, given=PAST), CapabilityError)


def test_the_reason_says_what_was_given(begun):
    density = cp.compile(step, YS[1])
    result = begun.extend(density, jax.random.key(1), given=PAST, keep=3)
    check_wording(result.reason, estimated=True)
