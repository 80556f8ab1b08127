"""A long run warns of factors that agree nowhere while it is under way; a short one says so at its end, for nothing."""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob import tuning
from composeprob.density.overlap import check_evaluations
from composeprob.runtime import watchers
from sampling_cases import both

CHAINS = 256
SAMPLER = cp.AnnealedMCMC(cp.MALA(lambda schedule: 0.3 * jnp.asarray(schedule.sigma) ** 2), 6)
SCHEDULE = cp.Schedule.log_snr(24)


def product(apart):
    """Two boxes of width 1: data, so that both products share their code."""
    f, g = (cp.Analytic(dist.Uniform(a, a + 1.0), SCHEDULE, label="box") for a in map(jnp.float32, (0.0, apart)))
    return cp.compile(both, f, g)


def sampled(density):
    return cp.infer(density, jax.random.key(0), num_chains=CHAINS, sampler=SAMPLER, progress=False)


@pytest.fixture
def asked(monkeypatch):
    """How often chains were sent ahead."""
    calls = []

    def counted(*arguments, check=watchers.check):
        calls.append(arguments)
        return check(*arguments)

    monkeypatch.setattr(watchers, "check", counted)
    return calls


def test_a_long_run_warns_before_its_end_and_has_the_same_samples(asked, monkeypatch):
    apart = product(2.0)
    quiet = sampled(apart)  # a warning of ours would be an error
    assert not asked
    assert quiet.status.has("no_overlap")  # said at the end, of its own samples
    monkeypatch.setattr(tuning, "CHECKS", tuning.CHECKS._replace(long_seconds=0.0))
    with pytest.warns(UserWarning, match=r"The factors agree nowhere: .*The run goes on; Ctrl-C ends it"):
        warned = sampled(apart)
    assert len(asked) == 1
    assert np.array_equal(warned["x"], quiet["x"])
    assert warned.status == quiet.status


def test_factors_that_agree_are_asked_once_and_nothing_is_said(asked, monkeypatch):
    monkeypatch.setattr(tuning, "CHECKS", tuning.CHECKS._replace(long_seconds=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampled(product(0.5)).status.ok
    assert len(asked) == 1


def test_asking_takes_no_more_than_its_share(asked, monkeypatch):
    """16 chains · (4 steps at each of 24 levels + 8 levels) of 256 chains · 24 levels · 7 evaluations."""
    monkeypatch.setattr(tuning, "CHECKS", tuning.CHECKS._replace(long_seconds=0.0))
    density = product(2.0)
    assert check_evaluations(density) == 16 * (4 * 24 + 8) <= 0.05 * CHAINS * 24 * 7
    monkeypatch.setattr(watchers, "check_evaluations", lambda density: int(0.05 * CHAINS * 24 * 7) + 1)
    sampled(density)
    assert not asked


def test_how_long_a_run_will_be_is_told_from_its_second_stretch_on(monkeypatch):
    """The first one compiles: 100 s of that and levels of 1 s make no long run, levels of 4 s do."""

    def at(level):
        visits = SimpleNamespace(made=24 - level, visited=lambda: [level])
        sampler = SimpleNamespace(evaluations=lambda first, visits: 10**6)
        return SimpleNamespace(**call, sampler=sampler, first=23, visits=visits)

    call = {"density": product(2.0), "pace": None, "num_chains": 1, "key": jax.random.key(0)}
    for seconds, long in ((1.0, False), (4.0, True)):
        clock = iter([100.0, 100.0 + 4 * seconds])
        monkeypatch.setattr(watchers.time, "monotonic", lambda clock=clock: next(clock))
        asked = []
        monkeypatch.setattr(watchers, "check", lambda *arguments, asked=asked: asked.append(arguments) or ())
        pilot_run = watchers.PilotRun(at(23))
        for level in (23, 19, 15, 11):
            pilot_run(at(level))
        assert bool(asked) == long
