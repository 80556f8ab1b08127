"""The driver: one trace, samples that depend on nothing but key and N, and warnings of
a run that is under way."""

import ast
import os
import signal
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
from composeprob.results.status import Code
from composeprob.runtime import compiled, stages
from composeprob.runtime.progress import Progress
from messages import check_finding, check_wording
from processes import HASTE, said
from sampling_cases import (
    SAMPLER,
    Calls,
    Counted,
    both,
    measured,
    modes,
    normal,
    run,
    single,
)


def counted(num_levels):
    """N(0, I) in the plane, and the counter of its calls."""
    calls = Calls()
    schedule = cp.Schedule.log_snr(num_levels)
    return cp.compile(
        single, cp.Energy(Counted(calls), schedule, event_shape=(2,))
    ), calls


def two_chains(density, step_size=0.01, seed=0):
    return run(density, seed, chains=2, sampler=cp.AnnealedMCMC(cp.MALA(step_size), 1))


def test_one_trace_for_ten_or_a_thousand_levels_and_for_rules_written_again():
    traces = []
    for num_levels in (10, 1000):
        density, calls = counted(num_levels)
        calls.reset()
        two_chains(density)
        traces.append(calls.traced)
        calls.reset()
        two_chains(
            density, 0.02, seed=1
        )  # other numbers, by a rule too, and another key: the same code
        assert calls.traced == 0
    assert traces[0] == traces[1] > 0
    result = two_chains(density, lambda schedule: 0.1 * schedule.sigma**2)
    assert "<lambda>" in result.about.sampler
    assert calls.traced == 0


def test_samples_depend_on_key_and_number_of_chains_only(product, monkeypatch):
    reference = run(product)
    monkeypatch.setattr(
        Progress, "pause", 1e-9
    )  # level by level instead of many at once
    assert np.array_equal(run(product)["x"], reference["x"])
    assert np.array_equal(run(product, progress=True)["x"], reference["x"])
    assert not np.array_equal(run(product, seed=1)["x"], reference["x"])


def test_result_fields_agree(product):
    result = run(product)
    levels = product.num_levels
    assert result["x"].shape == (64, 2)
    assert result.log_weights.shape == (64,)
    assert result._genealogy.weights.sum() == pytest.approx(1)
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
    assert result.reason == "chosen by the user"
    assert np.array_equal(
        result.levels["log_snr"], np.asarray(product.schedule.log_snr)
    )


@pytest.fixture
def interrupt_after(monkeypatch):
    """Ctrl-C when so many levels are done, by a real signal."""

    def after(levels):
        def update(self, done, **facts):
            if done >= levels:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Progress, "update", update)
        monkeypatch.setattr(Progress, "pause", 1e-9)

    # Python's own handler: a process started in the background of a shell inherits that
    # Ctrl-C is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield after
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_returns_what_is_done(product, interrupt_after):
    interrupt_after(5)
    result = run(product)
    assert result.status.code is Code.INTERRUPTED
    assert "5 of 32" in check_finding(result.status, Code.INTERRUPTED)
    assert np.all(np.isnan(result.acceptance[:27]))
    assert np.all(np.isfinite(result.acceptance[27:]))
    assert result.evaluations == 5 * 2
    assert np.all(np.isfinite(result["x"]))
    assert result.log_evidence is None  # that of a noisy level is not the program's
    assert result["x"].std() > 0.5  # still at the noise of level 27


MOVED = cp.AnnealedMCMC(cp.HMC(0.1), 1, then=(cp.GlobalMoves(5), cp.WarmUp()))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        # Without draws, global moves or a warm-up the run is complete.
        pytest.param({}, None, id="complete"),
        pytest.param({"draws": 3}, "0 of 3", id="draws"),
        pytest.param({"draws": 2, "sampler": MOVED}, "", id="moves"),
    ],
)
def test_ctrl_c_at_level_0_begins_nothing_more(
    product, interrupt_after, options, facts
):
    interrupt_after(product.num_levels)
    result = run(product, **options)
    assert result.status.has(Code.INTERRUPTED) == (facts is not None)
    if facts is not None:
        assert facts in check_finding(result.status, Code.INTERRUPTED)
    assert result["x"].shape == ((64, 1, 2) if options else (64, 2))
    assert result.about.global_acceptance is None


SCRIPT = """
import re, logging, sys
import jax, jax.numpy as jnp, numpyro.distributions as dist, composeprob as cp
from sampling_cases import SAMPLER, both, normal
compiled = []
class Names(logging.Handler):
    def emit(self, record):
        compiled.extend(re.findall(r"^Compiling (\\S+)", record.getMessage()))
logger = logging.getLogger("jax._src.interpreters.pxla")
logger.addHandler(Names())
density = cp.compile(both, normal([0.0, 0.0]), normal([1.0, -1.0]))
key = jax.random.key(0)
jax.config.update("jax_log_compiles", True)
result = cp.infer(density, key, num_chains=256, sampler=SAMPLER, progress=False)
first, compiled[:] = list(compiled), []
result.summary()
asked, compiled[:] = list(compiled), []
assert result.status.ok and result.about.curl == {}
print(first, asked, compiled, sep="\\n")
"""


def test_a_first_run_compiles_few_programs_and_leaves_questions_to_who_asks():
    """A new process compiles what is there for the levels and what reads them, and next
    to no single operations."""
    first, asked, again = map(ast.literal_eval, said(SCRIPT, **HASTE)[-3:])
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
    monkeypatch.setattr(
        jax, "clear_caches", double.clear_cache
    )  # its own alone: other tests go on with theirs
    compiled.make_room(0)
    assert double(2.0) == 4.0
    assert len(traced) == 2
    monkeypatch.setattr(compiled, "make_room", lambda: asked.append(1))
    two_chains(counted(12)[0])
    assert asked == [1]


# ── a long run warns of factors that agree nowhere; a short one says so at its end ────

CHAINS = 256
SLOW_SAMPLER = cp.AnnealedMCMC(
    cp.MALA(lambda schedule: 0.3 * jnp.asarray(schedule.sigma) ** 2), 6
)
CLOSE = cp.Schedule.log_snr(24)


def boxes(apart):
    """Two boxes of width 1: data, so that both products share their code."""

    def box(left):
        left = jnp.float32(left)
        return cp.Analytic(dist.Uniform(left, left + 1.0), CLOSE, label="box")

    return cp.compile(both, box(0.0), box(apart))


def sampled(density):
    return run(density, chains=CHAINS, sampler=SLOW_SAMPLER)


def every_run_is_long(monkeypatch):
    monkeypatch.setattr(tuning, "CHECKS", tuning.CHECKS._replace(long_seconds=0.0))


@pytest.fixture
def asked(monkeypatch):
    """Calls that sent chains ahead."""
    calls = []

    def counted(*arguments, check=stages.check):
        calls.append(arguments)
        return check(*arguments)

    monkeypatch.setattr(stages, "check", counted)
    return calls


def test_a_long_run_warns_before_its_end_and_has_the_same_samples(asked, monkeypatch):
    apart = boxes(2.0)
    quiet = sampled(apart)  # a warning of ours would be an error
    assert not asked
    assert quiet.status.has("no_overlap")  # said at the end, of its own samples
    every_run_is_long(monkeypatch)
    with pytest.warns(UserWarning, match="Ctrl-C") as caught:
        warned = sampled(apart)
    # JAX may warn as well, of a cache of compiled code that it cannot write.
    texts = [str(warning.message) for warning in caught]
    ours = [text for text in texts if "Ctrl-C" in text]
    check_wording(ours[0], estimated=True)
    assert len(asked) == 1
    assert np.array_equal(warned["x"], quiet["x"])
    assert warned.status == quiet.status


def test_factors_that_agree_are_asked_once_and_nothing_is_said(asked, monkeypatch):
    every_run_is_long(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampled(boxes(0.5)).status.ok
    assert len(asked) == 1


def test_asking_takes_no_more_than_its_share(asked, monkeypatch):
    """16 chains · (4 steps at each of 24 levels + 8 levels) of 256 chains · 24 levels ·
    7 evaluations."""
    every_run_is_long(monkeypatch)
    density = boxes(2.0)
    assert check_evaluations(density) == 16 * (4 * 24 + 8) <= 0.05 * CHAINS * 24 * 7
    monkeypatch.setattr(
        stages, "check_evaluations", lambda density: int(0.05 * CHAINS * 24 * 7) + 1
    )
    sampled(density)
    assert not asked


@pytest.mark.parametrize(
    ("seconds", "at_end", "long"), [(1.0, 0, False), (4.0, 0, True), (1.0, 10**8, True)]
)
def test_how_long_a_run_will_be_is_told_from_its_second_stretch_on(
    monkeypatch, seconds, at_end, long
):
    """The first one compiles: 100 s of that and levels of 1 s make no long run, levels
    of 4 s do, and so do rounds at level 0 of as many evaluations as 2,400 levels."""
    call = {
        "density": boxes(2.0),
        "attempt": SimpleNamespace(pace=None),
        "num_chains": 1,
        "key": jax.random.key(0),
    }
    finisher = SimpleNamespace(least_evaluations=lambda density: at_end)

    def at(level):
        visits = SimpleNamespace(made=24 - level, visited=lambda: [level])
        sampler = SimpleNamespace(
            evaluations=lambda visits: 10**6,
            kernel=None,
            weights=None,
            finishers=(finisher,),
        )
        return SimpleNamespace(**call, sampler=sampler, first=23, visits=visits)

    clock = iter([100.0, 100.0 + 4 * seconds])
    # JAX, which compiles here, keeps its own clock.
    slow_clock = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(stages, "time", slow_clock)
    asked = []
    monkeypatch.setattr(
        stages, "check", lambda *arguments: asked.append(arguments) or ()
    )
    pilot_run = stages.PilotRun(at(23))
    for level in (23, 19, 15, 11):
        pilot_run(at(level))
    assert bool(asked) == long


def test_rounds_of_a_warm_up_are_counted_before_they_begin():
    """Two rounds of 60 transitions, and HMC evaluates once for each leapfrog step."""

    @cp.program
    def scale(y):
        sd = cp.sample("sd", dist.HalfNormal(1.0))
        cp.observe("y", dist.Normal(0.0, sd), y)

    density = cp.compile(scale, 0.5)
    warm_up = cp.WarmUp()
    points = np.linspace(-1.0, 1.0, 8)[:, None]
    of_round = warm_up.evaluations(warm_up.adapt(points, density))
    transitions = tuning.WARM_UP.settling + tuning.WARM_UP.transitions
    assert of_round >= transitions
    assert warm_up.least_evaluations(density) == 2 * of_round
    assert cp.GlobalMoves().least_evaluations(density) == 0


# ── settings of JAX with which others look for mistakes in code of their own ──────────

LEVELS = cp.Schedule.log_snr(12)


def ranks():
    law = modes(jnp.ones(3) / 3, jnp.zeros(3), jnp.ones(3))  # of more ranks than one
    return cp.compile(both, cp.Analytic(law, LEVELS), normal(schedule=LEVELS))


def test_a_run_is_the_same_under_settings_that_look_for_mistakes():
    at = {"x": jnp.float32(0.3)}
    density = ranks()
    expected = run(density)["x"]
    log_density = density.log_density(at, 0)
    with (
        jax.debug_nans(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        density = ranks()
        np.testing.assert_array_equal(run(density)["x"], expected)
        assert density.log_density(at, 0) == log_density
        box = cp.Analytic(dist.Uniform(-3.0, 3.0), LEVELS)
        cp.compile(measured, box, lambda x: dist.Normal(x, 0.5), jnp.float32(1.0))
        assert cp.load("ring2d").event_shape == (2,)


def test_a_run_may_send_numbers_to_devices_where_its_caller_may_not():
    density = ranks()
    key = jax.random.key(0)
    with jax.transfer_guard("disallow"):
        result = cp.infer(density, key, num_chains=8, progress=False)
        with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
            jnp.float32(1.0)
    assert result["x"].shape[0] == 8


def test_the_settings_of_a_process_are_its_own_again():
    with jax.debug_nans(True):
        ranks()
        with pytest.raises(FloatingPointError):
            jnp.log(jnp.float32(-1.0))
