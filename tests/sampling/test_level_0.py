"""Stein's identity at level 0, asked of every run; and learned energies, whose default
run ends with moves there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.findings import Code
from composeprob.results.repetition import repeated_weights
from composeprob.runtime import compiled, outcome, stages
from composeprob.samplers.choose import choose
from composeprob.samplers.finishers import Relaxation
from composeprob.samplers.run import Visits, begin
from messages import check_finding
from sampling_cases import learned, normal, run, single, weighed

SCHEDULE = cp.Schedule.log_snr(20)
TOP = float(SCHEDULE.log_snr[0])
RIPPLES = 0.3
TILT = 1.0


def energy_network(x, t):
    """N(0, I) at all levels but level 0, which has ripples and a slope beside."""
    sigma = t / jnp.sqrt(1 + t**2)
    at_level_0 = jax.nn.sigmoid(40 * (0.3 - 2 * jnp.log(t) - TOP))
    wrong = jnp.sum(RIPPLES * jnp.cos(4 * x) - TILT * x)
    return sigma * (0.5 * jnp.sum(x**2) + at_level_0 * wrong)


def mean_of_level_0():
    """The exact mean of a number, by quadrature."""
    x = np.linspace(-8, 8, 16001)
    p = np.exp(-0.5 * x**2 - RIPPLES * np.cos(4 * x) + TILT * x)
    return np.sum(x * p) / np.sum(p)


@pytest.fixture(scope="module")
def unlike():
    """A density whose level 0 is not the limit of the noisier ones."""
    return cp.compile(single, learned(energy_network, "energy", SCHEDULE, time="sigma"))


def z_scores(result):
    """z-scores of the means by the effective chains, as errors may be withheld."""
    x = result["x"]
    error = x.std(0) / np.sqrt(result.effective_chains)
    return (x.mean(0) - mean_of_level_0()) / error


def test_weights_do_not_see_a_level_0_that_is_not_the_limit_and_stein_does(unlike):
    result = run(unlike, chains=300, sampler=cp.SMC())
    assert z_scores(result).min() < -4
    check_finding(result.status, Code.OFF_TARGET)
    assert np.isnan(result.mean(lambda s: s["x"]).error).all()


def test_a_default_run_of_a_learned_energy_moves_at_level_0(unlike):
    sampler, reason = choose(unlike, 300)
    assert [type(last) for last in sampler.finishers] == [Relaxation]
    assert "Stein" in reason
    for seed in range(2):
        result = run(unlike, seed, chains=300, sampler=None)
        assert result.status.ok
        assert abs(z_scores(result)).max() < 4
        # Moves leave a chain in its mode, so the repetition's shares hold after them.
        assert result._genealogy.repeated is not None
    # One round of moves is enough here.
    descent = run(unlike, chains=300, sampler=cp.SMC()).evaluations
    assert result.evaluations == descent + 60


def test_these_moves_are_in_the_executable_that_came_down(unlike, monkeypatch):
    """Another one, which has the networks once more, follows only where Stein's
    identity does not hold."""
    rounds = []

    def counted(*arguments):
        rounds.append(arguments)
        return close(*arguments)

    close = compiled.close
    monkeypatch.setattr(compiled, "close", counted)
    relaxed = run(unlike, chains=300, sampler=None)
    assert not rounds
    # They are no visit: what is recorded are the levels on the way.
    descent = run(unlike, chains=300, sampler=cp.SMC())
    for name in ("acceptance", "step_size", "ess"):
        np.testing.assert_allclose(
            relaxed.levels[name], descent.levels[name], rtol=1e-4
        )
    monkeypatch.setattr(Relaxation, "stay", 1)
    run(unlike, chains=300, sampler=cp.SMC(then=Relaxation()))
    assert rounds


def test_a_run_that_is_interrupted_in_these_moves_begins_them_anew(
    unlike, monkeypatch, tmp_path
):
    whole = run(unlike, chains=64, sampler=cp.SMC(then=Relaxation()))

    def interrupted(*_):
        raise KeyboardInterrupt

    options = {"chains": 64, "sampler": cp.SMC(then=Relaxation())}
    with monkeypatch.context() as patched:
        patched.setattr(stages, "_stayed", interrupted)
        kept = run(unlike, checkpoint_dir=tmp_path, **options)
    assert kept.status.has(Code.INTERRUPTED)
    resumed = run(unlike, checkpoint_dir=tmp_path, **options)
    np.testing.assert_array_equal(resumed["x"], whole["x"])
    assert resumed.evaluations == whole.evaluations


def test_moves_at_level_0_have_random_numbers_of_their_own(unlike):
    sampler = cp.SMC(then=Relaxation()).prepare(unlike)
    count = unlike.num_levels
    begun = begin(jax.random.key(0), 1, Visits.every(count - 1, count))
    begun = sampler.start(begun, unlike, count - 1)
    descent = sampler.phases(unlike, begun)
    down = descent.blank(begun)

    def numbers(state, made, turns, draws):
        visits = dataclasses.replace(begun.visits, made=jnp.int32(made))
        at = dataclasses.replace(begun, visits=visits)
        for turn in range(turns):
            state = dataclasses.replace(state, turn=jnp.int32(turn))
            yield from (int(descent.draw_number(at, state, draw)) for draw in draws)

    used = []
    for made in range(count):
        used += numbers(down, made, descent.total, (0, 1))
    used += numbers(descent.staying(down, Relaxation.stay), count, Relaxation.stay, [1])
    assert len(set(used)) == len(used)


def test_shares_of_the_repetition_are_those_of_where_chains_arrived(
    unlike, monkeypatch
):
    """The level's error moves all chains alike, and is no error of what they end as."""
    asked = []

    def remembering(positions, repetition):
        asked.append(positions["x"])
        return repeated_weights(positions, repetition)

    monkeypatch.setattr(outcome, "repeated_weights", remembering)
    result = run(unlike, chains=300, sampler=None)
    before = run(unlike, chains=300, sampler=cp.SMC())
    (arrived, ended) = asked
    np.testing.assert_allclose(arrived, ended, rtol=1e-5)
    np.testing.assert_allclose(ended, before["x"], rtol=1e-5)
    assert np.abs(result["x"] - arrived).mean() > 0.1


def test_closed_forms_have_no_such_moves():
    sampler, _ = choose(cp.compile(single, normal(0.0, 1.0, SCHEDULE)), 300)
    assert not any(isinstance(last, Relaxation) for last in sampler.finishers)


def edges(x):
    """A wall, and a step."""
    return jnp.where(x > -1.0, 2.0 * (x < 0), -jnp.inf)


def test_a_density_with_edges_is_not_asked():
    """Its score lacks what the edges contribute: the samples are right."""
    density = cp.compile(weighed, normal(0.0, 1.0, SCHEDULE), edges)
    result = run(density, chains=256, sampler=None)
    left = 0.3413 * np.exp(2)
    right = 0.5
    on_the_left = result.probability(lambda s: s["x"] < 0)
    assert abs(on_the_left.value - left / (left + right)) < 4 * on_the_left.error
    assert not result.status.has(Code.OFF_TARGET)


def test_samplers_without_transitions_are_asked_too(unlike):
    """Their scores are evaluated."""
    result = run(unlike, chains=300, sampler=cp.Ancestral())
    assert result.status.has(Code.OFF_TARGET)
