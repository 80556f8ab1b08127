"""The driver: one trace, the stated number of evaluations, and samples that depend on nothing but key and N."""

import importlib
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composeprob as cp
from composeprob.results.status import Code
from composeprob.runtime import compiled, descend
from composeprob.runtime.progress import Progress
from composeprob.samplers.base import begin
from composeprob.samplers.visits import Visits
from sampling_cases import SAMPLER, SCHEDULE, Calls, Counted, run, single, unit_energy

infer_module = importlib.import_module("composeprob.runtime.infer")


def energy_factor(calls, schedule):
    return cp.Energy(Counted(calls), schedule, event_shape=(2,))


def test_one_trace_for_ten_or_a_thousand_levels():
    traces = []
    for num_levels in (10, 1000):
        calls = Calls()
        density = cp.compile(single, energy_factor(calls, cp.Schedule.log_snr(num_levels)))
        calls.reset()
        cp.infer(density, jax.random.key(0), num_chains=2, sampler=cp.AnnealedMCMC(cp.MALA(0.01), 1), progress=False)
        traces.append(calls.traced)
        calls.reset()
        again = cp.AnnealedMCMC(cp.MALA(0.02), 1)  # other numbers, another key: the same code
        cp.infer(density, jax.random.key(1), num_chains=2, sampler=again, progress=False)
        assert calls.traced == 0
    assert traces[0] == traces[1]


def test_a_rule_that_is_written_again_is_not_compiled_again():
    calls = Calls()
    density = cp.compile(single, energy_factor(calls, cp.Schedule.log_snr(5)))

    def traced(factor):
        calls.reset()
        sampler = cp.AnnealedMCMC(cp.MALA(lambda schedule: factor * schedule.sigma**2), 1)
        result = cp.infer(density, jax.random.key(0), num_chains=2, sampler=sampler, progress=False)
        assert "<lambda>" in result.sampler
        return calls.traced

    assert traced(0.1) > 0
    assert traced(0.2) == 0


def network_factor(calls, parameterization):
    def network(x, t):
        calls()
        return unit_energy(x, t) if parameterization == "energy" else x * t / jnp.sqrt(1 + t**2)

    return cp.Diffusion(
        network, SCHEDULE, event_shape=(2,), parameterization=parameterization, time="sigma", label="counted"
    )


COUNTED = {
    "Ancestral": (cp.Ancestral(), "epsilon"),
    "ULA": (cp.AnnealedMCMC(cp.ULA(0.01), 2, reverse_step=True), "epsilon"),
    "MALA": (cp.AnnealedMCMC(cp.MALA(0.01), 2), "energy"),
    "MALA, reverse": (cp.AnnealedMCMC(cp.MALA(0.01), 2, reverse_step=True), "energy"),
    "UHMC": (cp.AnnealedMCMC(cp.UHMC(0.01, num_leapfrog=3), 2), "epsilon"),
    "HMC, reverse": (cp.AnnealedMCMC(cp.HMC(0.01, num_leapfrog=3), 2, reverse_step=True), "energy"),
    "HMC, warm-up": (cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=2), num_leapfrog=3), 1), "energy"),
    "SMC": (cp.SMC(cp.MALA(cp.Adaptive()), 2, check_levels=False), "energy"),
    "SMC, no kernel": (cp.SMC(check_levels=False), "epsilon"),
    "SMC, first order": (cp.SMC(second_order=False, check_levels=False), "epsilon"),
}
SLOW = ("MALA", "UHMC", "HMC, reverse", "SMC, first order")
"""Rows like another one."""
PER_LEVEL = {"ULA": 3, "MALA": 3, "MALA, reverse": 3, "UHMC": 7, "HMC, reverse": 7, "HMC, warm-up": 10, "SMC": 3}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else []) for n in COUNTED])
def test_evaluations_are_what_the_result_says(name):
    sampler, parameterization = COUNTED[name]
    calls = Calls()
    density = cp.compile(single, network_factor(calls, parameterization))
    calls.reset()
    result = cp.infer(density, jax.random.key(0), num_chains=2, sampler=sampler, progress=False)
    jax.effects_barrier()
    assert calls.run == result.evaluations  # a call serves all chains at once
    levels = SCHEDULE.num_levels
    if name in ("SMC", "SMC, no kernel"):  # each reverse step has one of its own
        assert result.evaluations == levels * PER_LEVEL.get(name, 1) + levels - 1
    else:
        assert result.evaluations == {"Ancestral": levels - 1}.get(name, levels * PER_LEVEL.get(name, 1))


@pytest.mark.parametrize("sampler", [cp.AnnealedMCMC(cp.HMC(0.01), 1), cp.SMC(cp.MALA(0.01)), cp.SMC()], ids=repr)
def test_starting_chains_evaluates_nothing(sampler):
    """So the networks are compiled once, in the loop over levels, which fills in what kernels cache."""
    calls = Calls()
    density = cp.compile(single, network_factor(calls, "energy"))
    calls.reset()
    sampler = sampler.prepare(density)
    first = sampler.first_level(density)
    blank = begin(jax.random.key(0), 2, Visits.every(first, density.num_levels))
    run = jax.jit(lambda run: sampler.start(run, density, first))(blank)
    jax.effects_barrier()
    assert calls.run == 0
    assert np.isfinite(run.chains.position["x"]).all()
    assert np.isnan(run.chains.evaluation.score["x"]).all()
    assert (run.chains.evaluation.parts is None) == isinstance(sampler, cp.AnnealedMCMC)  # only those who weigh read it


class Network(Counted):
    """An energy."""

    def __call__(self, x, t):
        return -super().__call__(x, t)


@pytest.mark.parametrize("second_order", [True, False])
def test_a_level_of_smc_has_the_networks_twice(second_order):
    """For what leads to the level and for the kernel's moves there: what compiling takes grows with every copy."""
    calls = Calls()
    factor = cp.Diffusion(Network(calls), SCHEDULE, event_shape=(2,), parameterization="energy")
    density = cp.compile(single, factor)
    sampler = cp.SMC(cp.MALA(0.01), second_order=second_order).prepare(density)
    run = sampler.start(begin(jax.random.key(0), 2, Visits.every(3, density.num_levels)), density, 3)
    level = jnp.int32(2)
    began = calls.traced
    density.evaluator({"x": jnp.zeros(2)}, level)
    once = calls.traced - began
    jax.eval_shape(lambda run: sampler.visit(run, density, level, level + 1).log_weights, run)
    assert calls.traced - began == 3 * once > 0


def test_density_weights_cost_one_evaluation_a_level():
    calls = Calls()
    density = cp.compile(single, energy_factor(calls, SCHEDULE))
    calls.reset()
    sampler = cp.SMC(cp.MALA(cp.Adaptive()), weights="density")
    result = cp.infer(density, jax.random.key(0), num_chains=2, sampler=sampler, progress=False)
    jax.effects_barrier()
    assert calls.run == result.evaluations == 2 * SCHEDULE.num_levels


def test_samples_depend_on_key_and_number_of_chains_only(product, monkeypatch):
    reference = run(product)
    monkeypatch.setattr(Progress, "pause", 1e-9)  # level by level instead of many at once
    assert np.array_equal(run(product)["x"], reference["x"])
    assert np.array_equal(run(product, progress=True)["x"], reference["x"])
    assert not np.array_equal(run(product, seed=1)["x"], reference["x"])


def test_result_fields_agree(product):
    result = run(product)
    levels = product.num_levels
    assert result["x"].shape == (64, 2)
    assert result.log_weights.shape == (64,)
    assert result.weights.sum() == pytest.approx(1)
    for name in ("acceptance", "step_size", "ess", "non_finite", "log_snr"):
        assert getattr(result, name).shape == (levels,)
    assert np.all((result.acceptance > 0) & (result.acceptance <= 1))
    assert np.all((result.ess > 0) & (result.ess <= 1 + 1e-6))
    assert np.all(result.step_size > 0)
    assert result.non_finite.sum() == 0
    assert result.status.ok
    assert result.density is product
    assert result.seconds > 0
    assert result.sampler == SAMPLER.describe()
    assert result.reason == "chosen by the user"
    assert np.array_equal(result.log_snr, np.asarray(product.schedule.log_snr))


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C; a process started in the background of a shell inherits that it is ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt_after(monkeypatch, levels):
    """Ctrl-C when so many levels are done, by a real signal."""

    def update(self, done, **facts):
        if done >= levels:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", update)
    monkeypatch.setattr(Progress, "pause", 1e-9)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_returns_what_is_done(product, monkeypatch):
    interrupt_after(monkeypatch, 5)
    result = run(product)
    assert result.status.code is Code.INTERRUPTED
    assert "after 5 of 32 levels" in result.status.message
    assert np.all(np.isnan(result.acceptance[:27]))
    assert np.all(np.isfinite(result.acceptance[27:]))
    assert result.evaluations == 5 * 2 + 4
    assert np.all(np.isfinite(result["x"]))
    assert result.log_evidence is None  # that of a noisy level is not the program's
    assert result["x"].std() > 0.5  # still at the noise of level 27


def test_ctrl_c_before_there_are_chains_is_not_swallowed(product, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(descend, "start", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(product)


def test_compiled_code_is_let_go_before_a_process_has_no_memory_maps_left(monkeypatch):
    traced, asked = [], []
    double = jax.jit(lambda x: traced.append(x) or 2 * x)
    double(1.0)
    compiled.make_room(10**9)
    double(1.0)
    assert len(traced) == 1
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("this system does not say how many there are")
    monkeypatch.setattr(jax, "clear_caches", double.clear_cache)  # its own alone: other tests go on with theirs
    compiled.make_room(0)
    assert double(2.0) == 4.0
    assert len(traced) == 2
    monkeypatch.setattr(infer_module, "make_room", lambda: asked.append(1))
    density = cp.compile(single, energy_factor(Calls(), SCHEDULE))
    cp.infer(density, jax.random.key(0), num_chains=2, sampler=cp.AnnealedMCMC(cp.MALA(0.01), 1), progress=False)
    assert asked == [1]
