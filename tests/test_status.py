"""Checks: a finding names each problem with its levels, and a healthy run has none."""

import io
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.findings import Code, Finding
from composeprob.results.checks import CHECKS, Need
from composeprob.results.checks.acceptance_collapsed import AcceptanceCollapsed
from composeprob.results.checks.erratic_weights import ErraticWeights
from composeprob.results.checks.few_chains import FewChains
from composeprob.results.checks.few_effective import FewEffective
from composeprob.results.checks.impossible_data import ImpossibleData
from composeprob.results.checks.interrupted import Interrupted
from composeprob.results.checks.limits import OUTSIDE_WALLS
from composeprob.results.checks.non_finite import NonFinite
from composeprob.results.checks.not_conservative import NotConservative
from composeprob.results.checks.samples_diverged import SamplesDiverged
from composeprob.results.status import Status
from composeprob.runtime.progress import Progress
from messages import check_finding, check_wording

K, N = 20, 100
HEALTHY = {
    "acceptance": np.full(K, 0.57),
    "non_finite": np.zeros(K),
    "ess": np.full(K, 0.8),
    "adjusted": True,
}
HEALTHY |= {"proposals": N, "num_chains": N, "completed_levels": K, "num_levels": K}


def diagnose(
    acceptance,
    non_finite,
    proposals,
    ess,
    num_chains,
    completed_levels,
    num_levels,
    adjusted,
    blocks=(),
    outside=0.0,
):
    """The status by the checks that read the diagnostics of levels."""
    visited = np.arange(num_levels) >= num_levels - completed_levels
    findings = [
        *NonFinite().findings(non_finite, proposals, visited),
        *OUTSIDE_WALLS.findings(outside),
        *AcceptanceCollapsed().findings(acceptance, visited, adjusted, blocks),
        *FewEffective().findings(ess, visited, num_chains),
    ]
    stopped = Interrupted.stopped_above(completed_levels, num_levels)
    if stopped:
        findings.append(Interrupted().finding(stopped))
    return Status().with_findings(*findings)


def at(levels, value, other):
    array = np.full(K, other, float)
    array[levels] = value
    return array


def test_a_healthy_run_is_ok_and_a_status_is_a_value():
    healthy = diagnose(**HEALTHY)
    assert healthy.ok
    assert healthy.code is Code.OK
    assert healthy.has(Code.OK)
    assert str(healthy) == "OK"
    assert Status() == Status()
    assert hash(Status()) == hash(Status())


def test_ok_states_the_levels_where_chains_were_lost():
    """Weights spread at levels 9 to 12, after which chains were resampled; a later
    finding replaces the remark."""
    ess = np.ones(K)
    ess[9:13] = [0.25, 0.4, 0.6, 0.8]
    log_snr = np.linspace(9.5, -9.5, K)
    (remark,) = FewChains().findings(20.0, N, ess, log_snr)
    status = Status().with_findings(remark)
    assert status.ok
    assert not status.withholds
    for number in ("100", "20", "-1.4", "1.3"):
        assert number in status.message
    check_wording(str(status))
    assert FewChains().findings(50.0, N, ess, log_snr) == []
    (short,) = FewChains().findings(20.0, N, np.ones(K), log_snr)
    assert "log-SNR" not in short.message
    finding = Finding(Code.LEVELS_TOO_FEW, "…", False)
    assert status.with_findings(finding).findings == (finding,)


NAN = np.full(K, np.nan)
FEW = {"num_chains": 8, "proposals": 8}
NOT_VISITED = {
    "completed_levels": 5,
    "acceptance": at(range(15), 0.0, 0.6),
    "ess": at(range(15), 0.0, 0.8),
}
"""Levels 0 … 14 were never reached: their zeros are not a collapse."""
STUCK = {
    "acceptance": np.full((K, 3), [0.6, 0, 0]),
    "adjusted": (True, True, False),
    "blocks": ("x", "mu, sigma", "z"),
}


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({"acceptance": NAN, "ess": NAN}, True),  # not applicable
        ({"acceptance": at([4], 0.06, 0.6)}, True),
        ({"acceptance": at([4], 0.04, 0.6)}, False),
        ({"non_finite": at([4], 1, 0)}, True),  # 1 %
        ({"non_finite": at([4], 2, 0)}, False),
        ({"non_finite": at([4], 5, 0), "proposals": 10 * N}, True),  # of all chains
        ({"non_finite": at([4], 50, 0), "proposals": np.full(K, 10 * N)}, False),
        # Without a Metropolis test there is none that could collapse.
        ({"acceptance": np.zeros(K), "adjusted": False}, True),
        (FEW | {"ess": at([3], 0.2, 0.8)}, False),  # 1.6 chains
        (FEW | {"ess": at([3], 0.4, 0.8)}, True),
        ({"num_chains": 1, "proposals": 1, "ess": np.ones(K)}, True),
    ],
)
def test_thresholds_are_the_documented_ones(change, ok):
    assert diagnose(**HEALTHY | change).ok == ok


@pytest.mark.parametrize(
    ("change", "code", "facts"),
    [
        ({"completed_levels": 5}, Code.INTERRUPTED, "5 of 20"),
        ({"outside": 0.005}, Code.ZERO_DENSITY, "0.50%.*cp.SMC"),
        ({"non_finite": at([3], 40, 0)}, Code.NON_FINITE, "40.0%.*level 3"),
        (
            {"acceptance": at([0, 1, 2, 7], 0.01, 0.6)},
            Code.ACCEPTANCE_COLLAPSED,
            "0.01.*0–2, 7",
        ),
        (
            {"ess": at([19], 0.01, 0.8)},
            Code.WEIGHTS_COLLAPSED,
            r"1\.0 of 100.*level 19",
        ),
        (NOT_VISITED, Code.INTERRUPTED, "level 15"),
        (STUCK, Code.ACCEPTANCE_COLLAPSED, "'mu, sigma'.* 0"),
    ],
)
def test_each_problem_is_named_alone(change, code, facts):
    status = diagnose(**HEALTHY | change)
    assert not status.ok
    assert [kind for kind, _ in status.findings] == [code]
    assert status.code is code
    assert re.search(facts, status.message), status.message
    check_wording(str(status))


IMPOSSIBLE = np.append(np.linspace(-120.0, 0.0, 99), -130.0)


class Case(NamedTuple):
    """A function of a check, arguments for which it finds something, and others."""

    function: Callable[..., list]
    arguments: tuple
    code: Code
    facts: list[str]  # names and numbers of the text
    without: list[tuple]  # arguments for which it finds nothing


FINDINGS = {
    "scores that are not conservative": Case(
        NotConservative().findings,
        ({"f(x)": 0.3, "g(x)": 0.01, "h(x)": 0.11},),
        Code.NOT_CONSERVATIVE,
        ["f(x)", "0.3", "h(x)", "0.11", "0.1"],
        [({"f(x)": 0.09, "g(x)": np.nan},)],  # NaN: could not be measured
    ),
    "weight increments of a single step that differ too much": Case(
        ErraticWeights().findings,
        (at([7], 4e3, 2.5),),
        Code.WEIGHTS_COLLAPSED,
        ["0.00025", "level 7"],
        [(np.full(K, 2.5),), (np.full(K, np.nan),)],
    ),
    # Four numbers of 32 bits tell 64 nats at most, and 128 below the best chain is no
    # place of the posterior.
    "chains where the data are impossible": Case(
        ImpossibleData().findings,
        (IMPOSSIBLE, 4),
        Code.ZERO_DENSITY,
        ["1.00%", "130 nats"],
        [(IMPOSSIBLE, 5), (IMPOSSIBLE[:-1], 4)],
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_findings_where_they_hold_and_none_elsewhere(name):
    finding = FINDINGS[name]
    ((code, text),) = finding.function(*finding.arguments)
    assert code is finding.code
    assert all(fact in text for fact in finding.facts), text
    check_wording(text)
    for arguments in finding.without:
        assert finding.function(*arguments) == []


def test_several_problems_come_gravest_first():
    change = {"acceptance": np.zeros(K), "ess": np.zeros(K), "completed_levels": 10}
    status = diagnose(**HEALTHY | change)
    assert status.code is Code.INTERRUPTED
    assert status.has(Code.ACCEPTANCE_COLLAPSED)
    assert status.has("acceptance_collapsed")
    assert status.has("ACCEPTANCE_COLLAPSED")  # as it is printed
    own = Status((Finding("Own", "s", False),))
    assert own.has("Own")
    assert not status.has("non_finite")
    assert status.has(Code.WEIGHTS_COLLAPSED)
    assert len(str(status).splitlines()) == 3
    later = status.with_findings(Finding(Code.SAMPLES_DIVERGED, "s", True))
    assert [code for code, _ in later.findings[:2]] == [
        Code.INTERRUPTED,
        Code.SAMPLES_DIVERGED,
    ]


def test_the_registry_is_in_the_order_of_gravity_and_says_what_withholds():
    *problems, remark = CHECKS
    gravities = [check.finding("…").gravity for check in problems]
    assert gravities == sorted(gravities)
    assert remark.code == Code.OK
    assert {check.code for check in CHECKS} == set(Code)
    assert all(check.meaning and isinstance(check.withholds, bool) for check in CHECKS)
    given = {check.code for check in CHECKS if not check.withholds}
    assert given == {
        Code.OK,
        Code.NON_FINITE,
        Code.NO_OVERLAP,
        Code.OUT_OF_TRAINING,
        Code.LEVELS_TOO_FEW,
        Code.CHECK_FAILED,
        Code.NOT_SAVED,
    }
    assert all(isinstance(need, Need) for check in CHECKS for need in check.needs)


def test_a_code_of_ones_own_is_less_grave_than_the_librarys():
    own = Finding("my_check", "It holds.", True)
    status = Status((own,)).with_findings(Finding(Code.NOT_SAVED, "…", False))
    assert [finding.code for finding in status.findings] == ["not_saved", "my_check"]
    assert status.withholds
    assert status.has("my_check")
    assert str(status).endswith("MY_CHECK: It holds.")


def test_progress_is_silent_in_a_pipe(capfd):
    with Progress(10, enabled=True, description="sampling") as bar:
        for i in range(10):
            bar.update(i + 1, acceptance=0.5)
    out, err = capfd.readouterr()
    assert out == err == ""


def on_a_terminal(total):
    """A bar as on a terminal of 100 columns, and the buffer that it draws into."""
    from rich.console import Console

    bar = Progress(total, description="sampling")
    buffer = io.StringIO()
    bar._console = Console(file=buffer, force_terminal=True, width=100)
    bar._kind = "terminal"
    return bar, buffer


def test_progress_shows_levels_facts_and_compiling_before_the_first_level():
    bar, buffer = on_a_terminal(10)
    with bar:
        for text in ("compiling a level of SMC with MALA", "compiling HMC at level 0"):
            bar.doing(text)
            # It is not held back until the next refresh is due.
            assert text in buffer.getvalue()
        for i in range(10):
            bar.update(i + 1, acceptance=np.float32(0.5))
    assert "sampling" in buffer.getvalue()
    # The last update is drawn although it came within the refresh interval.
    assert "10/10" in buffer.getvalue()
    assert "acceptance 0.5" in buffer.getvalue()


def test_progress_in_a_notebook_is_one_bar_that_moves(monkeypatch):
    pytest.importorskip("IPython")
    shown = []
    handle = SimpleNamespace(update=lambda page, raw: shown.append(page))
    monkeypatch.setattr(
        "IPython.display.display",
        lambda page, raw, display_id: shown.append(page) or handle,
    )
    bar = Progress(10, description="a < b")
    bar._kind = "notebook"
    with bar:
        bar.update(10, acceptance=np.float32(0.5))
    first = re.search(r"<progress value='(\d+)' max='10'", shown[0]["text/html"])
    assert first[1] == "0"
    assert "<progress value='10' max='10'" in shown[-1]["text/html"]
    assert "a &lt; b" in shown[-1]["text/html"]
    assert "10/10 · acceptance 0.5" in shown[-1]["text/html"]
    assert "a < b" in shown[-1]["text/plain"]


def test_progress_is_throttled_and_facts_are_lazy():
    class Fact:
        reads = 0

        def __float__(self):
            Fact.reads += 1
            return 0.5

    updates = 20_000
    bar, _ = on_a_terminal(updates)
    with bar:
        started = time.perf_counter()
        for i in range(updates):
            bar.update(i + 1, acceptance=Fact())
        seconds = time.perf_counter() - started
    assert Fact.reads <= 2 + seconds / 0.2
    # A level of the quickest run takes a hundred times as long.
    assert seconds / updates < 1e-4


def test_progress_survives_an_exception():
    bar, _ = on_a_terminal(3)

    def interrupted():
        with bar:
            bar.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_samples_that_the_noisiest_level_cannot_hide_have_diverged():
    x = np.random.default_rng(0).standard_normal((1000, 4))
    alpha, sigma = 0.01, 1.0  # hides what is smaller than 100
    assert SamplesDiverged().findings({"x": 20 * x}, alpha, sigma) == []
    one = np.array(x)
    one[3] = 1e5
    some = np.array(x)
    some[:20] = 150.0
    for bad, size in (
        (one, "1e+05"),
        (some, "150"),
        (1e13 * x, "e+13"),
        (np.where(x > 3, np.nan, x), "inf"),
    ):
        ((code, text),) = SamplesDiverged().findings({"x": bad}, alpha, sigma)
        assert code == "samples_diverged"
        assert size in text
        assert "100" in text
        check_wording(text)
    # Five of a thousand that are far may be the tail of a distribution.
    some[5:20] = 0.0
    assert SamplesDiverged().findings({"x": some}, alpha, sigma) == []


def test_reverse_steps_alone_lose_half_the_distance_of_levels():
    @cp.program
    def program(f):
        cp.sample("x", f)

    factor = cp.Analytic(dist.Normal(0.0, 1.0), cp.Schedule.log_snr(40, -9.0, 11.0))
    density = cp.compile(program, factor)
    key = jax.random.key(0)
    options = {"sampler": cp.Ancestral(), "progress": False}
    few = cp.infer(density, key, num_chains=16, **options)
    assert few.status.ok
    assert few.trust.narrowing == pytest.approx(0.22, abs=0.01)
    many = cp.infer(density, key, num_chains=2000, **options)
    lost = 1 - float(np.var(many["x"]))
    assert abs(lost - many.trust.narrowing) < 4 * np.sqrt(2 / 2000)
    assert "lose 22%" in check_finding(many.status, Code.LEVELS_TOO_FEW)
    assert many.status.withholds
    ddim = cp.infer(density, key, num_chains=16, sampler=cp.Ancestral(0.0))
    assert ddim.trust.narrowing == pytest.approx(0.12, abs=0.01)
    assert cp.infer(density, key, num_chains=16).trust.narrowing == 0
