"""The driver: one trace, and samples that depend on nothing but key and N."""

import ast
import os
import signal

import jax
import numpy as np
import pytest

import composeprob as cp
from composeprob.results.status import Code
from composeprob.runtime import compiled
from composeprob.runtime.progress import Progress
from processes import said
from sampling_cases import SAMPLER, SCHEDULE, Calls, Counted, run, single


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
    density = cp.compile(single, energy_factor(calls, cp.Schedule.log_snr(12)))

    def traced(factor):
        calls.reset()
        sampler = cp.AnnealedMCMC(cp.MALA(lambda schedule: factor * schedule.sigma**2), 1)
        result = cp.infer(density, jax.random.key(0), num_chains=2, sampler=sampler, progress=False)
        assert "<lambda>" in result.about.sampler
        return calls.traced

    assert traced(0.1) > 0
    assert traced(0.2) == 0


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
    assert result.families.weights.sum() == pytest.approx(1)
    for values in result.levels.variables.values():
        assert values.shape == (levels,)
    assert np.all((result.acceptance > 0) & (result.acceptance <= 1))
    assert np.all((result.levels["ess"] > 0) & (result.levels["ess"] <= 1 + 1e-6))
    assert np.all(result.step_size > 0)
    assert result.levels["non_finite"].sum() == 0
    assert result.status.ok
    assert result.density is product
    assert result.about.seconds > 0
    assert result.about.sampler == SAMPLER.describe()
    assert result.about.reason == "chosen by the user"
    assert np.array_equal(result.levels["log_snr"], np.asarray(product.schedule.log_snr))


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
    assert result.evaluations == 5 * 2
    assert np.all(np.isfinite(result["x"]))
    assert result.log_evidence is None  # that of a noisy level is not the program's
    assert result["x"].std() > 0.5  # still at the noise of level 27


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("draws", "words"), [(None, None), (3, "after 0 of 3 draws")])
def test_ctrl_c_at_level_0_begins_nothing_more(product, monkeypatch, draws, words):
    """Without draws, global moves or a warm-up the run has all that it was to have."""
    interrupt_after(monkeypatch, product.num_levels)
    result = run(product, draws=draws)
    assert result.status.has(Code.INTERRUPTED) == (words is not None)
    assert words is None or words in result.status.message
    assert result["x"].shape == ((64, 2) if draws is None else (64, 1, 2))


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("then", [cp.GlobalMoves(5), cp.WarmUp()], ids=str)
def test_ctrl_c_at_level_0_leaves_out_what_moves_chains_there(product, monkeypatch, then):
    interrupt_after(monkeypatch, product.num_levels)
    sampler = cp.AnnealedMCMC(cp.HMC(0.1), 1, then=then)
    result = run(product, sampler=sampler, draws=2)
    assert "before its global moves or its warm-up there had ended" in result.status.message
    assert result.about.global_acceptance is None


SCRIPT = """
import re, logging, sys
import jax, jax.numpy as jnp, numpyro.distributions as dist, composeprob as cp
from sampling_cases import both, normal
compiled = []
class Names(logging.Handler):
    def emit(self, record):
        compiled.extend(re.findall(r"^Compiling (\\S+)", record.getMessage()))
logger = logging.getLogger("jax._src.interpreters.pxla")
logger.addHandler(Names())
density = cp.compile(both, normal([0.0, 0.0]), normal([1.0, -1.0]))
key, sampler = jax.random.key(0), cp.SMC(cp.MALA(cp.Adaptive()))
jax.config.update("jax_log_compiles", True)
result = cp.infer(density, key, num_chains=256, sampler=sampler, progress=False)
first, compiled[:] = list(compiled), []
result.summary()
asked, compiled[:] = list(compiled), []
assert result.status.ok and result.about.curl == {}
print(first, asked, compiled, sep="\\n")
"""


def test_a_first_run_compiles_few_programs_and_leaves_questions_to_who_asks():
    """A new process compiles what is there for the levels and what reads them, and next to no single operations."""
    first, asked, again = map(ast.literal_eval, said(SCRIPT)[-3:])
    assert first == ["jit(start)", "jit(advance)", "jit(read)"]
    assert "jit(_expert_statistics)" not in first
    assert "jit(_expert_statistics)" in asked
    assert again == []


def test_ctrl_c_before_there_are_chains_is_not_swallowed(product, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled, "start", stopped)
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
    monkeypatch.setattr(compiled, "make_room", lambda: asked.append(1))
    density = cp.compile(single, energy_factor(Calls(), SCHEDULE))
    cp.infer(density, jax.random.key(0), num_chains=2, sampler=cp.AnnealedMCMC(cp.MALA(0.01), 1), progress=False)
    assert asked == [1]
