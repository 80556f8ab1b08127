"""Networks are in the compiled loop once, no array of it changes its type, few frames
lead to them, and they are evaluated as often as the result says."""

import traceback

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.kernels import langevin
from composeprob.results import support
from composeprob.samplers import weights
from composeprob.samplers.run import Pace, begin, placed
from composeprob.samplers.spread import Spread
from sampling_cases import (
    Calls,
    Counted,
    equations,
    learned,
    single,
    slow,
    squared,
    unit_energy,
)

SCHEDULE = cp.Schedule.log_snr(12)


@cp.program
def with_latents(f, anneal):
    x = cp.sample("x", f)
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    cp.observe("y", dist.Normal(x[0] + m, 1.0), 0.3, anneal=anneal)


ENERGIES = {
    "SMC": cp.SMC(check_levels=False),
    "SMC, order 1": cp.SMC(step=cp.ReverseStep(order=1), check_levels=False),
    "SMC, density": cp.SMC(cp.MALA(0.01), weights="density"),
    "MALA": cp.AnnealedMCMC(cp.MALA(0.01), 2),
    "MALA, reverse": cp.AnnealedMCMC(cp.MALA(cp.Adaptive()), 2, reverse_step=True),
    "HMC": cp.AnnealedMCMC(cp.HMC(0.01, num_leapfrog=3), 2, reverse_step=True),
    "Ancestral": cp.Ancestral(),
    "line integral": cp.AnnealedMCMC(
        cp.MALA(0.01, log_ratio=cp.LineIntegral(3)), 2, reverse_step=True
    ),
    "HMC, warm-up": cp.AnnealedMCMC(cp.HMC(cp.Adaptive(warmup=2), num_leapfrog=3), 1),
    "SMC, 2 steps": cp.SMC(cp.MALA(cp.Adaptive()), 2, check_levels=False),
    "replicas": cp.ReplicaExchange(
        cp.HMC(0.01, num_leapfrog=2), num_levels=3, sweeps=8
    ),
    "replicas, feynman_kac": cp.ReplicaExchange(
        cp.MALA(), num_levels=3, swap="feynman_kac", sweeps=8
    ),
}
SCORES = {
    "Ancestral, scores": cp.Ancestral(),
    "ULA, scores": cp.AnnealedMCMC(cp.ULA(0.01), 2, reverse_step=True),
    "UHMC, scores": cp.AnnealedMCMC(cp.UHMC(0.01, num_leapfrog=3), 2),
    "SMC, scores": cp.SMC(check_levels=False),
    "SMC, scores, order 1": cp.SMC(step=cp.ReverseStep(order=1), check_levels=False),
    "SMC, tracked": cp.SMC(
        cp.MALA(0.01, log_ratio=cp.LineIntegral(3)), check_levels=False
    ),
}
BLOCKS = {
    "SMC, latents": cp.SMC(check_levels=False),
    "SMC, tempered": cp.SMC(check_levels=False),
    "SMC, denoised": cp.SMC(check_levels=False),
    "Gibbs": cp.AnnealedMCMC(
        cp.Gibbs({"x": cp.MALA(0.01), "m": cp.HMC(0.1, num_leapfrog=2)}),
        2,
        reverse_step=True,
    ),
}


OPAQUE = {
    "BlackJAX": cp.AnnealedMCMC(cp.BlackJAX(blackjax.mala, 0.01), 2, reverse_step=True)
}


def counted(name):
    """Return a sampler, a density, and the counter of its network's calls."""
    calls = Calls()

    def network(x, t):
        calls()
        return x * t / jnp.sqrt(1 + t**2) if name in SCORES else unit_energy(x, t)

    form = "epsilon" if name in SCORES else "energy"
    factor = learned(network, form, SCHEDULE, time="sigma", label="counted")
    if name == "SMC, density":
        factor = cp.Energy(Counted(calls), SCHEDULE, event_shape=(2,))
    sampler = {**ENERGIES, **SCORES, **BLOCKS, **OPAQUE}[name]
    if name not in BLOCKS:
        program = squared if name == "SMC, tracked" else single
        return sampler, cp.compile(program, factor), calls
    policy = None
    if name in ("SMC, tempered", "SMC, denoised"):
        policy = name.removeprefix("SMC, ")
    return sampler, cp.compile(with_latents, factor, policy), calls


def places(jaxpr):
    """Return the number of loops around every call of the counter in a traced
    function."""
    return [
        loops
        for equation, loops in equations(jaxpr)
        if equation.primitive.name == "debug_callback"
    ]


PLACES = [
    "SMC",
    "SMC, density",
    "MALA, reverse",
    "Ancestral",
    "line integral",
    "HMC, warm-up",
    "replicas, feynman_kac",
    "SMC, scores",
    "SMC, tracked",
    "SMC, latents",
    "Gibbs",
    "BlackJAX",
]
"""Samplers whose loops differ by more than a number, or the kernel's loop."""
SLOW_PLACES = ["SMC, order 1", "HMC", "replicas"]


def types(run):
    """Return the type of every array in it, weakness included."""
    return jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), run)


def traced(name, pace=None):
    """Return the number of loops around each place where a network is evaluated: at the
    start, on the way down, and for a draw, of samplers that move.

    Every array is of one type before and after, so that a stretch is compiled once.
    """
    sampler, density, _ = counted(name)
    sampler = sampler.prepare(density)
    first = sampler.first_level(density)
    blank = placed(
        begin(jax.random.key(0), 4, sampler.visits(density, pace)),
        Spread.checked(None, None, 4),
    )

    def start(run):
        return sampler.start(run, density, first)

    def advance(run):
        return sampler.advance(run, density, jnp.int32(2))

    def draw(run):
        return sampler.draw(run, density, jnp.int32(0), jnp.int32(1))

    jaxpr, run = jax.make_jaxpr(start, return_shape=True)(blank)
    loops = [places(jaxpr.jaxpr)]
    stretches = [advance] if sampler.moves is None else [advance, draw]
    for stretch in stretches:
        jaxpr, after = jax.make_jaxpr(stretch, return_shape=True)(run)
        loops.append(places(jaxpr.jaxpr))
        assert types(after) == types(run)
    return loops


@pytest.mark.parametrize(
    ("name", "pace"),
    [
        *((name, None) for name in PLACES),
        *(slow(name, None) for name in SLOW_PLACES),
        ("SMC", Pace.default(8)),
        ("SMC, scores", Pace.default(8)),
    ],
)
def test_a_loop_has_the_network_once(name, pace):
    """It serves the step to a level, its correction and the moves there: compile time
    grows with every copy. A kernel that calls the density itself has further places,
    which shows that places are counted."""
    start, *stretches = traced(name, pace)
    assert start == []
    if name in OPAQUE:
        down, draw = stretches
        assert len(down) == 1 + len(draw) > 1
    else:
        assert all(len(loops) == 1 and loops[0] >= 1 for loops in stretches)


@pytest.mark.parametrize("name", [slow("SMC, tempered"), "SMC, denoised"])
def test_likelihoods_change_no_types(name):
    traced(name)


@pytest.mark.parametrize("name", ["MALA", "SMC", "SMC, scores"])
def test_starting_chains_evaluates_nothing(name):
    """So the networks are compiled once, in the loop over levels, which fills in what
    kernels cache."""
    sampler, density, calls = counted(name)
    sampler = sampler.prepare(density)
    blank = begin(jax.random.key(0), 2, sampler.visits(density, None))
    first = sampler.first_level(density)
    calls.reset()
    run = jax.jit(lambda run: sampler.start(run, density, first))(blank)
    assert calls.run == 0
    assert np.isfinite(run.chains.position).all()
    assert np.isnan(run.chains.evaluation.score).all()
    # Only weights read the density terms.
    assert (run.chains.evaluation.terms is None) == (name == "MALA")


STATED = {
    "Ancestral, scores": (0, 1),
    "ULA, scores": (3, 1),
    "UHMC, scores": (7, 0),
    "MALA": (3, 0),
    "MALA, reverse": (3, 1),
    "HMC": (7, 1),
    "HMC, warm-up": (10, 0),
    "SMC, 2 steps": (3, 1),
    "SMC, scores": (1, 1),
    "SMC, scores, order 1": (1, 0),
    "SMC, density": (2, 0),
}
"""Evaluations at a level, and further ones of a step from level to level."""
QUICK = ("SMC", "replicas", "Gibbs", "BlackJAX", "HMC, warm-up", "SMC, density")
"""Rows whose counts differ in kind: kernels/test_transitions.py has the cost of a line
integral."""
OTHERS = (*STATED, "line integral", "replicas, feynman_kac", "SMC, latents")
SLOW = [slow(name) for name in OTHERS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_evaluations_are_what_the_result_says(name, monkeypatch):
    """Barriers between chains are a question of the status, which is not counted."""
    monkeypatch.setattr(support, "_separated", lambda chains, unsupported: "")
    sampler, density, calls = counted(name)
    calls.reset()
    result = cp.infer(
        density, jax.random.key(0), num_chains=4, sampler=sampler, progress=False
    )
    replicas = sampler.num_levels if isinstance(sampler, cp.ReplicaExchange) else 1
    # A call serves all chains at once, and all of their replicas.
    assert replicas * calls.run == result.evaluations > 0
    assert result.about.blocks == (("x", "m") if name in BLOCKS else ())
    if name in STATED:
        at, between = STATED[name]
        levels = sampler.first_level(density) + 1
        assert result.evaluations == at * levels + between * (levels - 1)


# ── frames ────────────────────────────────────────────────────────────────────────────

stacks: dict[str, list[tuple[str, str]]] = {}


class Traced(Exception):
    """All is noted: compiling and running are not needed."""


def noted(name: str) -> None:
    """Keep the library's frames of a function's first call inside of the loop over
    levels."""
    frames = []
    for frame in traceback.extract_stack()[:-2]:
        file = frame.filename.split("/composeprob/")[-1]
        if file.startswith(("runtime/", "samplers/", "kernels/")):
            frames.append((file, frame.name))
    if ("samplers/descent.py", "phase") in frames:
        stacks.setdefault(name, frames)
    if len(stacks) == 3:
        raise Traced


class Bowl(eqx.Module):
    def __call__(self, x, t):
        noted("score")
        return 0.5 * jnp.sum(x**2)


def test_few_frames_lie_between_a_call_and_its_accept_test_or_weight(monkeypatch):
    def watched(module, name, label):
        function = getattr(module, name)

        def call(*args, **kwargs):
            noted(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watched(langevin, "metropolis", "accept")
    watched(weights, "incremental_log_weight", "weight")
    density = cp.compile(squared, learned(Bowl(), "energy", SCHEDULE, time="level"))
    with pytest.raises(Traced):
        cp.infer(density, jax.random.key(0), num_chains=256, progress=False)

    begin = stacks["accept"].index(("runtime/infer.py", "infer")) + 1
    accept = [*stacks["accept"][begin:], ("kernels/metropolis.py", "metropolis")]
    assert len(accept) <= 12, accept

    def from_phase(name):
        phase = stacks[name].index(("samplers/descent.py", "phase"))
        return stacks[name][phase:]

    weight = [*from_phase("weight"), ("samplers/weights.py", "incremental_log_weight")]
    path = [*from_phase("score")[1:], *weight]
    files = {file for file, _ in path}
    assert len(path) <= 14, path
    assert len(files) <= 7, sorted(files)
